"""Step 2: every node says how the axes it touches relate; together they are the dependency graph."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import onnxprune.rules  # noqa: F401  (registers the rules)
from onnxprune.folding import attributes
from onnxprune.importer import Model, load
from onnxprune.relations import Axis, Concat, Fixed, Mend, Product, Relation, Reorder, Same, Site, Statistics, rule_of
from onnxprune.scopes import captured, flat, flow, subgraphs, taken
from onnxprune.shuffles import Shuffle

if TYPE_CHECKING:
    import networkx as nx
    from onnx import ModelProto


@dataclass(frozen=True)
class Dependencies:
    """All relations between the axes of a model's values, and what has to be mended where an axis shrinks.

    sizes: of the axes that only rules know (parts and factors), by name.
    """

    relations: list[Relation]
    mends: list[Mend | Reorder]
    sizes: dict[str, int]


def relate(model: Model, allow_io: Sequence[str] = (), shuffles: Sequence[Shuffle] = ()) -> Dependencies:
    """Ask the rule of every node; what no rule speaks of is fixed.  shuffles: chains that are read as one Gather each."""
    relations: list[Relation] = []
    mends: list[Mend | Reorder] = []
    sizes: dict[str, int] = {}
    idle = _idle(model)
    ends = {shuffle.nodes[-1]: shuffle for shuffle in shuffles}
    inner = {i for shuffle in shuffles for i in shuffle.nodes} - set(ends)
    for index, node in enumerate(model.nodes):
        if index in inner:
            _fix(relations, model, node.input[1:], "sizes of a Reshape")
            continue
        if node.op_type == "Constant":
            if node.output[0] not in model.tensors:
                _fix(relations, model, node.output, "a constant without a tensor")
            continue
        rule = rule_of(node)
        opset = model.opsets.get(node.domain or "ai.onnx", 1)
        bodies = flow(node, opset) is not None
        inside = [v.name for g in subgraphs(node) for v in (*g.input, *g.output)] if bodies else sorted(captured(node))
        site = Site(index, node, opset, model.shapes, model.folded, inside)
        unknown = [n for n in (*node.input, *node.output) if n and n not in model.shapes]
        if index in ends:
            _reorder(site, ends[index])
        elif rule is None or (inside and not bodies):
            site.fixed([a for axes in (*site.x, *site.y) for a in axes], f"no rule for operator {node.op_type}")
            site.fixed(site.outside, f"read inside {node.op_type}")
        elif not bodies and ((node.input and node.input[0] in unknown) or node.output[0] in unknown):
            if any(o in idle for o in node.output):
                continue  # what never runs may not even have a shape
            site.fixed([a for axes in (*site.x, *site.y) for a in axes], "its shape is unknown")
        else:
            try:
                rule(site)
            except (IndexError, KeyError, ValueError, TypeError, ZeroDivisionError, AttributeError):
                # a node that does not follow its specification: nothing of it may change
                site.relations, site.mends = [], []
                site.fixed([a for axes in (*site.x, *site.y, site.outside) for a in axes], f"{node.op_type} with odd inputs")
        said = site.mentioned()
        for axes in (*site.x, site.outside) if index not in ends else ():
            forgotten = [a for a in axes if a not in said and site.size(a) != 1]
            site.fixed(forgotten, f"the rule of {node.op_type} leaves it")
        if any(a not in said and site.size(a) != 1 for axes in site.y for a in axes):  # then it does not know what the node does
            everything = [a for axes in (*site.x, *site.y) for a in axes]
            site.fixed(everything, f"the rule of {node.op_type} leaves out an axis of its result")
        relations += site.relations
        mends += site.mends
        sizes |= site.sizes
    _fix(relations, model, sorted(model.ambiguous & set(model.tensors)), "its name is not unique in the file")
    for kind, names in (("input", model.inputs), ("output", model.outputs)):
        for name in names:
            if not any(fnmatch.fnmatch(name, pattern) for pattern in allow_io):
                _fix(relations, model, [name], f"graph {kind} '{name}'")
    return Dependencies(relations, mends, sizes)


def _idle(model: Model) -> set[str]:
    """What is made in branches that no input takes."""
    found: set[str] = set()
    for node in model.nodes:
        if node.op_type == "If" and (branch := taken(node, model.folded)) is not None:
            other = attributes(node)["then_branch" if branch else "else_branch"]
            found |= {o for one in flat(other.node, model.opsets.get("ai.onnx", 1)) for o in one.output}
    return found


def _reorder(site: Site, shuffle: Shuffle) -> None:
    site.fixed([axis for axes in site.x[1:] for axis in axes], "sizes of a Reshape")
    x, y = site.axes(shuffle.source), site.axes(shuffle.result)
    site.same_all(x[: shuffle.axis], y[: shuffle.axis])
    site.same_all(x[shuffle.axis + 1 :], y[shuffle.axis + 1 :])
    site.take(x[shuffle.axis], y[shuffle.axis], shuffle.order)
    site.mends.append(Reorder(site.index, tuple(x), tuple(y), shuffle.axis, shuffle.order))


def _fix(relations: list[Relation], model: Model, names: Sequence[str], reason: str) -> None:
    relations.extend(Fixed((n, i), reason) for n in names for i in range(len(model.shapes.get(n, ()))))


def dependency_graph(
    model: str | os.PathLike[str] | ModelProto | Model,
    feeds: Mapping[str, np.ndarray] | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> nx.MultiDiGraph:
    """The axes of every value as nodes "value:axis" and their relations as edges, ready for networkx's exports.

    Nodes have `size`, and where they apply `fixed` (the reason) and `statistics`; edges have `relation` (same, concat or
    product) and, from whole to part, `position`.

    >>> graph = dependency_graph("model.onnx")                      # doctest: +SKIP
    >>> networkx.write_graphml(graph, "model.graphml")              # doctest: +SKIP
    """
    loaded = model if isinstance(model, Model) else load(model, feeds, input_shapes)
    return axis_graph(loaded, relate(loaded))


def axis_graph(model: Model, found: Dependencies) -> nx.MultiDiGraph:
    """The relations that were found, as the graph that `dependency_graph` describes."""
    import networkx as nx

    graph = nx.MultiDiGraph()
    for name, shape in model.shapes.items():
        graph.add_nodes_from((f"{name}:{i}", {"size": int(size)}) for i, size in enumerate(shape))
    graph.add_nodes_from((f"{name}:0", {"size": size}) for name, size in found.sizes.items())
    for relation in found.relations:
        match relation:
            case Same(a, b):
                graph.add_edge(axis_label(a), axis_label(b), relation="same")
            case Concat(whole, parts):
                for i, part in enumerate(parts):
                    graph.add_edge(axis_label(whole), axis_label(part), relation="concat", position=i)
            case Product(left, right) if left != right:
                for i, one in enumerate(left):
                    for j, other in enumerate(right):
                        graph.add_edge(axis_label(one), axis_label(other), relation="product", position=i + j)
            case Fixed(axis, reason):
                graph.add_node(axis_label(axis), fixed=reason)
            case Statistics(axis):
                graph.add_node(axis_label(axis), statistics=True)
    return graph


def axis_label(axis: Axis) -> str:
    """An axis as a node of the graph: "value:axis"."""
    return f"{axis[0]}:{axis[1]}"

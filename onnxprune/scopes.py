"""Subgraphs: how a control flow node's values are those of its bodies, and one name for each value of a model.

With unique names the nodes of all bodies stand in one list with those of the main graph, and what is said of a value is
said wherever it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnxprune.folding import Folded, attributes


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node's attributes hold."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def captured(node: NodeProto) -> set[str]:
    """Names that a node's subgraphs may take from outside."""
    names: set[str] = set()
    for graph in subgraphs(node):
        own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
        for inner in graph.node:
            names |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        names |= {v.name for v in graph.output}
        names -= own
    return names - {""}


@dataclass(frozen=True)
class Flow:
    """Which values of a control flow node and of its bodies are one.

    carried: (initial value, body input, body output, last value) of Loop's and Scan's states; sliced: (value, body input,
    axis) where an iteration sees one index of the axis; stacked: (value, body output, axis) where each iteration adds one
    index; chosen: (value, the branches' outputs).  counted: Loop's iteration number and condition in its body.
    """

    carried: tuple[tuple[str, str, str, str], ...] = ()
    sliced: tuple[tuple[str, str, int], ...] = ()
    stacked: tuple[tuple[str, str, int], ...] = ()
    chosen: tuple[tuple[str, tuple[str, ...]], ...] = ()
    counted: tuple[str, ...] = ()


def flow(node: NodeProto, opset: int) -> Flow | None:
    """None for an operator whose subgraphs are not understood: custom ones, sequences, Scan before opset 9, odd numbers of values."""
    if node.op_type not in ("If", "Loop", "Scan") or node.domain not in ("", "ai.onnx") or (node.op_type == "Scan" and opset < 9):
        return None
    given = attributes(node)
    try:
        if node.op_type == "If":
            branches = [[v.name for v in given[key].output] for key in ("then_branch", "else_branch")]
            return Flow(chosen=tuple((out, names) for out, *names in _zip(node.output, *branches)))
        if node.op_type == "Loop":
            starts, scanned = list(node.input)[2:], []
        else:
            many = len(node.input) - int(given["num_scan_inputs"])
            starts, scanned = list(node.input)[:many], list(node.input)[many:]
        ins, outs, ends = ([*(v.name for v in given["body"].input)], [*(v.name for v in given["body"].output)], [*node.output])
        counted: tuple[str, ...] = ()
        if node.op_type == "Loop":
            counted = (ins.pop(0), ins.pop(0))
            del outs[0]
        many = len(starts)
        axes = [given.get(key) or [0] * n for key, n in (("scan_input_axes", len(scanned)), ("scan_output_axes", len(outs) - many))]
        return Flow(
            carried=_zip(starts, ins[:many], outs[:many], ends[:many]),
            sliced=_zip(scanned, ins[many:], axes[0]),
            stacked=_zip(ends[many:], outs[many:], axes[1]),
            counted=counted,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _zip(*lists: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(zip(*lists, strict=True))


def taken(node: NodeProto, folded: Mapping[str, Folded]) -> int | None:
    """The branch (0 then, 1 else) that an If takes for all inputs; None where it depends on them."""
    condition = folded.get(node.input[0])
    if node.op_type != "If" or condition is None or condition.dynamic.any() or condition.number.size != 1:
        return None
    return 0 if condition.number.ravel()[0] else 1


def trips(
    node: NodeProto,
    links: Flow,
    shapes: Mapping[str, Sequence[int | None]],
    folded: Mapping[str, Folded],
    makers: Mapping[str, NodeProto],
) -> int | None:
    """How often a Loop or Scan runs its body; None where that depends on data."""
    for value, _, axis in (*links.sliced, *links.stacked):
        shape = shapes.get(value, ())
        if -len(shape) <= axis < len(shape) and shape[axis] is not None:
            return shape[axis]
    if node.op_type != "Loop" or not node.input[0] or node.input[0] not in folded:
        return None
    goes_on = next(graph.output[0].name for graph in subgraphs(node))
    while goes_on in makers and makers[goes_on].op_type in ("Identity", "Cast"):
        goes_on = makers[goes_on].input[0]
    for condition in (node.input[1], goes_on):
        always = folded.get(condition)
        if condition not in ("", links.counted[1]) and (always is None or not always.number.all()):
            return None
    return int(folded[node.input[0]].number.ravel()[0])


def flat(nodes: Sequence[NodeProto], opset: int) -> Iterator[NodeProto]:
    """The nodes and those of their bodies, each body before its node, where `flow` understands it."""
    for node in nodes:
        if flow(node, opset) is not None:
            for graph in subgraphs(node):
                yield from flat(graph.node, opset)
        yield node


def open_graphs(graph: GraphProto, opset: int) -> Iterator[GraphProto]:
    """A graph and the bodies in it that `flow` understands."""
    yield graph
    for node in graph.node:
        if flow(node, opset) is not None:
            for body in subgraphs(node):
                yield from open_graphs(body, opset)


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from all_graphs(body)


def _tensors(graph: GraphProto) -> list[str]:
    """Names of a graph's own initializers and Constants."""
    return [t.name for t in graph.initializer] + [o for n in graph.node if n.op_type == "Constant" for o in n.output]


def declared(graph: GraphProto) -> set[str]:
    """Names of a graph's own values."""
    names = {v.name for v in graph.input} | {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return (names | {o for n in graph.node for o in n.output}) - {""}


def unique_names(proto: ModelProto) -> tuple[ModelProto, frozenset[str]]:
    """A model in which no two values have one name, and the tensors that the file's own names do not identify.

    Subgraphs may name their values as others do; those are renamed in a copy, the main graph's never.
    """
    graphs = list(all_graphs(proto.graph))
    if len(graphs) == 1:
        return proto, frozenset()
    stored = Counter(name for graph in graphs for name in _tensors(graph))
    ambiguous = {name for name, times in stored.items() if times > 1}
    made = [declared(graph) for graph in graphs]
    known = set().union(*made)
    if sum(map(len, made)) == len(known):
        return proto, frozenset(ambiguous)
    single = {name for name, times in stored.items() if times == 1}
    used = set(made[0])
    copy = ModelProto()
    copy.CopyFrom(proto)

    def rename(graph: GraphProto, scope: dict[str, str]) -> None:
        for values in (graph.input, graph.output, graph.value_info, graph.initializer):
            for value in values:
                value.name = scope.get(value.name, value.name)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [scope.get(name, name) for name in names]
            for body in subgraphs(node):
                rename(body, scope | own_names(body))

    def own_names(graph: GraphProto) -> dict[str, str]:
        tensors, own = set(_tensors(graph)), {}
        for name in sorted(declared(graph)):
            own[name] = name
            if name in used or (name in single and name not in tensors):  # a name that is a tensor's alone stays the tensor's
                own[name] = next(f"{name}@{k}" for k in count(1) if f"{name}@{k}" not in known)
                known.add(own[name])
                ambiguous.update({own[name]} if name in tensors else ())
            used.add(own[name])
        return own

    rename(copy.graph, {})
    return copy, frozenset(ambiguous)

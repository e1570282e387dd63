"""Which groups an option's globs speak of."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence

from onnx import NodeProto

from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.grouping import Grouping
from onnxprune.importer import Model
from onnxprune.linear import RECURRENT
from onnxprune.scopes import all_graphs, subgraphs


def may_go(
    grouping: Grouping, scope: Sequence[str], exclude: Sequence[str], ratios: Mapping[str, float]
) -> tuple[set[int], dict[int, float]]:
    """The groups to choose from, and the share of units that the user gave for some of them.

    Raises OnnxPruneError for a glob that matches nothing in the model, and for a ratio that is none.
    """
    names = _names(grouping) if scope or exclude or ratios else {}
    chosen = {g.id for g in grouping.groups}
    if scope:
        chosen &= _matching(names, scope, "--scope", grouping.model)
    if exclude:
        chosen -= _matching(names, exclude, "--exclude", grouping.model)
    shares: dict[int, float] = {}
    for pattern, share in ratios.items():
        if not 0 <= share < 1:
            raise OnnxPruneError(f"--layer-ratio {pattern}={share}: a ratio is at least 0 and below 1")
        found = _matching(names, [pattern], "--layer-ratio", grouping.model)
        made = found & _matching(_names(grouping, _summed(grouping.model)), [pattern], "--layer-ratio", grouping.model)
        shares |= dict.fromkeys((made or found) & chosen, share)
    return chosen, shares


SAME = ("Identity", "Cast", "DequantizeLinear")


def _summed(model: Model) -> set[tuple[str, int]]:
    """The axes of weights along which layers sum over what others make: no units of their own."""
    maker = {out: node for node in model.nodes for out in node.output}
    found = set()
    for node in model.nodes:
        for position, name in enumerate(node.input[:2]):
            axis, turned = _sums_along(node, position), list[Sequence[int]]()
            while name in maker and maker[name].op_type in (*SAME, "Transpose"):
                if maker[name].op_type == "Transpose":
                    turned.append(attributes(maker[name]).get("perm", ()))
                name = maker[name].input[0]
            name = model.copies.get(name, name)
            if axis is None or name not in model.tensors or len(model.tensors[name].dims) < 2:
                continue
            axis %= len(model.tensors[name].dims)
            for order in turned:
                axis = order[axis] if order else len(model.tensors[name].dims) - 1 - axis
            found.add((name, axis))
    return found


def _sums_along(node: NodeProto, position: int) -> int | None:
    """The axis of a weight at this input along which a layer sums over what it reads; None of anything else."""
    given = attributes(node)
    if node.op_type == "MatMul":
        return -1 if position == 0 else -2
    if node.op_type == "Gemm":
        return (0 if given.get("transA", 0) else 1) if position == 0 else (1 if given.get("transB", 0) else 0)
    return {"Conv": 1, "ConvTranspose": 0, **dict.fromkeys(RECURRENT, 2)}.get(node.op_type) if position == 1 else None


def matched(grouping: Grouping, patterns: Sequence[str], option: str) -> dict[str, set[int]]:
    """For each glob the groups that it matches; raises OnnxPruneError for one that matches nothing in the model."""
    names = _names(grouping) if patterns else {}
    return {pattern: _matching(names, [pattern], option, grouping.model) for pattern in patterns}


def _names(grouping: Grouping, but: Collection[tuple[str, int]] = ()) -> dict[int, set[str]]:
    """For each group its tensors (`but` at these axes) and the nodes that read those; for a residual branch all in it, its Add too."""
    readers: dict[str, set[str]] = {}
    for node in grouping.model.nodes:
        bodies = (one for graph in subgraphs(node) for part in all_graphs(graph) for one in part.node)
        for name in (*node.input, *(name for one in bodies for name in one.input)):  # a Loop reads what its body reads
            readers.setdefault(name, set()).update({node.name, *node.output} - {""})
    tensors = {g.id: {m.tensor for m in g.members if (m.tensor, m.axis) not in but} for g in grouping.groups}
    names = {g: set().union(*({name} | readers.get(name, set()) for name in own)) for g, own in tensors.items()}
    for branch, own in ((g.branch, names[g.id]) for g in grouping.groups if g.branch is not None):
        inside = branch.dead | {branch.output}
        own |= inside | {n.name for n in grouping.model.nodes if inside.intersection(n.output)} - {""}
    return names


def _matching(names: Mapping[int, set[str]], patterns: Sequence[str], option: str, model: Model) -> set[int]:
    """The groups that a glob matches; a glob that matches nothing in the model is the user's mistake."""
    known = {*model.tensors, *(n.name for n in model.nodes), *(o for n in model.nodes for o in n.output)}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
            raise OnnxPruneError(f"{option} '{pattern}': no node or tensor of {model.name} has such a name; see `onnxprune groups`")
    return {g for g, own in names.items() if any(fnmatch.fnmatchcase(name, p) for name in own for p in patterns)}

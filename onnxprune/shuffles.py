"""Channel shuffles: Reshape, Transpose, Reshape that only puts one axis into another order.

Read axis by axis, such a chain ties channels into a grid, and a grid that meets other grids and concats ties more and more of
them.  Read as one Gather it ties nothing; where channels go, it is written as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxprune.folding import attributes
from onnxprune.importer import Model
from onnxprune.scopes import captured, subgraphs

Shape = tuple[int, ...]
OPEN = 2**31 - 1  # a prime, so that it is no factor of sizes: an axis of one index that has more at other input sizes


@dataclass(frozen=True)
class Shuffle:
    """result[…, i, …] is source[…, order[i], …] along an axis; nodes: the positions of the chain's nodes."""

    source: str
    result: str
    axis: int
    order: np.ndarray
    nodes: tuple[int, ...]


def find_shuffles(model: Model) -> list[Shuffle]:
    """The chains of a model whose inner values nothing else reads."""
    makers = {o: i for i, n in enumerate(model.nodes) for o in n.output if o}
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(model.nodes):
        for name in {*node.input, *captured(node)}:
            readers.setdefault(name, []).append(i)
    given = {*model.outputs, *(v.name for node in model.nodes for graph in subgraphs(node) for v in graph.output)}
    found = []
    for middle, node in enumerate(model.nodes):
        if node.op_type != "Transpose" or node.input[0] not in makers:
            continue
        first, after = makers[node.input[0]], readers.get(node.output[0], [])
        inner = {node.input[0], node.output[0]}
        alone = len(after) == 1 and readers[node.input[0]] == [middle] and not inner & given
        if alone and model.nodes[first].op_type == model.nodes[after[0]].op_type == "Reshape":
            shuffle = _shuffle(model, (first, middle, after[0]))
            found += [shuffle] if shuffle is not None else []
    return found


def _shuffle(model: Model, chain: tuple[int, int, int]) -> Shuffle | None:
    split, swap, merge = (model.nodes[i] for i in chain)
    names = split.input[0], split.output[0], merge.output[0]
    if merge.input[0] != swap.output[0] or any(n not in model.shapes for n in names):
        return None
    same = model.unchanging(names[0])
    before = tuple(size if size != 1 or fixed else OPEN for size, fixed in zip(model.shapes[names[0]], same, strict=True))
    between, after = (_opened(model, node, before) for node in (split, merge))
    runs = _runs(before, between)
    cut = [run for run in runs or () if len(run[1]) > 1]
    if before != after or runs is None or len(cut) != 1:
        return None
    axis, factors = cut[0]
    perm = list(attributes(swap).get("perm", range(len(between))[::-1]))
    whole = {inner[0]: i for i, inner in runs if len(inner) == 1}
    if not _follows(model, split, {i: (a, a) for i, a in whole.items()}, same):
        return None
    if not _follows(model, merge, {a: (perm.index(i), a) for i, a in whole.items()}, same):
        return None
    order = [i for i in perm if between[i] != 1]
    start = min(order.index(i) for i in factors)
    moved = order[start : start + len(factors)]
    unmoved = [*order[:start], *factors, *order[start + len(factors) :]]
    if moved == list(factors) or set(moved) != set(factors) or unmoved != sorted(order):
        return None
    grid = np.arange(before[axis]).reshape([between[i] for i in factors])
    return Shuffle(names[0], names[2], axis, grid.transpose([factors.index(i) for i in moved]).ravel(), chain)


def _opened(model: Model, reshape: NodeProto, source: Shape) -> Shape:
    """The shape of a Reshape's result, with OPEN for every 1 that is another size at other input sizes."""
    shape = model.shapes[reshape.output[0]]
    target = model.folded.get(reshape.input[1]) if len(reshape.input) > 1 else None
    if model.static is None or target is None or target.number.size != len(shape):
        return shape
    entries, dynamic = np.ravel(target.number), np.ravel(target.dynamic)
    copied = [entry == 0 and source[i : i + 1] == (OPEN,) for i, entry in enumerate(entries)]
    grows = [bool(dynamic[i] or entry == -1 or copied[i]) for i, entry in enumerate(entries)]
    return tuple(OPEN if size == 1 and grows[i] else size for i, size in enumerate(shape))


def _follows(model: Model, reshape: NodeProto, whole: Mapping[int, tuple[int, int]], same: Sequence[bool]) -> bool:
    """Whether a Reshape gives the axes that are neither cut nor merged their own sizes, for all inputs.

    whole: {axis of the result: the same axis of the Reshape's input, and of the chain's}; same: which of the chain's never change.
    """
    if len(reshape.input) < 2:
        return model.static is None
    target = model.folded.get(reshape.input[1])
    if target is None:
        return False
    entries, dynamic = np.ravel(target.number), np.ravel(target.dynamic)
    if len(entries) > len(same) and any(flag and i not in whole for i, flag in enumerate(dynamic)):  # a factor
        return False
    for i, entry in enumerate(entries if model.static is not None else ()):
        place, axis = whole.get(i, (-1, -1))
        if entry == 0 and place != i:  # the size of another axis, which happens to be the same here
            return False
        if entry > 0 and axis >= 0 and not dynamic[i] and not same[axis] and -1 in entries:  # the -1 takes what is too much
            return False
    return True


def _runs(before: Shape, between: Shape) -> list[tuple[int, tuple[int, ...]]] | None:
    """Each axis of a shape and the axes that it is cut into, leaving out those of size 1; None where axes are merged."""
    left, runs = [i for i, size in enumerate(between) if size != 1], []
    for axis, size in enumerate(before):
        inner: list[int] = []
        product = 1
        while product < size and left:
            inner.append(left.pop(0))
            product *= between[inner[-1]]
        if product != size:
            return None
        runs += [(axis, tuple(inner))] if inner else []
    return runs if not left else None

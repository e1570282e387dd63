"""Widths that kernels take whole: in which steps the units of each group go, for `--align` and `--target`.

Kernels work on blocks of channels (vectors of a CPU, tensor-core tiles of a GPU) and fill up what is no multiple of one.  The
block counts on the axes that a layer multiplies along, where a unit may take many places: of heads of 64 each, any number is a
multiple of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd, lcm

from onnx import NodeProto

from onnxprune.cost import ALIKE, ATTENTION
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Grouping
from onnxprune.layouts import Dim, Layout, find, length, resolve
from onnxprune.relations import Axis
from onnxprune.scoping import matched

Align = int | Mapping[str, int]
TARGETS = {
    "cpu": (16, 8),  # floats in a vector of AVX-512, of AVX2: the channel blocks of onnxruntime's convolutions
    "tensorrt": (32, 16, 8),  # of int8 tensors, of int8 tiles, of float16 tiles
    "cuda": (32, 16, 8),  # 128 bytes of float32, of int8, of float16
}
FINEST = 4  # for groups that are too narrow for more, and for budgets that coarser steps miss
LEVELS = 4  # widths, at least, that a group may choose from before its steps are made finer
CHANNELS = ("Conv", "ConvInteger", "ConvTranspose", "QLinearConv")  # layers whose second axes are channels
MATRICES = ("FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "QGemm", "QLinearMatMul", *ATTENTION)
RECURRENT = ("GRU", "LSTM", "RNN")


def check_align(align: Align, target: str | None) -> None:
    """Raises OnnxPruneError for a step that is no number of units, and a target that is not known."""
    for pattern, step in align.items() if isinstance(align, Mapping) else [("*", align)]:
        if step < 1:
            where = "" if pattern == "*" else f" for '{pattern}'"
            raise OnnxPruneError(f"align is {step}{where}; it is a number of units, 1 at least")
    if target is not None and target not in TARGETS:
        raise OnnxPruneError(f"no target is named '{target}'; there are: {', '.join(TARGETS)}")


def ladder(grouping: Grouping, align: Align = 1, target: str | None = None) -> list[dict[int, int]]:
    """{group: units that go together}, once for each fineness that the target allows, coarsest first.

    align: the width's divisor for all groups, or {glob over node and tensor names: divisor}, the last that matches counts; a target
    says it for groups that it does not name.  Raises OnnxPruneError for a glob that matches nothing.
    """
    named = {"*": align} if isinstance(align, int) else dict(align)
    if target is None and max(named.values(), default=1) == 1:
        return [{}]
    patterns = [p for p in named if p != "*"]
    given = {g.id: named["*"] for g in grouping.groups if named.get("*", 1) > 1}
    for pattern, own in matched(grouping, patterns, "--align").items():
        given |= dict.fromkeys(own, named[pattern])
    places = _places(grouping)
    rungs: list[dict[int, int]] = []
    for coarsest in (*TARGETS[target], FINEST) if target else (1,):
        blocks = [n for n in TARGETS[target] if n <= coarsest] if target else []
        steps: dict[int, int] = {}
        for group in grouping.groups:
            taken = places.get(group.id, set())
            if group.id in given:
                steps[group.id] = _exact(given[group.id], group.units, taken)
            elif target:
                coarser = rungs[-1][group.id] if rungs else group.units
                steps[group.id] = min(coarser, _fitting(blocks or [FINEST], group.units, taken))
        if steps not in rungs:
            rungs.append(steps)
    return rungs


def _exact(block: int, units: int, places: set[int]) -> int:
    """Units that go together so that the axes stay multiples of the block, or of half of it and so on where all are narrower."""
    wide = [n for n in places if units * n >= block]
    if not wide:
        return _exact(block // 2, units, places) if places and block > 1 else 1
    return lcm(*(block // gcd(block, n) for n in wide))


def _fitting(blocks: Sequence[int], units: int, places: set[int]) -> int:
    """The same for the largest block that leaves several widths to choose from; at least half of the units may go."""
    for block in blocks:
        step = _exact(block, units, places)
        if units >= LEVELS * step:
            return step
    block = blocks[-1]
    while block > 1 and 2 * _exact(block, units, places) > units:
        block //= 2
    return _exact(block, units, places)


def _places(grouping: Grouping) -> dict[int, set[int]]:
    """{group: indices that a unit takes on an axis along which layers multiply, for each such axis}."""
    owner = {leaf: g.id for g in grouping.groups for leaf in g.leaves}
    shapes = grouping.model.shapes
    axes = {axis for node in grouping.model.nodes for axis in _multiplied(node, shapes)}
    found: dict[int, set[int]] = {}
    for root in {find(grouping.dims[axis]) for axis in axes if axis in grouping.dims}:
        taken: dict[Dim, int] = {}
        for leaf, count in _counts(resolve(root)):
            taken[leaf] = taken.get(leaf, 0) + count
        for leaf, count in taken.items():
            if leaf in owner:
                found.setdefault(owner[leaf], set()).add(count)
    return found


def _counts(layout: Layout, times: int = 1) -> Iterator[tuple[Dim, int]]:
    """For each leaf of a layout how many indices one of its units takes, place by place."""
    for segment in layout:
        size = length(segment) * times
        for dim in map(find, segment):
            if dim.layout is None:
                yield dim, size // dim.size
            else:
                yield from _counts(dim.layout, size // dim.size)


def _multiplied(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Axis]:
    """The axes of a layer that its kernel blocks: what it sums over and what it makes, without batches and places."""
    op = ALIKE.get(node.op_type, node.op_type)
    weight = 3 if op.startswith("Q") and op != "QAttention" else 1
    names = [name for name in (*node.input[:1], *node.input[weight : weight + 1], *node.output[:1]) if name in shapes]
    if op in CHANNELS:
        yield from ((name, 1) for name in names if len(shapes[name]) > 1)
    elif op in MATRICES:
        yield from ((name, i) for name in names for i in range(max(0, len(shapes[name]) - 2), len(shapes[name])))
    elif op in RECURRENT:
        yield from ((name, 2) for name in node.input[1:3] if len(shapes.get(name, ())) == 3)
    elif op == "Einsum":
        terms = [t.strip() for t in _equation(node).replace("->", ",").split(",")]
        batch = set.intersection(*map(set, terms)) if terms else set()
        for name, letters in zip((*node.input, *node.output), terms, strict=False):
            yield from ((name, i) for i, letter in enumerate(letters) if letter not in batch and "." not in letters)


def _equation(node: NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "equation"), "").replace(" ", "")

"""What the layers that read or write a residual stream do when it is turned: their weights turn, and shifts go into their biases."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from onnxprune.folding import attributes
from onnxprune.rewiring import BIAS, Use
from onnxprune.trunk_rules import one_number, same
from onnxprune.trunks import NotRotatableError, Place, Rule, Shift, Stream, Walk, said


def matmul(walk: Walk, node: NodeProto) -> None:
    ranks = [len(walk.model.shapes[name]) for name in node.input]
    inner, outer = (ranks[0] - 1, max(ranks[1] - 2, 0)), (max(ranks[0] - 2, 0), ranks[1] - 1)
    if min(ranks) < 2:
        raise NotRotatableError(f"{said(node)} multiplies a vector")
    weights = [i for i, name in enumerate(node.input) if walk.carries(name) and name in walk.constants]
    if not weights:
        data = [i for i, name in enumerate(node.input) if walk.carries(name)]
        stream = walk.stream(node.input[data[0]], node)
        if len(data) != 1 or stream.axis == inner[data[0]]:
            raise NotRotatableError(f"{said(node)} multiplies its channels by data")
        if stream.shift is not None or stream.square:
            raise NotRotatableError(f"{said(node)} mixes what a norm made over another axis")
        same(walk, node, replace(stream, writers=None))
        return
    if len(weights) != 1:
        raise NotRotatableError(f"{said(node)} multiplies two constants")
    at = weights[0]
    _layer(walk, node, 1 - at, at, inner, inner[at], outer[at], _added_bias(walk, node))


def _added_bias(walk: Walk, node: NodeProto) -> Use:
    """The constant that the one reader of a product adds to it, if that is all it does."""
    out = node.output[0]
    plain = len(walk.model.shapes[node.input[1]]) == 2 and node.input[1] in walk.constants
    readers = [n for n in walk.model.main if out in n.input]
    if walk.live.reads[out] == 1 and len(readers) == 1 and readers[0].op_type == "Add" and plain:
        at = 1 - list(readers[0].input).index(out)
        bias = readers[0].input[at]
        shape, whole = walk.model.shapes[bias], walk.model.shapes[out]
        if bias in walk.model.tensors and bias in walk.constants and shape[-1:] == whole[-1:] and len(shape) <= len(whole):
            return Use(readers[0].output[0], at)
    return Use(out, BIAS)


def gemm(walk: Walk, node: NodeProto) -> None:
    given = attributes(node)
    flip = [int(bool(given.get("transA"))), int(bool(given.get("transB")))]
    inner, outer = (1 - flip[0], flip[1]), (flip[0], 1 - flip[1])
    weights = [i for i in (0, 1) if walk.carries(node.input[i]) and node.input[i] in walk.constants]
    has = len(node.input) > 2 and bool(node.input[2])
    bias = Use(node.output[0], 2 if has else BIAS)
    if weights != [1]:
        raise NotRotatableError(f"{said(node)} has no constant weight")
    if has and not given.get("beta", 1.0):
        raise NotRotatableError(f"{said(node)} has a bias that it does not use")
    factor = given.get("alpha", 1.0) / (given.get("beta", 1.0) if has else 1.0)
    _layer(walk, node, 0, 1, inner, inner[1], outer[1], bias, factor)
    _bias(walk, node, 2)


def convolved(walk: Walk, node: NodeProto) -> None:
    """A layer at every pixel, whatever its kernel; where it pads or overlaps, no bias stands for a constant that it reads."""
    given, (x, w) = attributes(node), node.input[:2]
    inner, outer = (1, 0) if node.op_type == "Conv" else (0, 1)
    if given.get("group", 1) != 1:
        raise NotRotatableError(f"{said(node)} has groups of channels")
    has = len(node.input) > 2 and bool(node.input[2])
    bias = Use(node.output[0], 2 if has else BIAS)
    if w not in walk.constants:
        raise NotRotatableError(f"{said(node)} has no constant weight")
    kernel = walk.model.shapes[w][2:]
    padded = any(given.get("pads", ())) or given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if walk.carries(x) and max(kernel, default=1) > 1 and (padded or node.op_type == "ConvTranspose"):
        stream = walk.stream(x, node)
        if stream.shift is not None and stream.shift.any():
            raise NotRotatableError(f"{said(node)} pads what a norm shifted")
    _layer(walk, node, 0, 1, (1, inner), inner, outer, bias)
    _bias(walk, node, 2)


def attention(walk: Walk, node: NodeProto) -> None:
    """Reads like a layer; what it makes are heads."""
    if node.input[1] not in walk.constants or any(walk.carries(name) for name in (*node.input[3:], *node.output) if name):
        raise NotRotatableError(f"{said(node)} is more than a layer to it")
    _layer(walk, node, 0, 1, (2, 0), 0, 1, Use(node.output[0], 2))


def _layer(
    walk: Walk, node: NodeProto, data: int, weight: int, inner: tuple[int, int], summed: int, made: int, bias: Use, factor: float = 1.0
) -> None:
    """A layer that sums over the weight's axis `summed` (the data's is inner[data]) and makes its axis `made`.

    bias: where its bias is, BIAS where it has none; factor: of the product, beside the bias.
    """
    w, use = node.input[weight], Use(node.output[0], weight)
    axes = walk.carries(w)
    if set(axes) - {summed, made}:
        raise NotRotatableError(f"{said(node)} has weights for every channel")
    x = node.input[data]
    if summed in axes:
        if x in walk.constants or walk.axis(x) != inner[data]:
            raise NotRotatableError(f"{said(node)} does not sum over its channels alone")
        stream = walk.stream(x, node)
        if stream.square:
            raise NotRotatableError(f"{said(node)} reads its square")
        if stream.norm is None:
            walk.signal(x, stream, normed=False)
        places = walk.roots(w, use, summed)
        walk.read(places, stream)
        if stream.shift is not None and stream.shift.any():
            root, order = _turned(walk, w, use)
            walk.found.shifts.append(Shift(root, order, summed, stream.shift, factor, bias, node.op_type))
    elif walk.carries(x):
        raise NotRotatableError(f"{said(node)} does not sum over its channels")
    if made in axes:
        out = node.output[0]
        along = walk.axis(out) - len(walk.model.shapes[out]) if node.op_type == "MatMul" else -1
        places = [*walk.roots(w, use, made), Place(Use(out, BIAS), along)]
        walk.write(places)
        walk.streams[out] = Stream(walk.axis(out), writers=tuple(places))


def _turned(walk: Walk, name: str, use: Use) -> tuple[Use, tuple[int, ...] | None]:
    """Where a weight comes from, and how it is transposed on the way."""
    order: tuple[int, ...] | None = None
    while name not in walk.model.tensors:
        node = walk.live.makers[name]
        if node.op_type not in ("Identity", "Cast", "Transpose"):
            raise NotRotatableError(f"{said(node)} changes a weight that a shift has to go through")
        if node.op_type == "Transpose":
            rank = len(walk.model.shapes[name])
            perm = tuple(attributes(node).get("perm", range(rank)[::-1]))
            order = perm if order is None else tuple(perm[i] for i in order)
        name, use = node.input[0], Use(node.output[0], 0)
    return use, order


def _bias(walk: Walk, node: NodeProto, position: int) -> None:
    """The bias of a layer that writes the stream is written as well."""
    out = node.output[0]
    if out not in walk.streams:
        return
    stream = walk.streams[out]
    if position < len(node.input) and node.input[position]:
        name = node.input[position]
        if not walk.carries(name):
            if one_number(walk, name) != 0.0:
                walk.found.centred = True
            walk.streams[out] = replace(stream, writers=None)
            return
        if name not in walk.constants:
            raise NotRotatableError(f"{said(node)} has a bias from data")
        places = walk.roots(name, Use(out, position), walk.axis(name))
        walk.write(places)
        walk.streams[out] = replace(stream, writers=(*(stream.writers or ()), *places))


LAYERS: dict[str, Rule] = {
    "Conv": convolved,
    "ConvTranspose": convolved,
    "Gemm": gemm,
    "MatMul": matmul,
    "com.microsoft:Attention": attention,
}

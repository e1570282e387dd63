"""What each operator does to a residual stream that is turned: layers read and write it, norms keep its length, sums add it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from onnxprune.folding import attributes
from onnxprune.rewiring import BIAS, Use
from onnxprune.trunks import MOVES, NotRotatableError, Place, Rule, Shift, Stream, Walk, alike, said

RULES: dict[str, Rule] = {}


def _rule(*operators: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def _attributes(walk: Walk, node: NodeProto, names: str, position: int) -> list[int] | None:
    """Axes or the like: an attribute in old opsets, an input in new ones; None where they are not said."""
    given = attributes(node)
    if names in given:
        return [int(i) for i in np.atleast_1d(given[names])]
    if position < len(node.input) and node.input[position]:
        number = walk.model.folded.get(node.input[position])
        if number is None:
            raise NotRotatableError(f"{said(node)} takes its {names} from data")
        return [int(i) for i in np.ravel(number.number)]
    return None


def _same(walk: Walk, node: NodeProto, stream: Stream) -> None:
    """The outputs are what the input is, wherever the channels are now."""
    for name in node.output:
        if name:
            walk.streams[name] = replace(stream, axis=walk.axis(name))


def _number(walk: Walk, name: str) -> float | None:
    """A constant of one number."""
    found = walk.model.folded.get(name)
    if found is None or found.dynamic.any() or found.number.size != 1 or found.from_shape:
        return None
    return float(found.number.ravel()[0])


# moves along other axes


@_rule(*MOVES, "Gather", "Neg")
def moved(walk: Walk, node: NodeProto) -> None:
    stream = walk.stream(node.input[0], node)
    if not walk.carries(node.input[0]) or any(walk.carries(name) for name in node.input[1:] if name):
        raise NotRotatableError(f"{said(node)} is not linear in its channels")
    if node.op_type == "Neg" and not stream.plain:
        raise NotRotatableError(f"{said(node)} changes what a norm made")
    _same(walk, node, stream)


@_rule("AveragePool", "Pad", "Resize")
def pooled(walk: Walk, node: NodeProto) -> None:
    """Linear along other axes, but what is constant along them need not stay so."""
    stream = walk.stream(node.input[0], node)
    if stream.shift is not None or stream.square:
        raise NotRotatableError(f"{said(node)} changes what a norm made")
    if node.op_type == "Pad":
        value = attributes(node).get("value", 0.0) if len(node.input) < 3 or not node.input[2] else _number(walk, node.input[2])
        if value != 0.0:
            raise NotRotatableError(f"{said(node)} pads it with other than zeros")
    _same(walk, node, stream)


@_rule("Concat")
def joined(walk: Walk, node: NodeProto) -> None:
    """Tokens of several streams, or a class token."""
    streams = [walk.stream(name, node) for name in node.input]
    if not all(stream.plain for stream in streams):
        raise NotRotatableError(f"{said(node)} joins what a norm made with something else")
    _same(walk, node, _sum(streams))


def _sum(streams: list[Stream]) -> Stream:
    writers: tuple[Place, ...] | None = ()
    for stream in streams:
        writers = None if writers is None or stream.writers is None else (*writers, *stream.writers)
    return Stream(streams[0].axis, writers=writers)


@_rule("Where")
def masked(walk: Walk, node: NodeProto) -> None:
    condition, *choices = node.input
    if walk.carries(condition):
        raise NotRotatableError(f"{said(node)} chooses channel by channel")
    inside = [walk.stream(name, node) for name in choices if walk.carries(name)]
    if not all(stream.plain for stream in inside):
        raise NotRotatableError(f"{said(node)} masks what a norm made")
    for name in choices:
        if not walk.carries(name) and _number(walk, name) != 0.0:
            walk.found.centred = True
    _same(walk, node, replace(_sum(inside), writers=None))


# sums and products


@_rule("Add", "Sum", "Sub")
def added(walk: Walk, node: NodeProto) -> None:
    """The stream and its branches; a norm's shift; the mean that a norm takes off."""
    inside = [name for name in node.input if walk.carries(name)]
    outside = [name for name in node.input if not walk.carries(name)]
    streams = {name: walk.stream(name, node) for name in inside if name not in walk.constants or name in walk.lengths}
    shifted = [stream for stream in streams.values() if not stream.plain]
    for name in outside:
        if _number(walk, name) != 0.0:
            if shifted:
                raise NotRotatableError(f"{said(node)} shifts what a norm made")
            walk.found.centred = True
    if shifted:
        first = shifted[0]
        if any(s.square or s.norm != first.norm or not alike(s.scale, first.scale) for s in streams.values()):
            what = "is scaled a channel at a time" if all(s.norm is None for s in shifted) else "comes from a norm (post-norm)"
            raise NotRotatableError(f"{said(node)} adds to the stream what {what}")
        shift = np.zeros(walk.width)
        for position, name in enumerate(node.input):
            sign = -1.0 if node.op_type == "Sub" and position == 1 else 1.0
            if name not in streams:
                shift += sign * walk.vector(name, Use(node.output[0], position), 0.0)[0]
            elif (own := streams[name].shift) is not None:
                shift += sign * own
        _same(walk, node, replace(first, shift=shift))
        return
    total = _sum([walk.stream(name, node) for name in inside])
    _same(walk, node, replace(total, writers=None) if outside else total)


@_rule("Mul", "Div")
def multiplied(walk: Walk, node: NodeProto) -> None:
    """By one number a channel, by what has no channels (a norm's length, a number), or with itself."""
    first, second = node.input
    if first == second and node.op_type == "Mul":
        squared(walk, node)
        return
    if node.op_type == "Div" and not (walk.carries(first) and first not in walk.constants):
        raise NotRotatableError(f"{said(node)} divides by it")
    active, other = (first, second) if walk.carries(first) and first not in walk.constants else (second, first)
    stream = walk.stream(active, node)
    if stream.square:
        raise NotRotatableError(f"{said(node)} scales its square")
    norm = walk.norm_of.get(other)
    if norm is not None:
        if stream.norm is not None or stream.shift is not None:
            raise NotRotatableError(f"{said(node)} normalizes what a norm made")
        stream = replace(stream, norm=norm, writers=None)
    if not walk.carries(other):
        if stream.shift is not None:
            number = _number(walk, other)
            if number is None:
                raise NotRotatableError(f"{said(node)} scales what a norm made by data")
            stream = replace(stream, shift=stream.shift * number if node.op_type == "Mul" else stream.shift / number)
        _same(walk, node, stream)
        return
    if other not in walk.constants:
        raise NotRotatableError(f"{said(node)} multiplies its channels by data")
    vector, use, offset = walk.vector(other, Use(node.output[0], list(node.input).index(other)), 1.0)
    if node.op_type == "Div":
        if not vector.all():
            raise NotRotatableError(f"{said(node)} divides its channels by zeros")
        vector = 1 / vector
    elif stream.norm is not None:
        walk.found.norms[stream.norm].gains.append((use, offset))
    if stream.writers and stream.plain:  # a scale on a branch (LayerScale) goes into what the branch adds
        walk.scale_writers(stream.writers, vector)
    else:
        shift = None if stream.shift is None else stream.shift * vector
        stream = replace(stream, scale=vector if stream.scale is None else stream.scale * vector, shift=shift, writers=None)
    _same(walk, node, stream)


@_rule("Pow")
def squared(walk: Walk, node: NodeProto) -> None:
    stream = walk.stream(node.input[0], node)
    if not stream.plain or (node.op_type == "Pow" and (walk.carries(node.input[1]) or _number(walk, node.input[1]) != 2.0)):
        raise NotRotatableError(f"{said(node)} is not linear in its channels")
    walk.signal(node.input[0], stream)
    _same(walk, node, Stream(stream.axis, square=True))


# statistics and norms


@_rule("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "GlobalAveragePool")
def reduced(walk: Walk, node: NodeProto) -> None:
    """A mean, or a mean of squares, over the channels; a mean over tokens."""
    name, op = node.input[0], node.op_type
    stream, rank = walk.stream(name, node), len(walk.model.shapes[name])
    axes = list(range(2, rank)) if op == "GlobalAveragePool" else _attributes(walk, node, "axes", 1)
    over = {i % rank for i in axes} if axes else set(range(rank))
    if stream.axis not in over:
        if op in ("ReduceMean", "GlobalAveragePool"):
            moved(walk, node)
        elif op == "ReduceSum":
            pooled(walk, node)
        return
    square = stream.square or op in ("ReduceL2", "ReduceSumSquare")
    if not stream.square and not stream.plain:
        raise NotRotatableError(f"{said(node)} sums over what a norm made")
    if not square:
        walk.found.centred = True
        return
    if over != {stream.axis}:
        raise NotRotatableError(f"{said(node)} takes a mean of squares over more than its channels")
    if not stream.square:
        walk.signal(name, stream)
    if op in ("ReduceMean", "GlobalAveragePool"):
        walk.norm_of[node.output[0]] = walk.norm()


@_rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "com.microsoft:SimplifiedLayerNormalization")
def normalized(walk: Walk, node: NodeProto) -> None:
    stream = walk.stream(node.input[0], node)
    rank = len(walk.model.shapes[node.input[0]])
    if not stream.plain:
        raise NotRotatableError(f"{said(node)} normalizes what a norm or a scale made (post-norm)")
    if attributes(node).get("axis", -1) % rank != rank - 1 or stream.axis != rank - 1:
        raise NotRotatableError(f"{said(node)} normalizes over more than its channels")
    walk.signal(node.input[0], stream)
    _norm(walk, node, stream, 1, 2)


def _norm(walk: Walk, node: NodeProto, stream: Stream, scale: int, shift: int | None) -> Stream:
    """The norm's first output, whose scale and shift are constants at these inputs."""
    if "Simplified" not in node.op_type and "RMS" not in node.op_type:
        walk.found.centred = True
    norm = walk.norm(node.output[0])
    gain, use, offset = walk.vector(node.input[scale], Use(node.output[0], scale), 1.0)
    walk.found.norms[norm].gains.append((use, offset))
    vector = None
    if shift is not None and shift < len(node.input) and node.input[shift]:
        vector = walk.vector(node.input[shift], Use(node.output[0], shift), 0.0)[0]
    made = Stream(stream.axis, scale=gain, shift=vector, norm=norm)
    walk.streams[node.output[0]] = made
    return made


@_rule("com.microsoft:SkipLayerNormalization", "com.microsoft:SkipSimplifiedLayerNormalization")
def skip_normalized(walk: Walk, node: NodeProto) -> None:
    """The sum of a stream and a branch (and a bias), normalized; the sum itself is the last output."""
    simple = "Simplified" in node.op_type
    bias = 3 if simple else 4
    terms = [*node.input[:2], *(name for name in node.input[bias : bias + 1] if name)]
    streams = [walk.stream(name, node) for name in terms]
    if not all(stream.plain for stream in streams):
        raise NotRotatableError(f"{said(node)} adds to the stream what comes from a norm (post-norm)")
    total = replace(_sum(streams), writers=None)
    made = _norm(walk, node, total, 2, None if simple else 3)
    if len(node.output) > 3 and node.output[3]:
        walk.streams[node.output[3]] = total
        walk.signal(node.output[3], total)
    else:
        walk.signal(node.output[0], made)


# layers


@_rule("MatMul")
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
        _same(walk, node, replace(stream, writers=None))
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


@_rule("Gemm")
def gemm(walk: Walk, node: NodeProto) -> None:
    given = attributes(node)
    flip = [int(bool(given.get("transA"))), int(bool(given.get("transB")))]
    inner, outer = (1 - flip[0], flip[1]), (flip[0], 1 - flip[1])
    weights = [i for i in (0, 1) if walk.carries(node.input[i]) and node.input[i] in walk.constants]
    has = len(node.input) > 2 and bool(node.input[2])
    bias = Use(node.output[0], 2 if has else BIAS)
    if weights != [1]:
        raise NotRotatableError(f"{said(node)} has no constant weight")
    factor = given.get("alpha", 1.0) / (given.get("beta", 1.0) if has else 1.0)
    _layer(walk, node, 0, 1, inner, inner[1], outer[1], bias, factor)
    _bias(walk, node, 2)


@_rule("Conv", "ConvTranspose")
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


@_rule("com.microsoft:Attention")
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
            if _number(walk, name) != 0.0:
                walk.found.centred = True
            walk.streams[out] = replace(stream, writers=None)
            return
        if name not in walk.constants:
            raise NotRotatableError(f"{said(node)} has a bias from data")
        places = walk.roots(name, Use(out, position), walk.axis(name))
        walk.write(places)
        walk.streams[out] = replace(stream, writers=(*(stream.writers or ()), *places))

"""What happens to a residual stream between the layers when it is turned: norms keep its length, sums add it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from onnxprune.folding import attributes
from onnxprune.rewiring import Use
from onnxprune.trunks import MOVES, NotRotatableError, Place, Rule, Stream, Walk, alike, said

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


def same(walk: Walk, node: NodeProto, stream: Stream) -> None:
    """The outputs are what the input is, wherever the channels are now."""
    for name in node.output:
        if name:
            walk.streams[name] = replace(stream, axis=walk.axis(name))


def one_number(walk: Walk, name: str) -> float | None:
    """A constant of one number."""
    found = walk.model.folded.get(name)
    if found is None or found.dynamic.any() or found.number.size != 1 or found.from_shape:
        return None
    return float(found.number.ravel()[0])


# moves along other axes


@_rule(*MOVES, "Gather", "GatherND", "Neg")
def moved(walk: Walk, node: NodeProto) -> None:
    stream = walk.stream(node.input[0], node)
    if not walk.carries(node.input[0]) or any(walk.carries(name) for name in node.input[1:] if name):
        raise NotRotatableError(f"{said(node)} is not linear in its channels")
    if node.op_type == "Neg" and not stream.plain:
        raise NotRotatableError(f"{said(node)} changes what a norm made")
    same(walk, node, stream)


@_rule("AveragePool", "Pad", "Resize")
def pooled(walk: Walk, node: NodeProto) -> None:
    """Linear along other axes, but what is constant along them need not stay so."""
    stream = walk.stream(node.input[0], node)
    if stream.shift is not None or stream.square:
        raise NotRotatableError(f"{said(node)} changes what a norm made")
    if node.op_type == "Pad":
        value = attributes(node).get("value", 0.0) if len(node.input) < 3 or not node.input[2] else one_number(walk, node.input[2])
        if value != 0.0:
            raise NotRotatableError(f"{said(node)} pads it with other than zeros")
    same(walk, node, stream)


@_rule("Concat")
def joined(walk: Walk, node: NodeProto) -> None:
    """Tokens of several streams, or a class token."""
    streams = [walk.stream(name, node) for name in node.input]
    if not all(stream.plain for stream in streams):
        raise NotRotatableError(f"{said(node)} joins what a norm made with something else")
    same(walk, node, _sum(streams))


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
        if not walk.carries(name) and one_number(walk, name) != 0.0:
            walk.found.centred = True
    same(walk, node, replace(_sum(inside), writers=None))


# sums and products


@_rule("Add", "Sum", "Sub")
def added(walk: Walk, node: NodeProto) -> None:
    """The stream and its branches; a norm's shift; the mean that a norm takes off."""
    inside = [name for name in node.input if walk.carries(name)]
    outside = [name for name in node.input if not walk.carries(name)]
    streams = {name: walk.stream(name, node) for name in inside if name not in walk.constants or name in walk.lengths}
    shifted = [stream for stream in streams.values() if not stream.plain]
    for name in outside:
        if one_number(walk, name) != 0.0:
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
        same(walk, node, replace(first, shift=shift))
        return
    total = _sum([walk.stream(name, node) for name in inside])
    same(walk, node, replace(total, writers=None) if outside else total)


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
            number = one_number(walk, other)
            if number is None:
                raise NotRotatableError(f"{said(node)} scales what a norm made by data")
            stream = replace(stream, shift=stream.shift * number if node.op_type == "Mul" else stream.shift / number)
        same(walk, node, stream)
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
    same(walk, node, stream)


@_rule("Pow")
def squared(walk: Walk, node: NodeProto) -> None:
    stream = walk.stream(node.input[0], node)
    if not stream.plain or (node.op_type == "Pow" and (walk.carries(node.input[1]) or one_number(walk, node.input[1]) != 2.0)):
        raise NotRotatableError(f"{said(node)} is not linear in its channels")
    walk.signal(node.input[0], stream)
    same(walk, node, Stream(stream.axis, square=True))


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


@_rule("BatchNormalization")
def folded(walk: Walk, node: NodeProto) -> None:
    """Running statistics are a scale and a shift a channel: behind a layer, the scale goes into the layer."""
    stream, given, out = walk.stream(node.input[0], node), attributes(node), node.output[0]
    tensors = all(name in walk.model.tensors and name in walk.constants for name in node.input[1:])
    if not stream.plain or not stream.writers or given.get("training_mode") or not tensors:
        raise NotRotatableError(f"{said(node)} scales its channels")
    epsilon = given.get("epsilon", 1e-5)
    uses = {position: Use(out, position) for position in range(1, 5)}
    scale, mean, variance = (
        walk.vector(node.input[position], uses[position], number)[0] for position, number in ((1, 1.0), (3, 0.0), (4, 1 - epsilon))
    )
    factor = scale / np.sqrt(variance + epsilon)
    shift = np.asarray(walk.model.array(walk.model.copies.get(node.input[2], node.input[2])), np.float64) - mean * factor
    walk.scale_writers(stream.writers, factor)
    place = Place(uses[2], 0)
    walk.found.bases[uses[2]] = shift
    walk.write([place])
    same(walk, node, replace(stream, writers=(*stream.writers, place)))

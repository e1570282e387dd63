"""Pairs of layers refined together after least squares: A's output goes through an activation into B and nowhere else.

Least squares fits B to what A happens to make, and A to what the original's A made; together they can do better, as A's units
that are left may become others that serve B more.  `gaussnewton` holds the numbers, this module what they are of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.emphasis import emphasis
from onnxprune.errors import OnnxPruneError
from onnxprune.frontier import Frontier
from onnxprune.gaussnewton import ITERATIONS, STEPS, Batch, Factor, Pair, Weights, factor, refined
from onnxprune.linear import CONVOLUTIONS, RECURRENT, made_by
from onnxprune.operators import operator
from onnxprune.plans import Plan
from onnxprune.reconstruction import Batches, Refit
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays, as_float32, first_line, session
from onnxprune.scopes import captured
from onnxprune.seats import Seat, all_seats, bias_of, give_bias, held_by, tensors_of, write

ROOM = 2**28  # numbers that are kept of the activations of a pair
WORK = 2e13  # multiply-accumulates that the steps of all pairs may take
ROWS = 16384  # that a preconditioner is made from, or 4 times its features where that is more
ENOUGH = 2  # rows for each feature of a layer; with fewer a pair is left as it is
EVERY = 4  # one batch of so many is held out
ALONE = (
    *("Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "PRelu", "Softplus", "Softsign", "Mish", "Gelu", "Swish"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Exp", "Neg", "Abs", "Identity", "Pow"),
    *("Add", "Sub", "Mul", "Div", "Min", "Max", "BatchNormalization"),
)


@dataclass(frozen=True)
class Couple:
    """Two layers of the pruned model and the nodes between them, in order."""

    first: Seat
    second: Seat
    nodes: tuple[NodeProto, ...]


def couples(plan: Plan, pruned: ModelProto) -> list[Couple]:
    """The pairs of layers of which the second reads the first through nothing but an activation of each number for itself."""
    seats = all_seats(plan, pruned)
    tensors, made = tensors_of(pruned), made_by(pruned.graph.node)
    firsts = {seat.layer.output: seat for seat in seats}
    order = {id(node): i for i, node in enumerate(pruned.graph.node)}
    reads = Counter(name for node in pruned.graph.node for name in (*node.input, *captured(node)) if name)
    reads.update(value.name for value in pruned.graph.output)
    found = []
    for second in seats:
        between: dict[int, NodeProto] = {}
        ends, waiting = set(), [second.source]
        inside = Counter([second.source])  # how often the nodes between, and the second layer, read each value
        while waiting:
            value = waiting.pop()
            if value in firsts:
                ends.add(value)
                continue
            node = made.get(value)
            if node is None or node.op_type not in ALONE or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
                ends.add("")
                break
            if order[id(node)] not in between:
                between[order[id(node)]] = node
                read = [name for name in node.input if name and name not in tensors]
                inside.update(read)
                waiting.extend(read)
        end = next(iter(ends)) if len(ends) == 1 else ""
        first = firsts.get(end)
        if first is None or any(inside[name] != reads[name] for name in inside):
            continue
        rank = len(plan.grouping.model.shapes[end])
        if _one_kind(first, second) and all(_each_for_itself(node, tensors, first, rank) for node in between.values()):
            found.append(Couple(first, second, tuple(between[i] for i in sorted(between))))
    return found


def _one_kind(first: Seat, second: Seat) -> bool:
    if (first.layer.op in CONVOLUTIONS) != (second.layer.op in CONVOLUTIONS):
        return False
    if second.layer.op in RECURRENT:  # what its gates are to make is no value of the original
        return False
    return not (first.shape.left or second.shape.left)


def _each_for_itself(node: NodeProto, tensors: Mapping[str, TensorProto], first: Seat, rank: int) -> bool:
    """Whether a node's constants are one number, or one for each channel; rank: of the first layer's output."""
    if node.op_type == "BatchNormalization":
        return first.layer.op in CONVOLUTIONS or rank == 2
    channel = rank - 2 if first.layer.op in CONVOLUTIONS else 0  # axes behind the channels'
    for name in node.input:
        if name in tensors:
            dims = list(tensors[name].dims)[::-1]
            if len(dims) > rank or any(n != 1 for i, n in enumerate(dims) if i != channel):
                return False
    return True


@dataclass(frozen=True)
class Refiner:
    """Refines each pair when its second layer has been fitted; pairs: by the weight of that."""

    plan: Plan
    pairs: Mapping[str, Couple]
    batches: Batches
    progress: Callable[[str], None] | None = None

    def changing(self, seat: Seat) -> tuple[str, ...]:
        """The first layer of the pair that this one is the second of: its weight and outputs."""
        couple = self.pairs.get(seat.weight)
        return (couple.first.weight, *couple.first.node.output) if couple else ()

    def __call__(self, proto: ModelProto, seat: Seat, known: tuple[Frontier, Frontier]) -> Refit | None:
        """The pair's misses before and after; None where there is no pair or no gain."""
        couple = self.pairs.get(seat.weight)
        if couple is None:
            return None
        try:
            refit = _refine(self.plan, proto, couple, self.batches, known, WORK / len(self.pairs))
        except OnnxPruneError as error:
            if self.progress:
                self.progress(f"{_name(couple.second)} is not refined: {error}")
            return None
        if self.progress and refit:
            self.progress(f"refined {refit.node} with {refit.partner}: misses {refit.before:.4f}, then {refit.after:.4f}")
        return refit


def refiner(plan: Plan, pruned: ModelProto, batches: Batches, progress: Callable[[str], None] | None = None) -> Refiner:
    """What refines all pairs of a pruned model, for `reconstruct`."""
    return Refiner(plan, {couple.second.weight: couple for couple in couples(plan, pruned)}, batches, progress)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # steps to what is no number do no better on held-out samples
def _refine(plan: Plan, proto: ModelProto, couple: Couple, batches: Batches, known: tuple[Frontier, Frontier], work: float) -> Refit | None:
    first, second = couple.first, couple.second
    tensors = tensors_of(proto)
    weights = _weights(proto, couple)
    gathered = _gather(plan, proto, couple, batches, known, work)
    if len({batch.held for batch in gathered}) < 2:
        return None
    x, y = gathered[0].x.shape, gathered[0].wanted.shape
    middle = first.shape.out(x, weights.parts[0].shape)
    one = operator(first.shape, weights.parts[0].shape, x, middle)
    two = operator(second.shape, weights.parts[2].shape, middle, y)
    if one is None or two is None or second.shape.out(middle, weights.parts[2].shape) != y:
        return None
    free = (first.layer.takes_bias, second.layer.takes_bias)
    pair = Pair(one, two, (first.shape, second.shape), _activation(proto, couple), free, second.bounds)
    seen = [batch for batch in gathered if not batch.held]
    found = refined(pair, weights, gathered, (_factor(pair, weights, seen, 0), _factor(pair, weights, seen, 1)))
    if found is None:
        return None
    kinds = [numpy_helper.to_array(tensors[seat.weight]).dtype for seat in (first, second)]
    if not all(held_by(kind, *found.parts[2 * i : 2 * i + 2]) for i, kind in enumerate(kinds)):
        return None
    for position, (seat, kind) in enumerate(zip((first, second), kinds, strict=True)):
        write(tensors[seat.weight], found.parts[2 * position].astype(kind))
        if free[position]:
            give_bias(proto, seat, found.parts[2 * position + 1].ravel())
    scale = max(_spread(pair, gathered), 1e-30)
    before, after = (pair.loss(gathered, w) / scale for w in (weights, found))
    return Refit(_name(second), before, after, 0.0, _name(first))


def _name(seat: Seat) -> str:
    return seat.node.name or seat.node.output[0]


def _spread(pair: Pair, gathered: Sequence[Batch]) -> float:
    """Σ of squares of what is wanted behind the bounds, less the channels' means."""
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    count = 0
    for batch in gathered:
        wanted = np.moveaxis(pair.clipped(batch.wanted), pair.second.axis, -1)
        wanted = wanted.reshape(-1, wanted.shape[-1])
        weighted = wanted if batch.weights is None else wanted * batch.weights.reshape(-1, 1)
        total = total + weighted.sum(axis=0, dtype=np.float64)
        squares = squares + (weighted * wanted).sum(axis=0, dtype=np.float64)
        count += len(wanted)
    return float(np.sum(squares - np.square(total) / max(1, count)))


def _weights(proto: ModelProto, couple: Couple) -> Weights:
    """As they are now, float32; zeros for a bias that is not there."""
    tensors = tensors_of(proto)
    parts = []
    for seat in (couple.first, couple.second):
        weight = numpy_helper.to_array(tensors[seat.weight]).astype(np.float32)
        parts += [weight, bias_of(proto, seat, math.prod(seat.shape.matrix(weight).shape[:2])).astype(np.float32)]
    return Weights((parts[0], parts[1], parts[2], parts[3]))


def _activation(proto: ModelProto, couple: Couple) -> Callable[[np.ndarray], np.ndarray]:
    """What is between the two layers, as a function of arrays."""
    if not couple.nodes:
        return lambda between: between
    part = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    part.graph.name = "activation"
    part.graph.node.extend(couple.nodes)
    tensors = tensors_of(proto)
    needed = dict.fromkeys(name for node in couple.nodes for name in node.input if name in tensors)
    for name in needed:
        part.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensors[name]), name))
    source, output = couple.first.layer.output, couple.second.source
    kind = tensors[couple.first.weight].data_type
    part.graph.input.append(helper.make_tensor_value_info(source, kind, None))
    part.graph.output.append(helper.make_tensor_value_info(output, kind, None))
    made_by = session(as_float32(part), optimize=True, threads=0)

    def activation(between: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(made_by.run(None, {source: between})[0])
        except Exception as error:
            raise OnnxPruneError(f"onnxruntime does not run an activation by itself ({first_line(error)})", 4) from error

    return activation


def _gather(plan: Plan, proto: ModelProto, couple: Couple, batches: Batches, known: tuple[Frontier, Frontier], work: float) -> list[Batch]:
    """What the pair reads and should make, of as many samples (of sequences: rows) as there is room and time for."""
    first, second, tensors = couple.first, couple.second, tensors_of(proto)
    shapes = [tuple(tensors[seat.weight].dims) for seat in (first, second)]
    widths = Widths(plan.grouping, plan.remove)
    mine = known[0].look(proto, [name for name in (first.source, second.other) if name])
    original = known[1].look(plan.grouping.model.proto, [second.goal])
    total = sum(1 for _ in batches())
    every, most = 1, 0
    found: list[Batch] = []
    for number, feeds in enumerate(batches()):
        if (number // EVERY) % every:
            continue
        now, then = mine(number, feeds), original(number, feeds)
        wanted = widths.cut(second.goal, then[second.goal])
        made = second.shape.out(first.shape.out(np.shape(now[first.source]), shapes[0]), shapes[1])
        if made != wanted.shape or not wanted.size:  # other places than the original's, by what was computed before
            continue
        arrays = [now[first.source], wanted, *([now[second.other]] if second.other else [])]
        if not most:
            room = _room(proto, couple, arrays[0].shape, wanted.shape, work)
            every = -(-total // room)
            most = max(1, room // total)
        cut = _cut(second, arrays, most, feeds, number)
        if found and second.layer.op in CONVOLUTIONS and cut[0].shape[1:] != found[0].x.shape[1:]:
            continue  # an operator is of one size
        channels = 1 if second.layer.op in CONVOLUTIONS else cut[1].ndim - 1
        weights = emphasis(cut[1], (channels,)) if second.layer.normed else None
        found.append(Batch(cut[0], cut[1], cut[2] if second.other else None, number % EVERY == EVERY - 1, weights))
    return found


def _room(proto: ModelProto, couple: Couple, x: tuple[int, ...], y: tuple[int, ...], work: float) -> int:
    """How many samples, or rows, may be kept of a pair that reads x and makes y, at least 1."""
    tensors = tensors_of(proto)
    shapes = [tuple(tensors[seat.weight].dims) for seat in (couple.first, couple.second)]
    middle = couple.first.shape.out(x, shapes[0])
    units = x[0] if couple.first.layer.op in CONVOLUTIONS else math.prod(y[:-1])
    numbers = (math.prod(x) + 4 * math.prod(middle) + 4 * math.prod(y)) / units
    macs = _macs(couple.first, shapes[0], x, middle) + _macs(couple.second, shapes[1], middle, y)
    return max(1, int(min(ROOM / numbers, work * units / (3 * macs * STEPS * (ITERATIONS + 2)))))


def _macs(seat: Seat, weight: tuple[int, ...], read: tuple[int, ...], made: tuple[int, ...]) -> int:
    """Multiply-accumulates for a batch."""
    if seat.layer.op not in CONVOLUTIONS:
        return math.prod(weight) * math.prod(made[:-1])
    side = read if seat.layer.op == "ConvTranspose" else made
    return math.prod(weight) * side[0] * math.prod(side[2:])


def _cut(seat: Seat, arrays: Sequence[np.ndarray], most: int, feeds: Arrays, number: int) -> list[np.ndarray]:
    """The first samples of a batch, or rows that are chosen at random."""
    if seat.layer.op in CONVOLUTIONS:
        return [np.ascontiguousarray(array[:most], np.float32) for array in arrays]
    places = seat.shape.choose(arrays[1].shape, most, feeds, np.random.default_rng(number))
    rows = [array.reshape(-1, array.shape[-1])[places] for array in arrays]
    return [row.reshape(*[1] * (array.ndim - 2), *row.shape) for row, array in zip(rows, arrays, strict=True)]


def _factor(pair: Pair, weights: Weights, batches: Sequence[Batch], position: int) -> Factor:
    """The preconditioner of one of the layers.  Raises OnnxPruneError where there are too few rows to fit so many features to."""
    shape, weight = pair.shapes[position], weights.parts[2 * position]
    features = shape.features(weight.shape)
    reads = [b.x.shape if position == 0 else pair.shapes[0].out(b.x.shape, weights.parts[0].shape) for b in batches]
    makes = [shape.out(read, weight.shape) for read in reads]
    counts = [shape.places(made) * (made[0] if shape.op in CONVOLUTIONS else 1) for made in makes]
    if sum(counts) < ENOUGH * features:
        raise OnnxPruneError(f"the samples make {sum(counts)} rows for {features} features, {ENOUGH * features} would do", 4)
    many = max(1, max(ROWS, 4 * features) // len(batches))

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for number, (batch, made) in enumerate(zip(batches, makes, strict=True)):
            read = batch.x if position == 0 else pair.activation(pair.between(batch.x, weights))
            places = shape.choose(made, many, {}, np.random.default_rng(number))
            found = shape.rows(read, made, weight.shape[2:] if shape.op in CONVOLUTIONS else (), places)
            if batch.weights is None or shape.op in CONVOLUTIONS:  # whose places need not be those that are weighed
                yield found, None
            else:
                yield found, shape.targets(batch.weights, places)

    return factor(shape, pair.free[position], rows(), sum(counts))

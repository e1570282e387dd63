"""Compensation by least squares, layer after layer: what each reads comes from the pruned model, what it should make from the original.

The targets of a layer whose output goes into a residual Add are what the Add should make less what the other operand is now, so
that the error that has come along the residual stream is taken back in the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from onnxprune.capture import Tap
from onnxprune.cost import count_macs
from onnxprune.evidence import WIDEST
from onnxprune.leastsquares import Fit, shrunk
from onnxprune.linear import CONVOLUTIONS, Geometry, Linear, geometry, linears, made_by
from onnxprune.moments import Moments
from onnxprune.plans import Plan
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays

Batches = Callable[[], Iterable[Arrays]]
ROWS = 65536  # of a layer, or 16 times its features where that is more
FEWEST = 12  # passes
WORK = 3e13  # multiply-accumulates that all passes may take; more layers share a pass where it would be more


@dataclass(frozen=True)
class Refit:
    """A layer that was fitted anew: its node, and the share of its targets' variance that it missed before and after."""

    node: str
    before: float
    after: float
    shrinkage: float


@dataclass(frozen=True)
class Seat:
    """A layer in the pruned model: the node there, and what it reads."""

    layer: Linear
    node: NodeProto
    shape: Geometry
    source: str
    weight: str
    bias: str
    other: str = ""
    narrowed: bool = False


def seats(plan: Plan, pruned: ModelProto) -> list[Seat]:
    """The layers that see less than they did, or read something that has changed, in the order of the graph."""
    model = plan.grouping.model
    made = made_by(pruned.graph.node)
    tensors = tensors_of(pruned)
    changed = {name for name, tensor in tensors.items() if name in model.tensors and list(tensor.dims) != list(model.tensors[name].dims)}
    originally = made_by(model.main)
    for node in pruned.graph.node:
        old = originally.get(node.output[0]) if node.output else None
        fresh = old is None or list(old.input) != list(node.input)
        if fresh or changed.intersection(node.input):
            changed.update(node.output)
    found = []
    for layer in linears(model):
        name = model.main[layer.node].output[0]
        node = made.get(name)
        if node is None or node.op_type != layer.op or layer.weight not in node.input or layer.weight not in tensors:
            continue
        shape = geometry(node, layer.weight, len(tensors[layer.weight].dims))
        source = node.input[0 if node.input[1] == layer.weight else 1]
        if layer.add >= 0:
            add = made.get(layer.output)
            if add is None or layer.bias not in add.input:
                continue
        other = ""
        if layer.added is not None:
            add = made.get(layer.added[0])
            if add is not None and add.op_type == "Add" and layer.output in add.input:
                other = add.input[1 - list(add.input).index(layer.output)]
        if source in changed or other in changed:
            wide = shape.matrix(numpy_helper.to_array(tensors[layer.weight])).shape[2]
            if wide > WIDEST:
                continue
            whole = geometry(model.main[layer.node], layer.weight, len(tensors[layer.weight].dims))
            narrowed = wide < whole.matrix(model.array(layer.weight)).shape[2]
            found.append(Seat(layer, node, shape, source, layer.weight, layer.bias, other, narrowed))
    return found


def tensors_of(proto: ModelProto) -> dict[str, TensorProto]:
    """The initializers and Constants of the main graph."""
    found = {t.name: t for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found


Solve = Callable[[Moments, Moments, np.ndarray, np.ndarray, bool], Fit]


def reconstruct(
    plan: Plan,
    pruned: ModelProto,
    batches: Batches,
    solve: Solve = shrunk,
    held: float = 0.25,
    progress: Callable[[str], None] | None = None,
) -> tuple[ModelProto, list[Refit]]:
    """A copy of the pruned model with the weights and biases of its layers fitted to the original, layer after layer.

    batches: yields feeds anew at each call; every fourth batch (`held`: the share) chooses the shrinkage.  Tensors keep their names
    and shapes; a Conv, ConvTranspose or Gemm without a bias gets one.  Where a pass for each layer would take long, several layers
    share one, and only layers that lost inputs are fitted.
    """
    out = ModelProto()
    out.CopyFrom(pruned)
    widths = Widths(plan.grouping, plan.remove)
    sizes = [max((len(v) for v in feeds.values() if np.ndim(v)), default=1) for feeds in batches()]
    stages = _stages(plan, seats(plan, out), sum(sizes))
    report: list[Refit] = []
    for number, stage in enumerate(stages):
        if progress:
            progress(f"fitting the layers that stay, pass {number + 1} of {len(stages)}")
        for seat, (seen, unseen) in zip(stage, _moments(plan, out, widths, stage, batches, len(sizes), held), strict=True):
            fitted = _fit(out, seat, seen, unseen, solve)
            report.append(Refit(seat.node.name or seat.node.output[0], fitted.before, fitted.after, fitted.shrinkage))
    return out, report


def _stages(plan: Plan, todo: list[Seat], samples: int) -> list[list[Seat]]:
    """One layer a pass, or several where a pass each would be more than WORK."""
    model = plan.grouping.model
    batch = next((shape[0] for shape in model.input_shapes.values() if shape), 1)
    once = 0.8 * count_macs(model) / max(1, batch) * max(1, samples)
    passes = max(FEWEST, int(WORK / max(once, 1.0)))
    if passes < len(todo):
        todo = [seat for seat in todo if seat.narrowed] or todo
    many = -(-len(todo) // passes)
    return [todo[i : i + many] for i in range(0, len(todo), max(1, many))]


def _moments(
    plan: Plan, pruned: ModelProto, widths: Widths, stage: Sequence[Seat], batches: Batches, total: int, held: float
) -> list[tuple[Moments, Moments]]:
    """Of each layer of a stage: the sums over the batches to fit to, and over those to choose by."""
    tensors = tensors_of(pruned)
    mine = Tap(pruned, [name for seat in stage for name in (seat.source, seat.other) if name])
    original = Tap(plan.grouping.model.proto, [_goal(seat) for seat in stage])
    weights = [numpy_helper.to_array(tensors[seat.weight]) for seat in stage]
    found = []
    for seat, weight in zip(stage, weights, strict=True):
        groups, wide, features = seat.shape.matrix(weight).shape
        found.append((Moments.zero(groups, features, wide), Moments.zero(groups, features, wide)))
    every = max(2, round(1 / held))
    for number, feeds in enumerate(batches()):
        now, then = mine.run(feeds), original.run(feeds)
        for position, (seat, weight) in enumerate(zip(stage, weights, strict=True)):
            goal = _kept(then[_goal(seat)], widths, _goal(seat))
            if seat.other:
                goal = goal - now[seat.other]
            many = max(ROWS, 16 * found[position][0].x.shape[1]) // total
            places = seat.shape.choose(goal.shape, many, feeds, np.random.default_rng([position, number]))
            kernel = weight.shape[2:] if seat.shape.op in CONVOLUTIONS else ()
            rows = seat.shape.rows(now[seat.source], goal.shape, kernel, places)
            found[position][number % every == every - 1].add(rows, seat.shape.targets(goal, places))
    return found


def _goal(seat: Seat) -> str:
    return seat.layer.added[0] if seat.other and seat.layer.added else seat.layer.output


def _kept(array: np.ndarray, widths: Widths, name: str) -> np.ndarray:
    """A value of the original without the removed units."""
    for axis in range(array.ndim):
        mask = widths.mask((name, axis))
        if mask is not None:
            array = np.compress(mask, array, axis=axis)
    return array


def _fit(proto: ModelProto, seat: Seat, seen: Moments, held: Moments, solve: Solve) -> Fit:
    """Fit one layer, and write what was found into the model."""
    tensors = tensors_of(proto)
    weight = numpy_helper.to_array(tensors[seat.weight])
    matrix = seat.shape.matrix(weight)
    groups, wide, _ = matrix.shape
    given = numpy_helper.to_array(tensors[seat.bias]) if seat.bias else None
    bias = np.zeros((groups, wide)) if given is None else np.asarray(given, np.float64).reshape(groups, wide)
    found = solve(seen, held, matrix, bias, seat.layer.takes_bias)
    write(tensors[seat.weight], seat.shape.weight(found.matrix, weight))
    if seat.layer.takes_bias:
        shape, kind = (given.shape, given.dtype) if given is not None else ((found.bias.size,), weight.dtype)
        give_bias(proto, seat, found.bias.reshape(shape).astype(kind))
    return found


def give_bias(proto: ModelProto, seat: Seat, bias: np.ndarray) -> None:
    """Write a layer's bias: into its tensor if no other node reads it, else into one of its own."""
    made = made_by(proto.graph.node)
    node = made[seat.layer.output if seat.layer.add >= 0 else seat.node.output[0]]
    readers = sum(list(other.input).count(seat.bias) for other in proto.graph.node) if seat.bias else 0
    if readers == 1:
        write(tensors_of(proto)[seat.bias], bias)
        return
    taken = {t.name for t in proto.graph.initializer} | set(made) | {v.name for v in proto.graph.input}
    name = next(n for i in range(len(taken) + 1) if (n := f"{seat.weight}_bias{i or ''}") not in taken)
    proto.graph.initializer.append(numpy_helper.from_array(bias, name))
    if seat.bias:
        node.input[list(node.input).index(seat.bias)] = name
    else:
        del node.input[2:]
        node.input.append(name)


def write(tensor: TensorProto, array: np.ndarray) -> None:
    kind, name = tensor.data_type, tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
    tensor.data_type = kind

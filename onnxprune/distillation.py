"""The whole pruned model, fitted to what the original makes of the samples by its gradient: distillation, without labels.

minimize  mean over outputs o of ‖y_o − z_o‖²/V_o  +  HIDDEN · mean over streams h of ‖y_h − z_h‖²_w/V_h

over the weights, biases and norms' scales (y: of the pruned model, z: of the original, V: the spread of z).  The logits stand for what a
Softmax or Sigmoid makes of them at the end (Ba and Caruana 2014, arXiv:1312.6184), the streams are what residual Adds make, where a norm
reads them with rows weighted as in `emphasis` (hints: Romero et al. 2015, arXiv:1412.6550).  Adam (Kingma and Ba 2015,
arXiv:1412.6980), each tensor's step in proportion to its own size, over a few passes of the samples with a rate that falls to 0.

The gradient is checked against a finite difference on the model itself before it is used, and what comes out counts only where it
does better on samples that were held out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune.adjoints  # noqa: F401  registers the rules
from onnxprune.capture import Tap, towards
from onnxprune.cost import count_macs
from onnxprune.emphasis import emphasis
from onnxprune.errors import OnnxPruneError
from onnxprune.gradients import Backward, backward
from onnxprune.linear import CONVOLUTIONS, live, made_by
from onnxprune.plans import Plan
from onnxprune.reconstruction import Refit
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays, as_float32, first_line, session, widened
from onnxprune.samples import Samples
from onnxprune.scopes import captured
from onnxprune.seats import all_seats, tensors_of, write

Progress = Callable[[str], None]
Changes = dict[str, np.ndarray]
HIDDEN = 1.0
HELD = 1 / 8  # of the samples
RATE = 2e-3  # of a tensor's root mean square, a step
LEAST = 1e-2  # the root mean square of tensors that are smaller
WORK = 3e13  # multiply-accumulates that all passes may take
PASSES = 20
WARM = 20  # steps until the rate is reached
MOMENTS = (0.9, 0.99)
AGREES = 0.1  # how far the gradient and the finite difference may be apart
SMALL = 65536  # numbers of a constant that a rule may look at
WEIGHED = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    **dict.fromkeys(("LayerNormalization", "BatchNormalization", "InstanceNormalization"), (1, 2)),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization", "PRelu"), (1,)),
    **dict.fromkeys(("MatMul", "Einsum", "Add", "Mul"), (0, 1)),
    "Sub": (1,),
}
BESIDE = ("Add", "Mul", "Sub")  # of constants they take those with one number a channel
LAST = ("Softmax", "LogSoftmax", "Sigmoid")


@dataclass(frozen=True)
class Target:
    """A value of both models; share: of the loss; final: an output, or its logits; normed: a norm reads it."""

    name: str
    share: float
    final: bool = False
    normed: bool = False


def targets(plan: Plan, pruned: ModelProto) -> list[Target]:
    """The outputs, or the logits behind them, and what residual Adds make."""
    model = plan.grouping.model
    made, originally = made_by(pruned.graph.node), made_by(model.main)
    outputs = []
    for value in pruned.graph.output:
        node, old = made.get(value.name), originally.get(value.name)
        last = node is not None and old is not None and node.op_type in LAST and list(node.input) == list(old.input)
        outputs.append(node.input[0] if last and node is not None else value.name)
    streams = {
        seat.layer.added[0]: seat.layer.normed
        for seat in all_seats(plan, pruned)
        if seat.layer.added is not None and seat.layer.added[0] in made and seat.layer.added[0] not in outputs
    }
    return [
        *(Target(name, 1 / len(outputs), final=True) for name in dict.fromkeys(outputs)),
        *(Target(name, HIDDEN / len(streams), normed=normed) for name, normed in streams.items()),
    ]


def tunable(proto: ModelProto) -> list[str]:
    """The initializers that are nothing but weights, biases or scales of the main graph's layers and norms."""
    tensors = {t.name: t for t in proto.graph.initializer}
    good: set[str] = set()
    bad = {v.name for v in (*proto.graph.output, *proto.graph.input)}
    for node in proto.graph.node:
        bad |= captured(node)
        for position, name in enumerate(node.input):
            if name not in tensors:
                continue
            dims = tensors[name].dims
            wide = sum(n > 1 for n in dims)
            fits = wide == 1 if node.op_type in BESIDE else wide > 0
            (good if fits and position in WEIGHED.get(node.op_type, ()) and node.domain in ("", "ai.onnx") else bad).add(name)
    return [name for name, tensor in tensors.items() if name in good - bad and tensor.data_type == TensorProto.FLOAT]


def _lifted(proto: ModelProto) -> ModelProto:
    """A float32 copy whose constants are all initializers."""
    copy = as_float32(proto)
    del copy.graph.value_info[:]
    for i in reversed(range(len(copy.graph.node))):
        node = copy.graph.node[i]
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None and value.data_type:
            copy.graph.initializer.add().CopyFrom(value)
            copy.graph.initializer[-1].name = node.output[0]
            del copy.graph.node[i]
    return copy


class Forward:
    """A model cut down to what makes some values, with weights that are given at each run."""

    def __init__(self, proto: ModelProto, values: Iterable[str], weights: Iterable[str]) -> None:
        part = towards(proto, [*dict.fromkeys(values)])
        part.ir_version = max(part.ir_version, 4)
        mine = set(weights)
        given = [t for t in part.graph.initializer if t.name in mine]
        kept = [t for t in part.graph.initializer if t.name not in mine]
        part.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in given)
        del part.graph.initializer[:]
        part.graph.initializer.extend(kept)
        self._session: ort.InferenceSession = session(part, optimize=True, threads=0)
        self._inputs = [v.name for v in part.graph.input]
        self._outputs = [v.name for v in part.graph.output]

    def run(self, feeds: Arrays, weights: Arrays) -> dict[str, np.ndarray]:
        """The values, and the feeds and weights themselves."""
        given = {name: widened(array) for name, array in feeds.items()} | dict(weights)
        try:
            found = self._session.run(self._outputs, {name: given[name] for name in self._inputs if name in given})
        except Exception as error:
            raise OnnxPruneError(f"onnxruntime does not run the pruned model ({first_line(error)})", 4) from error
        return given | dict(zip(self._outputs, found, strict=True))


@dataclass(frozen=True)
class Lesson:
    """What is fitted to what: the original, the pruned model forward and backward, and how far targets spread.

    spreads: of each target, in a batch.
    """

    original: Tap
    forward: Forward
    back: ort.InferenceSession
    graph: Backward
    widths: Widths
    wanted: Sequence[Target]
    spreads: Mapping[str, float]

    def gradient(self, feeds: Arrays, weights: Arrays) -> tuple[float, Changes]:
        """The loss of a batch, and how it changes with the weights."""
        now = self.forward.run(feeds, weights)
        loss, starts = 0.0, {}
        for target, missed, counts in self._missed(feeds, now):
            share = target.share / self.spreads[target.name]
            weighed = missed * counts
            loss += share * float(np.sum(missed * weighed, dtype=np.float64))
            if target.name in self.graph.starts:
                starts[self.graph.starts[target.name]] = (2 * share * weighed).astype(np.float32)
        given = starts | {name: now[name] for name in self.graph.reads}
        found = self.back.run(list(self.graph.weights.values()), given)
        return loss, dict(zip(self.graph.weights, (np.asarray(f) for f in found), strict=True))

    def losses(self, batches: Iterable[Arrays], weights: Arrays) -> dict[str, float]:
        """{target: its share of the loss} over batches."""
        found: Counter[str] = Counter()
        many = 0
        for feeds in batches:
            many += 1
            for target, missed, counts in self._missed(feeds, self.forward.run(feeds, weights)):
                found[target.name] += target.share / self.spreads[target.name] * float(np.sum(missed * missed * counts, dtype=np.float64))
        return {name: total / max(1, many) for name, total in found.items()}

    def _missed(self, feeds: Arrays, now: Arrays) -> Iterable[tuple[Target, np.ndarray, np.ndarray]]:
        then = self.original.run(feeds)
        for target in self.wanted:
            goal = self.widths.cut(target.name, then[target.name])
            yield target, now[target.name] - goal, weighing(target, goal, feeds)


def weighing(target: Target, goal: np.ndarray, feeds: Arrays) -> np.ndarray:
    """How much each position of a target counts, with an axis of 1 for the channels."""
    if not target.normed:
        return np.ones((1,) * goal.ndim, np.float32)
    counts = emphasis(goal, (goal.ndim - 1,))
    on = live(feeds, goal.shape, counts.size)
    if on is not None:
        kept = np.zeros(counts.size, np.float32)
        kept[on] = 1
        counts = counts * kept.reshape(counts.shape)
    return counts


def distilled(
    plan: Plan, pruned: ModelProto, samples: Samples, batch: int, progress: Progress | None = None, seed: int = 0
) -> tuple[ModelProto, list[Refit]]:
    """A copy of the pruned model with other weights, and what its outputs miss on held-out samples before and after.

    The model as it is, and nothing, where no weight's gradient is known, or where nothing better is found.
    """
    say = progress or (lambda text: None)
    seen, held = samples.split(1 - HELD)
    lifted = _lifted(pruned)
    weights = {t.name: numpy_helper.to_array(t).copy() for t in lifted.graph.initializer if t.name in set(tunable(lifted))}
    first = next(seen.batches(batch), None)
    if first is None or held.count == samples.count:
        say("the model is not distilled: there are too few samples to hold some out")
        return pruned, []
    alike = [v.shape for v in first.values()]

    def batches(some: Samples) -> Iterable[Arrays]:
        return (feeds for feeds in some.batches(batch) if [v.shape for v in feeds.values()] == alike)

    tests = list(batches(held)) or [next(held.batches(batch))]
    lesson = _lesson(plan, lifted, weights, list(batches(seen.part(0, 4 * batch))))
    if lesson is None:
        say("the model is not distilled: no rule says how what it makes changes with its weights")
        return pruned, []
    mine = {name: weights[name] for name in lesson.graph.weights}
    if not _agrees(lesson, first, mine):
        say("the model is not distilled: its gradient is not what a finite difference says")
        return pruned, []
    outputs = [target.name for target in lesson.wanted if target.final]
    start = lesson.losses(tests, mine)
    model = plan.grouping.model
    whole = next((shape[0] for shape in model.input_shapes.values() if shape), 1)
    once = 4 * count_macs(model) / max(1, whole) * seen.count
    passes = max(1, min(PASSES, int(WORK / max(once, 1.0))))
    best, least = mine, sum(start.values())
    steps = passes * max(1, seen.count // batch)
    averages = [{name: np.zeros_like(array) for name, array in mine.items()} for _ in range(2)]
    step = 0
    for turn in range(passes):
        for feeds in batches(seen.shuffled(seed * 1009 + turn)):
            step += 1
            rate = RATE * min(1, step / WARM) * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
            _, change = lesson.gradient(feeds, mine)
            mine = _stepped(mine, change, averages, step, rate)
        losses = lesson.losses(tests, mine)
        total = sum(losses.values())
        say(f"distilling, pass {turn + 1} of {passes}: the outputs miss {sum(losses[o] for o in outputs):.4f}, all {total:.4f} (start {sum(start[o] for o in outputs):.4f}, {sum(start.values()):.4f})")
        if total < least:
            best, least = mine, total
    if least >= sum(start.values()):
        return pruned, []
    out = ModelProto()
    out.CopyFrom(pruned)
    tensors = tensors_of(out)
    for name, array in best.items():
        write(tensors[name], array.astype(numpy_helper.to_array(tensors[name]).dtype))
    end = lesson.losses(tests, best)
    return out, [Refit(name, start[name], end[name], 0.0) for name in outputs]


def _lesson(plan: Plan, lifted: ModelProto, weights: Arrays, some: Sequence[Arrays]) -> Lesson | None:
    """some: batches to see shapes on, and how far targets spread."""
    wanted = targets(plan, lifted)
    everything = Forward(lifted, [name for node in lifted.graph.node for name in node.output if name], weights)
    runs = [everything.run(feeds, weights) for feeds in some[:2]]
    arrays = {t.name: numpy_helper.to_array(t) for t in lifted.graph.initializer if t.name not in weights}
    known = {name: array for name, array in runs[0].items() if isinstance(array, np.ndarray)} | arrays | dict(weights)
    shapes = {name: array.shape for name, array in known.items()}
    floats = {name for name, array in known.items() if array.dtype == np.float32}
    steady = {k: v for k, v in known.items() if v.dtype.kind in "iub" and v.size <= SMALL and all(np.array_equal(v, run.get(k, v)) for run in runs)}
    steady |= {name: array for name, array in arrays.items() if array.size <= SMALL}
    del runs, known, everything
    wanted = [target for target in wanted if target.name in floats]
    graph = backward(lifted, [t.name for t in wanted], list(weights), shapes, steady, floats)
    if not graph.weights:
        return None
    original = Tap(plan.grouping.model.proto, [t.name for t in wanted])
    widths = Widths(plan.grouping, plan.remove)
    spreads = {target.name: 0.0 for target in wanted}
    for feeds in some:
        then = original.run(feeds)
        for target in wanted:
            goal = widths.cut(target.name, then[target.name])
            spreads[target.name] += max(_spread(goal, weighing(target, goal, feeds)), 1e-30) / len(some)
    forward = Forward(lifted, [*(t.name for t in wanted), *graph.reads], weights)
    return Lesson(original, forward, session(graph.model, optimize=True, threads=0), graph, widths, wanted, spreads)


def _spread(goal: np.ndarray, counts: np.ndarray) -> float:
    """Σ of weighted squares of what differs between samples, or between all numbers where there is one sample."""
    mean = goal.mean(axis=0, keepdims=True) if len(goal) > 1 else goal.mean()
    return float(np.sum(np.square(goal - mean) * counts, dtype=np.float64))


def _agrees(lesson: Lesson, feeds: Arrays, weights: Changes) -> bool:
    """Whether the loss changes along the gradient as the gradient says."""
    rng = np.random.default_rng(0)
    loss, change = lesson.gradient(feeds, weights)
    if not all(np.isfinite(array).all() for array in change.values()):
        return False
    towards_ = {k: v * rng.uniform(0.5, 1.5, v.shape).astype(np.float32) for k, v in change.items()}
    slope = sum(float(np.sum(v * towards_[k], dtype=np.float64)) for k, v in change.items())
    if slope == 0:
        return False
    for size in (1e-2, 1e-3, 1e-1):
        length = size * loss / slope
        ends = [lesson.gradient(feeds, {k: w + np.float32(s * length) * towards_[k] for k, w in weights.items()})[0] for s in (1, -1)]
        if abs((ends[0] - ends[1]) / (2 * length) - slope) < AGREES * slope:
            return True
    return False


def _stepped(weights: Changes, change: Changes, averages: Sequence[Changes], step: int, rate: float) -> Changes:
    """One step of Adam; averages: of the gradient and of its square, brought up to date."""
    found = {}
    first, second = MOMENTS
    for name, array in weights.items():
        g = change[name]
        mean, square = averages[0][name], averages[1][name]
        mean += (1 - first) * (g - mean)
        square += (1 - second) * (g * g - square)
        size = max(float(np.sqrt(np.mean(np.square(array)))), LEAST)
        scale = rate * size / (1 - first**step)
        found[name] = array - np.float32(scale) * mean / (np.sqrt(square / (1 - second**step)) + np.float32(1e-12))
    return found

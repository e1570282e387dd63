"""What a pruned model is to learn from the original: values of both, how far apart they are on samples, and the gradient of that.

loss = mean over outputs o of ‖y_o − z_o‖²/V_o  +  HIDDEN · mean over streams h of ‖y_h − z_h‖²_w/V_h

y: of the pruned model, z: of the original, V: the spread of z.  Logits stand for what a Softmax or Sigmoid makes of them at the end (Ba
and Caruana 2014, arXiv:1312.6184).  Streams are what residual Adds make (hints: Romero et al. 2015, arXiv:1412.6550); where a norm
reads them, their rows are weighted as in `emphasis`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import onnxprune.adjoints  # noqa: F401  registers the rules
from onnxprune.capture import Tap, towards
from onnxprune.emphasis import emphasis
from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.gradients import Backward, backward
from onnxprune.importer import FLOATS
from onnxprune.linear import CONVOLUTIONS, RECURRENT, live, made_by
from onnxprune.plans import Plan
from onnxprune.recall import Recall
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays, as_float32, first_line, session, widened
from onnxprune.scopes import captured
from onnxprune.seats import all_seats, tensors_of

HIDDEN = 10.0
ROUNDING = 1e-8  # of the sum of squares
MASKING = 1e4  # as large as no bias is
SMALL = 65536  # numbers of a constant that a rule may look at
LAST = ("Softmax", "LogSoftmax", "Sigmoid")
DRAWN = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
WEIGHED = {  # which inputs of which operators are weights
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    **dict.fromkeys(("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)),
    **dict.fromkeys(RECURRENT, (1, 2, 3)),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization", "PRelu"), (1,)),
    **dict.fromkeys(("MatMul", "Einsum", "Add", "Mul"), (0, 1)),
    "Sub": (1,),
}
BESIDE = ("Add", "Mul", "Sub")  # of their constants those with one number a channel, behind a layer


@dataclass(frozen=True)
class Target:
    """A value of both models; share: of the loss; final: an output, or its logits; normed: the axis that a norm is over which reads it."""

    name: str
    share: float
    final: bool = False
    normed: int | None = None
    logits: bool = False

    def counted(self, goal: np.ndarray) -> np.ndarray:
        """What is to be made, with 0 for what is no number, and for logits that are so far off that they mask a class."""
        off = ~np.isfinite(goal)
        if self.logits:
            off |= np.abs(goal) >= MASKING
        return np.where(off, np.float32(0), goal) if off.any() else goal


def targets(plan: Plan, pruned: ModelProto) -> list[Target]:
    """The outputs, or the logits behind them, and what residual Adds make."""
    made, originally = made_by(pruned.graph.node), made_by(plan.grouping.model.main)
    outputs, logits, constants = list[str](), set[str](), tensors_of(pruned)
    for value in pruned.graph.output:
        if value.name in constants or value.type.tensor_type.elem_type not in (*FLOATS, TensorProto.UNDEFINED):
            continue
        node, old = made.get(value.name), originally.get(value.name)
        last = node is not None and old is not None and node.op_type in LAST and list(node.input) == list(old.input)
        outputs.append(node.input[0] if last and node is not None else value.name)
        logits.update(outputs[-1:] if last else ())
    streams = {
        seat.layer.added[0]: (1 if seat.layer.op in CONVOLUTIONS else -1) if seat.layer.normed else None
        for seat in all_seats(plan, pruned)
        if seat.layer.added is not None and seat.layer.added[0] in made and seat.layer.added[0] not in outputs
    }
    return [
        *(Target(name, 1 / len(outputs), final=True, logits=name in logits) for name in dict.fromkeys(outputs)),
        *(Target(name, HIDDEN / len(streams), normed=normed) for name, normed in streams.items()),
    ]


def trainable(proto: ModelProto) -> list[str]:
    """The initializers that are nothing but weights, biases or scales of the main graph's layers and norms, turned or not."""
    tensors = {t.name: t for t in proto.graph.initializer}
    forms = _forms(proto, tensors)
    widths, learned = _learned(proto, tensors, forms)
    good: set[str] = set()
    bad = {v.name for v in proto.graph.input} | {forms[v.name].tensor for v in proto.graph.output if v.name in forms}
    for node in proto.graph.node:
        bad |= {forms[name].tensor for name in captured(node) if name in forms}
        if node.output and node.output[0] in forms:
            continue
        for position, name in enumerate(node.input):
            if name not in forms:
                continue
            tensor, dims = forms[name]
            wide = [n for n in dims if n > 1]
            if node.op_type in BESIDE:
                fits = len(wide) == 1 and wide[0] in widths and bool(learned.intersection(node.input)) and _moderate(tensors[tensor])
            else:
                fits = bool(wide) and not _outer(node, position, dims)
            (good if fits and position in WEIGHED.get(node.op_type, ()) and node.domain in ("", "ai.onnx") else bad).add(tensor)
    return [name for name, tensor in tensors.items() if name in good - bad and tensor.data_type == TensorProto.FLOAT]


class Form(NamedTuple):
    """What a node reads of an initializer: itself, or what Identity, Cast and Transpose make of it; dims: the shape there."""

    tensor: str
    dims: tuple[int, ...]


def _forms(proto: ModelProto, tensors: Mapping[str, TensorProto]) -> dict[str, Form]:
    """{value: its form} of all initializers and what is made of them alone."""
    found = {name: Form(name, tuple(tensor.dims)) for name, tensor in tensors.items()}
    for node in proto.graph.node:
        if node.op_type in ("Cast", "Identity", "Transpose") and node.domain in ("", "ai.onnx") and node.input[0] in found:
            tensor, dims = found[node.input[0]]
            if node.op_type == "Transpose":
                dims = tuple(dims[i] for i in attributes(node).get("perm", range(len(dims))[::-1]))
            found[node.output[0]] = Form(tensor, dims)
    return found


def _learned(proto: ModelProto, tensors: Mapping[str, TensorProto], forms: Mapping[str, Form]) -> tuple[set[int], set[str]]:
    """How wide layers, norms and embeddings are, and the values behind any of them.

    Constants before them prepare the input (a mean and a deviation, frequencies that positions are multiplied by), and ones along
    another axis than that of channels belong to places (masks, strides of anchors).
    """
    widths: set[int] = set()
    learned: set[str] = set()
    for node in proto.graph.node:
        layer = node.op_type in (*WEIGHED, *RECURRENT) and node.op_type not in BESIDE
        layer = layer or (node.op_type == "Gather" and node.input[0] in tensors and tensors[node.input[0]].data_type == TensorProto.FLOAT)
        for position, name in enumerate(node.input):
            if layer and name in forms and not _outer(node, position, forms[name].dims):
                widths.update(forms[name].dims)
        if layer or (node.op_type not in ("Shape", "Size") and (learned.intersection(node.input) or learned & captured(node))):
            learned.update(name for name in node.output if name)
    return widths, learned


def _outer(node: NodeProto, position: int, dims: Sequence[int]) -> bool:
    """Whether a product sums over nothing."""
    if node.op_type == "MatMul":
        return len(dims) > 1 and dims[-1 if position == 0 else -2] == 1
    return node.op_type == "Einsum" and sum(n > 1 for n in dims) < 2


def _moderate(tensor: TensorProto) -> bool:
    """No mask: 0 where something counts, and something very negative elsewhere."""
    array = numpy_helper.to_array(tensor)
    return bool(np.isfinite(array).all() and np.abs(array).max(initial=0) < MASKING)


def with_initializers(proto: ModelProto, given: Collection[str] = ()) -> ModelProto:
    """A float32 copy whose constant tensors are all initializers, and none of them an input that may be given instead.

    given: those that are given instead; they are inputs alone.
    """
    copy = as_float32(proto)
    del copy.graph.value_info[:]
    for i in reversed(range(len(copy.graph.initializer))):
        if copy.graph.initializer[i].name in given:
            del copy.graph.initializer[i]
    stored = {t.name for t in copy.graph.initializer}
    for i in reversed(range(len(copy.graph.input))):
        if copy.graph.input[i].name in stored:
            del copy.graph.input[i]
    for i in reversed(range(len(copy.graph.node))):
        node = copy.graph.node[i]
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            copy.graph.initializer.add().CopyFrom(value)
            copy.graph.initializer[-1].name = node.output[0]
            del copy.graph.node[i]
    return copy


class Forward:
    """A model cut down to what makes some values, with weights that are given at each run.

    Raises OnnxPruneError (exit code 4) where onnxruntime does not take or run it.
    """

    def __init__(self, proto: ModelProto, values: Iterable[str], weights: Iterable[str]) -> None:
        part, mine = towards(proto, [*dict.fromkeys(values)]), set(weights)
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
    """The original, the pruned model forward and backward, and what of both is compared; spreads: of each target in a batch."""

    original: Recall
    forward: Forward
    back: ort.InferenceSession
    graph: Backward
    widths: Widths
    wanted: Sequence[Target]
    spreads: Mapping[str, float]

    def gradient(self, feeds: Arrays, weights: Arrays) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch, and how it changes with each weight.

        Raises OnnxPruneError (exit code 4) where onnxruntime does not run the backward pass.
        """
        now = self.forward.run(feeds, weights)
        loss, given = 0.0, {name: now[name] for name in self.graph.reads}
        for target, missed, counts in self._missed(feeds, now):
            share = target.share / self.spreads[target.name]
            weighed = missed * counts
            loss += share * float(np.sum(missed * weighed, dtype=np.float64))
            if target.name in self.graph.starts:
                given[self.graph.starts[target.name]] = np.asarray(2 * share * weighed, np.float32)
        try:
            found = self.back.run(list(self.graph.weights.values()), given)
        except Exception as error:
            raise OnnxPruneError(f"onnxruntime does not run the backward pass ({first_line(error)})", 4) from error
        return loss, {name: np.asarray(change) for name, change in zip(self.graph.weights, found, strict=True)}

    def losses(self, batches: Sequence[Arrays], weights: Arrays) -> dict[str, float]:
        """What each target adds to the loss, on average over batches."""
        found = {target.name: 0.0 for target in self.wanted}
        for feeds in batches:
            for target, missed, counts in self._missed(feeds, self.forward.run(feeds, weights)):
                total = float(np.sum(missed * missed * counts, dtype=np.float64))
                found[target.name] += target.share / self.spreads[target.name] * total / len(batches)
        return found

    def _missed(self, feeds: Arrays, now: Arrays) -> Iterator[tuple[Target, np.ndarray, np.ndarray]]:
        then = self.original.run(feeds)
        for target in self.wanted:
            goal = self.widths.cut(target.name, then[target.name])
            _check_sizes(target.name, goal.shape, now[target.name].shape)
            counted = target.counted(goal)
            missed = now[target.name] - goal
            yield target, missed if counted is goal else np.where(counted == goal, missed, np.float32(0)), _counts(target, counted, feeds)


def lesson(plan: Plan, pruned: ModelProto, weights: Arrays, some: Sequence[Arrays]) -> Lesson | None:
    """pruned: with all its constants as initializers; some: batches, all of one size, to see shapes and spreads on.

    None where the gradient of no weight is known.  Raises OnnxPruneError (exit code 4) where onnxruntime does not run a part of it, or
    what is compared has other sizes from batch to batch.
    """
    everything = Forward(pruned, [name for node in pruned.graph.node for name in node.output if name], weights)
    seen = everything.run(some[0], weights)
    constants = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer if t.name not in weights}
    known = {name: array for name, array in seen.items() if isinstance(array, np.ndarray)} | constants
    shapes = {name: array.shape for name, array in known.items()}
    floats = {name for name, array in known.items() if array.dtype == np.float32}
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in known.items()}
    free = _free(pruned)
    steady = {name: array for name, array in known.items() if array.dtype.kind in "iub" and array.size <= SMALL and name not in free}
    del seen, known, everything
    made = [name for name in made_by(pruned.graph.node) if name in steady]
    for feeds in some[1:2] if made else ():  # sizes that depend on the samples are not the same again
        again = Forward(pruned, made, weights).run(feeds, weights)
        steady = {name: array for name, array in steady.items() if np.array_equal(array, again.get(name, array))}
    steady |= {name: array for name, array in constants.items() if array.size <= SMALL}
    wanted = [target for target in targets(plan, pruned) if target.name in floats and 0 not in shapes[target.name]]
    graph = backward(pruned, [target.name for target in wanted], list(weights), shapes, steady, floats, kinds)
    if not graph.weights:
        return None
    original = Recall(Tap(plan.grouping.model.proto, [target.name for target in wanted]))
    widths = Widths(plan.grouping, plan.remove)
    spreads = {target.name: 0.0 for target in wanted}
    middles: dict[str, np.ndarray] = {}
    for then in (original.run(feeds) for feeds in some):
        for target in wanted:
            goal = target.counted(widths.cut(target.name, then[target.name]))
            _check_sizes(target.name, goal.shape, shapes[target.name])
            middles[target.name] = middles.get(target.name, np.float32(0)) + _middle(goal) / len(some)
    for feeds, then in ((feeds, original.run(feeds)) for feeds in some):
        for target in wanted:
            goal = target.counted(widths.cut(target.name, then[target.name]))
            apart = goal.ndim > 0 and len(goal) > 1  # samples of one batch
            middle = _middle(goal) if apart else middles[target.name] if len(some) > 1 else goal.mean()
            spreads[target.name] += _spread(goal, middle, _counts(target, goal, feeds)) / len(some)
    forward = Forward(pruned, [*(target.name for target in wanted), *graph.reads], weights)
    return Lesson(original, forward, session(graph.model, optimize=True, threads=0), graph, widths, wanted, spreads)


def _free(proto: ModelProto) -> set[str]:
    """The values that depend on what the samples are, and not only on their sizes."""
    free = {v.name for v in proto.graph.input}
    for node in proto.graph.node:
        if node.op_type in DRAWN or (node.op_type not in ("Shape", "Size") and (free.intersection(node.input) or free & captured(node))):
            free.update(name for name in node.output if name)
    return free


def _counts(target: Target, goal: np.ndarray, feeds: Arrays) -> np.ndarray:
    """How much each position of a target counts: of sequences those that a mask leaves on."""
    if target.normed is None:
        return np.ones((1,) * goal.ndim, np.float32)
    counts = emphasis(goal, (target.normed % goal.ndim,))
    on = live(feeds, goal.shape, counts.size) if target.normed == -1 else None
    if on is not None:
        kept = np.zeros(counts.size, np.float32)
        kept[on] = 1
        counts = counts * kept.reshape(counts.shape)
    return counts


def _check_sizes(name: str, *shapes: tuple[int, ...]) -> None:
    """Of batches that are alike in size; where padding is cut off at the longest sample, what is made of them is not."""
    if len(set(shapes)) > 1:
        raise OnnxPruneError(f"the sizes of {name!r} differ from batch to batch", 4)


def _middle(goal: np.ndarray) -> np.ndarray:
    """The mean of the samples of a batch."""
    return np.asarray(goal.mean(axis=0, keepdims=True) if goal.ndim else goal)


def _spread(goal: np.ndarray, middle: np.ndarray, counts: np.ndarray) -> float:
    """Σ of weighted squares of what differs between samples, or between all numbers where there is one sample.

    Not less than rounding makes of values that are the same for all samples.
    """
    apart, size = (float(np.sum(np.square(array) * counts, dtype=np.float64)) for array in (goal - middle, goal))
    return max(apart, ROUNDING * size, 1e-30)

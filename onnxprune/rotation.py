"""Turn a residual stream into its principal components, so that its last channels carry the least and may be sliced.

SliceGPT's computational invariance (Ashkboos et al. 2024, arXiv:2401.15024) on any ONNX graph: with an orthogonal R, what
writes a stream writes xR instead, what reads it reads with Rᵀ, and norms do not notice.  Theirs turns every block on its own
and pays with a matrix on each shortcut; here one R serves a whole stream, and the graph stays as it is.

LayerNormalization also takes off the mean over the channels, so R has to keep the direction of all ones.  SliceGPT makes it an
RMS norm first; ours stays, and R = 11ᵀ/d + P Hᵀ: P are the principal components among the directions without mean, and the
Helmert basis H has h_j = (1, …, 1, −j, 0, …, 0) / √(j(j+1)).  Among the first d' channels the components from d' on, and the
mean, are the same number in every one of them, which the norm over d' channels takes off.  So slicing the last d − d' channels
leaves exactly the first d' − 1 components, for every d'.

A norm over d' channels divides by √(S/d' + ε) where it was √(S/d + ε).  With ε' = ε d/d' that is √(d/d') times as much, so its
gain becomes √(d/d') (`Rotated.rescaled`).

    rotated = rotate(grouping, samples)                       # grouping of the model
    again = group(load(rotated.model, feeds))                 # to be certified and sliced as any model
    scores = rotated.scores_in(again)                         # {group: a number a channel}; the lowest go
    smaller = rotated.rescaled(rewrite(again, remove))        # after the surgery is proven
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.certificate import Bench, prepare
from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.grouping import Grouping
from onnxprune.importer import Model
from onnxprune.moves import Moves
from onnxprune.rewiring import BIAS, Rewired, Use, with_inputs
from onnxprune.running import MOST, Arrays, Runner, distance, jittered
from onnxprune.trunk_layers import LAYERS
from onnxprune.trunk_rules import RULES
from onnxprune.trunks import NotRotatableError, Signal, Trunk, channels, trunk

EPSILON = {"SkipLayerNormalization": 1e-12, "SkipSimplifiedLayerNormalization": 1e-12}  # defaults other than 1e-5


@dataclass(frozen=True)
class Rotated:
    """A model that computes the same, whose streams are principal components, the first the largest.

    scores: {group: a number a channel, larger where more of the stream is, strictly decreasing}; skipped: {group: why it was
    not turned}; apart: tensors that several nodes read and that are two now.  Groups have the ids of the grouping given.
    """

    model: ModelProto = field(repr=False)
    scores: Mapping[int, np.ndarray] = field(repr=False)
    skipped: Mapping[int, str]
    apart: tuple[str, ...] = ()
    trunks: tuple[Trunk, ...] = field(default=(), repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)  # nodes that a bias was added behind, by their outputs

    def _nodes(self, proto: ModelProto) -> dict[str, NodeProto]:
        """Nodes by the first output that they had."""
        nodes = {node.output[0]: node for node in proto.graph.node}
        return nodes | {old: nodes[new] for old, new in self.renamed.items() if new in nodes}

    def scores_in(self, grouping: Grouping) -> dict[int, np.ndarray]:
        """The scores by the ids of a grouping of the rotated model."""
        readers = self._nodes(grouping.model.proto)
        found = {}
        for one in self.trunks:
            uses = [p for p in one.places if p.use.position != BIAS and p.use.node in readers]
            anchors = {(readers[p.use.node].input[p.use.position], p.axis) for p in uses}
            for group in grouping.groups:
                if group.units == one.group.units and any((m.tensor, m.axis) in anchors for m in group.members):
                    found[group.id] = self.scores[one.group.id]
        return found

    def rescaled(self, pruned: ModelProto) -> ModelProto:
        """The rotated model after channels were sliced off, with the norms' epsilon and gain for as many channels as stay."""
        copy = ModelProto()
        copy.CopyFrom(pruned)
        nodes = self._nodes(copy)
        arrays = {t.name: t for t in copy.graph.initializer}
        for node in copy.graph.node:
            if node.op_type == "Constant":
                arrays.update((node.output[0], a.t) for a in node.attribute if a.name == "value")

        def read(use: Use) -> np.ndarray | None:
            node = nodes.get(use.node)
            tensor = arrays.get(node.input[use.position]) if node is not None and use.position < len(node.input) else None
            return None if tensor is None else numpy_helper.to_array(tensor).astype(np.float64)

        changed: dict[Use, np.ndarray] = {}
        for one in self.trunks:
            sizes = {a.shape[p.axis] for p in one.places if p.use.position != BIAS and (a := read(p.use)) is not None}
            if len(sizes) != 1 or sizes == {one.group.units}:
                continue
            ratio = one.group.units / sizes.pop()
            for norm in one.norms:
                if isinstance(norm.epsilon, Use) and (array := read(norm.epsilon)) is not None:
                    changed[norm.epsilon] = array * ratio
                elif isinstance(norm.epsilon, str) and norm.epsilon in nodes:
                    node = nodes[norm.epsilon]
                    value = attributes(node).get("epsilon", EPSILON.get(node.op_type, 1e-5)) * ratio
                    for i in reversed([i for i, a in enumerate(node.attribute) if a.name == "epsilon"]):
                        del node.attribute[i]
                    node.attribute.append(helper.make_attribute("epsilon", value))
                for use, offset in norm.gains[:1]:
                    if (array := read(use)) is not None:
                        changed[use] = np.full(array.shape, np.sqrt(ratio) - offset)
                if not norm.gains:
                    weights = {p.use: a for p in norm.readers if (a := read(p.use)) is not None}
                    changed.update((use, array * np.sqrt(ratio)) for use, array in weights.items())
        return with_inputs(copy, {use._replace(node=nodes[use.node].output[0]): array for use, array in changed.items()}).model


def rotate(
    grouping: Grouping,
    samples: Iterable[Arrays],
    bench: Bench | None = None,
    only: Iterable[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Rotated:
    """Turn every group that allows it into the principal components of the samples (feeds), and check the outputs.

    bench: what the check runs on and how far outputs may be apart, else the first sample; only: group ids, else all.
    A group that may not be turned, or after which the outputs are not the same, is skipped, with the reason.
    Raises OnnxPruneError (exit code 2) where there are no samples, and where onnxruntime does not run the model on them.
    """
    say = progress or (lambda text: None)
    model, chosen = grouping.model, None if only is None else set(only)
    where = channels(grouping)
    trunks: list[Trunk] = []
    skipped: dict[int, str] = {}
    for group in grouping.groups:
        if group.branch is None and (chosen is None or group.id in chosen):
            try:
                trunks.append(trunk(grouping, group, where.get(group.leaves[0], {}), RULES | LAYERS))
            except NotRotatableError as reason:
                skipped[group.id] = str(reason)
    if not trunks:
        return Rotated(model.proto, {}, skipped)
    feeds = iter(samples)
    first = next(feeds, None)
    if first is None:
        raise OnnxPruneError("principal components need samples; give some with --calibration", 2)
    say(f"principal components of {len(trunks)} streams")
    grams = _grams(model, trunks, _chain(first, feeds))
    bases = {one.group.id: principal(grams[one.group.id], one.centred) for one in trunks}
    bench = bench or prepare(grouping, first)

    def turned(part: Sequence[Trunk]) -> tuple[Rewired, float]:
        current: dict[Use, np.ndarray] = {}
        for one in part:
            _turn(model, one, bases[one.group.id][0], current)
        made = with_inputs(model.proto, current)
        try:
            gap = max(distance(before, Runner(made.model, watch=bench.watch).run(on)) for on, before in _references(bench))
        except OnnxPruneError:
            gap = float("inf")
        return made, gap

    tolerance = max(bench.tolerance, min(MOST, 5 * _halves(bench, grouping, trunks)))
    kept = list(trunks)
    best, gap = turned(kept)
    if not gap <= tolerance:
        kept, best = [], Rewired(model.proto)
        for one in trunks:
            tried, gap = turned([*kept, one])
            if gap <= tolerance:
                kept, best = [*kept, one], tried
            else:
                skipped[one.group.id] = f"turning it moves the outputs by {gap:.2g} standard deviations"
    scores = {one.group.id: bases[one.group.id][1] for one in kept}
    return Rotated(best.model, scores, skipped, best.apart, tuple(kept), best.renamed)


def _halves(bench: Bench, grouping: Grouping, trunks: Sequence[Trunk]) -> float:
    """How far the outputs move where weights of half precision are rounded anew, once."""
    model, found = grouping.model, 0.0
    for kind, units in ((TensorProto.FLOAT16, 2.0**-11 / 6e-8), (TensorProto.BFLOAT16, 2.0**-8 / 6e-8)):
        names = {m.tensor for one in trunks for m in one.group.members if model.tensors[m.tensor].data_type == kind}
        if names:
            arrays = jittered({name: model.array(name) for name in names}, np.random.default_rng(0), units)
            found = max(found, bench.gap(arrays, Moves(grouping)))
    return found


def _references(bench: Bench) -> list[tuple[Arrays, Arrays]]:
    found = [(bench.feeds, bench.reference)]
    if bench.elsewhere is not None:
        found.append((bench.elsewhere, bench.runner.run(bench.elsewhere)))
    return found


def _chain(first: Arrays, rest: Iterable[Arrays]) -> Iterable[Arrays]:
    yield first
    yield from rest


# principal components


def principal(gram: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """(d, d) orthogonal R whose columns are channels of falling variance, and (d,) the variances, strictly falling.

    centred: R keeps the direction of all ones; channel j then stands for the j-th component without mean (see above), and
    channel 0 for the first.
    """
    gram = (gram + gram.T) / 2
    width = len(gram)
    if centred:
        basis = helmert(width)
        values, vectors = np.linalg.eigh(basis.T @ gram @ basis)
        rotation = np.full((width, width), 1 / width) + basis @ vectors[:, ::-1] @ basis.T
        variances = np.concatenate([values[:-2:-1], values[::-1]])
    else:
        values, vectors = np.linalg.eigh(gram)
        rotation, variances = vectors[:, ::-1], values[::-1]
    variances = np.maximum(variances, 0.0)
    ties = np.arange(width)[::-1] * max(float(variances[0]), 1e-30) * 1e-9  # the order is what counts
    return rotation, np.maximum.accumulate(variances[::-1])[::-1] + ties


def helmert(width: int) -> np.ndarray:
    """(d, d − 1) orthonormal directions without mean: h_j = (1, …, 1, −j, 0, …, 0) / √(j(j+1)), the −j at index j."""
    steps = np.arange(1, width)
    basis = np.triu(np.ones((width, width - 1)))
    basis[steps, steps - 1] = -steps
    return np.asarray(basis / np.sqrt(steps * (steps + 1.0)))


def _grams(model: Model, trunks: Sequence[Trunk], samples: Iterable[Arrays]) -> dict[int, np.ndarray]:
    """{group: (d, d) second moment of what its readers see, all of them weighing the same}, in one pass.

    A norm's input counts divided by its root mean square, as the norm divides it.
    """
    watch = sorted({signal.value for one in trunks for signal in one.signals.values()})
    runner = Runner(model.proto, watch=watch)
    sums = {one.group.id: np.zeros((one.group.units, one.group.units)) for one in trunks}
    raw: dict[tuple[int, str], np.ndarray] = {}
    for feeds in samples:
        values = runner.run(feeds)
        for one in trunks:
            for signal in one.signals.values():
                rows = _rows(values[signal.value], signal, one)
                if signal.normed:
                    sums[one.group.id] += rows.T @ rows
                else:
                    key = (one.group.id, signal.value)
                    raw[key] = raw.get(key, 0.0) + rows.T @ rows
    counts = {one.group.id: sum(signal.normed for signal in one.signals.values()) for one in trunks}
    for one in trunks:
        sums[one.group.id] *= counts[one.group.id] / max(float(np.trace(sums[one.group.id])), 1e-30)
    for (group, _), gram in raw.items():
        sums[group] += gram / max(float(np.trace(gram)), 1e-30)
    return sums


def _rows(value: np.ndarray, signal: Signal, one: Trunk) -> np.ndarray:
    """(positions, d) of a signal, finite, with what a norm does to each position done."""
    rows = np.moveaxis(np.asarray(value, np.float64), signal.axis, -1).reshape(-1, one.group.units)
    if signal.shift is not None:
        rows = rows - signal.shift
    if signal.scale is not None:
        rows = np.divide(rows, signal.scale, out=np.zeros_like(rows), where=signal.scale != 0)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if signal.normed:
        rows = rows - rows.mean(axis=1, keepdims=True) if one.centred else rows
        length = np.sqrt((rows**2).mean(axis=1, keepdims=True))
        rows = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return rows


# weights


def _turn(model: Model, one: Trunk, rotation: np.ndarray, current: dict[Use, np.ndarray]) -> None:
    """Put into `current` what every use of a constant has to be, given what is there already."""
    nodes = {node.output[0]: node for node in model.main}

    def get(use: Use) -> np.ndarray | None:
        if use in one.bases and use not in current:
            return one.bases[use]
        if use not in current:
            node = nodes[use.node]
            name = node.input[use.position] if 0 <= use.position < len(node.input) else ""
            if not name:
                return None
            return model.array(model.copies.get(name, name)).astype(np.float64)
        return current[use].astype(np.float64)

    doubles = any(tensor.data_type == TensorProto.DOUBLE for tensor in model.tensors.values())
    for shift in one.shifts:
        weight = get(shift.weight)
        if weight is None:
            continue
        weight = weight if shift.perm is None else np.transpose(weight, shift.perm)
        summed = np.tensordot(shift.vector, weight, (0, shift.axis)) * shift.factor
        if shift.operator.startswith("Conv"):
            summed = summed.reshape(len(summed), -1).sum(axis=1)
        elif shift.bias.position == BIAS and shift.operator == "MatMul":
            summed = np.expand_dims(summed, shift.axis)
        before = get(shift.bias)
        current[shift.bias] = summed if before is None else before + summed
    uses = dict.fromkeys((*(place.use for place in (*one.scales, *one.places)), *one.fills))
    for use in uses:  # one after the other, as doubles take room
        array = get(use)
        if array is None:
            continue
        if use in one.fills:
            current[use] = np.full(array.shape, one.fills[use])
            continue
        for place, scale in one.scales.items():
            if place.use == use:
                array = np.moveaxis(np.moveaxis(array, place.axis, -1) * scale, -1, place.axis)
        for place in one.places:
            if place.use == use:
                array = np.moveaxis(np.moveaxis(array, place.axis, -1) @ rotation, -1, place.axis)
        current[use] = array if doubles else array.astype(np.float32)

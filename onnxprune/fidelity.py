"""How near pruned models stay to the original where there are no labels, output by output, streamed over samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto

from onnxprune.errors import OnnxPruneError
from onnxprune.running import as_float32, first_line, session, widened, with_sizes
from onnxprune.samples import Arrays, Feeds, Samples
from onnxprune.scopes import subgraphs

_LARGEST = 2**22  # numbers of an output that are compared at once
SAME = 110.0  # decibels from which on two outputs of 32 bits differ by rounding alone
_LEAST = 1e-12  # what a probability of 0 counts as


@dataclass(frozen=True)
class OutputFidelity:
    """One output before and after, over `samples` samples; None where a figure does not apply.

    agreement: share of rows whose largest number along the last axis is at the same place (of integers: that are equal).
    cosine: of the whole output of a sample, mean; 1 for two vectors of zeros, 0 for one.
    kl: Kullback–Leibler divergence Σ p ln(p / q) of a row, in nats, p the original's probabilities and q the pruned model's, mean.
    sqnr: 10 log₁₀ (Σ a² / Σ (a − b)²), in decibels, over all samples; infinite where nothing changes.
    alike: the original gives the same for all samples, of which there are two at least.
    """

    output: str
    samples: int
    agreement: float | None
    cosine: float | None
    kl: float | None
    sqnr: float | None
    alike: bool = False

    @property
    def same(self) -> bool:
        """Whether nothing but the last digits changes."""
        return self.agreement == 1.0 if self.sqnr is None else self.sqnr >= SAME

    @property
    def noise(self) -> float:
        """Σ (a − b)² / Σ a²; for integers the share that is not equal."""
        return 10 ** (-self.sqnr / 10) if self.sqnr is not None else 1 - (self.agreement or 0.0)

    def to_json(self) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Fidelity:
    """A pruned model beside the original; outputs whose shapes differ between them are left out.

    samples: on so many at least one output was compared.
    """

    samples: int
    outputs: tuple[OutputFidelity, ...]

    @property
    def loss(self) -> float:
        """One number to choose by, less is better: the mean over the outputs of KL where there is one, else of the noise."""
        return float(np.mean([o.noise if o.kl is None else o.kl for o in self.outputs])) if self.outputs else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "outputs": [o.to_json() for o in self.outputs]}


@overload
def fidelity(original: ModelProto, others: ModelProto, samples: Samples, batch: int = 32) -> Fidelity: ...
@overload
def fidelity(original: ModelProto, others: Sequence[ModelProto], samples: Samples, batch: int = 32) -> list[Fidelity]: ...
def fidelity(
    original: ModelProto, others: ModelProto | Sequence[ModelProto], samples: Samples, batch: int = 32
) -> Fidelity | list[Fidelity]:
    """How near each of the others stays to the original, which runs once a batch for all of them.

    Raises OnnxPruneError where there are no samples or a model does not run on them.
    """
    candidates = [others] if isinstance(others, ModelProto) else list(others)
    tallies = [Tally(original) for _ in candidates]
    for turn in runs([original, *candidates], samples, batch):
        for tally, outputs in zip(tallies, turn.outputs[1:], strict=True):
            tally.add(turn.outputs[0], outputs, turn.count)
    found = [tally.result() for tally in tallies]
    return found[0] if isinstance(others, ModelProto) else found


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One batch: how many samples, their feeds and extras, and each model's outputs that are arrays."""

    count: int
    feeds: Feeds
    extras: Feeds
    outputs: list[Feeds]


def runs(models: Sequence[ModelProto], samples: Samples, batch: int, extras: bool = False) -> Iterator[Turn]:
    """Every batch through every model, with what the source holds beside the inputs if that is asked for.

    Raises OnnxPruneError where there are no samples or a model does not run on them.
    """
    if not samples.count:
        raise OnnxPruneError(f"{samples.source}: has no samples to compare models on")
    sessions = [_open(model) for model in models]
    done = 0
    drawn = samples.counted_pairs(batch) if extras else ((feeds, {}, count) for feeds, count in samples.counted(batch))
    for feeds, beside, count in drawn:
        done += count
        yield Turn(count, feeds, beside, [_run(s, feeds, samples.source) for s in sessions])
    if not done:
        raise OnnxPruneError(f"{samples.source}: no batch of {samples.at_once} samples is full; give more")


def _open(model: ModelProto) -> ort.InferenceSession:
    values = (*model.graph.input, *model.graph.output)
    if any(v.type.tensor_type.elem_type == TensorProto.BFLOAT16 for v in values):  # which numpy has no type for
        return session(as_float32(model), optimize=True)
    try:
        return session(model, optimize=True)
    except OnnxPruneError:  # no kernels in its types
        return session(as_float32(model), optimize=True)


def _run(sess: ort.InferenceSession, feeds: Arrays, where: str) -> Feeds:
    types = {v.name: v.type for v in sess.get_inputs()}
    given = {n: widened(a) if types[n] == "tensor(float)" else a for n, a in feeds.items() if n in types}
    try:
        outputs = sess.run(None, given)
    except Exception as error:
        raise OnnxPruneError(f"{where}: the model does not run on samples of {with_sizes(given)}: {first_line(error)}") from error
    return {v.name: o for v, o in zip(sess.get_outputs(), outputs, strict=True) if isinstance(o, np.ndarray)}


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What is added up of one output; kind: `probabilities`, `logits`, `vector` (rows that have a largest number), or none of these."""

    kind: str
    samples: int = 0
    rows: int = 0
    same: float = 0.0
    cosine: float = 0.0
    kl: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    first: np.ndarray | None = None  # what the original gives for the first sample
    alike: bool = True

    def watch(self, samples: np.ndarray) -> None:
        """Whether the original's outputs (samples, …) are those of the first sample, to the last digits."""
        if self.first is None:
            self.first = samples[:1].copy()
        if self.alike:
            one, fits = self.first.astype(np.float64), samples.shape[1:] == self.first.shape[1:]
            close = 1e-5 * float(np.abs(one[np.isfinite(one)]).max(initial=0.0))
            self.alike = fits and np.allclose(samples.astype(np.float64), one, rtol=1e-5, atol=close, equal_nan=True)


class Tally:
    """Adds up, batch by batch, how far the outputs of one model are from the original's."""

    def __init__(self, original: ModelProto) -> None:
        self._makers = {o: n for n in original.graph.node for o in n.output}
        self._constants = {t.name for t in original.graph.initializer} | {""}  # values that come from the file alone
        for node in original.graph.node:
            if self._constants.issuperset(node.input) and not any(subgraphs(node)):
                self._constants.update(node.output)
        self._sums: dict[str, _Sums] = {}

    def add(self, before: Arrays, after: Arrays, count: int) -> None:
        """Outputs of `count` samples; those of other shapes, and what is no number, are left out."""
        for name, a in before.items():
            b = after.get(name)
            if b is None or a.shape != b.shape or a.dtype.kind not in "biuf" or not a.size:
                continue
            sums = self._sums.setdefault(name, _Sums(self._kind(name, a)))
            sums.samples += count
            sums.watch(a if a.shape[:1] == (count,) else a[None])
            if a.dtype.kind != "f":
                sums.same += float((a == b).mean()) * count
                sums.rows += count
                continue
            rows = count if a.shape[:1] == (count,) else 1  # one vector, where axis 0 does not count the samples
            a, b = (x.reshape(rows, -1, x.shape[-1] if x.ndim > 1 else 1) for x in (a, b))
            step = max(1, _LARGEST // (a.size // rows))
            for start in range(0, rows, step):
                _compare(sums, a[start : start + step], b[start : start + step], count / rows)

    def result(self) -> Fidelity:
        found = []
        for name, sums in self._sums.items():
            agreement = sums.same / sums.rows if sums.rows else None
            alike = sums.alike and sums.samples > 1
            if sums.kind == "integers":
                found.append(OutputFidelity(name, sums.samples, agreement, None, None, None, alike))
                continue
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.float64(sums.signal) / np.float64(sums.noise)
                sqnr = float(10 * np.log10(ratio)) if sums.noise else math.inf
            kl = max(sums.kl / sums.rows, 0.0) if sums.kind in ("logits", "probabilities") else None
            found.append(OutputFidelity(name, sums.samples, agreement, sums.cosine / sums.samples, kl, sqnr, alike))
        return Fidelity(max((output.samples for output in found), default=0), tuple(found))

    def _kind(self, name: str, a: np.ndarray) -> str:
        """What an output seems to hold, along its last axis.

        Probabilities: no number is negative and rows add up to 1.  Logits: what a linear layer or LogSoftmax gives, with nothing
        but bias, scale and new shapes behind it, in two axes, or three for sequences.  The rest with two axes are vectors.
        """
        if a.dtype.kind != "f":
            return "integers"
        if a.ndim < 2 or a.shape[-1] < 2:
            return ""
        if (a >= 0).all() and np.allclose(a.sum(axis=-1, dtype=np.float64), 1, atol=1e-3 if a.dtype != np.float16 else 1e-2):
            return "probabilities"
        if a.ndim <= 3 and self._linear(name, a.ndim):
            return "logits"
        return "vector" if a.ndim == 2 else ""

    def _linear(self, name: str, axes: int) -> bool:
        node = self._makers.get(name)
        while node is not None:
            if node.op_type in _LINEAR or (axes == 2 and node.op_type in _CONV):
                return node.op_type != "MatMul" or not self._constants.isdisjoint(node.input)
            if node.op_type not in (_THROUGH | _POOL if axes == 2 else _THROUGH):
                return False
            data = [x for x in node.input[: 2 if node.op_type in _WITH else 1] if x not in self._constants]
            node = self._makers.get(data[0]) if len(data) == 1 else None
        return False


_LINEAR = {"Gemm", "MatMul", "QLinearMatMul", "QGemm", "MatMulNBits", "MatMulInteger", "LogSoftmax"}
_CONV = {"Conv", "QLinearConv"}
_POOL = {"GlobalAveragePool", "ReduceMean", "AveragePool"}
_WITH = {"Add", "Sub", "Mul", "Div"}
_THROUGH = _WITH | {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Dropout"}
_THROUGH |= {"QuantizeLinear", "DequantizeLinear"}


def _compare(sums: _Sums, a: np.ndarray, b: np.ndarray, weight: float) -> None:
    """Add samples (count, rows, classes), each counted `weight` times.

    A sample whose numbers are not finite where the original's are counts as zeros.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a)
    b[(finite & ~np.isfinite(b)).any(axis=(1, 2))] = 0.0
    if sums.kind:
        sums.rows += a.shape[0] * a.shape[1]
        sums.same += float((a.argmax(axis=-1) == b.argmax(axis=-1)).sum())
    if sums.kind in ("logits", "probabilities"):
        p, q = (_log_probabilities(x, sums.kind) for x in (a, b))
        sums.kl += float((np.exp(p) * (p - q)).sum())
    one, other = (np.where(finite, x, 0.0).reshape(len(x), -1) for x in (a, b))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    dots = (one * other).sum(axis=1)
    cosines = np.divide(dots, lengths, out=np.array((one == other).all(axis=1), np.float64), where=lengths > 0)
    sums.cosine += float(cosines.sum()) * weight
    sums.signal += float((one**2).sum())
    sums.noise += float(((one - other) ** 2).sum())


def _log_probabilities(rows: np.ndarray, kind: str) -> np.ndarray:
    if kind == "probabilities":
        return np.asarray(np.log(np.clip(np.nan_to_num(rows), _LEAST, None)))
    rows = np.nan_to_num(rows, nan=0.0, posinf=1e30, neginf=-1e30)  # classes that are masked out
    rows = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True)))

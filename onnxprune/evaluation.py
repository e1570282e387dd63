"""Accuracy where there are labels, a metric of the user's own, and how near the outputs stay to the original's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.calibration import samples_of
from onnxprune.errors import OnnxPruneError
from onnxprune.fidelity import OutputFidelity, Tally, Turn, runs
from onnxprune.inputs import inputs_of
from onnxprune.samples import Arrays, Samples
from onnxprune.userfunctions import ENDS, said

Metric = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], Any]


@dataclass(frozen=True)
class Evaluation:
    """before and after: shares of right samples (0 to 1), None without labels.

    agreement: share of samples for which both models choose the same class, None where the first output has no classes.
    metric_before, metric_after: the user's own metric, None without one.  outputs: how near each output stays.
    """

    samples: int
    agreement: float | None
    before: float | None = None
    after: float | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    outputs: tuple[OutputFidelity, ...] = ()

    def to_json(self) -> dict[str, Any]:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return plain | {"outputs": [o.to_json() for o in self.outputs]}


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; raises OnnxPruneError where it is none."""
    if not Path(path).is_file():
        raise OnnxPruneError(f"{path}: no such file; give an .npz with an array for each input")
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError) as error:
        raise OnnxPruneError(f"{path}: not an .npz of arrays; write it with numpy.savez") from error


def evaluate(
    original: ModelProto, pruned: ModelProto, data: Mapping[str, np.ndarray] | Samples, batch: int = 64, metric: Metric | None = None
) -> Evaluation:
    """Both models on samples, or on arrays {input: (n, …)}.

    Where there are `labels`, class numbers (n,), top-1 accuracy: the largest number of a sample in the first output, or the number
    that it is where it is an integer.  metric(outputs, data) -> float gets a batch, `data` holding its feeds and whatever else
    the source has for it; its mean is over samples.

    Raises OnnxPruneError where there are no samples, they do not fit, the labels are no class numbers, or the metric fails.
    """
    samples = data if isinstance(data, Samples) else samples_of(data, inputs_of(original), "the evaluation data")
    tally, count = Tally(original), 0
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    labels: list[np.ndarray] = []
    metrics = [0.0, 0.0]
    for turn in runs([original, pruned], samples, batch, extras=True):
        count += turn.count
        tally.add(turn.outputs[0], turn.outputs[1], turn.count)
        choices = [_choices(outputs) for outputs in turn.outputs]
        if choices[0] is not None and choices[1] is not None and choices[0].shape == choices[1].shape:
            chosen.append((choices[0], choices[1]))
        if "labels" in turn.extras:
            wrong = wrong_labels(turn.extras["labels"], classes_in(next(iter(turn.outputs[0].values()), None)))
            if wrong and metric is None:
                raise OnnxPruneError(f"{samples.source}: {wrong}")
            labels += [] if wrong else [turn.extras["labels"].reshape(-1)]  # others are the metric's business
        for i, outputs in enumerate(turn.outputs):
            metrics[i] += turn.count * _measured(metric, outputs, turn, samples.source) if metric else 0.0
    found = Evaluation(count, None, outputs=tally.result().outputs)
    if metric:
        found = replace(found, metric_before=metrics[0] / count, metric_after=metrics[1] / count)
    if not chosen:
        return found
    one, other = (np.concatenate(side) for side in zip(*chosen, strict=True))
    found = replace(found, agreement=float((one == other).mean()))
    right = np.concatenate(labels) if labels else None
    if right is not None and right.shape != one.shape and metric is None:
        raise OnnxPruneError(
            f"{samples.source}: has {len(right)} labels for {len(one)} rows of the first output; give one for each, none, or a --metric"
        )
    if right is None or right.shape != one.shape:
        return found
    return replace(found, before=float((one == right).mean()), after=float((other == right).mean()))


def _choices(outputs: Arrays) -> np.ndarray | None:
    """The class that the first output says for each sample, (samples,); None where it says none."""
    first = next(iter(outputs.values()), None)
    if first is None or not first.ndim:
        return None
    each = first.reshape(len(first), math.prod(first.shape[1:]))
    if each.shape[1] > 1:
        return np.asarray(each.argmax(axis=1))
    return each[:, 0] if each.shape[1] and first.dtype.kind in "biu" else None


def classes_in(first: np.ndarray | None) -> int | None:
    """Among how many classes the first output chooses for a sample; None where it says none, or the number of one itself."""
    columns = math.prod(first.shape[1:]) if first is not None and first.ndim else 0
    return columns if columns > 1 else None


def wrong_labels(labels: np.ndarray, classes: int | None) -> str:
    """Why labels are no class numbers, one a sample; "" where they are."""
    if labels.dtype.kind not in "iu" or not labels.ndim or labels.size != len(labels):
        return f"the labels are {labels.dtype} {list(labels.shape[1:])} a sample; they must be one class number, or give a --metric"
    numbers = labels.reshape(-1)
    beyond = numbers[(numbers < 0) | (numbers >= classes)] if classes is not None else numbers[:0]
    return f"the label {beyond[0]} is no class of the model, which has {classes}; count from 0, or give a --metric" if beyond.size else ""


def _measured(metric: Metric, outputs: Arrays, turn: Turn, where: str) -> float:
    name = getattr(metric, "__name__", "the metric")
    try:
        found = metric(dict(outputs), {**turn.extras, **turn.feeds})
    except ENDS as error:
        raise OnnxPruneError(f"the metric {name} fails on {where} ({said(error)})") from error
    if not isinstance(found, int | float | np.number) and np.shape(found) != ():
        raise OnnxPruneError(f"the metric {name} gives a {type(found).__name__}; it must give one number")
    try:
        return float(found)
    except (TypeError, ValueError):
        raise OnnxPruneError(f"the metric {name} gives a {type(found).__name__}; it must give one number") from None

"""Accuracy on labelled arrays, or agreement with the original where there are no labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from onnxprune.errors import OnnxPruneError
from onnxprune.running import session


@dataclass(frozen=True)
class Evaluation:
    """before and after: shares of right samples (0 to 1); agreement: share on which both models choose the same class."""

    samples: int
    agreement: float
    before: float | None = None
    after: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        return dict(vars(self))


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; raises OnnxPruneError where it is none."""
    if not Path(path).is_file():
        raise OnnxPruneError(f"{path}: no such file; give an .npz with an array for each input")
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError) as error:
        raise OnnxPruneError(f"{path}: not an .npz of arrays; write it with numpy.savez") from error


def evaluate(original: ModelProto, pruned: ModelProto, data: Mapping[str, np.ndarray], batch: int = 64) -> Evaluation:
    """Top-1 accuracy of both models on `labels` (n,), argmax over the last axis of their first output.

    data: {input name: (n, …)} and, for accuracy, `labels`.  Raises OnnxPruneError where an input is missing.
    """
    left, right = session(original, optimize=True), session(pruned, optimize=True)
    names = [v.name for v in left.get_inputs()]
    missing = [n for n in names if n not in data]
    if missing:
        raise OnnxPruneError(f"the evaluation data has no '{missing[0]}'; it needs {', '.join(names)} and, for accuracy, labels")
    samples = len(data[names[0]])
    first = left.get_inputs()[0].shape
    batch = first[0] if first and isinstance(first[0], int) and first[0] > 0 else batch
    if not samples:
        raise OnnxPruneError("the evaluation data has no samples")
    if samples < batch:
        batch = samples
    counted = samples - samples % batch if first and isinstance(first[0], int) else samples
    one = _choices(left, names, data, batch, counted)
    other = _choices(right, names, data, batch, counted)
    agreement = float((one == other).mean())
    if "labels" not in data:
        return Evaluation(counted, agreement)
    labels = np.asarray(data["labels"])
    if labels.dtype.kind not in "iu" or labels.size != len(labels):
        raise OnnxPruneError(f"the labels are {labels.dtype} {list(labels.shape)}; they must be one class number a sample")
    labels = labels.reshape(-1)[:counted]
    if labels.shape != one.shape:
        raise OnnxPruneError(f"the evaluation data has {len(labels)} labels for {len(one)} samples; there must be one a sample")
    return Evaluation(counted, agreement, float((one == labels).mean()), float((other == labels).mean()))


def _choices(sess: ort.InferenceSession, names: list[str], data: Mapping[str, np.ndarray], batch: int, samples: int) -> np.ndarray:
    """The class that the model chooses for each sample, (samples,)."""
    chosen = []
    for start in range(0, samples, batch):
        feeds = {n: data[n][start : start + batch] for n in names}
        try:
            output = np.asarray(sess.run(None, feeds)[0])
        except Exception as error:
            raise OnnxPruneError(f"the evaluation data does not fit the model ({str(error).splitlines()[0][:160]})") from error
        chosen.append(output if output.ndim == 1 else output.reshape(len(output), -1).argmax(axis=1))
    return np.concatenate(chosen)

"""How good a pruned model is, in one number: accuracy, the user's own metric, or how near its outputs stay to the original's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.calibration import read_calibration
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluation import Evaluation, Metric, evaluate
from onnxprune.importer import Model
from onnxprune.samples import Arrays
from onnxprune.userfunctions import user_function

Compare = Callable[[ModelProto, ModelProto], Evaluation]


def evaluator(
    model: Model,
    source: str | os.PathLike[str] | Arrays | Callable[[], Any],
    preprocess: str | None = None,
    metric: str | Metric | None = None,
    seed: int = 0,
) -> Compare:
    """What compares the original with a pruned model on samples with or without labels (`read_calibration` says what they may be).

    metric: the user's own, or `module:function`.  Noise is other noise than that of a calibration with the same seed.
    Raises OnnxPruneError where the samples do not fit the model or there are none.
    """
    samples = read_calibration(source, model, preprocess=preprocess, seed=seed + 1)
    if not samples.count:
        raise OnnxPruneError(f"--eval {source}: has no samples")
    measure = user_function(metric) if isinstance(metric, str) else metric
    return lambda original, pruned: evaluate(original, pruned, samples, metric=measure)


@dataclass(frozen=True)
class Quality:
    """measure: `metric`, `accuracy`, `cosine` (of the outputs with the original's, mean) or `agreement` (of integers); more is better.

    before: of the original; value: of the pruned model.
    """

    measure: str
    before: float
    value: float


def quality(found: Evaluation) -> Quality:
    """The user's metric if there is one, else accuracy where there are labels, else the cosine of the float outputs."""
    if found.metric_before is not None and found.metric_after is not None:
        return Quality("metric", found.metric_before, found.metric_after)
    if found.before is not None and found.after is not None:
        return Quality("accuracy", found.before, found.after)
    cosines = [output.cosine for output in found.outputs if output.cosine is not None]
    if not cosines:  # integers alone
        same = [output.agreement for output in found.outputs if output.agreement is not None]
        return Quality("agreement", 1.0, float(np.mean(same)) if same else 0.0)
    return Quality("cosine", 1.0, float(np.mean(cosines)))

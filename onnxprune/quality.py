"""How good a pruned model is, in one number: accuracy, the user's own metric, or how near its outputs stay to the original's."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.calibration import read_calibration
from onnxprune.errors import OnnxPruneError, OnnxPruneWarning
from onnxprune.evaluation import Evaluation, Metric, evaluate, wrong_labels
from onnxprune.importer import FLOATS, Model
from onnxprune.samples import Arrays, Samples
from onnxprune.userfunctions import user_function


@dataclass(frozen=True)
class Evaluator:
    """Compares the original with a pruned model on samples, by a metric of the user's own if there is one."""

    samples: Samples
    metric: Metric | None

    def __call__(self, original: ModelProto, pruned: ModelProto) -> Evaluation:
        return evaluate(original, pruned, self.samples, metric=self.metric)

    def expect(self, model: Model, figures: Collection[str] = ()) -> None:
        """What the samples cannot tell is said before they are run: a warning where labels are missing.

        figures: those that must come out.  Raises OnnxPruneError where one cannot, and where labels are no class numbers of the model;
        of samples in several files the first file is looked at.
        """
        source, first, columns = self.samples.source, self.samples.first, _columns(model)
        chooses = columns != 1 or model.proto.graph.output[0].type.tensor_type.elem_type not in FLOATS
        asked = [figure for figure in ("accuracy", "agreement") if figure in figures]
        if asked and not chooses:
            raise OnnxPruneError(f"--fail-under {asked[0]}: the first output, '{model.outputs[0]}', has no classes")
        if first.labels is None:
            if "accuracy" in figures:
                raise OnnxPruneError(f"--fail-under accuracy: {source} has no `labels`; add an array of class numbers, one a sample")
            if source != "noise":
                self._say(f"{source}: has no `labels`, so there is no accuracy; outputs are compared with the original's")
        elif not chooses:
            self._say(f"{source}: has labels, and the first output, '{model.outputs[0]}', has no classes; accuracy needs a --metric")
        elif self.metric is None or "accuracy" in figures:
            wrong = wrong_labels(first.labels, columns if columns and columns > 1 else None)
            if wrong:
                raise OnnxPruneError(f"{source}: {wrong}")

    def _say(self, text: str) -> None:
        if self.metric is None:
            warnings.warn(text, OnnxPruneWarning, stacklevel=3)


def _columns(model: Model) -> int | None:
    """Among how many the first output chooses for a sample, where that is the same for all sizes."""
    shape = model.shapes.get(model.outputs[0], ())
    return math.prod(shape[1:]) if shape and all(model.unchanging(model.outputs[0])[1:]) else None


def evaluator(
    model: Model,
    source: str | os.PathLike[str] | Arrays | Callable[[], Any],
    preprocess: str | None = None,
    metric: str | Metric | None = None,
    seed: int = 0,
) -> Evaluator:
    """What compares the original with a pruned model on samples with or without labels (`read_calibration` says what they may be).

    metric: the user's own, or `module:function`.  Noise is other noise than that of a calibration with the same seed.
    Raises OnnxPruneError where the samples do not fit the model or there are none.
    """
    samples = read_calibration(source, model, preprocess=preprocess, seed=seed + 1)
    if not samples.count:
        raise OnnxPruneError(f"--eval {source}: has no samples")
    measure = user_function(metric) if isinstance(metric, str) else metric
    return Evaluator(samples, measure)


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

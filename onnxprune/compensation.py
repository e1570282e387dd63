"""Step 8: move what was lost into what stays, by the weights and biases that are there already.

A compensation is a function (study, plan, pruned) -> (model, refits) registered under a name; it changes no shape and no node:

    @compensation("half")
    def half(study, plan, pruned):
        return updated(plan, pruned, study.evidence, weights=False), []
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import ModelProto

from onnxprune.distillation import distilled
from onnxprune.errors import OnnxPruneError
from onnxprune.expectation import expected
from onnxprune.moments import Observed
from onnxprune.oneshot import updated
from onnxprune.plans import Plan
from onnxprune.reconstruction import Refit, reconstruct
from onnxprune.refinement import refiner
from onnxprune.registry import Registry
from onnxprune.ridge import Fit
from onnxprune.seats import Seat, seats
from onnxprune.study import Study

Made = tuple[ModelProto, list[Refit]]
Compensation = Callable[[Study, Plan, ModelProto], Made]
compensation: Registry[Compensation] = Registry("compensation", "onnxprune.compensations")


@compensation("none")
def none(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """What the surgery left."""
    return pruned, []


@compensation("merge")
def merge(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """What went is merged into the channels that say most of it, by the weights alone: `update` by the moments of `expectation`.

    Data-free; UDFC (Bai et al. 2023, arXiv:2308.07209) does it with the products of the filters in the place of covariances.
    """
    return updated(plan, pruned, expected(plan.grouping)), []


@compensation("mean")
def mean(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """What removed inputs were on average goes into the bias (An et al. 2024, FLAP, arXiv:2312.11983)."""
    return updated(plan, pruned, study.evidence, weights=False), []


@compensation("update")
def update(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """Least squares on the original's own activations: optimal brain surgeon's update, in one pass (OBSPA, arXiv:2403.18955)."""
    return updated(*study.surgery(plan), study.turned.evidence), []


@compensation("moments")
def moments(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """Every channel of every layer gets the mean and deviation that it had: batch-norm recalibration, norms folded or not."""
    return reconstruct(plan, pruned, study.batches, match_moments, matched=None, progress=study.progress, find=by_themselves)


def by_themselves(plan: Plan, pruned: ModelProto) -> list[Seat]:
    """The layers that see less, each to make what it made alone: not what a residual Add behind it should, no row more than another."""
    return [replace(seat, layer=replace(seat.layer, normed=False), other="", bounds=None) for seat in seats(plan, pruned)]


@compensation("reconstruct")
def reconstruction(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """Least squares towards the original, layer after layer, on what the pruned model makes (`reconstruction`)."""
    return reconstruct(*study.surgery(plan), study.batches, progress=study.progress)


@compensation("refine")
def refine(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """The same, and Gauss-Newton on each layer together with the one before it (`refinement`)."""
    plan, pruned = study.surgery(plan)
    after = refiner(plan, pruned, study.batches, study.progress)
    return reconstruct(plan, pruned, study.batches, progress=study.progress, after=after)


@compensation("distill")
def distill(study: Study, plan: Plan, pruned: ModelProto) -> Made:
    """The same as `reconstruct`, and then all layers together by the gradient of what the outputs miss (`distillation`).

    Where that is not possible, or does not help, `refine`.
    """
    if study.samples.count < FEWEST:
        if study.progress:
            study.progress(f"the model is not distilled: there are too few samples to hold some out, {FEWEST} would do")
        return refine(study, plan, pruned)
    seen, held = study.samples.split(1 - HELD, study.seed)
    if any(next(some.batches(study.batch), None) is None for some in (seen, held)):
        if study.progress:
            study.progress("the model is not distilled: of the samples to fit to, or of those held out, no batch is full; give more")
        return refine(study, plan, pruned)
    narrow, cut = study.surgery(plan)
    made, refits = reconstruct(narrow, cut, lambda: seen.batches(study.batch), progress=study.progress)
    found = distilled(narrow, made, seen, held, study.batch, study.progress, study.seed)
    return refine(study, plan, pruned) if found is made else (found, refits)


def match_moments(observed: Observed, matrix: np.ndarray, bias: np.ndarray, intercept: bool = True) -> Fit:
    """Each output scaled and shifted to the targets' mean and variance; the scale within a factor of 10."""
    both = observed.seen + observed.held
    n = max(1, both.count)
    x, y = both.means()
    covariance = both.xx / n - x[:, :, None] * x[:, None, :]
    now = np.einsum("gof,gof->go", matrix @ covariance, matrix)
    wanted = np.maximum(both.yy / n - y**2, 0)
    scale = np.clip(np.sqrt(wanted / np.maximum(now, 1e-30)), 0.1, 10) * (now > 0) + (now <= 0)
    made = matrix * scale[:, :, None]
    shifted = y - np.einsum("gof,gf->go", made, x) if intercept else bias
    spread = max(both.spread(), 1e-30)
    return Fit(made, shifted, 0.0, both.error(matrix, bias) / spread, both.error(made, shifted) / spread)


FEWEST = 16  # samples to distil with
HELD = 1 / 8  # of the samples, to see what distillation is worth
TURNING = ("update", "reconstruct", "refine", "distill")  # start from the model with its linear bottlenecks turned (`turning`)
DATA_FREE = ("none", "merge")


def check_compensation(name: str, samples: bool) -> None:
    """Raises OnnxPruneError where there is no such compensation, or where it needs samples and there are none."""
    compensation.get(name)
    if name not in DATA_FREE and not samples:
        raise OnnxPruneError(f"--compensation {name} fits to activations; give --calibration (samples, or 'noise')")

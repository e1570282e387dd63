"""Scores and losses of the groups that may be pruned, and which criterion and allocation serve a model best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from onnxprune.allocations import BALANCED, DISTORTION, MEASURED, Choice
from onnxprune.compensation import compensation
from onnxprune.criteria import criterion as criteria
from onnxprune.curves import RATIOS, change, curves, outputs_of
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Group, Grouping
from onnxprune.plans import Plan
from onnxprune.registry import Registry
from onnxprune.rewriter import Widths, rewrite
from onnxprune.rounds import put_back
from onnxprune.saliency import measured
from onnxprune.study import Study

AUTO, PCA = "auto", "pca"
SAMPLED = (AUTO, PCA, "distortion")  # criteria that run the model
CANDIDATES = (
    ("obs", BALANCED),
    ("obs", DISTORTION),
    ("obs", "global"),
    ("energy", DISTORTION),
    ("fluctuation", "standardized"),
    ("l2", "uniform"),
)
JUDGED = {"refine": "reconstruct", "distill": "reconstruct"}  # compensations that take too long to be tried with each pair
FITTED = 256  # samples to which candidates are fitted
WORK = 1e13  # multiply-accumulates that measuring may take, as long as it has LEAST samples
LEAST, MOST = 8, 128
Scores = dict[int, np.ndarray]
Losses = Mapping[int, np.ndarray] | None


def check_criterion(name: str, samples: bool, free: bool = False) -> None:
    """Raises OnnxPruneError where there is no such criterion, or where it looks at samples and there are none.

    free: data-free pruning was asked for, where most go by what the weights let expect.
    """
    if name in (AUTO, PCA) or name in measured.names():
        if not samples and not (free and name not in SAMPLED):
            free_too = "" if name in SAMPLED else ", or 'none' for data-free"
            raise OnnxPruneError(f"--criterion {name} looks at activations; give --calibration (samples, or 'noise'{free_too})")
    elif name not in criteria.names():
        known = sorted({*criteria.names(), *measured.names(), AUTO, PCA})
        raise OnnxPruneError(f"no criterion is named '{name}'; there are: {', '.join(known)}")


def scored(grouping: Grouping, ids: Collection[int], name: str, seed: int, study: Study) -> Scores:
    """{group: scores (units,)} of the width groups among `ids`."""
    groups = [g for g in grouping.groups if g.id in ids and g.branch is None]
    if name == PCA:
        known = {g.id: study.known[g.id] for g in groups if g.id in study.known}
        return known | scored(grouping, set(ids) - set(known), "obs", seed, study)
    if name in measured.names():
        return {g.id: _asked(measured, name, study.evidence, g, seed) for g in groups}
    return {g.id: _asked(criteria, name, grouping.model, g, seed) for g in groups}


def _asked(registry: Registry[Any], name: str, seen: object, group: Group, seed: int) -> np.ndarray:
    """A criterion's scores of a group; raises OnnxPruneError where they are not a number a unit."""
    found = registry.call(name, seen, group, np.random.default_rng([seed, group.id]))
    try:
        scores = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        scores = np.zeros(0)
    if scores.shape != (group.units,):
        given = f"an array of the shape {list(np.shape(found))}" if isinstance(found, np.ndarray) else f"{found!r:.40}"
        raise OnnxPruneError(f"the criterion '{name}' gives {given} for group {group.id}; it must give {group.units} scores, one a unit")
    if registry.foreign(name) and np.isnan(scores).any():
        raise OnnxPruneError(f"the criterion '{name}' gives scores for group {group.id} that are not numbers (NaN)")
    return scores


def measured_losses(grouping: Grouping, scores: Mapping[int, np.ndarray], study: Study) -> dict[int, np.ndarray]:
    """{group: what the outputs lose at each number of its units removed, (units + 1,)}, by prunings of single groups on samples."""
    runs = len(RATIOS) * len(scores) * max(1.0, study.macs)
    fit, held = study.trials(int(min(MOST, max(LEAST, WORK / max(1.0, runs)))))
    turned = study.turned
    order = {**scores, **{g: turned.scores[g] for g in scores if g in turned.scores}}
    return curves(
        replace(grouping, model=turned.grouping.model),
        turned.evidence.part or turned.evidence,
        order,
        held,
        fit=fit,
        progress=study.progress,
        finish=study.finish,
    )


def weighed(losses: Mapping[int, np.ndarray], scores: Mapping[int, np.ndarray], allocation: str) -> dict[int, np.ndarray]:
    """What an allocation splits: the measured losses, or the geometric mean of those and of the sums of the scores of what goes."""
    if allocation == DISTORTION:
        return dict(losses)
    return {g: np.sqrt(curve * np.concatenate([[0.0], np.cumsum(np.maximum(np.sort(scores[g]), 0))])) for g, curve in losses.items()}


@dataclass(frozen=True)
class Selection:
    """How units were scored and losses measured, and by which criterion and allocation."""

    criterion: str
    allocation: str
    scores: Scores
    losses: Losses


Choose = Callable[[Scores, str, Losses, float], Choice]


def select(
    grouping: Grouping, ids: Collection[int], criterion: str, allocation: str, seed: int, study: Study, compensate: str, choose: Choose
) -> Selection:
    """Scores and losses of the groups; where one of the two names is `auto`, those of the pair that serves the model best.

    compensate: what is done to the model afterwards; choose: from scores, allocation, losses and the share of the budget that is to go
    already, which units go.
    """

    @cache
    def scores(one: str) -> Scores:
        return scored(grouping, ids, one, seed, study)

    @cache
    def losses(one: str) -> dict[int, np.ndarray]:
        return measured_losses(grouping, scores(one), study)

    tried = [
        Selection(one, rule, scores(one), weighed(losses(one), scores(one), rule) if rule in MEASURED else None)
        for one, rule in _pairs(criterion, allocation)
    ]
    if len(tried) == 1:
        return tried[0]
    changes = [_change(study, grouping, choose(found.scores, found.allocation, found.losses, 1.0), compensate) for found in tried]
    if study.progress:
        for attempt, moved in zip(tried, changes, strict=True):
            study.progress(f"{attempt.criterion} by {attempt.allocation}: outputs change by {moved:.3g} of their variance")
    return tried[int(np.argmin(changes))]


def _pairs(criterion: str, allocation: str) -> list[tuple[str, str]]:
    """What is tried where one of the two is `auto`."""
    if AUTO not in (criterion, allocation):
        return [(criterion, allocation)]
    pairs = [(criterion if criterion != AUTO else c, allocation if allocation != AUTO else a) for c, a in CANDIDATES]
    return list(dict.fromkeys(pairs))


def _change(study: Study, grouping: Grouping, choice: Choice, compensate: str) -> float:
    """How much the outputs change on samples that the fit has not seen, when the model is pruned so and compensated."""
    feeds = list(study.judged[1].batches(study.batch))
    plan = Plan(grouping, choice.remove)
    try:
        cut = study.finish(rewrite(grouping, choice.remove))
        pruned, _ = compensation.call(JUDGED.get(compensate, compensate), study.fitting(FITTED), plan, cut)
        return change(outputs_of(grouping.model.proto, feeds), outputs_of(pruned, feeds), Widths(grouping, choice.remove))
    except OnnxPruneError:
        return float("inf")


def in_steps(selection: Selection, grouping: Grouping, seed: int, study: Study, compensate: str, choose: Choose, steps: int) -> Selection:
    """The selection made again `steps` times, each on what is left when a larger part of the budget has gone and was compensated."""
    for step in range(1, steps):
        choice = choose(selection.scores, selection.allocation, selection.losses, step / steps)
        plan = Plan(grouping, choice.remove)
        pruned = rewrite(grouping, choice.remove)
        pruned = study.finish(pruned)
        if study.progress:
            study.progress(f"step {step} of {steps}")
        pruned, _ = compensation.call(compensate, study, plan, pruned)
        left = put_back(plan, pruned)
        again = replace(study, grouping=left)
        scores = scored(left, selection.scores, selection.criterion, seed, again)
        for group, units in choice.remove.items():
            if group in scores:
                scores[group][units] = min(0.0, float(scores[group].min())) - 1.0  # what is gone goes first
        losses = weighed(measured_losses(left, scores, again), scores, selection.allocation) if selection.allocation in MEASURED else None
        selection = Selection(selection.criterion, selection.allocation, scores, losses)
    return selection

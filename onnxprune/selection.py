"""Scores and losses of the groups that may be pruned, and which criterion and allocation serve a model best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from onnxprune.allocations import DISTORTION, Choice
from onnxprune.criteria import criterion as criteria
from onnxprune.equivalence import distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Grouping
from onnxprune.oneshot import updated
from onnxprune.plans import Plan
from onnxprune.rewriter import rewrite
from onnxprune.saliency import measured
from onnxprune.sensitivity import curves, outputs_of
from onnxprune.study import Study

AUTO = "auto"
CANDIDATES = (("obs", DISTORTION), ("obs", "global"), ("fluctuation", "standardized"), ("l2", "uniform"))
Scores = dict[int, np.ndarray]
Losses = Mapping[int, np.ndarray] | None


def check_criterion(name: str, samples: bool) -> None:
    """Raises OnnxPruneError where there is no such criterion, or where it looks at samples and there are none."""
    if name == AUTO or name in measured.names():
        if not samples:
            raise OnnxPruneError(f"--criterion {name} looks at activations; give --calibration (samples, or 'noise')")
    elif name not in criteria.names():
        known = sorted({*criteria.names(), *measured.names(), AUTO})
        raise OnnxPruneError(f"no criterion is named '{name}'; there are: {', '.join(known)}")


def candidates(criterion: str, allocation: str) -> list[tuple[str, str]]:
    """What is tried where one of the two is `auto`."""
    pairs = [(criterion if criterion != AUTO else c, allocation if allocation != AUTO else a) for c, a in CANDIDATES]
    return list(dict.fromkeys(pairs))


def scored(grouping: Grouping, ids: Collection[int], name: str, seed: int, study: Study | None) -> Scores:
    """{group: scores (units,)} of the width groups among `ids`."""
    groups = [g for g in grouping.groups if g.id in ids and g.branch is None]
    if name in measured.names() and study is not None:
        look = measured.get(name)
        return {g.id: look(study.evidence, g, np.random.default_rng([seed, g.id])) for g in groups}
    score = criteria.get(name)
    return {g.id: score(grouping.model, g, np.random.default_rng([seed, g.id])) for g in groups}


def losses_of(grouping: Grouping, scores: Mapping[int, np.ndarray], allocation: str, study: Study | None) -> Losses:
    """What the outputs lose at each number of units removed, where the allocation goes by that; None otherwise."""
    if allocation != DISTORTION or study is None:
        return None
    return curves(grouping, study.evidence, scores, study.few(), progress=study.progress)


Choose = Callable[[Scores, str, Losses], Choice]


def best_of(
    study: Study, grouping: Grouping, ids: Collection[int], seed: int, choose: Choose, tries: Sequence[tuple[str, str]] = CANDIDATES
) -> tuple[str, str, Scores, Losses]:
    """The criterion and allocation whose pruning changes the outputs least on samples, each with its readers updated in one shot."""
    feeds = study.few(256)
    before = outputs_of(grouping.model.proto, feeds)
    found: list[tuple[float, tuple[str, str, Scores, Losses]]] = []
    for criterion, allocation in tries:
        scores = scored(grouping, ids, criterion, seed, study)
        lost = losses_of(grouping, scores, allocation, study)
        choice = choose(scores, allocation, lost)
        try:
            pruned = updated(Plan(grouping, choice.remove), rewrite(grouping, choice.remove), study.evidence)
            change = distortion(before, outputs_of(pruned, feeds))
        except OnnxPruneError:
            change = float("inf")
        found.append((change, (criterion, allocation, scores, lost)))
        if study.progress:
            study.progress(f"{criterion} by {allocation}: outputs change by {change:.3g} of their variance")
    return min(found, key=lambda pair: pair[0])[1]

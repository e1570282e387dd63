"""How much the outputs change when one group alone loses units: measured at a few ratios, on samples, with its readers updated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from joblib import Parallel, delayed
from onnx import ModelProto

from onnxprune.capture import Tap
from onnxprune.equivalence import distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.evidence import Evidence
from onnxprune.grouping import Grouping
from onnxprune.matching import match, narrowed
from onnxprune.oneshot import updated
from onnxprune.plans import Plan
from onnxprune.rewriter import Widths, rewrite
from onnxprune.running import Arrays

RATIOS = (0.15, 0.3, 0.5, 0.7)


Outputs = list[dict[str, np.ndarray]]


def outputs_of(proto: ModelProto, feeds: Sequence[Arrays]) -> Outputs:
    """The outputs, a mapping for each batch."""
    tap = Tap(proto, [v.name for v in proto.graph.output], threads=1)
    return [tap.run(one) for one in feeds]


def change(before: Outputs, after: Outputs, widths: Widths | None = None) -> float:
    """The distortion over several batches, whose sizes may differ; widths: what outputs that may shrink have lost."""
    if widths is not None:
        before = [{name: widths.cut(name, array) for name, array in run.items()} for run in before]
    return distortion(_flat(before), _flat(after))


def _flat(runs: Outputs) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.ravel(run[name]) for run in runs]) for name in runs[0]}


def trimmed(
    plan: Plan, evidence: Evidence, fit: Sequence[Arrays], finish: Callable[[ModelProto], ModelProto] = lambda model: model
) -> ModelProto:
    """What the plan leaves, with the layers that read it updated in one shot, and products of two activations by what they are of `fit`."""
    pruned = updated(plan, finish(rewrite(plan.grouping, plan.remove)), evidence)
    for product in narrowed(plan, pruned):
        match(plan, pruned, product, lambda: fit)
    return pruned


def curves(
    grouping: Grouping,
    evidence: Evidence,
    scores: Mapping[int, np.ndarray],
    feeds: Iterable[Arrays],
    fit: Sequence[Arrays] | None = None,
    ratios: Sequence[float] = RATIOS,
    progress: Callable[[str], None] | None = None,
    finish: Callable[[ModelProto], ModelProto] = lambda model: model,
) -> dict[int, np.ndarray]:
    """For each group the distortion of the outputs of `feeds` at every number of units removed, (units + 1,); rising.

    Measured at `ratios`; between them in proportion to the scores of the units that go.  The distortion is the mean squared change
    of the outputs by their variance (equivalence.distortion).
    """
    batches = list(feeds)
    model = grouping.model
    before = outputs_of(model.proto, batches)
    wanted = []
    for group in grouping.groups:
        if group.id in scores:
            counts = sorted({round(r * group.units) for r in ratios} - {0, group.units})
            order = np.argsort(scores[group.id], kind="stable")
            wanted += [(group.id, count, np.sort(order[:count])) for count in counts]

    def measure(group: int, units: np.ndarray) -> float:
        plan = Plan(grouping, {group: units})
        try:
            pruned = trimmed(plan, evidence, batches if fit is None else fit, finish)
            return change(before, outputs_of(pruned, batches), Widths(grouping, plan.remove))
        except OnnxPruneError:
            return float("inf")

    if progress:
        progress(f"measuring {len(wanted)} prunings of single groups")
    found = Parallel(n_jobs=os.cpu_count() or 1, prefer="threads")(delayed(measure)(group, units) for group, _, units in wanted)
    points: dict[int, list[tuple[int, float]]] = {}
    for (owner, count, _), value in zip(wanted, found, strict=True):
        points.setdefault(owner, []).append((count, value))
    return {g: _curve(np.asarray(scores[g], np.float64), points.get(g, [])) for g in scores}


def _curve(scores: np.ndarray, points: Sequence[tuple[int, float]]) -> np.ndarray:
    """Through the measured points, in proportion to the sums of the scores between and beyond them."""
    rising = np.sort(np.maximum(scores, 0))
    sums = np.concatenate([[0.0], np.cumsum(rising + 1e-12 * max(float(rising.max(initial=0)), 1e-30))])
    if not points:
        return sums
    at = [0, *(count for count, _ in points)]
    values = np.maximum.accumulate([0.0, *(value for _, value in points)])
    curve = np.interp(sums, sums[at], values)
    last = at[-1]
    slope = values[-1] / max(sums[last], 1e-30)
    with np.errstate(invalid="ignore"):  # beyond a loss without bounds
        curve[last:] = values[-1] + slope * (sums[last:] - sums[last])
    return np.asarray(np.where(np.isfinite(curve), curve, np.inf))

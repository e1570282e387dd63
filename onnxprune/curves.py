"""How much the outputs change when one group alone loses units: measured at a few ratios, on samples, with its readers updated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
from joblib import Parallel, delayed
from onnx import ModelProto

from onnxprune.capture import Tap
from onnxprune.equivalence import distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.evidence import Evidence
from onnxprune.frontier import Frontier
from onnxprune.grouping import Group, Grouping
from onnxprune.matching import match, narrowed
from onnxprune.oneshot import updated
from onnxprune.plans import Plan
from onnxprune.products import products
from onnxprune.rewriter import Widths, rewrite
from onnxprune.running import Arrays
from onnxprune.scopes import captured

RATIOS = (0.15, 0.3, 0.5, 0.7)
TRIALS = 4  # for each core, before the original is run further


Outputs = list[dict[str, np.ndarray]]


def outputs_of(proto: ModelProto, feeds: Sequence[Arrays], known: Frontier | None = None) -> Outputs:
    """The outputs, a mapping for each batch; known: how far the model has been run on them."""
    given = [known.kept(number) if known else {} for number in range(len(feeds))]
    types = {name: array.dtype for name, array in given[0].items()} if given else {}
    tap = Tap(proto, [v.name for v in proto.graph.output], threads=1, known=types)
    return [tap.run({**one, **more}) for one, more in zip(feeds, given, strict=True)]


def change(before: Outputs, after: Outputs, widths: Widths | None = None) -> float:
    """The distortion over several batches, whose sizes may differ; widths: what outputs that may shrink have lost."""
    if widths is not None:
        before = [{name: widths.cut(name, array) for name, array in run.items()} for run in before]
    return distortion(_flat(before), _flat(after))


def _flat(runs: Outputs) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.ravel(run[name]) for run in runs]) for name in runs[0]}


def trimmed(
    plan: Plan,
    evidence: Evidence,
    fit: Sequence[Arrays],
    finish: Callable[[ModelProto], ModelProto] = lambda model: model,
    known: Frontier | None = None,
) -> ModelProto:
    """What the plan leaves, with the layers that read it updated in one shot, and products of two activations by what they are of `fit`.

    known: how far the original has been run on `fit`.
    """
    original = plan.grouping.model.proto
    pruned = updated(plan, finish(rewrite(plan.grouping, plan.remove)), evidence)
    for product in narrowed(plan, pruned):
        match(plan, pruned, product, lambda: fit, known=(known.on(original, pruned), known.on(original, original)) if known else None)
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
    fit = batches if fit is None else fit
    model, chosen = grouping.model, [g for g in grouping.groups if g.id in scores]
    before = outputs_of(model.proto, batches)
    ahead, fitted = Frontier(len(batches)), Frontier(len(fit))
    wanted = {group.id: sorted({round(r * group.units) for r in ratios} - {0, group.units}) for group in chosen}

    def measure(group: int, count: int) -> float:
        order = np.argsort(scores[group], kind="stable")
        plan = Plan(grouping, {group: np.sort(order[:count])})
        try:
            pruned = trimmed(plan, evidence, fit, finish, fitted)
            return change(before, outputs_of(pruned, batches, ahead.on(model.proto, pruned)), Widths(grouping, plan.remove))
        except OnnxPruneError:
            return float("inf")

    if progress:
        progress(f"measuring {sum(map(len, wanted.values()))} prunings of single groups")
    points: dict[int, list[tuple[int, float]]] = {}
    jobs = os.cpu_count() or 1
    for part, changing in _by_place(model.proto, chosen, -(-TRIALS * jobs // max(1, len(ratios)))):
        with suppress(OnnxPruneError):  # a value that cannot be handed out: runs begin at the inputs
            ahead.advance(model.proto, changing, batches)
            if products(model):
                fitted.advance(model.proto, changing, fit)
        todo = [(group.id, count) for group in part for count in wanted[group.id]]
        found = Parallel(n_jobs=jobs, prefer="threads")(delayed(measure)(*each) for each in todo)
        for (owner, count), value in zip(todo, found, strict=True):
            points.setdefault(owner, []).append((count, value))
    return {g: _curve(np.asarray(scores[g], np.float64), points.get(g, [])) for g in scores}


def _by_place(proto: ModelProto, groups: Sequence[Group], many: int) -> Iterator[tuple[Sequence[Group], set[str]]]:
    """The groups, so many at a time, in the order in which a run comes to them; and the tensors of those and of all behind."""
    places: dict[str, int] = {}
    for place, node in enumerate(proto.graph.node):
        for name in (*node.input, *node.output, *captured(node)):
            places.setdefault(name, place)
    ordered = sorted(groups, key=lambda group: min(places.get(member.tensor, 0) for member in group.members))
    for start in range(0, len(ordered), many):
        yield ordered[start : start + many], {member.tensor for group in ordered[start:] for member in group.members}


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

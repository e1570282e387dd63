"""How much the outputs change, and accuracy drops, when one group alone loses units: at any ratios, kept point by point."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.calibration import read_calibration
from onnxprune.certificate import certify
from onnxprune.curves import change, outputs_of, trimmed
from onnxprune.depth import at_granularity
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluation import Metric
from onnxprune.external import AT_ONCE
from onnxprune.ground import NO_EFFECT
from onnxprune.grouping import Grouping, group
from onnxprune.importer import load, read
from onnxprune.keeping import counted, digest_of, keep, key_of, read_kept
from onnxprune.naming import group_names
from onnxprune.plans import Plan
from onnxprune.quality import Evaluator, evaluator, quality
from onnxprune.quantized import in_floats
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays
from onnxprune.samples import Samples
from onnxprune.scoping import may_go
from onnxprune.selection import AUTO, PCA, check_criterion, scored
from onnxprune.sizing import guessed, sized, tell_guessed
from onnxprune.study import Study

KIND = "sensitivity"
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
FEW = 128  # samples on which the change of the outputs is measured


@dataclass(frozen=True)
class Point:
    """One group without its `removed` lowest units of `units`, the layers that read it updated in one shot.

    change: mean squared change of the outputs by their variance, None where the model does not run so; quality: on the evaluation
    samples, None without them.
    """

    group: int
    units: int
    removed: int
    ratio: float
    change: float | None
    quality: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """ratios: as asked for; points: by group and number removed; tensors, names: {group: the first tensor of each, and what people
    call it}.

    measure: what `quality` is (`quality.Quality`), None where nothing was evaluated; before: the original's; skipped: groups that the
    inputs do not exercise, and so stay whole.
    """

    model: str
    ratios: tuple[float, ...]
    points: tuple[Point, ...]
    tensors: Mapping[int, str]
    names: Mapping[int, str]
    measure: str | None
    before: float | None
    skipped: tuple[int, ...]
    key: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The format of docs/exploring.md, which is that of the state file too."""
        naming = {"tensor": self.tensors, "name": self.names}
        return {
            "format": 1,
            "kind": KIND,
            "model": self.model,
            "key": dict(self.key),
            "ratios": list(self.ratios),
            "measure": self.measure,
            "before": self.before,
            "skipped": list(self.skipped),
            "points": [asdict(point) | {n: known.get(point.group) for n, known in naming.items()} for point in self.points],
        }


def sensitivity(
    model: str | os.PathLike[str] | ModelProto,
    calibration: str | os.PathLike[str] | Arrays | Callable[[], Any],
    *,
    ratios: Sequence[float] = RATIOS,
    criterion: str = "obs",
    samples: int | None = None,
    evaluation: str | os.PathLike[str] | Arrays | Callable[[], Any] | None = None,
    metric: str | Metric | None = None,
    preprocess: str | None = None,
    scope: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_io: Sequence[str] = (),
    feeds: Arrays | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    verify: bool = True,
    memory: int | None = None,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Remove each ratio of the units of each group alone, and measure what that changes.

    ratios: between 0 and 1, rounded to whole units, of which one stays at least.  The lowest units by the criterion go, and the layers
    that read the group are updated in closed form from the calibration samples' moments, as when `prune` measures losses.
    evaluation: samples for accuracy (with `labels`), the metric, or the cosine of the outputs.
    state: a JSON file in which each point is kept as soon as it is measured; what it holds already is not measured again.

    Raises OnnxPruneError for bad input, and for a state of another model, other samples or other options.
    """
    if criterion in (AUTO, PCA):
        raise OnnxPruneError(f"--criterion {criterion} is no order of one group's units; give another, such as obs")
    check_criterion(criterion, calibration != "none")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise OnnxPruneError(f"the ratio {ratio:g} is no share to remove; it must lie between 0 and 1")
    if evaluation is None and metric is not None:
        raise OnnxPruneError("--metric says how the samples of --eval are used; give --eval too")
    if progress:
        progress("reading the model")
    file = read(model, AT_ONCE if memory is None else memory)
    file.external.need_memory(file.name, "sensitivity")
    sizes = sized(file.proto, feeds, input_shapes, [calibration, evaluation], preprocess)
    loaded = load(file, feeds, sizes)
    tell_guessed(loaded, guessed(loaded.proto, feeds, sizes), calibration)
    data = read_calibration(calibration, loaded, preprocess=preprocess, limit=samples, seed=seed)
    if not data.count:
        raise OnnxPruneError("--calibration none: there is nothing to measure on; give samples, or 'noise'")
    compare = evaluator(loaded, evaluation, preprocess, metric, seed) if evaluation is not None else None
    if compare is not None:
        compare.expect(loaded)
    key = key_of(
        model,
        calibration=digest_of(data, calibration),
        eval=None if compare is None else digest_of(compare.samples, evaluation),
        metric=getattr(metric, "__name__", metric),
        criterion=criterion,
        seed=seed,
        input_shapes={k: list(v) for k, v in loaded.input_shapes.items()},
        allow_io=list(allow_io),
    )
    remedy = "give another --state, or remove that file"
    kept = read_kept(state, KIND, key, remedy) if state is not None else {}
    grouping, idle = at_granularity(group(loaded, allow_io), "channel"), set[int]()
    if verify and grouping.groups:
        grouping, proof, _ = certify(grouping, feeds, seed, progress=progress)
        idle = set(proof.unexercised)
    chosen, _ = may_go(grouping, scope, exclude, {})
    if chosen and chosen <= idle:
        raise OnnxPruneError(f"{loaded.name}: {NO_EFFECT}", 3)
    if not chosen:
        raise OnnxPruneError(f"{loaded.name}: no group is left to measure; widen --scope or --exclude less", 3)
    names = group_names(grouping)
    tensors = {g.id: g.members[0].tensor for g in grouping.groups}
    floats = in_floats(grouping, feeds, lambda one: at_granularity(group(one, allow_io), "channel"))
    if floats is not None:  # integers say nothing of a unit's size, and cannot be updated
        grouping = replace(floats[0], groups=tuple(replace(g, id=floats[1][g.id]) for g in floats[0].groups))
    grouping = replace(grouping, groups=tuple(g for g in grouping.groups if g.id in chosen - idle))
    if not grouping.groups:
        raise OnnxPruneError(f"{loaded.name}: no group is left to measure; see `onnxprune groups`", 3)
    found = Sensitivity(
        model=loaded.name,
        ratios=tuple(ratios),
        points=tuple(_points(kept)),
        tensors={g.id: tensors[g.id] for g in grouping.groups},
        names={i: name for i, name in names.items() if i in chosen},
        measure=kept.get("measure"),
        before=kept.get("before"),
        skipped=tuple(sorted(chosen & idle)),
        key=key,
    )
    return _measured(found, grouping, data, criterion, seed, compare, state, progress)


def removed(units: int, ratio: float) -> int:
    """Units that a ratio removes: one at least, and one stays."""
    return min(units - 1, max(1, round(ratio * units)))


def _points(kept: Mapping[str, Any]) -> list[Point]:
    names = Point.__dataclass_fields__
    return [Point(**{k: v for k, v in entry.items() if k in names}) for entry in kept.get("points", ())]


def _measured(
    found: Sensitivity,
    grouping: Grouping,
    data: Samples,
    criterion: str,
    seed: int,
    compare: Evaluator | None,
    state: str | os.PathLike[str] | None,
    progress: Callable[[str], None] | None,
) -> Sensitivity:
    """With the points that are missing."""
    study = Study(grouping, data, progress)
    done = {(point.group, point.removed) for point in found.points}
    wanted = []
    for one in grouping.groups:
        wanted += [(one, count) for count in sorted({removed(one.units, ratio) for ratio in found.ratios})]
    missing = [(one, count) for one, count in wanted if (one.id, count) not in done]
    if missing:
        scores = scored(grouping, {one.id for one, _ in missing}, criterion, seed, study)
        (fit, batches), evidence = study.trials(FEW), study.evidence.part or study.evidence
        before = outputs_of(grouping.model.proto, batches)
        tell = counted(len(wanted), len(wanted) - len(missing), "points", progress)

        def measure(one: int, units: int, count: int) -> tuple[Point, str | None, float | None]:
            order = np.argsort(scores[one], kind="stable")
            plan = Plan(grouping, {one: np.sort(order[:count])})
            point = Point(one, units, count, count / units, None)
            try:
                pruned = trimmed(plan, evidence, fit)
                moved = change(before, outputs_of(pruned, batches), Widths(grouping, plan.remove))
            except OnnxPruneError:  # it does not run without these units
                return point, None, None
            point = replace(point, change=moved if np.isfinite(moved) else None)
            if compare is None:
                return point, None, None
            judged = quality(compare(grouping.model.proto, pruned))
            return replace(point, quality=judged.value), judged.measure, judged.before

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            waiting = [pool.submit(measure, one.id, one.units, count) for one, count in missing]
            try:
                for future in as_completed(waiting):
                    point, measured, original = future.result()
                    points = sorted([*found.points, point], key=lambda p: (p.group, p.removed))
                    found = replace(found, points=tuple(points), measure=measured or found.measure)
                    found = found if original is None else replace(found, before=original)
                    keep(found.to_json(), state)
                    tell()
            finally:  # where it was interrupted, only what runs is waited for
                pool.shutdown(cancel_futures=True)
    asked = {(one.id, count) for one, count in wanted}
    return replace(found, points=tuple(p for p in found.points if (p.group, p.removed) in asked))

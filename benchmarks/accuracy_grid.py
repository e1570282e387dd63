"""Several results of onnxprune in one process, for accuracy.py: samples are read once, losses measured once, plans chosen once.

What comes out is what `onnxprune.prune` makes of each one's names (tests/test_accuracy_grid.py compares them); of the proof it has that
of the groups, not that of each surgery.  Two names that remove the same units (`l2` and `bn-scale`, where no BatchNormalization is
left) have one result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import onnx


class Job(Protocol):
    """What accuracy.py asks for; those given together have one model, ratio, seed and calibration."""

    model: str
    ratio: float
    seed: int
    options: dict[str, str]


def together(
    jobs: Sequence[Job], calibration: Any, samples: int | None, path: Path, feeds: Any
) -> Iterator[tuple[tuple[Any, ...], Callable[[], onnx.ModelProto]]]:
    """Of each job what tells its result from another's, and how to make the pruned model.

    Raises OnnxPruneError where one cannot be made.
    """
    from onnxprune.allocations import MEASURED, Limits
    from onnxprune.calibration import read_calibration
    from onnxprune.certificate import certify
    from onnxprune.choosing import chosen_for
    from onnxprune.compensation import TURNING, compensation
    from onnxprune.grouping import group
    from onnxprune.importer import load
    from onnxprune.plans import Plan
    from onnxprune.rewriter import rewrite
    from onnxprune.selection import measured_losses, scored, weighed
    from onnxprune.study import Study

    first = jobs[0]
    loaded = load(str(path), feeds)
    grouping, proof, _ = certify(group(loaded), feeds, first.seed)
    plain = Study(grouping, read_calibration(calibration, loaded, limit=samples, seed=first.seed), seed=first.seed)
    turning = replace(plain, turns=True)
    turning.__dict__["evidence"] = plain.evidence
    chosen = {g.id for g in grouping.groups} - set(proof.unexercised)

    @cache
    def scores(criterion: str) -> Any:
        return scored(grouping, chosen, criterion, first.seed, plain)

    @cache
    def losses(criterion: str, turns: bool) -> dict[int, Any]:
        return measured_losses(grouping, scores(criterion), turning if turns else plain)

    @cache
    def plan(criterion: str, rule: str, turns: bool) -> Plan:
        split = weighed(losses(criterion, turns), scores(criterion), rule) if rule in MEASURED else None
        choice = chosen_for(None, grouping, scores(criterion), {}, first.ratio, "macs", rule, [Limits()], {}, split)
        return Plan(grouping, choice.remove)

    def model(name: str, made: Plan) -> onnx.ModelProto:
        study = turning if name in TURNING else plain
        return compensation.get(name)(study, made, rewrite(grouping, made.remove))[0]

    for job in jobs:
        name = job.options["compensation"]
        made = plan(job.options["criterion"], job.options["allocation"], name in TURNING)
        removed = tuple((group, tuple(map(int, units))) for group, units in sorted(made.remove.items()))
        yield (name, removed), partial(model, name, made)

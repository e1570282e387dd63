"""Several results of onnxprune in one process, for accuracy.py: samples are read once, losses measured once, plans chosen once.

What comes out is what `onnxprune.prune` makes of each one's names (tests/test_accuracy_grid.py compares them); of the proof it has that
of the groups, not that of each surgery.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import onnx


class Job(Protocol):
    """What accuracy.py asks for; of those given together only allocation and compensation differ."""

    model: str
    ratio: float
    seed: int
    options: dict[str, str]


def together(jobs: Sequence[Job], calibration: Any, samples: int | None, path: Path, feeds: Any) -> Iterator[onnx.ModelProto]:
    """The pruned model of each job.

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
    scores = scored(grouping, chosen, first.options["criterion"], first.seed, plain)

    @cache
    def losses(turns: bool) -> dict[int, Any]:
        return measured_losses(grouping, scores, turning if turns else plain)

    @cache
    def plan(rule: str, turns: bool) -> Plan:
        split = weighed(losses(turns), scores, rule) if rule in MEASURED else None
        choice = chosen_for(None, grouping, scores, {}, first.ratio, "macs", rule, [Limits()], {}, split)
        return Plan(grouping, choice.remove)

    for job in jobs:
        name = job.options["compensation"]
        made = plan(job.options["allocation"], name in TURNING)
        yield compensation.get(name)(turning if name in TURNING else plain, made, rewrite(grouping, made.remove))[0]

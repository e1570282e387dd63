"""A model's groups and the samples it is studied on, with what was found so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from onnx import ModelProto

from onnxprune.cost import count_macs
from onnxprune.evidence import Evidence, gather
from onnxprune.expectation import expected
from onnxprune.grouping import Grouping
from onnxprune.plans import Plan
from onnxprune.rewriter import rewrite
from onnxprune.running import Arrays
from onnxprune.samples import Samples
from onnxprune.turning import Turned, turned

HELD = 128  # samples on which losses are measured, at most
LARGE = 2**17  # elements of a sample's inputs, from which on batches are small


@dataclass
class Study:
    """samples: calibration data, or none (count 0); evidence: gathered when first asked for, or what the weights alone let expect.

    known: scores that the model's own form gives (of streams that were turned into principal components); finish: what a pruned
    model needs besides the surgery (their norms' scale); turns: compensation may change what the units of a linear bottleneck are;
    seed: of the order in which samples are drawn.
    """

    grouping: Grouping
    samples: Samples
    progress: Callable[[str], None] | None = None
    known: Mapping[int, np.ndarray] = field(default_factory=dict)
    finish: Callable[[ModelProto], ModelProto] = lambda model: model
    turns: bool = False
    seed: int = 0

    @property
    def batch(self) -> int:
        """Samples a batch: at least sixteen batches where there are samples for it, and small ones of large inputs."""
        shapes = self.grouping.model.input_shapes.values()
        elements = sum(math.prod(shape[1:]) for shape in shapes)
        return max(1, min(8 if elements >= LARGE else 32, self.samples.count // 16))

    @property
    def macs(self) -> float:
        """Multiply-accumulates of one sample."""
        model = self.grouping.model
        return count_macs(model) / max(1, next((shape[0] for shape in model.input_shapes.values() if shape), 1))

    def batches(self) -> Iterator[Arrays]:
        return self.samples.batches(self.batch)

    def part(self, most: int) -> Samples:
        """At most so many samples, spread over all; a whole batch of a model that takes no other."""
        return _at_most(self.samples, most)

    def apart(self, share: float, most: int) -> tuple[Samples, Samples]:
        """`share` of the samples (at most so many) to fit to and the others to compare on; all for both where there are too few."""
        count, least = self.samples.count, self.samples.at_once or 1
        if count < 2 * least:
            return self.samples, self.samples
        held = min(max(round(count * (1 - share) / least), 1) * least, count - least)
        fit, other = self.samples.split(1 - held / count)
        return _at_most(fit, most), other

    def few(self, most: int = HELD) -> list[Arrays]:
        """Feeds of at most so many samples."""
        return list(self.part(most).batches(self.batch))

    def trials(self, most: int = HELD) -> tuple[list[Arrays], list[Arrays]]:
        """Feeds of at most so many samples to fit to, and to measure losses on (`judged`)."""
        fit, held = (_at_most(some, most) for some in self.judged)
        return list(fit.batches(self.batch)), list(held.batches(self.batch))

    @cached_property
    def evidence(self) -> Evidence:
        if not self.samples.count:
            return expected(self.grouping)
        fit, held = self.judged
        if fit is held:
            return replace(gather(self.grouping, self.batches, progress=self.progress), trial=self.few)
        parts = (lambda: fit.batches(self.batch), lambda: held.batches(self.batch))
        return replace(gather(self.grouping, *parts, progress=self.progress), trial=self.few)

    @cached_property
    def judged(self) -> tuple[Samples, Samples]:
        """The samples to update layers by when the loss of a pruning is measured, and the quarter, or HELD, to measure it on.

        On what layers were updated by they look better than they are, those of many inputs and few places most.
        """
        return self.apart(1 - min(0.25, HELD / max(1, self.samples.count)), self.samples.count)

    @cached_property
    def turned(self) -> Turned:
        """The grouping on a model whose linear bottlenecks are turned, if `turns`; the grouping as it is otherwise."""
        first = next(self.batches(), None) if self.turns and self.samples.count else None
        return Turned(self.grouping, self.evidence) if first is None else turned(self.grouping, self.evidence, first)

    def on(self, grouping: Grouping) -> Study:
        """The same for fewer groups of the same model, with what was found so far."""
        other = replace(self, grouping=grouping)
        other.__dict__.update({name: vars(self)[name] for name in ("evidence", "turned") if name in vars(self)})
        return other

    def fitting(self, most: int) -> Study:
        """The same with at most so many samples, none of those that losses are measured on, and with what was found without them."""
        other = replace(self, samples=_at_most(self.judged[0], most))
        evidence = self.turned.evidence
        found = {"evidence": self.evidence.part or self.evidence, "turned": replace(self.turned, evidence=evidence.part or evidence)}
        other.__dict__.update(found)
        return other

    def surgery(self, plan: Plan) -> tuple[Plan, ModelProto]:
        """The plan on the turned model, and that model pruned by it: what a compensation starts from."""
        made = self.turned.plan(plan)
        return made, self.finish(rewrite(made.grouping, made.remove))


def _at_most(samples: Samples, most: int) -> Samples:
    most = max(most, samples.at_once or 1)
    return samples if samples.count <= most else samples.split(1 - most / samples.count)[1]

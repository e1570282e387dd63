"""A model's groups and the samples it is studied on, with what was found so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from onnxprune.evidence import Evidence, gather
from onnxprune.expectation import expected
from onnxprune.grouping import Grouping
from onnxprune.running import Arrays
from onnxprune.samples import Samples

LARGE = 2**17  # elements of a sample's inputs, from which on batches are small


@dataclass
class Study:
    """samples: calibration data, or none (count 0); few: a part of it, for what is measured many times.

    evidence: gathered when first asked for; without samples it is what the weights alone let expect.
    """

    grouping: Grouping
    samples: Samples
    progress: Callable[[str], None] | None = None

    @property
    def batch(self) -> int:
        """Samples a batch: at least sixteen batches where there are samples for it, and small ones of large inputs."""
        shapes = self.grouping.model.input_shapes.values()
        elements = sum(math.prod(shape[1:]) for shape in shapes)
        return max(1, min(8 if elements >= LARGE else 32, self.samples.count // 16))

    def batches(self) -> Iterator[Arrays]:
        return self.samples.batches(self.batch)

    def part(self, most: int) -> Samples:
        """At most so many samples, spread over all."""
        count = self.samples.count
        return self.samples if count <= most else self.samples.split(1 - most / count)[1]

    def few(self, most: int = 128) -> list[Arrays]:
        """Feeds of at most so many samples."""
        return list(self.part(most).batches(self.batch))

    @cached_property
    def evidence(self) -> Evidence:
        if not self.samples.count:
            return expected(self.grouping)
        return replace(gather(self.grouping, self.batches, progress=self.progress), trial=self.few)

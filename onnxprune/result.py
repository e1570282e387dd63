"""What pruning gives: a model, the plan that made it, its proof and its costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.certificate import Proof
from onnxprune.fidelity import Fidelity
from onnxprune.plans import Plan
from onnxprune.reconstruction import Refit
from onnxprune.rewriter import Widths
from onnxprune.tensorrt import Support
from onnxprune.writing import write_model

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """A pruned model, the plan that made it, its proof (None without verification), and its costs before and after.

    refits: the layers that compensation fitted anew; fidelity: how near the outputs on calibration samples stay to the original's,
    without compensation and with it.  support: what TensorRT does not take of the original, where that is the target.
    scores, losses: {group id: (units,)} and, of allocations that measure, what the outputs lose at each number of units removed,
    {group id: (units + 1,)}: what the units were chosen by.
    macs, parameters: (before, after); reached: share of the budget that went; on_budget: within a point of what was asked, a latency
    within five percent; latency: seconds (before, after), where that was the budget.
    model: where weights were left in other files, as they exceed `memory`, those of the result have no values in it: `save` it.
    """

    model: ModelProto = field(repr=False)
    plan: Plan = field(repr=False)
    proof: Proof | None
    macs: tuple[int, int]
    parameters: tuple[int, int]
    reached: float
    on_budget: bool
    refits: tuple[Refit, ...] = field(default=(), repr=False)
    fidelity: tuple[Fidelity, Fidelity] | None = field(default=None, repr=False)
    scores: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    losses: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    support: Support | None = field(default=None, repr=False)
    latency: tuple[float, float] | None = None

    def save(self, path: str | os.PathLike[str], *, shard_size: int | None = None, progress: Progress | None = None) -> None:
        """Write the model, whole or not at all; weights go to PATH.data where the original's stand in other files, or over 2 GiB.

        shard_size: bytes of each data file at most (PATH-00001-of-00004.data, …).  Raises OnnxPruneError where the disk does not take it.
        """
        original, widths = self.plan.grouping.model, Widths(self.plan.grouping, self.plan.remove)

        def pieces(name: str) -> Iterator[np.ndarray]:
            place = original.external.places[name]
            return place.rows(widths.masks(name, len(place.shape)))

        files = original.external.files
        write_model(self.model, path, pieces=pieces, external=bool(files), shard_size=shard_size, inputs=files, progress=progress)

    def to_json(self) -> dict[str, Any]:
        return {
            "macs": list(self.macs),
            "parameters": list(self.parameters),
            "latency": list(self.latency) if self.latency else None,
            "reached": self.reached,
            "on_budget": self.on_budget,
            "options": dict(self.plan.options),
            "proof": self.proof.to_json() if self.proof else None,
            "refits": [refit.to_json() for refit in self.refits],
            "fidelity": [found.to_json() for found in self.fidelity] if self.fidelity else None,
            "support": self.support.to_json() if self.support else None,
        }

"""What benchmarks/accuracy_grid.py makes of many names in one process is what `prune` makes of each."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import ROOT

import onnxprune

sys.path.insert(0, str(ROOT / "benchmarks"))
from accuracy_grid import together


@dataclass(frozen=True)
class Job:
    options: dict[str, str]
    model: str = ""
    ratio: float = 0.4
    seed: int = 3


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet"])
def test_results_made_together_are_those_made_alone(name: str) -> None:
    path = ROOT / "models" / f"{name}.onnx"
    with np.load(ROOT / "models" / "digits-images.calibration.npz") as content:
        calibration = {key: content[key] for key in content.files}
    names = itertools.product(["global", "balanced"], ["none", "update", "reconstruct"])
    jobs = [Job({"criterion": "obs", "allocation": a, "compensation": c}) for a, c in names]
    for job, made in zip(jobs, together(jobs, calibration, 40, path, None), strict=True):
        alone = onnxprune.prune(str(path), job.ratio, calibration=calibration, samples=40, seed=job.seed, **job.options)
        assert made.SerializeToString() == alone.model.SerializeToString(), job.options

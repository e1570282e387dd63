"""benchmarks/: what is made of many names in one process is what `prune` makes of each, and the tables of them say what was measured."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import onnxprune

sys.path.insert(0, str(ROOT / "benchmarks"))
from accuracy_grid import together
from accuracy_pairs import page, summary


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
    names = itertools.product(["obs", "l2", "bn-scale"], ["global", "balanced"], ["none", "update", "reconstruct"])
    jobs = [Job({"criterion": c, "allocation": a, "compensation": k}) for c, a, k in names]
    known: dict[Any, bytes] = {}
    for job, (result, model) in zip(jobs, together(jobs, calibration, 40, path, None), strict=True):
        alone = onnxprune.prune(str(path), job.ratio, calibration=calibration, samples=40, seed=job.seed, **job.options)
        known.setdefault(result, model().SerializeToString())
        assert known[result] == alone.model.SerializeToString(), job.options


def row(criterion: str, allocation: str, accuracy: float) -> dict[str, Any]:
    names = {"criterion": criterion, "allocation": allocation, "compensation": "update", "calibration": "data:64"}
    found = {"model": "resnet20-cifar10", "ratio": 0.3, "macs": 0.3, "evaluated": 1000, "accuracy": accuracy, "options": names}
    return found | {"method": ", ".join(names.values())}


def test_means_of_pairs_are_of_all_of_them_or_left_out() -> None:
    rows = [row("l1", "global", 0.5), row("l1", "uniform", 0.7), row("obs", "global", 0.8), row("obs", "uniform", 0.6)]
    text = summary(rows, rows[2]["options"])
    for line in ("| `l1` | 60.0 |", "| `obs` | **70.0** |", "| `global` | **65.0** |", "| `uniform` | **65.0** |"):
        assert line in text
    assert "| `update` | 4 | 80.0 (`obs`, `global`) | 80.0 | 65.0 | 50.0 (`l1`, `global`) |" in text
    assert "| `l1` | 50.0 | 70.0 |" in page(rows)
    less = summary(rows[:3], rows[2]["options"])
    for line in ("| `l1` | 60.0 |", "| `obs` |  |", "| `global` | 65.0 |", "| `uniform` |  |"):  # the only one is not the best of any
        assert line in less

"""Real models and a collection of exported graphs, where they are at hand (they are not part of the repository)."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from outside import covered, distance, permuted, run

import onnxprune

REAL = sorted((SHARED / "real").glob("*.onnx")) if (SHARED / "real").is_dir() else []
missing = pytest.mark.skipif(not REAL, reason=f"{SHARED} is not there: the models are not part of the repository")
LARGEST = 3_000_000  # parameters


def zoo() -> Any:
    sys.path.insert(0, str(SHARED / "zoo"))
    import zoo as module

    return module


def graphs() -> list[str]:
    """Every small graph of the collection."""
    return sorted(n for n, entry in zoo().index().items() if entry["parameters"] < LARGEST) if REAL else []


@missing
@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_models_meet_the_budget_and_the_proof(path: Any, ratio: float) -> None:
    given = path.with_suffix(".feeds.npz")
    feeds = dict(np.load(given)) if given.exists() else None
    result = onnxprune.prune(path, ratio, feeds=feeds)
    assert result.on_budget
    assert abs(1 - result.macs[1] / result.macs[0] - ratio) <= 0.01
    assert result.proof is not None
    assert not result.proof.frozen


@missing
@pytest.mark.parametrize("name", graphs())
def test_exported_graphs(name: str) -> None:
    """What is claimed of a graph holds from outside; or nothing is claimed, or the proof refuses."""
    model, feeds = zoo().load(name, 0), dict(zoo().feeds(name, 0))
    try:
        result = onnxprune.prune(model, 0.4, feeds=feeds)
    except onnxprune.OnnxPruneError as error:
        if error.exit_code in (3, 4):
            return
        raise
    assert result.proof is not None
    content = result.plan.to_json()
    assert covered(content)
    source = result.plan.grouping.model.proto
    gap = distance(run(source, feeds), run(permuted(source, content), feeds))
    assert gap <= max(2e-3, 20 * result.proof.rounding)

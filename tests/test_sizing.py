"""Sizes that a file leaves open: what the proof, the counters and the clock run on follows the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command
from outside import Weight, build

import onnxprune
from onnxprune.errors import OnnxPruneError

LENGTH = 7


def sequences() -> onnx.ModelProto:
    """x (N, S, 6) and a mask (N, S), two layers."""
    body = "h = MatMul (x, a) r = Relu (h) z = MatMul (r, b) u = Unsqueeze (m, two) y = Mul (z, u)"
    weights: dict[str, Weight] = {"a": (6, 8), "b": (8, 4), "two": [2]}
    return build("float[N,S,6] x, float[N,S] m", body, "float y", weights)


def samples(length: int, count: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((count, length, 6)).astype(np.float32), "m": np.ones((count, length), np.float32)}


def shapes(result: onnxprune.Result) -> dict[str, list[int]]:
    found: dict[str, list[int]] = result.to_json()["options"]["input_shapes"]
    return found


def of_two_lengths() -> Iterator[dict[str, np.ndarray]]:
    yield samples(LENGTH)
    yield samples(LENGTH + 2)


@pytest.mark.parametrize("kind", ["arrays", "npz", "folder", "one sample a file", "function"])
def test_open_sizes_are_those_of_the_first_sample(kind: str, tmp_path: Path) -> None:
    source: Any = samples(LENGTH)
    if kind == "npz":
        source = tmp_path / "data.npz"
        np.savez(source, **samples(LENGTH))
    elif kind == "folder":
        source = tmp_path
        np.savez(tmp_path / "a.npz", **samples(LENGTH))
        np.savez(tmp_path / "b.npz", **samples(LENGTH + 2))
    elif kind == "one sample a file":
        source = tmp_path
        for i in range(8):
            np.savez(tmp_path / f"{i}.npz", **{name: array[i] for name, array in samples(LENGTH + i).items()})
    elif kind == "function":
        source = of_two_lengths
    result = onnxprune.prune(sequences(), 0.5, calibration=source)
    assert shapes(result) == {"x": [2, LENGTH, 6], "m": [2, LENGTH]}
    assert result.macs[0] == onnxprune.prune(sequences(), 0.5, input_shapes={"x": (2, LENGTH, 6), "m": (2, LENGTH)}).macs[0]


def test_what_is_given_goes_before_what_samples_have() -> None:
    result = onnxprune.prune(sequences(), 0.5, calibration=samples(LENGTH), input_shapes={"x": (2, 5, 6)})
    assert shapes(result) == {"x": [2, 5, 6], "m": [2, 5]}
    fed = {name: array[:3] for name, array in samples(4).items()}
    assert shapes(onnxprune.prune(sequences(), 0.5, calibration=samples(LENGTH), feeds=fed)) == {"x": [3, 4, 6], "m": [3, 4]}


def test_a_model_that_runs_at_no_assumed_size_runs_at_that_of_its_samples() -> None:
    body = "h = MatMul (x, a) r = Relu (h) z = MatMul (r, b) y = Add (z, p)"
    model = build("float[N,S,6] x", body, "float y", {"a": (6, 8), "b": (8, 4), "p": (LENGTH, 4)})
    with pytest.raises(OnnxPruneError, match="--input-shape"):
        onnxprune.prune(model, 0.5)
    assert shapes(onnxprune.prune(model, 0.5, calibration={"x": samples(LENGTH)["x"]})) == {"x": [2, LENGTH, 6]}


def test_the_command_takes_sizes_from_evaluation_samples_and_says_them(command: Command, tmp_path: Path) -> None:
    onnx.save(sequences(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **samples(LENGTH))
    np.savez(tmp_path / "other.npz", **samples(LENGTH + 1))
    result = command("model.onnx", "-r", "0.5", "--eval", "data.npz")
    assert result.returncode == 0, result.stderr
    assert f"counted and timed at x 2×{LENGTH}×6" in " ".join(result.stdout.split())
    result = command("model.onnx", "-r", "0.5", "--eval", "data.npz", "--calibration", "other.npz")
    assert f"counted and timed at x 2×{LENGTH + 1}×6" in " ".join(result.stdout.split())


def test_sensitivity_and_sweep_take_them_too(tmp_path: Path) -> None:
    wanted = {"x": [2, LENGTH, 6], "m": [2, LENGTH]}
    assert onnxprune.sensitivity(sequences(), samples(LENGTH), ratios=[0.5]).key["input_shapes"] == wanted
    found = onnxprune.sweep(sequences(), tmp_path / "out", [0.5], evaluation=samples(LENGTH), seconds=0)
    assert found.key["input_shapes"] == wanted
    assert found.original["macs"] == 2 * LENGTH * (6 * 8 + 8 * 4)


@pytest.mark.parametrize(
    "line",
    [("prune", "model.onnx", "-r", "0.5"), ("sweep", "model.onnx", "--ratios", "0.5"), ("plan", "model.onnx", "-r", "0.5", "-o", "p")],
)
def test_no_latency_of_a_size_that_is_only_assumed(line: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    onnx.save(sequences(), tmp_path / "model.onnx")
    result = command(*line, "--of", "latency", "--calibration", "noise")
    assert result.returncode == 2
    [error] = result.stderr.splitlines()
    assert "'x' [N, S, 6]" in error
    assert "--input-shape" in error
    assert "--feeds" in error

"""`--fail-under`: the least that a pruned model must reach in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EVAL, MODELS, Command
from outside import build
from test_cli import failing

from onnxprune.gates import Gate

MLP = MODELS / "digits-mlp.onnx"
DATA = MODELS / EVAL["digits-mlp"]
SAMPLES = MODELS / "digits-mlp.calibration.npz"


def test_gates_that_are_met_leave_exit_code_0_and_are_in_the_json(command: Command) -> None:
    gates = ["--fail-under", "accuracy=90%,macs=0.39", "--fail-under", "cosine=0.5,agreement=0.5,params=0.01,speedup=0.001"]
    result = command(MLP, "-r", "0.4", "-q", "-o", "o.onnx", "--eval", DATA, "--calibration", SAMPLES, *gates, "--json", "-")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    found = {gate["figure"]: gate for gate in content["gates"]}
    assert list(found) == ["accuracy", "macs", "cosine", "agreement", "params", "speedup"]
    assert all(gate["passed"] and gate["found"] >= gate["least"] for gate in found.values())
    assert found["accuracy"] == {"figure": "accuracy", "least": 0.9, "found": content["evaluation"]["after"], "passed": True}
    assert found["macs"]["found"] == pytest.approx(1 - content["macs"][1] / content["macs"][0])
    latencies = [m["latency_median_s"] for m in content["benchmark"]]  # measured, though --quiet leaves that out otherwise
    assert found["speedup"]["found"] == pytest.approx(latencies[0] / latencies[1])


def test_a_gate_that_is_missed_is_named_and_the_model_is_written(command: Command, tmp_path: Path) -> None:
    gates = ["--fail-under", "accuracy=1,agreement=0.1"]
    result = command(MLP, "-r", "0.6", "-q", "-o", "o.onnx", "--eval", DATA, *gates, "--json", "o.json")
    assert result.returncode == 5
    assert len(result.stderr.splitlines()) == 1
    assert "accuracy is 0." in result.stderr
    assert "agreement" not in result.stderr
    onnx.checker.check_model(onnx.load(tmp_path / "o.onnx"))
    content = json.loads((tmp_path / "o.json").read_text())
    assert [gate["passed"] for gate in content["gates"]] == [False, True]


def test_a_figure_that_the_samples_cannot_tell_is_refused_before_any_work(command: Command, tmp_path: Path) -> None:
    np.savez(tmp_path / "unlabelled.npz", input=np.load(DATA)["input"][:32])
    result = command(MLP, "-r", "0.3", "-q", "-o", "o.onnx", "--eval", "unlabelled.npz", "--fail-under", "accuracy=0.1")
    failing(result, 2, "unlabelled.npz", "labels", "accuracy")
    values = build("float[N,4] x", "h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)", "float y", {"a": (4, 8), "b": (8, 1)})
    onnx.save(values, tmp_path / "m.onnx")
    np.savez(tmp_path / "rows.npz", x=np.ones((8, 4), np.float32), labels=np.zeros(8, int))
    for figure in ("accuracy", "agreement"):
        result = command("m.onnx", "-r", "0.3", "-q", "-o", "o.onnx", "--eval", "rows.npz", "--fail-under", f"{figure}=0.1")
        failing(result, 2, figure, "'y'", "no classes")
    assert not (tmp_path / "o.onnx").exists()


def test_a_missed_gate_comes_before_a_budget_out_of_reach(command: Command) -> None:
    result = command(MLP, "-r", "0.99", "-q", "--no-verify", "-o", "o.onnx", "--eval", DATA, "--fail-under", "accuracy=1")
    assert result.returncode == 5
    assert "out of reach" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--fail-under", "accuracy=0.9"], "--eval"),
        (["--fail-under", "cosine=0.9"], "--calibration"),
        (["--fail-under", "metric=0.9", "--eval", str(DATA)], "--metric"),
        (["--fail-under", "precision=0.9"], "speedup"),
        (["--fail-under", "accuracy=95", "--eval", str(DATA)], "95%"),
        (["--fail-under", "speedup=fast"], "speedup=NUMBER"),
        (["--fail-under", "speedup"], "speedup=NUMBER"),
        (["--fail-under", "speedup=nan"], "speedup=NUMBER"),
    ],
)
def test_gates_that_cannot_be_judged_are_said_before_any_work(command: Command, tmp_path: Path, options: list[str], word: str) -> None:
    result = command(MLP, "-r", "0.4", "-o", "o.onnx", *options)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert word in result.stderr
    assert not (tmp_path / "o.onnx").exists()


def test_a_figure_just_below_is_not_said_to_be_what_was_asked() -> None:
    assert str(Gate("cosine", 1.0, 0.9999998)) == "cosine is 0.9999998, 1 at least was asked"
    assert str(Gate("macs", 0.5, 0.39712)) == "macs is 0.3971, 0.5 at least was asked"
    assert str(Gate("macs", 0.5, None)) == "macs is not known, 0.5 at least was asked"

"""Options from onnxprune.toml or pyproject.toml: which file counts, what wins, and what is said about mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODELS

MODEL = str(MODELS / "digits-mlp.onnx")


def command(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "ONNXPRUNE_CONFIG"}
    return subprocess.run(
        [sys.executable, "-m", "onnxprune", *args], cwd=folder, capture_output=True, text=True, env=clean | environment, check=False
    )


def options(folder: Path, *args: str, **environment: str) -> dict[str, object]:
    """Those of the plan that `plan` writes."""
    made = command(folder, "plan", MODEL, "-o", "plan.json", "-q", *args, **environment)
    assert made.returncode == 0, made.stderr
    content: dict[str, object] = json.loads((folder / "plan.json").read_text())["options"]
    return content


def test_names_of_flags_work_in_a_file_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "onnxprune.toml").write_text('ratio = 0.3\ncriterion = "l1"\nverify = false\nseed = 7\nmin-keep = 0.2\n')
    found = options(tmp_path)
    assert (found["ratio"], found["criterion"], found["seed"], found["min_keep"]) == (0.3, "l1", 7, 0.2)
    found = options(tmp_path, "--ratio", "0.2", "--criterion", "l2")
    assert (found["ratio"], found["criterion"], found["seed"]) == (0.2, "l2", 7)


def test_pyproject_and_a_commands_own_table(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    text = "[project]\nname = 'x'\n[tool.onnxprune]\nratio = 0.3\nseed = 1\n[tool.onnxprune.plan]\nratio = 0.25\n"
    (tmp_path / "pyproject.toml").write_text(text)
    (inner / "pyproject.toml").write_text("[project]\nname = 'y'\n")  # says nothing of onnxprune
    found = options(inner)
    assert (found["ratio"], found["seed"]) == (0.25, 1)
    (inner / "onnxprune.toml").write_text("ratio = 0.35\n")  # nearer
    assert options(inner)["ratio"] == 0.35
    (tmp_path / "other.toml").write_text("ratio = 0.45\n")
    assert options(inner, ONNXPRUNE_CONFIG=str(tmp_path / "other.toml"))["ratio"] == 0.45
    assert command(inner, "plan", MODEL, "-o", "p.json", ONNXPRUNE_CONFIG="").returncode == 2  # none is read: no ratio


def test_the_file_that_counts_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "onnxprune.toml").write_text('ratio = "30%"\neval = "labelled.npz"\nwarmup = 1\n')
    made = command(tmp_path, "plan", MODEL, "-o", "plan.json")
    assert made.stderr == f"{tmp_path / 'onnxprune.toml'}: --ratio; flags on the command line win\n"
    assert json.loads((tmp_path / "plan.json").read_text())["options"]["ratio"] == 0.3
    for quiet in (["plan", MODEL, "-o", "plan.json", "-q"], ["groups", MODEL, "--no-verify"], ["verify", MODEL, "--json", "-"]):
        assert command(tmp_path, *quiet).stderr == ""  # or no option of it is the command's


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ratoi = 0.3\n", "there is no option 'ratoi'"),
        ("ratio = 'much'\n", "'ratio' is 'much'"),
        ("ratio = [0.1]\n", "'ratio' is [0.1]"),
        ("ratio = 0.3\nverify = 1\n", "'verify' is 1; it must be true or false"),
        ("[plan]\nwarmup = 1\n", "'plan' has no option 'warmup'"),
        ("ratio = \n", "is not TOML"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "onnxprune.toml").write_text(text)
    made = command(tmp_path, "plan", MODEL, "-o", "plan.json")
    assert made.returncode == 2
    assert said in made.stderr
    assert "onnxprune.toml" in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "plan.json").exists()
    assert command(tmp_path, "--help").returncode == 0

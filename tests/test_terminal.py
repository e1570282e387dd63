"""What the terminal shows: tables in narrow windows, and names that tell groups apart."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import MODELS, two_layers
from rich.console import Console

import onnxprune
from onnxprune import terminal
from onnxprune.benchmark import Measurement
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.naming import group_names
from onnxprune.report import hint_alignment

MLP = [str(MODELS / f"digits-mlp{ending}") for ending in (".onnx", ".calibration.npz", ".eval.npz")]


def shown(folder: Path, width: int, *args: str) -> list[str]:
    """The lines that a command prints in a window of so many characters."""
    line = [sys.executable, "-m", "onnxprune", *args]
    environment = {**os.environ, "COLUMNS": str(width)}
    made = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert made.returncode == 0, made.stderr
    return made.stdout.splitlines()


@pytest.mark.parametrize("width", [60, 80])
def test_no_number_is_split_where_the_window_is_narrow(tmp_path: Path, width: int) -> None:
    lines = shown(tmp_path, width, "sensitivity", MLP[0], "--calibration", MLP[1], "--samples", "64", "--state", "s.json")
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for point in json.loads((tmp_path / "s.json").read_text())["points"]:
        assert f"{point['change']:.2g}" in words
        assert any(point["tensor"] in line for line in lines)
    lines = shown(tmp_path, width, MLP[0], "-r", "0.3", "--calibration", MLP[1], "--eval", MLP[2], "--samples", "64", "-o", "out.onnx")
    assert max(map(len, lines)) <= width
    assert any(re.search(r" logits +0\.\d{4} → \d\.\d{4} +-?[\d.]+ → [\d.]+ .* [\d.]+% → [\d.]+%", line) for line in lines)


def test_names_are_not_folded_letter_by_letter(tmp_path: Path) -> None:
    lines = shown(tmp_path, 60, "inspect", str(MODELS / "digits-mobilenet.onnx"), "--no-verify")
    titles = [line for line in lines if re.match(r" (layer|group) ", line)]
    assert len(titles) == 2
    for line, name in zip(titles, ("layer", "tensors"), strict=True):
        after = re.search(rf"{name}( +)", line)
        assert after
        assert len(after[0]) > 15
    assert max(len(line) for line in lines if not line.startswith(("digits", "  "))) <= 60  # sentences fold in the window


@pytest.mark.parametrize(("times", "said"), [(1.2, "but slower"), (1.02, "hardly faster"), (0.95, "hardly faster"), (0.8, "")])
def test_slower_is_what_no_clock_varies_by(times: float, said: str) -> None:
    result = onnxprune.prune(two_layers(), 0.5, of="channels")
    measured = [Measurement("m", 1, 1, 1, None, t, t, t, 9) for t in (1.0, times)]
    console = Console(file=io.StringIO(), width=200)
    hint_alignment(console, measured, result)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert said in text if said else not text


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return model


def test_groups_are_called_by_a_name_that_says_something() -> None:
    model = two_layers()
    assert group_names(group(load(model))) == {0: "w1 and 2 more"}
    model = renamed(model, {"w1": "onnx::MatMul_12"})
    assert group_names(group(load(model))) == {0: "b1 and 2 more"}
    model = renamed(model, {"b1": "13", "w2": "onnx::MatMul_14"})
    assert group_names(group(load(model))) == {0: "onnx::MatMul_12 of the MatMul that makes h and 2 more"}
    model.graph.node[0].name = "/fc1/MatMul"
    assert group_names(group(load(model))) == {0: "onnx::MatMul_12 of /fc1/MatMul and 2 more"}


def test_no_two_groups_have_one_name() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        both (float[N, 4] x) => (float[N, 3] y) {
            a = MatMul(x, "onnx::MatMul_1")
            b = Relu(a)
            c = MatMul(x, "onnx::MatMul_2")
            d = Sigmoid(c)
            e = Concat <axis=1> (b, d)
            y = MatMul(e, head)
        }"""
    model = onnx.parser.parse_model(text.replace('"onnx::MatMul_1"', "w1").replace('"onnx::MatMul_2"', "w2"))
    for name, shape in (("w1", (4, 5)), ("w2", (4, 6)), ("head", (11, 3))):
        size = shape[0] * shape[1]
        model.graph.initializer.append(onnx.helper.make_tensor(name, 1, shape, [0.1 * i for i in range(size)]))
    model.graph.node[0].name, model.graph.node[2].name = "first", "second"
    found = group_names(group(load(renamed(model, {"w1": "onnx::MatMul_1", "w2": "onnx::MatMul_2"}))))
    assert sorted(found.values()) == ["onnx::MatMul_1 of first and 1 more", "onnx::MatMul_2 of second and 1 more"]


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, lines in ((1000.0, 0), (0.0, 2)):
        monkeypatch.setattr(terminal, "EVERY", seconds)
        with terminal.progress(quiet=False) as say:
            say("one")
            say("two")
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == lines
    with terminal.progress(quiet=True) as say:
        say("three")
    assert capsys.readouterr().err == ""

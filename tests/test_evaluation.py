"""What `--eval` and `--calibration` are told that is not what the user means: said before any work, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Command, two_layers
from outside import build
from test_cli import failing

import onnxprune
from onnxprune.calibration import read_calibration
from onnxprune.errors import OnnxPruneWarning
from onnxprune.evaluation import evaluate
from onnxprune.importer import load

X = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
LINE = ("model.onnx", "-r", "0.5", "-q", "-o", "out.onnx", "--eval", "data.npz")
SENSITIVITY = ("sensitivity", "model.onnx", "--calibration", "noise", *LINE[-2:])


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "model.onnx")


def test_samples_without_labels_are_said_once(command: Command, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X)
    result = command(*LINE)
    assert result.returncode == 0
    [line] = result.stderr.splitlines()
    assert line.startswith("warning: data.npz: has no `labels`")
    np.savez(tmp_path / "data.npz", x=X, labels=np.zeros(len(X), int))
    assert command(*LINE).stderr == ""
    assert command(*LINE[:-1], "noise").stderr == ""


@pytest.mark.parametrize(
    ("labels", "word"),
    [(np.full(12, 3), "label 3"), (np.full(12, -1), "label -1"), (np.ones(12), "float64"), (np.zeros(11, int), "12 samples")],
)
@pytest.mark.parametrize("line", [LINE, ("sweep", "model.onnx", "-o", "out", *LINE[-2:]), SENSITIVITY])
def test_labels_that_are_no_classes_are_refused_before_any_work(
    line: tuple[str, ...], labels: np.ndarray, word: str, command: Command, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", x=X, labels=labels)
    failing(command(*line), 2, "data.npz", word)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "model.onnx"]


def test_any_labels_are_the_business_of_a_metric() -> None:
    data = {"x": X, "labels": np.full(12, 7)}
    found = evaluate(two_layers(), two_layers(), data, metric=lambda outputs, data: float(data["labels"].mean()))
    assert (found.metric_before, found.before) == (7.0, None)


def test_a_sweep_says_it_of_its_own_samples_only(tmp_path: Path) -> None:
    with pytest.warns(OnnxPruneWarning, match="labels"):
        onnxprune.sweep(two_layers(), tmp_path / "one", [0.5], evaluation={"x": X}, seconds=0)
    with pytest.warns(OnnxPruneWarning, match="labels") as told:
        onnxprune.sensitivity(two_layers(), {"x": X}, ratios=[0.5], evaluation={"x": X})
    assert len(told) == 1


@pytest.mark.filterwarnings("error")
def test_calibration_needs_no_labels(tmp_path: Path) -> None:
    onnxprune.prune(two_layers(), 0.4, calibration={"x": X})
    onnxprune.sweep(two_layers(), tmp_path / "out", [0.5], calibration={"x": X}, seconds=0)


PICTURES = build("float[N,3,4,6] x", "p = GlobalAveragePool (x) f = Flatten (p) y = MatMul (f, a)", "float y", {"a": (3, 2)})


@pytest.mark.parametrize(("pixels", "kind"), [(200, np.uint8), (9, np.uint8), (200, np.int64)])
def test_pixels_for_floats_are_a_likely_mistake(pixels: int, kind: type) -> None:
    data = {"x": np.full((5, 3, 4, 6), pixels, kind)}
    with pytest.warns(OnnxPruneWarning, match=f"'x' holds {np.dtype(kind)} up to {pixels}.*--preprocess.*raw"):
        read_calibration(data, load(PICTURES))


@pytest.mark.filterwarnings("error")
def test_other_numbers_are_not() -> None:
    shape = (5, 3, 4, 6)
    read_calibration({"x": np.full(shape, 200, np.uint8)}, load(PICTURES), preprocess="raw")
    read_calibration({"x": np.full(shape, 200.0, np.float32)}, load(PICTURES))
    read_calibration({"x": np.full(shape, -200)}, load(PICTURES))
    read_calibration({"x": np.ones(shape, np.uint8)}, load(PICTURES))
    read_calibration({"x": np.arange(40).reshape(10, 4)}, load(two_layers()))


def test_pixels_of_a_folder_are_said_once(command: Command, tmp_path: Path) -> None:
    onnx.save(PICTURES, tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for i in range(3):
        np.savez(tmp_path / "data" / f"{i}.npz", x=np.full((5, 3, 4, 6), 200, np.uint8))
    result = command("sweep", "model.onnx", "--ratios", "0.5", "--calibration", "data")
    assert result.stderr.count("like pixels") == 1


def test_a_sample_without_its_axis_is_said(tmp_path: Path) -> None:
    with pytest.warns(OnnxPruneWarning, match=r"'x' \[4\] lacks the axis that counts samples: taken as one sample, \[1, 4\]"):
        samples = read_calibration({"x": X[0]}, load(two_layers()))
    assert [batch["x"].shape for batch in samples.batches(4)] == [(1, 4)]


@pytest.mark.parametrize("line", [("sweep", "--ratios", "0.5"), ("sensitivity", "--calibration", "noise")])
def test_a_model_that_cannot_be_read_leaves_nothing_behind(line: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, words in (("nowhere/model.onnx", "no such file"), ("broken.onnx", "not an ONNX model"), (".", "is a folder")):
        failing(command(line[0], name, *line[1:]), 2, name, words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_feed_whose_labels_do_not_fit_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "feeding.py").write_text(
        "import numpy as np\n"
        "def some():\n"
        "    for labels in (8, 5):\n"
        "        yield {'x': np.ones((8, 4), 'f4'), 'labels': np.zeros(labels, int)}\n"
    )
    onnx.save(two_layers(), tmp_path / "net.onnx")
    found = command("net.onnx", "-r", "0.3", "--eval", "feeding:some", "-o", "out.onnx", "-q")
    assert found.returncode == 2
    assert "feeding:some, feed 1: has labels of the shape [5] for 8 samples" in found.stderr
    assert not (tmp_path / "out.onnx").exists()

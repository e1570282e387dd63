"""`sensitivity`: what each group alone is worth, kept point by point."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS, Command, two_layers
from test_cli import accuracy, failing

import onnxprune
from onnxprune.errors import OnnxPruneError

MLP, DATA, LABELLED = (MODELS / f"digits-mlp{ending}" for ending in (".onnx", ".calibration.npz", ".eval.npz"))


def half_dead() -> onnx.ModelProto:
    """A model of eight hidden units, four of which nothing listens to."""
    model = two_layers()
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[[0, 2, 5, 7]] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "w2"))
        elif tensor.name == "b1":  # so that no sample turns all of the others off
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(8, 3, np.float32), "b1"))
    return model


def some(count: int = 64) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((count, 4)).astype(np.float32)}


def test_units_that_nothing_listens_to_are_worth_nothing() -> None:
    found = onnxprune.sensitivity(half_dead(), some(), ratios=(0.25, 0.5, 0.75), evaluation=some(32))
    assert [(p.group, p.removed, p.ratio) for p in found.points] == [(0, 2, 0.25), (0, 4, 0.5), (0, 6, 0.75)]
    changes = [p.change for p in found.points if p.change is not None]
    assert max(changes[:2]) < 1e-6
    assert changes[2] > 1e-2
    assert found.measure == "cosine"
    assert [p.quality for p in found.points[:2]] == pytest.approx([1, 1])


def test_more_units_change_more_and_labels_give_accuracy() -> None:
    found = onnxprune.sensitivity(MLP, DATA, ratios=(0.5, 0.95), evaluation=LABELLED, samples=128)
    assert {p.group for p in found.points} == {0, 1, 2}
    for group in range(3):
        few, many = (p for p in found.points if p.group == group)
        assert few.change is not None
        assert many.change is not None
        assert few.change < many.change
    assert found.measure == "accuracy"
    assert found.before == pytest.approx(accuracy(MLP, LABELLED))
    assert all(p.quality is not None and 0.05 <= p.quality <= 1 for p in found.points)


def test_scope_says_which_groups() -> None:
    found = onnxprune.sensitivity(MLP, DATA, ratios=(0.5,), scope=["layers.0.weight"], samples=64)
    assert [p.group for p in found.points] == [0]


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    state, ratios = tmp_path / "state.json", (0.1, 0.2, 0.3, 0.4)

    def stop(text: str) -> None:
        if text.startswith("3 of 12"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        onnxprune.sensitivity(MLP, DATA, ratios=ratios, samples=64, state=state, progress=stop)
    kept = json.loads(state.read_text())["points"]
    assert len(kept) == 3
    said: list[str] = []
    found = onnxprune.sensitivity(MLP, DATA, ratios=ratios, samples=64, state=state, progress=said.append)
    assert "3 of 12 points" in said  # what it starts from
    assert not any(text.startswith("2 of 12") for text in said)
    assert found.points == onnxprune.sensitivity(MLP, DATA, ratios=ratios, samples=64).points
    assert all(point in json.loads(state.read_text())["points"] for point in kept)


def test_other_ratios_add_to_what_is_kept(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    onnxprune.sensitivity(MLP, DATA, ratios=(0.25,), samples=64, state=state)
    said: list[str] = []
    found = onnxprune.sensitivity(MLP, DATA, ratios=(0.25, 0.5), samples=64, state=state, progress=said.append)
    assert "3 of 6 points" in said
    assert len(found.points) == len(json.loads(state.read_text())["points"]) == 6


@pytest.mark.parametrize("other", ["model", "criterion", "calibration", "eval"])
def test_a_state_of_something_else_is_refused(tmp_path: Path, other: str) -> None:
    state = tmp_path / "state.json"
    onnxprune.sensitivity(two_layers(), some(), ratios=(0.5,), state=state)
    before = state.read_bytes()
    with pytest.raises(OnnxPruneError, match=f"another {other}.*--state"):
        onnxprune.sensitivity(
            two_layers(seed=1 if other == "model" else 0),
            some(63 if other == "calibration" else 64),
            criterion="l2" if other == "criterion" else "obs",
            evaluation=some() if other == "eval" else None,
            ratios=(0.5,),
            state=state,
        )
    assert state.read_bytes() == before


def test_command_shows_a_table_and_keeps_the_points(command: Command, tmp_path: Path) -> None:
    onnx.save(half_dead(), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=some()["x"])
    result = command("sensitivity", "m.onnx", "--calibration", "data.npz", "--ratios", "0.25:0.75:0.25", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    for word in ("w1", "0.25", "0.75", "m-sensitivity.json"):
        assert word in result.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == json.loads((tmp_path / "m-sensitivity.json").read_text())
    assert [(p["group"], p["tensor"], p["removed"], p["units"]) for p in content["points"]] == [(0, "w1", n, 8) for n in (2, 4, 6)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--calibration"]),
        (("--calibration", "none"), ["none"]),
        (("--calibration", DATA, "--ratios", "0.1:x"), ["--ratios", "0.1:0.8:0.1"]),
        (("--calibration", DATA, "--ratios", "0.5,1.5"), ["1.5", "between 0 and 1"]),
        (("--calibration", DATA, "--criterion", "auto"), ["auto"]),
        (("--calibration", DATA, "--criterion", "l3"), ["l3"]),
        (("--calibration", DATA, "--metric", "mine:f"), ["--eval"]),
        (("--calibration", DATA, "--plot", "a.gif"), ["a.gif", ".svg"]),
        (("--calibration", DATA, "--state", DATA), ["named twice"]),
        (("--calibration", DATA, "--state", "other.json"), ["other.json", "--state"]),
    ],
)
def test_bad_input(command: Command, tmp_path: Path, options: tuple[str | Path, ...], words: list[str]) -> None:
    (tmp_path / "other.json").write_text('{"format": 1}')
    state = () if "--state" in options else ("--state", "s.json")
    failing(command("sensitivity", MLP, *options, *state), 2, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_missing_matplotlib_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    failing(command("sensitivity", MLP, "--calibration", DATA, "--state", "s.json", "--plot", "a.svg"), 2, "a.svg", "onnxprune[bench]")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib (the extra bench) is not there")
@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_plot(command: Command, tmp_path: Path, ending: str, start: bytes) -> None:
    arguments = ("--calibration", DATA, "--eval", LABELLED, "--ratios", "0.5", "--samples", "64", "--state", "s.json")
    result = command("sensitivity", MLP, *arguments, "--plot", f"curves.{ending}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"curves.{ending}").read_bytes().startswith(start)

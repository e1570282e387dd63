"""`sweep`: models at many ratios, each kept, with what it costs and how good it is."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pytest
from conftest import MODELS, Command, two_layers
from test_cli import accuracy, failing

import onnxprune
from onnxprune.benchmark import benchmark
from onnxprune.criteria import criterion
from onnxprune.errors import OnnxPruneError

MLP, DATA, LABELLED = (MODELS / f"digits-mlp{ending}" for ending in (".onnx", ".calibration.npz", ".eval.npz"))
COSTS = ("macs", "parameters", "latency")


def plain(rows: Any) -> list[dict[str, Any]]:
    """Points without what was measured with a clock, and what follows from it."""
    return [{k: v for k, v in row.items() if not k.startswith("latency") and k != "pareto"} for row in rows]


def test_every_model_is_kept_with_its_plan_and_figures(command: Command, tmp_path: Path) -> None:
    options = ("--ratios", "0.2,0.6", "--criteria", "l2,random", "--eval", LABELLED, "--seconds", "0.05")
    result = command("sweep", MLP, *options, "-o", "out", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())
    points = content["points"]
    assert [(p["criterion"], p["ratio"]) for p in points] == [("l2", 0.2), ("l2", 0.6), ("random", 0.2), ("random", 0.6)]
    assert content["measure"] == "accuracy"
    assert content["original"]["quality"] == pytest.approx(accuracy(MLP, LABELLED))
    for point in points:
        model, plan = tmp_path / "out" / point["model"], tmp_path / "out" / point["plan"]
        assert point["quality"] == pytest.approx(accuracy(model, LABELLED))
        assert abs(1 - point["macs"] / point["macs_before"] - point["ratio"]) <= 0.01
        assert onnxprune.inspect(model, verify=False).macs == point["macs"]
        assert onnxprune.inspect(model, verify=False).parameters == point["parameters"]
        assert onnxprune.apply(MLP, plan).model.SerializeToString() == onnx.load(model).SerializeToString()
        assert point["latency"] > 0
        assert point["latency_before"] > 0
        assert point["name"] in result.stdout


def test_pareto_points_are_those_that_nothing_beats(tmp_path: Path) -> None:
    found = onnxprune.sweep(MLP, tmp_path / "out", (0.3, 0.6, 0.8), criteria=["l2", "random"], evaluation=LABELLED, seconds=0.02)
    for cost in COSTS:
        for point in found.points:
            own, rivals = point[cost] / point[f"{cost}_before"], [(1.0, found.original["quality"])]
            rivals += [(p[cost] / p[f"{cost}_before"], p["quality"]) for p in found.points if p is not point]
            beaten = any(c <= own and q >= point["quality"] and (c < own or q > point["quality"]) for c, q in rivals)
            assert (cost in point["pareto"]) != beaten
    assert any(point["pareto"] for point in found.points)


def test_quality_without_labels_is_fidelity(tmp_path: Path) -> None:
    data = {"x": np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)}
    found = onnxprune.sweep(two_layers(), tmp_path / "out", (0.25, 0.75), calibration=data, seconds=0)
    assert found.measure == "cosine"
    assert found.original["quality"] == 1
    assert 1 > found.points[0]["quality"] > found.points[1]["quality"]
    assert [p["latency"] for p in found.points] == [None, None]
    assert all("latency" not in p["pareto"] for p in found.points)


def test_processes_side_by_side_make_the_same(tmp_path: Path) -> None:
    one, two = (
        onnxprune.sweep(MLP, tmp_path / str(jobs), (0.3, 0.5, 0.7), calibration=DATA, samples=64, evaluation=LABELLED, jobs=jobs, seconds=0)
        for jobs in (1, 2)
    )
    assert plain(one.points) == plain(two.points)
    for point in one.points:
        assert (tmp_path / "1" / point["model"]).read_bytes() == (tmp_path / "2" / point["model"]).read_bytes()


def test_points_that_are_timed_are_made_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def process(outputs: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> float:
        return float(os.getpid())

    arguments: dict[str, Any] = {"of": "latency", "evaluation": "noise", "seconds": 0}
    with joblib.parallel_config(n_jobs=2):
        found = onnxprune.sweep(two_layers(64), tmp_path / "out", (0.3, 0.5), metric=process, **arguments)
    assert {point["quality"] for point in found.points} == {os.getpid()}
    for jobs in (2, -1):
        with pytest.raises(OnnxPruneError, match=r"jobs is .*--of latency"):
            onnxprune.sweep(two_layers(64), tmp_path / "other", (0.3, 0.5), jobs=jobs, **arguments)


def test_threads_are_those_of_every_clock(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(two_layers(), tmp_path / "m.onnx")
    result = command("sweep", "m.onnx", "--ratios", "0.5", "--seconds", "0.01", "--threads", "2", "-o", "out")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["key"]["threads"] == 2
    failing(command("sweep", "m.onnx", "--ratios", "0.5", "--seconds", "0.01", "-o", "out"), 2, "threads", "2 there, 1 now")
    clocks = []

    def clock(files: Any, *arguments: Any, threads: int, **options: Any) -> Any:
        clocks.append(threads)
        return benchmark(files, *arguments, threads=threads, **options)

    monkeypatch.setattr("onnxprune.sweeping.benchmark", clock)
    onnxprune.sweep(two_layers(), tmp_path / "two", (0.5,), seconds=0.01, threads=2)
    assert clocks == [2]


def test_points_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = onnxprune.sweep(MLP, folder, (0.3, 0.5), evaluation=LABELLED, seconds=0.02)
    (folder / "0.5.onnx").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said: list[str] = []
    second = onnxprune.sweep(MLP, folder, (0.3, 0.5, 0.7), evaluation=LABELLED, seconds=0.02, progress=said.append)
    assert "1 of 3 points" in said  # what it starts from
    assert (folder / "0.3.onnx").stat().st_mtime_ns == times["0.3.onnx"]
    assert (folder / "0.5.onnx").is_file()
    assert second.points[0] == first.points[0] | {"pareto": second.points[0]["pareto"]}  # its latency too
    assert [p["ratio"] for p in second.points] == [0.3, 0.5, 0.7]


def test_an_interruption_keeps_what_is_made(tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if text.startswith("2 of 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        onnxprune.sweep(MLP, tmp_path / "out", (0.3, 0.5, 0.7), seconds=0, progress=stop)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["points"]) == 2
    assert len(onnxprune.sweep(MLP, tmp_path / "out", (0.3, 0.5, 0.7), seconds=0).points) == 3


def test_weights_in_another_file_are_the_model_too(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / "w.bin").unlink(missing_ok=True)
        onnx.save(two_layers(seed=seed), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        if seed == 0:
            onnxprune.sweep(tmp_path / "m.onnx", tmp_path / "out", (0.5,), seconds=0)
            graph = (tmp_path / "m.onnx").read_bytes()
    assert graph == (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(OnnxPruneError, match="another model"):
        onnxprune.sweep(tmp_path / "m.onnx", tmp_path / "out", (0.5,), seconds=0)


@pytest.mark.parametrize("other", ["model", "of", "eval", "seed"])
def test_a_folder_of_another_sweep_is_refused(tmp_path: Path, other: str) -> None:
    onnxprune.sweep(onnx.load(MLP), tmp_path / "out", (0.5,), seconds=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    changed: dict[str, dict[str, Any]] = {"of": {"of": "params"}, "eval": {"evaluation": LABELLED}, "seed": {"seed": 1}}
    model = two_layers() if other == "model" else onnx.load(MLP)
    with pytest.raises(OnnxPruneError, match=r"another (model|of|eval|seed).* -o"):
        onnxprune.sweep(model, tmp_path / "out", (0.5,), seconds=0, **changed.get(other, {}))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_point_that_fails_does_not_stop_the_others(command: Command, tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "m.onnx")
    result = command("sweep", "m.onnx", "--ratios", "0.01,0.5", "--seconds", "0", "--json", "out.json")  # a unit is 12 % of them
    failing(result, 3, "0.01", "ask for")
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [(p["ratio"], p["error"] is None) for p in points] == [(0.01, False), (0.5, True)]
    assert (tmp_path / "m-sweep" / "0.5.onnx").is_file()


def test_a_point_that_failed_is_tried_again(tmp_path: Path) -> None:
    works: list[bool] = []

    @criterion("moody")
    def moody(model: Any, group: Any, rng: np.random.Generator) -> np.ndarray:
        if not works:
            raise RuntimeError("not today")
        return np.arange(group.units, dtype=float)

    arguments: dict[str, Any] = {"ratios": (0.5,), "criteria": ["l2", "moody"], "seconds": 0}
    found = onnxprune.sweep(MLP, tmp_path / "out", **arguments)
    assert [(p["criterion"], p["error"]) for p in found.failed] == [("moody", "the criterion 'moody' fails (RuntimeError: not today)")]
    works.append(True)
    found = onnxprune.sweep(MLP, tmp_path / "out", **arguments)
    assert not found.failed
    assert len(found.points) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ratios", "0.8:0.1:0.1"), ["--ratios"]),
        (("--ratios", "0.1,2"), ["2", "between 0 and 1"]),
        (("--criteria", "l2,l3"), ["l3"]),
        (("--criteria", "obs"), ["--calibration"]),
        (("--allocations", "fair"), ["fair"]),
        (("--eval", "nowhere.npz"), ["nowhere.npz"]),
        (("--granularity", "atom"), ["atom"]),
        (("--jobs", "0"), ["jobs is 0"]),
        (("--jobs", "2", "--of", "latency"), ["jobs is 2"]),
        (("-o", MLP), ["named twice"]),
    ],
)
def test_bad_input(command: Command, tmp_path: Path, options: tuple[str | Path, ...], words: list[str]) -> None:
    failing(command("sweep", MLP, *(() if "-o" in options else ("-o", "out")), "--seconds", "0", *options), 2, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib (the extra bench) is not there")
def test_plot(command: Command, tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "m.onnx")
    result = command("sweep", "m.onnx", "--ratios", "0.25,0.5", "--seconds", "0.01", "--plot", "curve.svg")
    assert result.returncode == 0, result.stderr
    assert b"latency" in (tmp_path / "curve.svg").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="dask's distributed is not installed")
def test_points_run_on_a_dask_cluster(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    def process(outputs: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> float:
        return float(os.getpid())

    arguments: dict[str, Any] = {"ratios": (0.3, 0.5, 0.7), "calibration": DATA, "samples": 64, "seconds": 0}
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster), joblib.parallel_config(backend="dask"):
        found = onnxprune.sweep(MLP, tmp_path / "cluster", metric=process, **arguments)
    assert not found.failed
    assert os.getpid() not in {point["quality"] for point in found.points}  # they were made elsewhere
    for point in onnxprune.sweep(MLP, tmp_path / "here", **arguments).points:
        assert (tmp_path / "here" / point["model"]).read_bytes() == (tmp_path / "cluster" / point["model"]).read_bytes()

"""The command line: what it prints, writes and returns, on good input and on bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import EVAL, MODELS, Command, two_layers

import onnxprune
from onnxprune import writing
from onnxprune.cli import main
from onnxprune.errors import OnnxPruneError
from onnxprune.options import read_list

MLP = MODELS / "digits-mlp.onnx"


def failing(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on standard error, the exit code, and the words in it."""
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def accuracy(path: Path, arrays: Path) -> float:
    data = np.load(arrays)
    logits = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": data["input"]})[0]
    return float((np.asarray(logits).argmax(axis=1) == data["labels"]).mean())


def test_default_command_prunes_proves_and_measures(command: Command, tmp_path: Path, shipped: str) -> None:
    arrays = MODELS / EVAL[shipped]
    result = command(MODELS / f"{shipped}.onnx", "--ratio", "0.3", "-o", "out.onnx", "--eval", arrays, "--json", "out.json")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert abs(1 - content["macs"][1] / content["macs"][0] - 0.3) <= 0.01
    assert content["proof"]["frozen"] == {}
    assert content["evaluation"]["before"] == pytest.approx(accuracy(MODELS / f"{shipped}.onnx", arrays))
    assert content["evaluation"]["after"] == pytest.approx(accuracy(tmp_path / "out.onnx", arrays))
    assert [m["macs"] for m in content["benchmark"]] == content["macs"]
    for word in ("accuracy on 600 samples", "MACs", "latency", "proof"):
        assert word in result.stdout


def test_output_is_beside_the_model_and_json_goes_to_standard_output(command: Command, tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "small.onnx")
    result = command("small.onnx", "--ratio", "0.5", "--of", "channels", "--json", "-", "--no-verify")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["proof"] is None
    pruned = onnx.load(tmp_path / "small-pruned.onnx")
    assert {t.name: list(t.dims) for t in pruned.graph.initializer} == {"w1": [4, 4], "b1": [4], "w2": [4, 3]}


def test_plan_apply_and_verify_agree_with_prune(command: Command, tmp_path: Path) -> None:
    assert command(MLP, "-r", "0.4", "-o", "one.onnx", "--plan-out", "one.json", "-q").returncode == 0
    assert command("plan", MLP, "-r", "0.4", "-o", "two.json").returncode == 0
    assert command("apply", MLP, "two.json", "-o", "two.onnx").returncode == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    result = command("verify", MLP, "two.onnx", "--plan", "one.json", "--json", "-")
    assert json.loads(result.stdout)["matches"] == 0
    assert command("verify", MLP).returncode == 0
    other = command("verify", MLP, MLP, "--plan", "one.json")
    failing(other, 4, "layers.0.weight")


def test_quiet_prints_nothing(command: Command) -> None:
    result = command(MLP, "-r", "0.4", "-o", "one.onnx", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_verbose_lists_every_place_and_every_fixed_axis(command: Command) -> None:
    result = command("groups", MLP, "-v")
    assert "group 0: layers.0.weight, axis 0" in result.stdout
    assert "fixed: layers.12.weight, axis 0: belongs to the model's output 'logits'" in result.stdout
    assert "group 0: layers.4.weight, axis 1" in command(MLP, "-r", "0.3", "-o", "out.onnx", "-v").stdout


def test_bench_shows_models_side_by_side(command: Command) -> None:
    result = command("bench", MLP, MODELS / "digits-conv1d.onnx", "--seconds", "0.05", "--batch", "2", "--json", "-")
    assert result.returncode == 0, result.stderr
    assert [m["macs"] for m in json.loads(result.stdout)] == [2 * 91392, 2 * 166144]


@pytest.mark.parametrize(
    "name", ["", "prune", "groups", "plan", "apply", "export-plan", "verify", "bench", "inspect", "sensitivity", "sweep"]
)
def test_help_has_examples(command: Command, name: str) -> None:
    result = command(*([name] if name else []), "--help")
    assert result.returncode == 0
    assert "onnxprune " + (f"{name} " if name and name != "prune" else "model.onnx") in result.stdout


def test_help_of_many_options_has_headings_and_leaves_none_out(command: Command) -> None:
    for name in ("prune", "plan", "sweep", "sensitivity"):
        text = command(name, "--help").stdout
        titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
        assert titles[0] == "What goes"
        assert not {"Options", "Other"} & set(titles)
        flags = {max(one.opts, key=len) for one in main.commands[name].params if isinstance(one, click.Option)}
        assert all(len(re.findall(rf"^ .*{flag}\b", text, re.MULTILINE)) >= 1 for flag in flags)
    assert "Options:" in command("bench", "--help").stdout


def test_shares_may_be_percentages(command: Command, tmp_path: Path) -> None:
    given = (
        ["-r", "30%", "--min-keep", "20%", "--layer-ratio", "layers.0*=20%"],
        ["-r", "0.3", "--min-keep", "0.2", "--layer-ratio", "layers.0*=0.2"],
    )
    plans = []
    for arguments in given:
        assert command("plan", MLP, *arguments, "-o", "plan.json", "-q").returncode == 0
        plans.append((tmp_path / "plan.json").read_text())
    assert plans[0] == plans[1]
    assert read_list("10%:30%:10%", "--ratios") == read_list("0.1,0.2,30%", "--ratios") == (0.1, 0.2, 0.3)


# --- bad input ------------------------------------------------------------------------------------------------------


def broken(folder: Path, how: str) -> Path:
    """A file that is wrong in one way."""
    path, model = folder / f"{how}.onnx", onnx.load(MLP)
    first = model.graph.initializer[0]
    if how == "text":
        path.write_text("this is no model\n" * 20)
        return path
    if how in ("truncated", "empty"):
        path.write_bytes(MLP.read_bytes()[: 0 if how == "empty" else 200_000])
        return path
    if how == "missing-data":
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (folder / "weights.bin").unlink()
        return path
    if how == "short-raw":
        first.raw_data = first.raw_data[:-4]
    elif how == "short-floats":
        name, dims, values = first.name, list(first.dims), onnx.numpy_helper.to_array(first).ravel()[:-3].tolist()
        first.Clear()
        first.name, first.data_type = name, 1
        first.dims.extend(dims)
        first.float_data.extend(values)
    elif how == "cyclic":
        model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    elif how == "dangling":
        model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("text", ["not an ONNX model"]),
        ("truncated", ["not an ONNX model", "cut short"]),
        ("empty", ["empty"]),
        ("missing-data", ["external data", "weights.bin"]),
        ("short-raw", ["layers.0.weight", "[256, 64]", "bytes"]),
        ("short-floats", ["layers.0.weight", "[256, 64]", "elements"]),
        ("cyclic", ["cycle", "/layers/layers.0/Gemm"]),
        ("dangling", ["nowhere", "/layers/layers.0/Gemm"]),
    ],
)
def test_broken_files(command: Command, tmp_path: Path, how: str, words: list[str]) -> None:
    path = broken(tmp_path, how)
    before = sorted(tmp_path.iterdir())
    failing(command(path, "--ratio", "0.4"), 2, path.name, *words)
    failing(command("groups", path), 2, path.name, *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.onnx", "-r", "0.4"], 2, ["missing.onnx", "no such file"]),
        (["frobnicate"], 2, ["frobnicate", "neither a file nor a command"]),
        ([MLP], 2, ["--ratio"]),
        ([MLP, "-r", "1.4"], 2, ["1.4", "between 0 and 1"]),
        ([MLP, "-r", "0"], 2, ["between 0 and 1"]),
        ([MLP, "-r", "nan"], 2, ["between 0 and 1"]),
        ([MLP, "-r", "half"], 2, ["half", "0.4 or 40%"]),
        ([MLP, "-r", "140%"], 2, ["140%", "0.4 or 40%"]),
        ([MLP, "-r", "0.4", "--min-keep", "100%"], 2, ["100%"]),
        ([MLP, "-r", "0.4", "--min-keep", "nan"], 2, ["min-keep is nan"]),
        ([MLP, "-r", "0.4", "--min-keep", "inf"], 2, ["min-keep is inf"]),
        (["inspect", MLP, "--min-keep", "-1"], 2, ["min-keep is -1"]),
        ([MLP, "-r", "0.4", "-o", "nowhere/out.onnx"], 2, ["nowhere", "does not exist"]),
        ([MLP, "-r", "0.4", "-o", "."], 2, ["folder"]),
        ([MLP, "-r", "0.4", "-o", MLP], 2, ["input itself"]),
        ([MLP, "-r", "0.4", "--criterion", "magic"], 2, ["magic", "l2"]),
        ([MLP, "-r", "0.4", "--allocation", "magic"], 2, ["magic", "uniform"]),
        ([MLP, "-r", "0.4", "--of", "joules"], 2, ["joules", "macs"]),
        ([MLP, "-r", "0.4", "--exclude", "conv*"], 2, ["conv*", "--exclude"]),
        ([MLP, "-r", "0.4", "--exclude", "*"], 3, ["no group"]),
        ([MLP, "-r", "0.4", "--layer-ratio", "layers.0*=1.5"], 2, ["1.5"]),
        ([MLP, "-r", "0.4", "--layer-ratio", "layers.0*"], 2, ["GLOB"]),
        ([MLP, "-r", "0.4", "--input-shape", "input"], 2, ["NAME=1,3,224,224"]),
        ([MLP, "-r", "0.4", "--input-shape", "input=2,63"], 2, ["input", "[2, 63]"]),
        ([MLP, "-r", "0.4", "--input-shape", "image=2,64"], 2, ["image", "input"]),
        ([MLP, "-r", "0.4", "--feeds", "missing.npz"], 2, ["missing.npz"]),
        ([MLP, "-r", "0.4", "--feeds", MLP], 2, ["named twice"]),
        ([MLP, "-r", "0.4", "--feeds", MODELS / "README.md"], 2, ["not an .npz"]),
        ([MLP, "-r", "0.4", "--eval", MODELS / "README.md"], 2, ["not an .npz"]),
        ([MLP, "-r", "0.4", "--calibration", ""], 2, ["empty name"]),
        (["apply", MLP, "missing.json", "-o", "out.onnx"], 2, ["missing.json"]),
        (["apply", MLP, MODELS / "README.md", "-o", "out.onnx"], 2, ["not a JSON file"]),
        (["bench", "missing.onnx"], 2, ["missing.onnx"]),
    ],
    ids=str,
)
def test_bad_usage(command: Command, tmp_path: Path, arguments: list[str], code: int, words: list[str]) -> None:
    given = MLP.read_bytes()
    failing(command(*arguments), code, *words)
    assert list(tmp_path.iterdir()) == []
    assert MLP.read_bytes() == given


@pytest.mark.parametrize(
    "arguments",
    [
        ["{model}", "-r", "0.4", "-o", "{samples}"],
        ["{model}", "-r", "0.4", "-o", "out.onnx", "--plan-out", "{samples}"],
        ["{model}", "-r", "0.4", "-o", "out.onnx", "--json", "{samples}"],
        ["plan", "{model}", "-r", "0.4", "-o", "{samples}"],
        ["sweep", "{model}", "--ratios", "0.4", "--json", "{samples}"],
        ["sensitivity", "{model}", "--json", "{samples}"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("folder", [False, True])
def test_samples_are_never_replaced(command: Command, tmp_path: Path, arguments: list[str], folder: bool) -> None:
    (tmp_path / "samples").mkdir()
    file = tmp_path / "samples" / "some.npz"
    shutil.copy(MODELS / "digits-mlp.calibration.npz", file)
    before = file.read_bytes()
    given = [text.format(model=MLP, samples=file) for text in arguments]
    failing(command(*given, "--calibration", file.parent if folder else file), 2, "some.npz", "own")
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_nothing_to_prune_is_exit_code_3(command: Command, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "relu.onnx")
    failing(command("relu.onnx", "-r", "0.4"), 3, "relu.onnx", "nothing can be pruned")
    failing(command("groups", "relu.onnx", "--quiet"), 3, "nothing can be pruned")
    assert [p.name for p in tmp_path.iterdir()] == ["relu.onnx"]


def test_budget_out_of_reach_writes_the_closest_and_says_so(command: Command, tmp_path: Path) -> None:
    result = command(MLP, "-r", "0.9", "--min-keep", "0.5", "-o", "out.onnx", "-q")
    failing(result, 3, "out of reach", "90.0%")
    sizes = {t.name: list(t.dims) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert sizes["layers.0.weight"] == [128, 64]


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["groups"][0]["members"][0].update(tensor="other.weight"),
        lambda plan: plan["groups"][0]["members"].pop(),
        lambda plan: plan["groups"][0]["members"][0]["indices"].reverse(),
        lambda plan: plan["shapes"].update({"layers.0.weight": [256, 63]}),
        lambda plan: plan["groups"][0].update(remove=[5000]),
        lambda plan: plan["groups"][0].update(remove=[1, 1]),
        lambda plan: plan["groups"][0].update(remove=list(range(plan["groups"][0]["units"]))),
        lambda plan: plan["groups"][0].update(blocks=[list(range(100)), list(range(100, 256))], remove=[0, 1]),
        lambda plan: plan["groups"][0].pop("members"),
        lambda plan: plan.pop("groups"),
        lambda plan: plan.update(format=2),
    ],
)
def test_plans_that_do_not_fit(command: Command, tmp_path: Path, change: object) -> None:
    assert command("plan", MLP, "-r", "0.4", "-o", "plan.json", "-q").returncode == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert callable(change)
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    failing(command("apply", MLP, "plan.json", "-o", "out.onnx"), 2)
    assert not (tmp_path / "out.onnx").exists()


def test_a_plan_for_another_model(command: Command, tmp_path: Path) -> None:
    assert command("plan", MODELS / "digits-resnet.onnx", "-r", "0.4", "-o", "plan.json", "-q").returncode == 0
    failing(command("apply", MLP, "plan.json", "-o", "out.onnx"), 2, "the plan was made for another model")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_fits_a_fine_tuned_sister(command: Command, tmp_path: Path) -> None:
    assert command("plan", MLP, "-r", "0.4", "-o", "plan.json", "-q").returncode == 0
    model = onnx.load(MLP)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    onnx.save(model, tmp_path / "sister.onnx")
    assert command("apply", "sister.onnx", "plan.json", "-o", "out.onnx", "--verify").returncode == 0


def test_models_over_the_limit_of_one_message_get_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = onnxprune.prune(MLP, 0.4).model
    monkeypatch.setattr(writing, "LARGEST", 10_000)
    large = onnxprune.prune(MLP, 0.4).model  # its proof runs such models too
    writing.write_model(large, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    assert (tmp_path / "out.onnx").stat().st_size < 20_000
    read = onnx.load(tmp_path / "out.onnx")
    arrays = [{t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (small, read)]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(arrays[0][k], arrays[1][k]) for k in arrays[0])
    ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])


def test_interrupted_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"what was there before")

    def interrupted(model: onnx.ModelProto, path: str) -> None:
        Path(path).write_bytes(model.SerializeToString()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.onnx, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writing.write_model(onnx.load(MLP), target)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert target.read_bytes() == b"what was there before"


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: onnx.ModelProto, path: str) -> None:
        Path(path).write_bytes(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.onnx, "save", full)
    with pytest.raises(OnnxPruneError, match="the disk is full") as caught:
        writing.write_model(onnx.load(MLP), tmp_path / "out.onnx")
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs takes root")
def test_a_tmpfs_of_one_megabyte(command: Command, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a tmpfs be mounted")
    try:
        (disk / "filler").write_bytes(bytes(700_000))
        failing(command(MODELS / "digits-resnet.onnx", "-r", "0.1", "-o", "disk/out.onnx", "-q"), 2, "disk is full")
        assert [p.name for p in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    onnx.save(two_layers(4096, 2048, 2048), tmp_path / "large.onnx")
    line = [sys.executable, "-m", "onnxprune", "large.onnx", "-r", "0.1", "-q"]
    for wait in (0.7, 1.2, 1.6):
        process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, 130, -signal.SIGINT), errors  # 0: it was quicker
        left = {p.name for p in tmp_path.iterdir()} - {"large.onnx"}
        assert left <= {"large-pruned.onnx"}
        for name in left:  # written before the interrupt: then it is whole
            onnx.checker.check_model(tmp_path / name)
            (tmp_path / name).unlink()

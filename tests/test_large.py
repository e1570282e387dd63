"""Models whose weights stand in files of their own: read a tensor at a time, proven in parts, written streamed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT, Command, two_layers
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import external, writing
from onnxprune.certificate import certify
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import group
from onnxprune.importer import load

sys.path.insert(0, str(ROOT / "benchmarks"))
from large import Decoder, Size

LITTLE = 100_000  # bytes of memory for weights, of which each model here has more


def decoder(folder: Path, kind: str = "float32", layers: int = 2) -> Path:
    path = folder / "decoder.onnx"
    Decoder(path, Size(heads=8, inner=384, layers=layers, words=300, head=16), kind, seed=1).write()
    return path


def layers(folder: Path, name: str = "m.onnx", location: str = "m.data") -> Path:
    """Two layers of 128 KiB each, in another file."""
    path = folder / name
    onnx.save(two_layers(256, 128, 128), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the same as in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "random"])
def test_what_is_written_is_what_pruning_in_memory_gives(tmp_path: Path, kind: str, criterion: str) -> None:
    path = decoder(tmp_path, kind, layers=1)
    whole = onnxprune.prune(path, 0.4, criterion=criterion, verify=False)
    parts = onnxprune.prune(path, 0.4, criterion=criterion, verify=False, memory=LITTLE)
    left = [t.name for t in parts.model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert "embedding" in left
    assert "layers.0.down" in left
    whole.save(tmp_path / "whole.onnx")
    parts.save(tmp_path / "parts.onnx")
    assert whole.plan.to_json() == parts.plan.to_json()
    assert same(arrays(tmp_path / "whole.onnx"), arrays(tmp_path / "parts.onnx"))
    onnx.checker.check_model(tmp_path / "parts.onnx", full_check=True)


def test_it_is_proven_in_parts_as_it_is_in_one(tmp_path: Path) -> None:
    path = decoder(tmp_path)
    whole, parts = (onnxprune.prune(path, 0.4, memory=memory) for memory in (2**30, LITTLE))
    assert whole.proof is not None
    assert parts.proof is not None
    assert set(parts.proof.proven) == set(whole.proof.proven) == {g.id for g in parts.plan.groups}
    assert parts.proof.permutation <= parts.proof.tolerance
    assert parts.proof.masked is not None
    assert parts.proof.masked <= parts.proof.tolerance
    parts.save(tmp_path / "out.onnx")
    feeds = {"input_ids": np.arange(12).reshape(2, 6)}
    logits = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    expected = ort.InferenceSession(whole.model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("body", [False, True])
def test_tensors_of_constant_nodes_and_of_bodies_move_too(tmp_path: Path, body: bool) -> None:
    """x -> MatMul -> + b1 -> Relu -> MatMul, where b1 is a Constant's, of the main graph or in the branches of an If."""
    model = two_layers(256, 128, 128)
    bias = model.graph.initializer.pop(1)
    constant = helper.make_node("Constant", [], ["b1"], value=bias)
    if body:
        kind = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
        add, kept = helper.make_node("Add", ["h", "b1"], ["b"]), model.graph.node[1]
        then = helper.make_graph([constant, add], "then", [], [kind])
        other = helper.make_graph([helper.make_node("Identity", ["h"], ["c"])], "else", [], [helper.make_tensor_value_info("c", 1, None)])
        model.graph.node.remove(kept)
        model.graph.node.insert(1, helper.make_node("If", ["condition"], ["b"], then_branch=then, else_branch=other))
        model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    else:
        model.graph.node.insert(0, constant)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=4096)
    parts = onnxprune.prune(tmp_path / "m.onnx", 0.4, memory=LITTLE)
    assert any(m.tensor.startswith("b1") for g in parts.plan.groups for m in g.members)
    assert parts.proof is not None
    assert parts.proof.proven == tuple(g.id for g in parts.plan.groups)


@pytest.mark.parametrize("granularity", ["block", "all", "head"])
def test_branches_go_and_are_proven_in_parts(tmp_path: Path, granularity: str) -> None:
    path = decoder(tmp_path, layers=4)
    whole, parts = (onnxprune.prune(path, 0.3, granularity=granularity, memory=memory) for memory in (2**30, LITTLE))
    assert whole.plan.to_json()["groups"] == parts.plan.to_json()["groups"]
    assert parts.proof is not None
    assert parts.proof.masked is not None
    for name, result in (("whole.onnx", whole), ("parts.onnx", parts)):
        result.save(tmp_path / name)
    assert same(arrays(tmp_path / "whole.onnx"), arrays(tmp_path / "parts.onnx"))


def test_a_wrong_group_is_found_in_parts(tmp_path: Path) -> None:
    grouping = group(load(decoder(tmp_path), memory=LITTLE))
    wrong = next(g for g in grouping.groups if any(m.tensor == "layers.1.down" and m.axis == 0 for m in g.members))
    torn = replace(wrong, members=tuple(m for m in wrong.members if m.tensor != "layers.1.down"))
    certified, proof, _ = certify(replace(grouping, groups=tuple(torn if g is wrong else g for g in grouping.groups)))
    assert set(proof.frozen) == {wrong.id}
    assert wrong.id not in {g.id for g in certified.groups}
    assert set(proof.proven) == {g.id for g in grouping.groups} - {wrong.id}


def test_a_model_that_is_not_what_the_plan_leaves_is_found_in_parts(tmp_path: Path) -> None:
    path, out = layers(tmp_path), tmp_path / "out.onnx"
    result = onnxprune.prune(path, 0.4, memory=LITTLE)
    result.save(out)
    assert (onnxprune.verify(path, out, result.plan, memory=LITTLE).matches or 0.0) < 1e-4
    data = bytearray((tmp_path / "out.onnx.data").read_bytes())
    data[4096:8192] = np.ones(1024, np.float32).tobytes()
    (tmp_path / "out.onnx.data").write_bytes(data)
    assert (onnxprune.verify(path, out, result.plan, memory=LITTLE).matches or 0.0) > 0.1


def test_a_plan_is_made_and_applied(command: Command, tmp_path: Path) -> None:
    path = decoder(tmp_path)
    assert command("plan", path, "-r", "0.4", "-o", "plan.json", "--memory", "100KB", "-q").returncode == 0
    assert command("apply", path, "plan.json", "-o", "parts.onnx", "--memory", "100KB", "--verify", "-q").returncode == 0
    assert command("apply", path, "plan.json", "-o", "whole.onnx", "-q").returncode == 0
    assert same(arrays(tmp_path / "parts.onnx"), arrays(tmp_path / "whole.onnx"))
    assert command("groups", path, "--memory", "100KB", "--json", "groups.json", "-q").returncode == 0
    assert json.loads((tmp_path / "groups.json").read_text())["groups"]


# --- what is written ------------------------------------------------------------------------------------------------


def test_weights_go_where_the_originals_are(tmp_path: Path) -> None:
    onnx.save(two_layers(256, 128, 128), tmp_path / "inside.onnx")
    for source in (layers(tmp_path), tmp_path / "inside.onnx"):
        onnxprune.prune(source, 0.4, verify=False).save(tmp_path / f"out-{source.name}")
    assert (tmp_path / "out-m.onnx.data").is_file()
    assert not (tmp_path / "out-inside.onnx.data").exists()
    assert same(arrays(tmp_path / "out-m.onnx"), arrays(tmp_path / "out-inside.onnx"))


@pytest.mark.parametrize("memory", ["100KB", "1GB"])
def test_shards(command: Command, tmp_path: Path, memory: str) -> None:
    path = decoder(tmp_path)
    assert command(path, "-r", "0.3", "-o", "whole.onnx", "--no-verify", "-q").returncode == 0
    assert command(path, "-r", "0.3", "-o", "out.onnx", "--no-verify", "-q", "--shard-size", "120KB", "--memory", memory).returncode == 0
    shards = sorted(tmp_path.glob("out.onnx-*.data"))
    assert [p.name for p in shards] == [f"out.onnx-{k + 1:05}-of-{len(shards):05}.data" for k in range(len(shards))]
    assert len(shards) > 3
    weights = arrays(tmp_path / "out.onnx")
    largest = max(array.nbytes for array in weights.values())
    assert max(p.stat().st_size for p in shards) <= max(120_000, largest)
    assert same(weights, arrays(tmp_path / "whole.onnx"))
    ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])


def test_a_model_over_the_limit_of_one_message_is_known_without_its_size() -> None:
    """protobuf raises where it is asked for the size of such a model."""
    model = two_layers()
    assert writing.fits(model)
    model.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 10], raw_data=b""))
    assert not writing.fits(model)


def test_progress_says_how_much_how_fast_and_how_long(tmp_path: Path) -> None:
    said: list[str] = []
    onnxprune.prune(layers(tmp_path), 0.4, verify=False, memory=LITTLE).save(tmp_path / "out.onnx", progress=said.append)
    assert said
    assert all(line.startswith("writing weights: ") and "/s, " in line and line.endswith(" left") for line in said)


def test_the_inputs_weights_are_not_replaced(command: Command, tmp_path: Path) -> None:
    path = layers(tmp_path, location="out.onnx.data")
    before = files(tmp_path)
    for memory in ("100KB", "1GB"):
        result = command(path, "-r", "0.4", "-o", "out.onnx", "--no-verify", "-q", "--memory", memory)
        assert result.returncode == 2
        assert "out.onnx.data: holds weights of the input" in result.stderr
        assert files(tmp_path) == before


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", ["writing", "first", "second"])
def test_interrupted_nothing_is_left_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, existing: bool
) -> None:
    result = onnxprune.prune(layers(tmp_path), 0.4, verify=False, memory=LITTLE)
    if existing:
        (tmp_path / "out.onnx").write_bytes(b"a model")
        (tmp_path / "out.onnx.data").write_bytes(b"its weights")
    before = files(tmp_path)

    def stop(line: str) -> None:
        if moment == "writing" and line.startswith("writing weights"):
            raise KeyboardInterrupt

    def renamed(source: str, target: Path, real: Callable[..., None] = writing.os.replace) -> None:
        if Path(target).name == {"first": "out.onnx.data", "second": "out.onnx"}.get(moment) and str(source).endswith(".tmp"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(writing.os, "replace", renamed)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "out.onnx", progress=stop)
    assert files(tmp_path) == before


def test_the_command_is_interrupted(tmp_path: Path) -> None:
    path = decoder(tmp_path, layers=12)
    before = set(files(tmp_path))
    line = [sys.executable, "-m", "onnxprune", str(path), "-r", "0.4", "--no-verify", "-q", "--memory", "100KB", "-o", "out.onnx"]
    child = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not list(tmp_path.glob(".out.onnx*.tmp")):
        time.sleep(0.001)
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert (child.returncode, said.strip()) == (130, "error: interrupted; no half-written file is left")
    assert set(files(tmp_path)) == before


# --- bad input ------------------------------------------------------------------------------------------------------


def changed(path: Path, key: str, value: str) -> None:
    """Say something else of where the first tensor's data is."""
    model = onnx.load(path, load_external_data=False)
    entry = next((e for e in model.graph.initializer[0].external_data if e.key == key), None)
    entry = entry or model.graph.initializer[0].external_data.add(key=key)
    entry.value = value
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("memory", ["100KB", "1GB"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["external data file", "m.data", "missing"]),
        ("short", ["'w2'", "cut short", "m.data"]),
        ("parent", ["'w1'", "../secret", "not in the model's own folder"]),
        ("absolute", ["'w1'", "/etc/hostname", "not in the model's own folder"]),
        ("link", ["'w1'", "m.data", "a link to outside of the model's folder"]),
        ("length", ["'w1'", "512 bytes", "131072"]),
        ("offset", ["'w1'", "no number"]),
        ("negative", ["'w1'", "byte -4"]),
    ],
)
def test_external_data_that_is_not_as_the_model_says(command: Command, tmp_path: Path, how: str, words: list[str], memory: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, data = layers(folder), folder / "m.data"
    (tmp_path / "secret").write_bytes(data.read_bytes())
    if how == "missing":
        data.unlink()
    elif how == "short":
        data.write_bytes(data.read_bytes()[:-4])
    elif how == "link":
        data.unlink()
        data.symlink_to(tmp_path / "secret")
    else:
        key = {"length": "length", "offset": "offset", "negative": "offset"}.get(how, "location")
        changed(path, key, {"parent": "../secret", "absolute": "/etc/hostname", "length": "512", "offset": "x", "negative": "-4"}[how])
    before = sorted(tmp_path.rglob("*"))
    result = command(path, "-r", "0.4", "-o", "out.onnx", "--no-verify", "-q", "--memory", memory)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = layers(tmp_path)
    result = onnxprune.prune(path, 0.4, verify=False, memory=LITTLE)
    (tmp_path / "m.data").write_bytes(b"")
    with pytest.raises(OnnxPruneError, match="became shorter"):
        result.save(tmp_path / "out.onnx")
    assert set(files(tmp_path)) == {"m.onnx", "m.data"}


@pytest.mark.parametrize(
    "options",
    [
        ["--calibration", "noise"],
        ["--compensation", "merge"],
        ["--criterion", "obs", "--calibration", "none"],
        ["--allocation", "auto", "--calibration", "noise"],
        ["--eval", "noise"],
        ["--steps", "2"],
    ],
)
def test_what_takes_all_weights_at_once_is_refused_and_says_what_to_do(command: Command, tmp_path: Path, options: list[str]) -> None:
    result = command(layers(tmp_path), "-r", "0.4", "--memory", "100KB", *options)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "cannot do" in result.stderr
    assert "--memory" in result.stderr


def test_weights_that_do_not_fit_are_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layers(tmp_path)
    monkeypatch.setattr(external, "available", lambda: 200_000)
    with pytest.raises(OnnxPruneError, match="one at a time by a smaller --memory") as caught:
        onnxprune.prune(path, 0.4)
    assert caught.value.exit_code == 2
    assert onnxprune.prune(path, 0.4, memory=LITTLE).on_budget


def test_a_proto_does_not_tell_where_its_data_is(tmp_path: Path) -> None:
    model = onnx.load(layers(tmp_path), load_external_data=False)
    with pytest.raises(OnnxPruneError, match="give the model's path") as caught:
        onnxprune.prune(model, 0.4)
    assert caught.value.exit_code == 2


def test_sizes_are_written_as_people_write_them(command: Command, tmp_path: Path) -> None:
    path = layers(tmp_path)
    for size in ("100000", "0.0001GB", "97.7KiB", "100 kb"):
        result = command(path, "-r", "0.4", "--calibration", "noise", "--memory", size)
        assert "one at a time" in result.stderr
    result = command(path, "-r", "0.4", "--memory", "much")
    assert result.returncode == 2
    assert "is no size" in result.stderr

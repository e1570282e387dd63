"""What people read: what samples cannot tell, which sizes were guessed, names that stay the same, and counts that agree."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS, Command, two_layers
from outside import Weight, build, run
from rich.console import Console

import onnxprune
from onnxprune import certificate
from onnxprune.cautions import cautions
from onnxprune.naming import group_names
from onnxprune.report import show_proof
from onnxprune.shortening import shortened
from onnxprune.terminal import Steps, done_of, progress_bars

TWO = """h = MatMul (x, w1) r = Relu (h) a = MatMul (r, w2)
         g = MatMul (x, v1) s = Relu (g) b = MatMul (s, v2) y = Add (a, b)"""
SIZES: Mapping[str, tuple[int, ...]] = {"w1": (4, 8), "w2": (8, 3), "v1": (4, 6), "v2": (6, 3)}


def words(text: str) -> str:
    return " ".join(text.split())


def two_ways(**values: np.ndarray) -> onnx.ModelProto:
    """y = Relu(x w1) w2 + Relu(x v1) v2."""
    rng = np.random.default_rng(0)
    weights: dict[str, Weight] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SIZES.items()}
    return build("float[N,4] x", TWO, "float[N,3] y", {**weights, **values})


POSITIVE = np.ones((4, 8), np.float32) + np.arange(8, dtype=np.float32) / 9


def negative(count: int = 40) -> dict[str, np.ndarray]:
    return {"x": -np.abs(np.random.default_rng(1).standard_normal((count, 4))).astype(np.float32)}


# --- samples that tell nothing ----------------------------------------------------------------------------------------


def test_samples_that_do_not_reach_what_went_are_said(command: Command, tmp_path: Path) -> None:
    """Negative inputs and positive weights: one of the two ways is silent, and only that one may be pruned."""
    onnx.save(two_ways(w1=POSITIVE), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", **negative())
    line = ["m.onnx", "-r", "0.286", "--calibration", "data.npz", "--compensation", "reconstruct", "--scope", "w1", "--json", "out.json"]
    result = command(*line)
    assert result.returncode == 0, result.stderr
    assert "the calibration samples cannot tell the pruned model from the original" in words(result.stdout)
    assert "--calibration data.npz" in words(result.stdout)
    assert not re.search(r"\binf\b", result.stdout)
    assert any("cannot tell" in one for one in json.loads((tmp_path / "out.json").read_text())["cautions"])
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    assert "cannot tell" not in words(command(*line).stdout)


def test_samples_that_are_all_alike_are_said() -> None:
    rng = np.random.default_rng(0)
    same = {"x": np.repeat(rng.standard_normal((1, 4)).astype(np.float32), 40, axis=0)}
    result = onnxprune.prune(two_ways(), 0.3, calibration=same, compensation="reconstruct")
    assert any("the original gives the same outputs for all of them" in one for one in cautions(result))
    other = {"x": rng.standard_normal((40, 4)).astype(np.float32)}
    assert not any(
        "cannot tell" in one for one in cautions(onnxprune.prune(two_ways(), 0.3, calibration=other, compensation="reconstruct"))
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"of": "params"},
        {"criterion": "obs", "calibration": "noise", "compensation": "update"},
        {"granularity": "all", "min_keep": 0.99},
    ],
)
def test_a_ratio_below_one_unit_is_told_what_to_ask_for(options: dict[str, Any]) -> None:
    with pytest.raises(onnxprune.OnnxPruneError, match="no unit takes as little as 1e-06") as refused:
        onnxprune.prune(MODELS / "digits-resnet.onnx", 1e-6, **options)
    assert refused.value.exit_code == 3
    said = re.search(r"ask for ([\d.e-]+) or more", str(refused.value))
    assert said
    assert onnxprune.prune(MODELS / "digits-resnet.onnx", float(said[1]), **options).reached > 0
    with pytest.raises(onnxprune.OnnxPruneError, match=re.escape(said[0])):
        onnxprune.prune(MODELS / "digits-resnet.onnx", float(said[1]) / 1.3, **options)


def test_shares_that_take_no_unit_are_named() -> None:
    with pytest.raises(onnxprune.OnnxPruneError, match="--layer-ratio take no unit"):
        onnxprune.prune(MODELS / "digits-mlp.onnx", 0.3, layer_ratios={"*": 1e-4})


def test_a_compensation_that_does_harm_says_so() -> None:
    """Two ways that cancel each other: what one of them loses, the other one does not bring back by more variance."""
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal(SIZES[name]).astype(np.float32) for name in ("w1", "w2"))
    model = two_ways(w1=w1, w2=w2, v1=w1[:, :6], v2=-w2[:6] * np.float32(0.9))
    data = {"x": rng.standard_normal((256, 4)).astype(np.float32)}
    said = {}
    for name in ("moments", "reconstruct"):
        result = onnxprune.prune(model, 0.4, calibration=data, criterion="random", compensation=name, allocation="uniform")
        assert result.fidelity is not None
        harm = result.fidelity[1].loss > result.fidelity[0].loss
        said[name] = [one for one in cautions(result) if "further from the original's" in one]
        assert bool(said[name]) == harm == (name == "moments"), name
    assert "--compensation moments" in said["moments"][0]
    assert "use --compensation distill" in said["moments"][0]


def test_a_proof_on_inputs_that_show_nothing_of_what_went_says_so() -> None:
    model = two_layers()
    weights = {t.name: onnx.numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    for tensor in model.graph.initializer:  # half of the units are small, and dead on these inputs
        dead = weights[tensor.name]
        if tensor.name == "b1":
            dead[:4] = -1e-2
        else:
            dead[(slice(None), slice(4)) if tensor.name == "w1" else slice(4)] *= 1e-6
        tensor.CopyFrom(onnx.numpy_helper.from_array(dead, tensor.name))
    result = onnxprune.prune(model, 0.4, of="channels", min_keep=1)
    assert result.proof is not None
    assert result.proof.moved == 0
    [said] = [one for one in cautions(result) if "of the proof" in one]
    assert "made-up inputs" in said
    assert "--feeds" in said
    assert not any("of the proof" in one for one in cautions(onnxprune.prune(two_layers(), 0.4, of="channels")))


def test_sensitivity_says_where_nothing_changes_at_any_point(command: Command, tmp_path: Path) -> None:
    onnx.save(two_ways(w1=POSITIVE), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", **negative())
    line = ["sensitivity", "m.onnx", "--calibration", "data.npz", "--ratios", "0.5"]
    assert "no output changes at any point" in words(command(*line, "--scope", "w1", "--state", "a.json").stdout)
    assert "no output changes at any point" not in words(command(*line, "--scope", "v1", "--state", "b.json").stdout)


# --- sizes that were guessed ------------------------------------------------------------------------------------------


def sequence(tmp_path: Path) -> Path:
    path = tmp_path / "seq.onnx"
    body = "h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)"
    onnx.save(build("float[N,S,6] x", body, "float y", {"a": (6, 8), "b": (8, 4)}), path)
    return path


def test_a_guessed_size_is_said_with_the_flag_that_gives_it(command: Command, tmp_path: Path) -> None:
    line = [sequence(tmp_path), "-r", "0.25", "--calibration", "noise", "--compensation", "reconstruct", "-o", "o.onnx"]
    result = command(*line)
    assert "a guessed size, x 2×2×6 (S open in the file)" in result.stderr
    assert "--input-shape x=1,SIZE,6" in result.stderr
    assert "counted and timed at a guessed size, x 2×2×6" in words(result.stdout)
    assert "x 2×6 each" in words(result.stdout)
    given = command(*line, "--input-shape", "x=1,12,6")
    assert given.returncode == 0, given.stderr
    assert "counted and timed at x 1×12×6" in words(given.stdout)
    for text in (given.stdout, given.stderr):
        assert "guessed" not in text
        assert "--input-shape" not in text


def test_inspect_and_sensitivity_say_guessed_sizes_too(command: Command, tmp_path: Path) -> None:
    path = sequence(tmp_path)
    assert "guessed: x 2×2×6 (S open in the file)" in command("inspect", path).stdout
    assert "guessed" not in command("inspect", path, "--input-shape", "x=1,12,6").stdout
    line = ["sensitivity", path, "--calibration", "noise", "--ratios", "0.5", "--state", "s.json"]
    assert "--input-shape x=1,SIZE,6" in command(*line).stderr


# --- the same words everywhere ----------------------------------------------------------------------------------------


def locals_of_other_versions() -> onnx.ModelProto:
    """Its weights are in a function whose opset is not the model's, so that onnx does not inline it."""
    helper = onnx.helper
    weight = helper.make_tensor("w", 1, [4, 4], np.ones(16, np.float32))
    body = [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("own", "Block", ["a"], ["b"], body, [helper.make_opsetid("", 13)])
    x, y = (helper.make_tensor_value_info(name, 1, [2, 4]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Block", ["x"], ["y"], domain="own")], "net", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)


def test_inspect_groups_and_prune_give_one_reason(command: Command, tmp_path: Path) -> None:
    onnx.save(locals_of_other_versions(), tmp_path / "m.onnx")
    said = [
        words(made.stdout + made.stderr)
        for made in (command("inspect", "m.onnx"), command("groups", "m.onnx"), command("m.onnx", "-r", "0.3"))
    ]
    reasons = [re.search(r"nothing can be pruned \((.*?)\)", text) for text in said]
    assert all(reasons), said
    assert len({found[1] for found in reasons if found}) == 1
    assert "'Block'" in said[0]


def test_a_group_has_one_name_in_all_commands(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MODELS / "digits-resnet.onnx"
    whole = group_names(onnxprune.inspect(path).grouping)
    assert group_names(onnxprune.groups(path)) == whole
    pruned = group_names(onnxprune.prune(path, 0.3).plan.grouping)
    assert pruned == {i: whole[i] for i in pruned}
    assert len(set(whole.values())) == len(whole)
    # a group that is frozen does not change the others' names, and keeps its own in the proof
    blame = certificate._permuted_gap
    monkeypatch.setattr(certificate, "_permuted_gap", lambda b, g, s, part: 9.0 if any(p.id == 0 for p in part) else blame(b, g, s, part))
    result = onnxprune.prune(path, 0.3)
    assert result.proof is not None
    assert 0 in result.proof.frozen
    assert group_names(result.plan.grouping) == {i: name for i, name in pruned.items() if i}
    console = Console(file=io.StringIO(), width=500)
    show_proof(console, result.proof)
    assert f"group 0 ({whole[0]}) stays whole: failed the test" in console.file.getvalue()  # type: ignore[attr-defined]


def test_heads_and_their_channels_have_names_of_their_own() -> None:
    body = """q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
              a = Reshape (q, split) b = Reshape (k, split) c = Reshape (v, split)
              d = Transpose <perm=[0,2,1,3]> (a) e = Transpose <perm=[0,2,3,1]> (b) f = Transpose <perm=[0,2,1,3]> (c)
              g = MatMul (d, e) h = Softmax (g) i = MatMul (h, f) j = Transpose <perm=[0,2,1,3]> (i) l = Reshape (j, joined)
              y = MatMul (l, wo)"""
    weights: dict[str, Weight] = {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "wo": (12, 5), "split": [0, 0, 3, 4], "joined": [0, 0, 12]}
    groups = onnxprune.groups(build("float[2,7,6] x", body, "float[2,7,5] y", weights)).groups
    assert "head" in {group.kind for group in groups}
    names = [re.sub(" and .*", "", group.name) for group in groups]
    assert len(set(names)) == len(names) > 1
    assert len(set(shortened([group.name for group in groups], 24))) == len(names)


@pytest.mark.parametrize("options", [(), ("-v",)])
def test_inspect_counts_layers_in_one_way(command: Command, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = command("inspect", MODELS / "digits-mobilenet.onnx", "--json", "out.json", *options)
    layers = json.loads((tmp_path / "out.json").read_text())["layers"]
    found = re.findall(r"of (\d+) layers|: \d+ of (\d+), with", words(result.stdout))
    assert {int(a or b) for a, b in found} == {len(layers)}
    without = sum(not layer["groups"] for layer in layers)
    assert f"nothing can go: {without} of {len(layers)}" in words(result.stdout)


# --- a handful of samples ---------------------------------------------------------------------------------------------


def test_figures_of_a_handful_of_samples_are_called_that() -> None:
    x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    for count, words_ in ((20, "only 20 calibration samples:"), (200, "")):
        said = [one for one in cautions(onnxprune.prune(two_ways(), 0.3, calibration={"x": x[:count]})) if "fitted to them" in one]
        assert bool(said) == bool(words_)
        assert all(one.startswith(words_) and "--eval" in one for one in said)
    assert not any("fitted to them" in one for one in cautions(onnxprune.prune(two_ways(), 0.3, calibration="noise", samples=20)))
    assert not any("fitted to them" in one for one in cautions(onnxprune.prune(two_ways(), 0.3)))


def test_one_sample_leaves_none_to_see_by_so_that_nothing_is_fitted(command: Command, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32))
    onnx.save(two_ways(), tmp_path / "net.onnx")
    line = ("net.onnx", "-r", "0.3", "--calibration", "one.npz", "--compensation", "reconstruct", "-o", "out.onnx", "--report", "out.html")
    found = command(*line)
    said = words(found.stdout + found.stderr)
    assert "only one calibration sample: too few to see by whether a fit holds elsewhere, so no layer was fitted" in said
    assert re.search(r"reconstruct, 0 layers fitted, \d left as cut", said)
    assert re.search(r"reconstruct: 0 layers fitted, \d left as cut", (tmp_path / "out.html").read_text())
    cut = onnxprune.apply(two_ways(), onnxprune.prune(two_ways(), 0.3, calibration=str(tmp_path / "one.npz")).plan).model
    for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer:
        assert tensor.raw_data == next(t.raw_data for t in cut.graph.initializer if t.name == tensor.name)


# --- one group that pays for all --------------------------------------------------------------------------------------


def test_one_group_that_pays_for_all_is_said() -> None:
    said = cautions(onnxprune.prune(two_ways(), 0.2, scope=["w1"]))
    assert any("all of the reduction comes from one group of 2: group 0 (w1 and 1 more)" in one for one in said)
    assert not any("comes from one group" in one for one in cautions(onnxprune.prune(two_ways(), 0.3)))
    assert not any("comes from one group" in one for one in cautions(onnxprune.prune(two_layers(), 0.3)))


def test_a_group_that_loses_nearly_all_is_said() -> None:
    path = MODELS / "digits-mlp.onnx"
    said = cautions(onnxprune.prune(path, 0.98, min_keep=0.05))
    assert any(re.search(r"group \d+ \(.*\) keeps only \d+ of \d+ units", one) and "--min-keep" in one for one in said)
    assert not any("keeps only" in one for one in cautions(onnxprune.prune(path, 0.3)))


# --- how much was measured on what ------------------------------------------------------------------------------------


def test_samples_are_said_with_how_many_were_given_and_macs_with_their_batch(command: Command) -> None:
    data = MODELS / "digits-images.eval.npz"
    with np.load(data) as arrays:
        given = len(next(iter(arrays.values())))
    assert given > 256
    line = [
        MODELS / "digits-resnet.onnx",
        "-r",
        "0.3",
        "--calibration",
        data,
        "--allocation",
        "uniform",
        "--compensation",
        "reconstruct",
        "-o",
        "o.onnx",
    ]
    said = words(command(*line).stdout)
    assert f"256 of the {given} calibration samples" in said
    assert re.search(r"MACs: .* less\) for a batch of 2", said)
    assert "MACs, memory and latency are for a batch of 2" in said
    said = words(command(*line, "--samples", "64", "--input-shape", "input=1,1,8,8").stdout)
    assert "on 64 calibration samples" in said
    assert "for a batch of" not in said


# --- long names in narrow windows -------------------------------------------------------------------------------------

ROOT = "StatefulPartitionedCall/model/functional_1"
LONG = [
    f"{ROOT}/block_{i}_{kind}/{rest}"
    for i in range(12)
    for kind, rest in (("expand", "Conv2D/ReadVariableOp:0"), ("bn", "FusedBatchNormV3"))
]


@pytest.mark.parametrize("room", [24, 32, 48])
def test_long_names_are_short_and_apart(room: int) -> None:
    found = shortened(LONG, room)
    assert max(map(len, found)) <= room
    assert len(set(found)) == len(LONG)
    for name, short in zip(LONG, found, strict=True):
        assert re.search(r"block_\d+", name)[0] in short  # type: ignore[index]


def test_names_that_differ_in_a_letter_stay_apart() -> None:
    names = ["a" * 40 + str(i) + "b" * 40 + f" and {i} more" for i in range(9)]
    found = shortened(names, 30)
    assert len({re.sub(r" \+\d+$", "", short) for short in found}) == len(names)
    assert shortened(names, 200) == names


def test_a_row_stays_a_row(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(MODELS / "digits-mobilenet.onnx")
    new = {t.name: f"{ROOT}/{t.name.replace('.', '/')}/ReadVariableOp:0" for t in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.name = new[tensor.name]
    for node in model.graph.node:
        node.name = f"{ROOT}{node.name}/Conv2D"
        node.input[:] = [new.get(name, name) for name in node.input]
    onnx.save(model, tmp_path / "m.onnx")
    monkeypatch.setenv("COLUMNS", "80")
    for line in (("groups", "m.onnx"), ("inspect", "m.onnx"), ("m.onnx", "-r", "0.3", "-o", "o.onnx")):
        text = command(*line).stdout
        rows = [row for row in text.splitlines() if re.match(r" +\d+   ", row)]  # of groups
        names = [max(re.split(r"  +", row.strip()), key=lambda cell: ("/" in cell, len(cell))) for row in rows]
        assert len(rows) > 5
        assert len(set(names)) == len(names)
        assert any("…" in name for name in names)
        first, last = text.index(rows[0]), text.index(rows[-1])
        assert text[first:last].count("\n") == len(rows) - 1  # nothing between them


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("reading activations, batch 3 of 20", (2, 20)),
        ("pass 1 of 8: misses 0.2", (0, 8)),
        ("7 of 40 points, about 3 min left", (7, 40)),
        ("1,024 of 4,096 points", (1024, 4096)),
        ("reading the model", (0, None)),
        ("writing weights: 1.2 GB of 3 GB, 5 s left", (0, None)),
    ],
)
def test_how_much_is_done_is_read_from_the_words(text: str, done: tuple[int, int | None]) -> None:
    assert done_of(text) == done


def test_a_step_that_counts_is_one_bar_and_other_words_are_another() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    bars = progress_bars(console)
    say = Steps(bars)
    say("reading the model")
    for number in range(1, 4):
        say(f"fitting, pass {number} of 4: [misses] 0.{number}")
        say("fitted conv1")  # between two of a count
    assert [(task.completed, task.total) for task in bars.tasks if task.visible] == [(0, None)]
    say("fitting, pass 3 of 4: [misses] 0.3")
    [task] = [task for task in bars.tasks if task.visible]
    assert (task.completed, task.total) == (2, 4)
    assert task.time_remaining is not None
    console.print(bars.get_renderable())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "fitting, pass 3 of 4: [misses] 0.3" in shown
    assert "0:00:0" in shown
    say("writing")
    assert [task.total for task in bars.tasks if task.visible] == [None]
    say("fitting, pass 1 of 4")
    say("fitting, pass 2 of 4")
    say("fitting, pass 1 of 4")  # from the start again
    say("fitting, pass 2 of 4")
    assert [task.completed for task in bars.tasks if task.visible] == [1]
    assert len(bars.tasks) == 1


@pytest.mark.parametrize(
    ("reader", "weight", "named"),
    [
        ("y = MatMul (r, w2)", (8, 3), 0),
        ("t = Transpose <perm = [1, 0]> (w2)  y = MatMul (r, t)", (3, 8), 0),
        ("y = Gemm <alpha = 2.0> (r, w2)", (8, 3), 0),
        ("t = Tanh (w2)  y = MatMul (r, t)", (8, 3), 1),
        ('y = Einsum <equation = "ni,io->no"> (r, w2)', (8, 3), 1),
        ("s = Sin (r)  a = MatMul (r, w2)  b = MatMul (s, w2)  y = Add (a, b)", (8, 3), 2),
    ],
)
def test_layers_that_nothing_is_fitted_to_are_named(reader: str, weight: tuple[int, ...], named: int) -> None:
    model = build(
        "float[N, 4] x", f"h = Gemm (x, w1, b1)  r = Tanh (h)  {reader}", "float[N, 3] y", {"w1": (4, 8), "b1": (8,), "w2": weight}
    )
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    for compensation in ("none", "update"):
        result = onnxprune.prune(model, 0.4, criterion="l1", allocation="uniform", compensation=compensation, calibration={"x": x})
        said = [one for one in cautions(result) if "only cut, not fitted" in one]
        assert len(said) == (named > 0 and compensation != "none")
        if said:
            assert said[0].startswith("2 layers" if named == 2 else "a layer")
            assert result.fidelity is not None
            before, after = result.fidelity
            assert after.loss == pytest.approx(before.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("reader", "weight", "compensation", "why"),
    [
        ("y = MatMul (r, w2)", (8, 3), "mean", "they have no bias"),
        ("y = MatMul (r, w2)", (8, 3), "update", ""),
        ("y = MatMul (r, w2)", (8, 3), "merge", ""),
        ("y = Gemm (r, w2)", (8, 3), "mean", ""),
        ("u = Unsqueeze (r, two)  z = Conv <group = 2> (u, w2)  y = Flatten (z)", (4, 4, 1), "merge", "what they read is not known"),
    ],
)
def test_layers_that_a_compensation_does_nothing_for_are_named(reader: str, weight: tuple[int, ...], compensation: str, why: str) -> None:
    body = f"h = Gemm (x, w1, b1)  r = Tanh (h)  {reader}"
    shapes = {"w1": (4, 8), "b1": (8,), "w2": weight, "two": np.array([2])}
    model = build("float[N, 4] x", body, "float y", {name: shape for name, shape in shapes.items() if name in body})
    x = np.random.default_rng(0).standard_normal((96, 4)).astype(np.float32)
    given = {"calibration": "none" if compensation == "merge" else {"x": x}, "criterion": "l1", "allocation": "uniform"}
    result = onnxprune.prune(model, 0.4, compensation=compensation, **given)  # type: ignore[arg-type]
    said = [one for one in cautions(result) if "as cut" in one]
    assert [why in one for one in said] == [True] * bool(why)
    before, after = run(onnxprune.apply(model, result.plan).model, {"x": x}), run(result.model, {"x": x})
    assert np.array_equal(before["y"], after["y"]) == bool(why)

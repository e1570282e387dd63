"""Files that leave sizes open which their nodes take for granted, and models that do not run: what is done, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Command, two_layers
from outside import Weight, build
from test_cli import failing

import onnxprune
from onnxprune.errors import OnnxPruneError
from onnxprune.importer import load
from onnxprune.report import verdict
from onnxprune.running import first_line


def traced(length: int = 6) -> onnx.ModelProto:
    """x (N, T, 4), whose nodes reshape to the length that was traced."""
    weights: dict[str, Weight] = {"w1": (4, 8), "w2": (8, 3), "s": np.array([0, length, 8])}
    return build("float[N,T,4] x", "h = MatMul (x, w1) s1 = Reshape (h, s) r = Relu (s1) y = MatMul (r, w2)", "float y", weights)


def test_the_one_size_that_runs_is_found_in_the_file_and_said(command: Command, tmp_path: Path) -> None:
    assert load(traced()).input_shapes == {"x": (2, 6, 4)}
    assert load(traced(), None, {"x": (5, 6, 4)}).input_shapes == {"x": (5, 6, 4)}
    proof = onnxprune.verify(traced())
    assert proof.pinned == ("x, axis 1 (T), is 6",)
    onnx.save(traced(), tmp_path / "m.onnx")
    made = command("m.onnx", "-r", "0.3", "-o", "out.onnx")
    assert "x, axis 1 (T), is 6: open in the file" in made.stdout
    assert "dynamic" in made.stdout


def test_open_sizes_that_run_are_not_said_to_be_pinned() -> None:
    assert onnxprune.verify(two_layers()).pinned == ()
    free = build("float[N,T,4] x", "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)", "float y", {"w1": (4, 8), "w2": (8, 3)})
    assert onnxprune.verify(free).pinned == ()
    halves = "p = AveragePool <kernel_shape=[16], strides=[16]> (x) t = Transpose <perm=[0,2,1]> (p) h = MatMul (t, w1) r = Relu (h) "
    multiple = build("float[N,4,T] x", halves + "y = MatMul (r, w2)", "float y", {"w1": (4, 8), "w2": (8, 3)})
    assert onnxprune.verify(multiple).pinned == ()
    table: dict[str, Weight] = {"table": (16, 8), "w1": (8, 8), "w2": (8, 3), "zero": [0], "one": [1], "ar": np.arange(16)}
    body = "n = Shape (i) t = Slice (n, one, two, zero) p = Slice (ar, zero, t, zero) e = Gather (table, p) h = MatMul (e, w1) "
    longest = build("int64[N,T] i", body + "r = Relu (h) y = MatMul (r, w2)", "float y", {**table, "two": [2]})
    assert onnxprune.verify(longest, input_shapes={"i": (1, 16)}).pinned == ()  # shorter inputs run


@pytest.mark.parametrize("how", ["plain", "groups", "verify", "plan"])
def test_a_model_that_does_not_run_is_bad_input(command: Command, tmp_path: Path, how: str) -> None:
    weights: dict[str, Weight] = {"table": (4, 6), "w1": (6, 8), "w2": (8, 3), "large": np.array([1000])}
    body = "i = Add (x, large) e = Gather (table, i) h = MatMul (e, w1) r = Relu (h) y = MatMul (r, w2)"
    onnx.save(build("int64[N] x", body, "float y", weights), tmp_path / "m.onnx")
    arguments = {"plain": ["m.onnx", "-r", "0.3"], "plan": ["plan", "m.onnx", "-r", "0.3", "-o", "p.json"]}.get(how, [how, "m.onnx"])
    failing(command(*arguments), 2, "m.onnx", "does not run", "idx=1001 must be within the inclusive range [-4,3]", "x [2]", "--feeds")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_does_not_load_is_bad_input_with_a_way_out(command: Command, tmp_path: Path) -> None:
    model = two_layers()
    model.graph.node.append(onnx.helper.make_node("Foreign", ["x"], ["z"], domain="my.own"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    model.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    onnx.save(model, tmp_path / "m.onnx")
    failing(command("m.onnx", "-r", "0.3"), 2, "m.onnx", "does not load", "my.own", "--no-verify")
    assert command("m.onnx", "-r", "0.25", "--of", "channels", "-o", "out.onnx", "--no-verify", "-q").returncode == 0


def test_verbose_tells_all_that_onnxruntime_said(command: Command, tmp_path: Path) -> None:
    weights: dict[str, Weight] = {"w1": (4, 8), "w2": (8, 3), "s": np.array([7, 7])}
    onnx.save(build("float[2,4] x", "h = MatMul (x, w1) r = Reshape (h, s) y = MatMul (r, w2)", "float y", weights), tmp_path / "m.onnx")
    short, long = command("groups", "m.onnx").stderr, command("groups", "m.onnx", "-v").stderr
    assert len(short.splitlines()) == 1
    assert long.startswith(short)


def test_reasons_end_at_a_word_and_leave_out_where_onnxruntime_was() -> None:
    said = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'/a/Reshape' Status Message: "
        "/onnxruntime_src/onnxruntime/core/providers/cpu/tensor/reshape_helper.h:47 onnxruntime::ReshapeHelper::ReshapeHelper(const "
        "onnxruntime::TensorShape&, onnxruntime::TensorShapeVector&, bool) Input shape:{2,224}, requested shape:{-1,5,4}"
    )
    assert first_line(RuntimeError(said)) == "Reshape node '/a/Reshape': Input shape:{2,224}, requested shape:{-1,5,4}"
    cut = first_line(RuntimeError("a very long word " * 40))
    assert cut.endswith(("word …", "long …", "very …", "a …"))
    assert first_line(RuntimeError("")) == "RuntimeError"


def test_the_proof_has_a_verdict_in_words(command: Command, tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "m.onnx")
    common = ["m.onnx", "-o"]
    planned = command("plan", *common, "p.json", "-r", "0.5", "--of", "channels").stdout
    assert "p.json holds the plan" in planned
    assert "  the group's units put in another order: the outputs stay the same" in planned
    applied = command("apply", "m.onnx", "p.json", "-o", "out.onnx").stdout
    assert "out.onnx is written" in applied
    assert "onnxprune verify m.onnx out.onnx --plan p.json" in applied
    assert "the proof holds: what is left computes what the original does without the removed units" in " ".join(
        command("verify", "m.onnx", "out.onnx", "--plan", "p.json").stdout.split()
    )
    trained = onnx.load(tmp_path / "out.onnx")
    tensor = trained.graph.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
    assert "weights of its own" in verdict(onnxprune.verify(two_layers(), trained, tmp_path / "p.json"))
    assert "change places" in verdict(onnxprune.verify(two_layers()))


def test_groups_that_inputs_do_not_exercise_are_said_with_a_way_out(command: Command, tmp_path: Path) -> None:
    model = two_layers()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "b1")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(8, -1e4, np.float32), "b1"))  # Relu gives zeros
    onnx.save(model, tmp_path / "m.onnx")
    said = " ".join(command("groups", "m.onnx").stdout.split())
    assert "nothing is proven; 1 group without proof stays whole" in said
    assert "group 0 (w1 and 2 more) stays whole: on these inputs nothing that is done to it changes the outputs" in said
    assert "give real inputs with --feeds" in said


def test_unproven_models_raise_the_code_of_bad_input_in_python() -> None:
    with pytest.raises(OnnxPruneError, match="does not run") as caught:
        onnxprune.prune(traced(), 0.3, input_shapes={"x": (1, 5, 4)})
    assert caught.value.exit_code == 2

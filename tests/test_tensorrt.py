"""`--target tensorrt`: what its parser does not take is found, and pruning adds nothing to it."""

from __future__ import annotations

import json
import lzma
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EVAL, MODELS, SHARED, Command
from onnx import ModelProto, TensorProto, helper
from onnxruntime import quantization
from outside import Weight, build, distance, feeds_of, run, tensors
from test_quantized import Samples

import onnxprune
from onnxprune.errors import OnnxPruneError
from onnxprune.importer import load
from onnxprune.scopes import all_graphs
from onnxprune.tensorrt import Support, check, check_introduced
from onnxprune.tensorrt_operators import OPERATORS, OPSETS

SHIPPED = ("digits-resnet", "digits-densenet", "digits-mobilenet", "digits-conv1d", "digits-mlp")


def symmetric(name: str, folder: Path, per_channel: bool = True) -> ModelProto:
    """A shipped model as onnxruntime quantizes it for TensorRT: signed, symmetric, biases left in float."""
    source, target = folder / "model.onnx", folder / "quantized.onnx"
    source.write_bytes((MODELS / f"{name}.onnx").read_bytes())
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    kinds = {"activation_type": quantization.QuantType.QInt8, "weight_type": quantization.QuantType.QInt8}
    arrays = MODELS / EVAL[name].replace("eval", "calibration")
    quantization.quantize_static(source, target, Samples(arrays), per_channel=per_channel, extra_options=options, **kinds)
    return onnx.load(target)


def refusals(model: ModelProto) -> set[tuple[str, str]]:
    return {(f.op, f.reason) for f in check(load(model)).refused}


# --- what is found ---------------------------------------------------------------------------------------------------

CASES: list[tuple[str, str, str, dict[str, Weight], str, str]] = [
    ("float[1, 4, 8] x", "float[1, 4, 4] y", "y = MaxPool<kernel_shape=[2], strides=[2]>(x)", {}, "MaxPool", "two or three dimensions"),
    ("float[1, 4, 8, 8] x", "float[1, 4, 4, 4] y", "y = MaxPool<kernel_shape=[3,3], dilations=[2,2]>(x)", {}, "MaxPool", "dilations"),
    ("float[2, 4] x", "float[2, 4] y", "y = Det(x)", {}, "Det", "no such operator"),
    ("float[2, 8] x", "float[2, 8] y", "y = com.microsoft.FastGelu(x)", {}, "com.microsoft.FastGelu", "another domain"),
    ("int16[2, 8] x", "int16[2, 8] y", "y = Add(x, x)", {}, "Add", "type int16"),
    ("int64[2, 8] x", "int64[2, 8] y", "y = Clip(x)", {}, "Clip", "type int64"),
    ("uint8[2, 8] x", "float[2, 8] y", "y = DequantizeLinear(x, s)", {"s": np.array(0.1, np.float32)}, "DequantizeLinear", "type uint8"),
    (
        "int8[2, 8] x",
        "float[2, 8] y",
        "y = DequantizeLinear(x, s, z)",
        {"s": np.array(0.1, np.float32), "z": np.array(3, np.int8)},
        "DequantizeLinear",
        "zero points other than 0",
    ),
    (
        "float[2, 3, 4] x, int64[1] a",
        "float[2, 3, 4] y",
        "s = ReduceSum<keepdims=1>(x, a) y = Sub(x, s)",
        {},
        "ReduceSum",
        "must be constant",
    ),
    (
        "float[1, 2, 4, 4] x",
        "float[1, 2, 8, 8] y",
        'y = Resize<mode="cubic">(x, , sizes)',
        {"sizes": np.array([1.0, 1, 2, 2], "f4")},
        "Resize",
        "mode cubic",
    ),
    ("float[2, 8] x", "int16[2, 8] y", "y = Cast<to=5>(x)", {}, "Cast", "to type int16"),
    ("float[4000] x", "float[3900] y", "y, i = TopK(x, k)", {"k": np.array([3900])}, "TopK", "3840"),
]


@pytest.mark.parametrize(("inputs", "outputs", "body", "weights", "op", "words"), CASES)
def test_what_the_parser_does_not_take_is_named(
    inputs: str, outputs: str, body: str, weights: dict[str, Weight], op: str, words: str
) -> None:
    found = [f for f in check(load(build(inputs, body, outputs, weights))).refused if f.op == op]
    assert any(words in f.reason for f in found), found
    assert all(f.where for f in found)


def test_opsets_inputs_and_notes_of_the_model() -> None:
    model = build("float[N, 4] x", "h = Gemm(x, w) y = Relu(h)", "float[N, 3] y", {"w": (4, 3)})
    support = check(load(model))
    assert support.refused == ()
    assert [f.where for f in support.notes] == [("x",)]
    assert support.profiles == {"x": ((1, 4), (2, 4))}
    model.opset_import[0].version = OPSETS[0] - 1
    assert any("opset" in f.reason for f in check(load(model)).refused)
    wide = build("double[2, 4] x", "h = MatMul(x, w) y = Relu(h)", "double[2, 3] y", {"w": np.ones((4, 3))})
    support = check(load(wide))
    assert support.refused == ()
    assert {f.op for f in support.notes} == {"", "MatMul", "Relu"}


def test_bodies_are_looked_into() -> None:
    then, other = (
        helper.make_graph([helper.make_node(op, ["h"], [f"{op}:out"])], op, [], [helper.make_tensor_value_info(f"{op}:out", 1, [2, 2])])
        for op in ("Relu", "Det")
    )
    other.output[0].CopyFrom(helper.make_tensor_value_info("Det:out", 1, []))
    model = build("float[2, 4] x, bool b", "h = MatMul(x, w)", "float[2, 2] h", {"w": (4, 2)})
    model.graph.node.append(helper.make_node("If", ["b"], ["y"], then_branch=then, else_branch=other))
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    assert ("Det", "TensorRT has no such operator") in refusals(model)


# --- what pruning leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_pruning_adds_nothing_that_the_parser_does_not_take(name: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    result = onnxprune.prune(model, 0.4, target="tensorrt", verify=False)
    assert isinstance(result.support, Support)
    assert refusals(result.model) <= refusals(model) == {(f.op, f.reason) for f in result.support.refused}
    onnx.checker.check_model(result.model, full_check=True)


def test_sizes_that_are_pinned_use_known_operators_only() -> None:
    """Numbers that the model computes from a width that shrinks: the rewriter puts constants and choices in their place."""
    body = """h = MatMul(x, u) s = Shape(h) n = Gather(s, last) f = Cast<to=1>(n) r = Sqrt(f) d = Div(h, r) t = Relu(d)
              p = Reshape(t, s) y = MatMul(p, v)"""
    model = build("float[N, 8] x", body, "float[N, 4] y", {"u": (8, 32), "v": (32, 4), "last": np.array(1)})
    result = onnxprune.prune(model, 0.5, target="tensorrt")
    new = {n.op_type for n in result.model.graph.node} - {n.op_type for n in model.graph.node}
    assert new <= OPERATORS.keys()
    assert not refusals(result.model)


def test_an_operator_that_pruning_added_would_be_refused() -> None:
    model = build("float[2, 2] x", "y = Relu(x)", "float[2, 2] y", {})
    other = build("float[2, 2] x", "d = Det(x) y = Add(x, d)", "float[2, 2] y", {})
    with pytest.raises(OnnxPruneError, match="Det") as caught:
        check_introduced(model, other)
    assert caught.value.exit_code == 4
    check_introduced(other, other)


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet", "digits-mlp"])
def test_pairs_of_quantizers_stay_in_place(name: str, tmp_path: Path) -> None:
    model = symmetric(name, tmp_path)
    assert not refusals(model)
    result = onnxprune.prune(model, 0.4, target="tensorrt", feeds=feeds_of(model, symbolic=4))
    assert result.on_budget
    assert not refusals(result.model)
    ops = [Counter(n.op_type for n in m.graph.node) for m in (model, result.model)]
    assert ops[0] == ops[1]
    weights = tensors(result.model)
    for node in result.model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights and weights[node.input[1]].dims:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            assert weights[node.input[0]].dims[axis] == weights[node.input[1]].dims[0]


def test_what_onnxruntime_quantizes_by_default_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((MODELS / "digits-mlp.onnx").read_bytes())
    reader = Samples(MODELS / "digits-mlp.calibration.npz")
    quantization.quantize_static(tmp_path / "model.onnx", tmp_path / "q.onnx", reader)
    reasons = " ".join(reason for _, reason in refusals(onnx.load(tmp_path / "q.onnx")))
    assert "symmetrically" in reasons
    assert "QuantizeBias" in reasons


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet", "digits-densenet"])
def test_graphsurgeon_reads_and_writes_the_result(name: str) -> None:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    model = onnx.load(MODELS / f"{name}.onnx")
    pruned = onnxprune.prune(model, 0.4, target="tensorrt", verify=False).model
    again = surgeon.export_onnx(surgeon.import_onnx(pruned).cleanup().toposort())
    feeds = feeds_of(pruned, symbolic=3)
    assert distance(run(pruned, feeds), run(again, feeds)) < 1e-6
    assert [n.op_type for n in pruned.graph.node if n.op_type == "Conv"] == [n.op_type for n in again.graph.node if n.op_type == "Conv"]


def test_the_command_says_what_is_refused(command: Command, tmp_path: Path) -> None:
    body = "h = MatMul(x, u) r = Relu(h) g = com.microsoft.FastGelu(r) y = MatMul(g, v)"
    onnx.save(build("float[N, 8] x", body, "float[N, 4] y", {"u": (8, 32), "v": (32, 4)}), tmp_path / "m.onnx")
    result = command("m.onnx", "-r", "0.5", "--target", "tensorrt", "-o", "o.onnx", "--json", "o.json", "--no-verify")
    assert result.returncode == 0, result.stderr
    assert "com.microsoft.FastGelu" in result.stdout
    assert "--optShapes=x:2x8" in result.stdout
    content = json.loads((tmp_path / "o.json").read_text())["support"]
    assert [f["op"] for f in content["refused"]] == ["com.microsoft.FastGelu"]
    assert content["profiles"] == {"x": {"min": [1, 8], "opt": [2, 8]}}
    shown = command("groups", "m.onnx", "--target", "tensorrt", "--no-verify", "--json", "-")
    assert json.loads(shown.stdout)["support"] == content
    assert command("groups", "m.onnx", "--target", "gpu").returncode == 2


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_speaks_of_operators_that_onnx_has() -> None:
    own = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of early opsets, which onnx no longer lists
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert OPERATORS.keys() - own <= known


@pytest.mark.skipif(not (SHARED / "zoo").is_dir(), reason="needs ../shared/zoo, a collection of exported graphs")
def test_the_table_against_the_operators_of_real_exports() -> None:
    sys.path.insert(0, str(SHARED / "zoo"))
    import zoo

    used: Counter[str] = Counter()
    for entry in zoo.index().values():
        with lzma.open(SHARED / "zoo" / entry["file"]) as content:
            model = onnx.load_from_string(content.read())
        inside = [node for function in model.functions for node in function.node]
        nodes = inside + [node for graph in all_graphs(model.graph) for node in graph.node]
        used.update({node.op_type for node in nodes if node.domain in ("", "ai.onnx")})
    missing = {op: graphs for op, graphs in used.items() if op not in OPERATORS}
    assert len(used) > 80
    assert missing == {"Col2Im": 1}

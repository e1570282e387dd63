"""Distillation at the public interface: better on samples it has not seen, and left alone where it would not be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune.calibration import read_calibration
from onnxprune.distillation import mixed
from onnxprune.fidelity import fidelity
from onnxprune.gradients import RULES, Site, Value
from onnxprune.importer import load
from onnxprune.lessons import targets, trainable, with_initializers

RESNET = MODELS / "digits-resnet.onnx"
IMAGES = MODELS / "digits-images.calibration.npz"
RNG = np.random.default_rng(5)


def pruned(model: Any, compensation: str, **options: Any) -> tuple[onnxprune.Result, list[str]]:
    said: list[str] = []
    given: dict[str, Any] = {"calibration": IMAGES, "samples": 192, "verify": False, "allocation": "uniform", "criterion": "l2"} | options
    return onnxprune.prune(model, 0.5, compensation=compensation, progress=said.append, **given), said


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def missed(model: onnx.ModelProto) -> float:
    """Noise over signal of the outputs on images that were not calibrated with."""
    samples = read_calibration(MODELS / "digits-images.eval.npz", load(RESNET))
    return -float(fidelity(onnx.load(RESNET), model, samples).outputs[0].sqnr)


def test_it_does_better_than_layer_by_layer_on_images_that_it_has_not_seen() -> None:
    before, after = pruned(RESNET, "reconstruct")[0], pruned(RESNET, "distill")[0]
    assert after.plan.remove.keys() == before.plan.remove.keys()
    assert missed(after.model) < missed(before.model) - 0.3  # decibels
    shapes = [{name: (array.shape, array.dtype) for name, array in weights_of(one.model).items()} for one in (before, after)]
    assert shapes[0] == shapes[1]
    assert [n.op_type for n in after.model.graph.node] == [n.op_type for n in before.model.graph.node]


def test_the_same_for_a_seed_and_another_for_another() -> None:
    first, again, other = (weights_of(pruned(RESNET, "distill", seed=seed, samples=64)[0].model) for seed in (3, 3, 4))
    assert all(np.array_equal(array, again[name]) for name, array in first.items())
    assert any(not np.array_equal(array, other[name]) for name, array in first.items())


def test_a_gradient_that_is_wrong_is_not_used_and_layers_are_refined_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(site: Site) -> Sequence[Value | None]:
        return (site.g * 2.0,)

    monkeypatch.setitem(RULES, "Relu", doubled)
    found, said = pruned(RESNET, "distill")
    assert any("finite difference" in line for line in said)
    assert not any(line.startswith("distilling") for line in said)
    assert found.model == pruned(RESNET, "refine")[0].model


def test_too_few_samples_are_said() -> None:
    found, said = pruned(RESNET, "distill", samples=1)
    assert any("too few samples" in line for line in said)
    assert found.model == pruned(RESNET, "refine", samples=1)[0].model


def two_layers(last: str = "", kind: int = TensorProto.FLOAT, between: str = "Relu") -> onnx.ModelProto:
    """x (n, 12) through 12 × 32 × 5 with an activation, a node that may be unknown, and perhaps a last one."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(12, 32)), "p": rng.normal(size=32) * 0.3, "b": rng.normal(size=(32, 5)) / 4, "q": rng.normal(size=5)}
    nodes = [
        helper.make_node("Gemm", ["x", "a", "p"], ["one"]),
        helper.make_node(between, ["one"], ["two"]),
        helper.make_node("Gemm", ["two", "b", "q"], ["logits"]),
        *([helper.make_node(last, ["logits"], ["y"])] if last else []),
    ]
    values = [helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("x", 12), ("y" if last else "logits", 5))]
    initializers = [numpy_helper.from_array(array.astype(dtype), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


X = {"x": RNG.normal(size=(256, 12)).astype(np.float32)}


def test_logits_stand_for_the_softmax_behind_them() -> None:
    plan = onnxprune.plan(two_layers("Softmax"), 0.5, verify=False)
    assert [(t.name, t.final) for t in targets(plan, onnxprune.apply(two_layers("Softmax"), plan).model)] == [("logits", True)]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_floats_stay_what_they_are(kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    found, said = pruned(two_layers(kind=kind), "distill", calibration={"x": X["x"].astype(dtype)})
    assert any(line.startswith("distilling") for line in said)
    assert {str(array.dtype) for array in weights_of(found.model).values()} == {str(dtype)}
    onnx.checker.check_model(found.model)


def test_before_a_node_without_a_rule_weights_stay_as_reconstruct_left_them() -> None:
    model = two_layers(between="Celu")
    assert "Celu" not in RULES
    found, said = pruned(model, "distill", calibration=X)
    assert any(line.startswith("distilling") for line in said)
    kept = onnxprune.apply(model, found.plan).model
    assert np.array_equal(weights_of(found.model)["a"], weights_of(kept)["a"])
    assert not np.array_equal(weights_of(found.model)["b"], weights_of(kept)["b"])


def test_constants_that_are_no_weights_are_not_trained() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Add", ["embedded", "positions"], ["placed"]),
        helper.make_node("MatMul", ["placed", "w"], ["made"]),
        helper.make_node("Add", ["made", "b"], ["biased"]),
        helper.make_node("Add", ["biased", "shift"], ["y"]),
    ]
    shapes = {"table": (9, 4), "positions": (1, 3, 4), "w": (4, 5), "b": (5,), "shift": ()}
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 3])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 5])], tensors)
    assert set(trainable(helper.make_model(graph))) == {"w", "b"}


def test_constant_nodes_are_initializers_too() -> None:
    model = two_layers()
    constant = helper.make_node("Constant", [], ["a"], value=model.graph.initializer[0])
    del model.graph.initializer[0]
    model.graph.node.insert(0, constant)
    assert set(trainable(with_initializers(model))) == {"a", "p", "b", "q"}
    found, _ = pruned(model, "distill", calibration=X)
    kept = onnxprune.apply(model, found.plan).model
    values = [numpy_helper.to_array(one.graph.node[0].attribute[0].t) for one in (found.model, kept)]
    assert values[0].shape == values[1].shape
    assert not np.array_equal(*values)


def test_samples_are_mixed_only_where_all_inputs_are_floats() -> None:
    rng = np.random.default_rng(0)
    floats = {"x": RNG.normal(size=(6, 3)).astype(np.float32), "z": RNG.normal(size=(6, 2, 2)).astype(np.float32)}
    found = mixed(floats, rng)
    then, now = (np.hstack([arrays[name].reshape(6, -1) for name in "xz"]) for arrays in (floats, found))
    shares = np.linalg.lstsq(then.T, now.T, rcond=None)[0]
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-4)  # both inputs by the same shares of the same two samples
    assert (np.diag(shares) >= 0.499).all()
    assert not np.allclose(np.diag(shares), 1)
    ids = floats | {"ids": np.arange(6)}
    assert mixed(ids, rng) is ids
    single = {"x": np.ones((1, 3), np.float32)}
    assert mixed(single, rng) is single

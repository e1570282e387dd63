"""Distillation at the public interface: better on samples it has not seen, and left alone where it would not be right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS
from onnx import TensorProto, helper, numpy_helper

import onnxprune
import onnxprune.lessons
from onnxprune.calibration import read_calibration
from onnxprune.capture import Tap
from onnxprune.distillation import Adam, mixed
from onnxprune.fidelity import fidelity
from onnxprune.gradients import RULES, Site, Value
from onnxprune.importer import load
from onnxprune.lessons import Lesson, lesson, targets, trainable, with_initializers
from onnxprune.running import session

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
    model = two_layers(between="Shrink")
    assert "Shrink" not in RULES
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


def three_values(extra: Sequence[Any], tensors: dict[str, np.ndarray], outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """`two_layers` with nodes and tensors besides, and more outputs."""
    model = two_layers()
    model.graph.node.extend(extra)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    return model


@pytest.mark.parametrize("stored", [True, False])
def test_outputs_that_are_constants_are_nothing_to_learn(stored: bool) -> None:
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(3, np.float32)))
    model = three_values([] if stored else [constant], {"k": np.ones(3, np.float32)} if stored else {}, ["k"])
    found, said = pruned(model, "distill", calibration=X)
    assert any(line.startswith("distilling") for line in said)
    np.testing.assert_array_equal(session(found.model).run(["k"], {"x": X["x"][:1]})[0], np.ones(3))


def test_integers_among_the_outputs_take_no_share_of_the_loss() -> None:
    model = three_values([helper.make_node("ArgMax", ["logits"], ["best"], axis=1)], {})
    model.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["n", 1]))
    plan = onnxprune.plan(model, 0.5, verify=False)
    assert [(t.name, t.share) for t in targets(plan, onnxprune.apply(model, plan).model)] == [("logits", 1.0)]


@pytest.mark.parametrize("version", [3, 8])
def test_initializers_that_are_inputs_too_are_weights(version: int) -> None:
    model = two_layers()
    model.ir_version = version
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in two_layers().graph.initializer)
    found, said = pruned(model, "distill", calibration=X)
    assert any(line.startswith("distilling") for line in said)
    assert {v.name for v in found.model.graph.input} == {v.name for v in model.graph.input}
    assert not np.array_equal(weights_of(found.model)["a"], weights_of(onnxprune.apply(model, found.plan).model)["a"])


def test_what_prepares_the_input_or_belongs_to_places_is_not_trained() -> None:
    """A mean before any layer, frequencies of positions, a mask, strides of anchors."""
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "w"], ["made"]),
        helper.make_node("Add", ["made", "b"], ["biased"]),
        helper.make_node("Add", ["biased", "mask"], ["masked"]),
        helper.make_node("Transpose", ["masked"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["turned", "strides"], ["y"]),
        helper.make_node("Cast", ["positions"], ["placed"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["frequencies", "placed"], ["angles"]),
        helper.make_node("Mul", ["placed", "rates"], ["others"]),
        helper.make_node("Shape", ["made"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "second"], ["long"]),
        helper.make_node("Range", ["none", "long", "one"], ["counted"]),
        helper.make_node("Cast", ["counted"], ["counts"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["counts", "slower"], ["more"]),
    ]
    shapes = {"mean": (4,), "w": (4, 5), "b": (5,), "strides": (1, 7), "frequencies": (1, 5, 1), "rates": (5, 1), "slower": (5, 1)}
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    tensors.append(numpy_helper.from_array(np.float32([0, 0, 0, -1e9, -1e9]), "mask"))
    tensors += [numpy_helper.from_array(np.array(i), name) for i, name in enumerate(("none", "one", "second"))]
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y", "angles", "others", "more")]
    inputs = [floats[0], helper.make_tensor_value_info("positions", TensorProto.INT64, [1, 1, 7])]
    assert set(trainable(helper.make_model(helper.make_graph(nodes, "g", inputs, floats[1:], tensors)))) == {"w", "b"}


def test_a_step_that_is_no_number_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, gradient = [0], Lesson.gradient

    def sometimes(self: Lesson, feeds: Any, weights: Any) -> Any:
        calls[0] += 1
        loss, change = gradient(self, feeds, weights)
        return loss, {name: array * np.float32(np.nan) for name, array in change.items()} if calls[0] == 3 else change

    monkeypatch.setattr(Lesson, "gradient", sometimes)
    found, said = pruned(two_layers(), "distill", calibration=X)
    assert not any("not distilled" in line or "nan" in line for line in said)
    assert all(np.isfinite(array).all() for array in weights_of(found.model).values())


def test_samples_of_many_sizes_are_said(tmp_path: Path) -> None:
    for i in range(64):
        np.savez(tmp_path / f"{i:02}.npz", x=RNG.normal(size=(1, 1 + i % 7, 12)).astype(np.float32))
    model = two_layers()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim.insert(1, onnx.TensorShapeProto.Dimension(dim_param="t"))
    for node in model.graph.node:
        if node.op_type == "Gemm":
            node.op_type = "MatMul"
            del node.input[2:]
    _, said = pruned(model, "distill", calibration=str(tmp_path), samples=64)
    assert any("other sizes" in line for line in said)


def test_the_rate_falls_to_the_last_step_where_the_model_takes_one_sample_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    rates, stepped = [], Adam.stepped

    def seen(self: Adam, weights: Any, change: Any, rate: float) -> Any:
        rates.append(rate)
        return stepped(self, weights, change, rate)

    monkeypatch.setattr(Adam, "stepped", seen)
    pruned(model, "distill", calibration=X, samples=64)
    assert rates[len(rates) // 2] > 0.3 * max(rates)
    assert rates[-1] < 1e-3 * max(rates)


@pytest.mark.parametrize(
    ("factors", "passes"),
    [
        ([1 + i / 100 for i in range(1, 200)], [10, 5, 5]),  # ever worse
        ([0.9 + i / 100 for i in range(200)], [11]),  # after the first pass
        ([*[1 + i / 100 for i in range(1, 10)], 1.05, *[0.9] * 30], [40]),  # but not always
        ([1.5] * 200, [40, 5, 5]),  # in vain the whole way: slower ones have an eighth of it
        ([1.5] * 40 + [1.5, 0.9] + [1.5] * 38, [40, 40]),  # unless they do better by then
        ([9.0] + [1.5] * 200, [1, 40, 5]),  # what was too fast says nothing of slower ones
        ([1.5] * 38 + [0.9, 1.5], [40]),  # the first one may do better late
    ],
)
def test_how_long_courses_go_on_in_vain(factors: list[float], passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([1.0, *factors])
    monkeypatch.setattr("onnxprune.distillation._agrees", lambda *given: True)
    monkeypatch.setattr(Lesson, "losses", lambda self, batches, weights: {t.name: 0.1 * f for f in [next(made)] for t in self.wanted})
    _, said = pruned(two_layers(), "distill", calibration=X, samples=64)
    numbers = [int(line.split()[2]) for line in said if line.startswith("distilling, pass")]
    starts = [i for i, number in enumerate(numbers) if number == 1]
    assert [numbers[end - 1] for end in [*starts[1:], len(numbers)]] == passes
    assert any("nothing does better" in line for line in said) == (0.9 not in factors)


def test_one_number_of_one_sample_has_the_spread_of_the_samples() -> None:
    """And no more than that: a batch of one sample with one number would have none, and the loss no bounds."""
    model = two_layers()
    tensors = weights_of(model)
    for name in "bq":
        value = next(t for t in model.graph.initializer if t.name == name)
        value.CopyFrom(numpy_helper.from_array(tensors[name][..., :1].copy(), name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    _, said = pruned(model, "distill", calibration=X, samples=64)
    first = next(line for line in said if line.startswith("distilling"))
    assert 0 < float(first.split()[-3]) < 10


def test_places_that_the_samples_say_are_those_of_each_batch() -> None:
    """Rows gathered by an input, even where the first batch is the only one that the lesson has seen."""
    model = two_layers()
    model.graph.node[2].input[0] = "picked"
    model.graph.node.insert(2, helper.make_node("Gather", ["two", "rows"], ["picked"], axis=0))
    model.graph.input.append(helper.make_tensor_value_info("rows", TensorProto.INT64, ["n"]))
    plan = onnxprune.plan(model, 0.5, verify=False)
    lifted = with_initializers(onnxprune.apply(model, plan).model)
    weights = {name: array for name, array in weights_of(lifted).items() if name in trainable(lifted)}
    found = lesson(plan, lifted, weights, [{"x": X["x"][:8], "rows": np.arange(8)[::-1].copy()}])
    assert found is not None
    assert set(found.graph.weights) == {"a", "p", "b", "q"}
    other = {"x": X["x"][8:16], "rows": np.array([2, 2, 2, -1, 0, 5, 5, 1])}
    _, change = found.gradient(other, weights)
    for name, array in change.items():
        length = 1e-3 / float(np.abs(array).max())
        ends = (sum(found.losses([other], weights | {name: weights[name] + np.float32(s * length) * array}).values()) for s in (1, -1))
        up, down = ends
        assert (up - down) / (2 * length) == pytest.approx(float(np.sum(np.square(array))), rel=0.05), name


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


def texts(trimmed: bool = False) -> onnx.ModelProto:
    """ids, mask (n, 8) through a table and two layers; trimmed: to as many places as the longest of the batch has."""
    rng = np.random.default_rng(0)
    tensors = {"table": rng.normal(size=(40, 12)), "a": rng.normal(size=(12, 32)), "b": rng.normal(size=(32, 5)) / 4}
    integers = {"zero": [0], "one": [1], "last": [-1]}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("ReduceSum", ["mask", "last"], ["lengths"], keepdims=0),
        helper.make_node("ReduceMax", ["lengths", "zero"], ["longest"], keepdims=1),
        helper.make_node("Slice", ["rows", "zero", "longest", "one"], ["there"]),
        helper.make_node("MatMul", ["there" if trimmed else "rows", "a"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["on"]),
        helper.make_node("MatMul", ["on", "b"], ["y"]),
    ]
    ins = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", 8]) for name in ("ids", "mask")]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "places", 5])]
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    initializers += [numpy_helper.from_array(np.array(numbers), name) for name, numbers in integers.items()]
    graph = helper.make_graph(nodes, "g", ins, outs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_what_the_original_makes_of_texts_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, runs, run = np.random.default_rng(0), [0], Tap.run
    feeds = {"ids": rng.integers(0, 40, (160, 8)), "mask": np.ones((160, 8), np.int64)}

    def counted(self: Tap, feeds: Any) -> Any:
        runs[0] += 1
        return run(self, feeds)

    monkeypatch.setattr(Tap, "run", counted)
    once, said = pruned(texts(), "distill", calibration=feeds)
    assert sum(line.startswith("distilling") for line in said) > 2
    seldom, runs[0] = runs[0], 0
    monkeypatch.setattr(onnxprune.lessons, "Recall", lambda tap: tap)
    each, same = pruned(texts(), "distill", calibration=feeds)
    assert said == same
    assert 2 * seldom < runs[0]
    for name, array in weights_of(each.model).items():
        np.testing.assert_allclose(weights_of(once.model)[name], array, atol=1e-4, err_msg=name)


def test_sizes_that_differ_from_batch_to_batch_are_said() -> None:
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(160) < 6, 8, 5)  # batches with a long one among them, and without
    feeds = {"ids": rng.integers(0, 40, (160, 8)), "mask": (np.arange(8) < lengths[:, None]).astype(np.int64)}
    found, said = pruned(texts(trimmed=True), "distill", calibration=feeds)
    assert any("not distilled" in line for line in said)
    assert found.model == pruned(texts(trimmed=True), "refine", calibration=feeds)[0].model

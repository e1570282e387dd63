"""Models that onnxruntime's quantizer wrote, pruned in their own types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_op_rules
from conftest import EVAL, MODELS
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from op_cases import Case, Weights
from outside import build, covered, distance, permuted, run

import onnxprune
from onnxprune.benchmark import benchmark
from onnxprune.evaluation import evaluate


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, arrays: Path) -> None:
        self.rows: Iterator[np.ndarray] = iter(np.load(arrays)["input"][:64].reshape(8, 8, *np.load(arrays)["input"].shape[1:]))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.rows, None)
        return None if batch is None else {"input": batch}


def quantized(name: str, how: str, per_channel: bool, folder: Path) -> onnx.ModelProto:
    source, target = folder / "model.onnx", folder / "quantized.onnx"
    source.write_bytes((MODELS / f"{name}.onnx").read_bytes())  # the quantizer writes beside it
    if how == "dynamic":
        quantization.quantize_dynamic(source, target, per_channel=per_channel)
    else:
        form = {"qdq": quantization.QuantFormat.QDQ, "operators": quantization.QuantFormat.QOperator}[how]
        arrays = MODELS / EVAL[name].replace("eval", "calibration")
        quantization.quantize_static(source, target, Samples(arrays), quant_format=form, per_channel=per_channel)
    return onnx.load(target)


ALL = [(n, h) for n in ("digits-resnet", "digits-mlp", "digits-mobilenet", "digits-densenet") for h in ("qdq", "operators", "dynamic")]
REFUSED = ("digits-densenet", "dynamic")  # the quantizer's own shape inference fails on it


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("name", "how"), [case for case in ALL if case != REFUSED])
def test_quantized_models(name: str, how: str, per_channel: bool, tmp_path: Path) -> None:
    model = quantized(name, how, per_channel, tmp_path)
    data = np.load(MODELS / EVAL[name])
    feeds = {"input": data["input"][:16]}
    result = onnxprune.prune(model, 0.3, feeds=feeds)
    content = result.plan.to_json()
    whole = onnxprune.groups(MODELS / f"{name}.onnx", verify=False)
    assert sum(g.units for g in result.plan.groups) >= 0.9 * sum(g.units for g in whole.groups)
    assert result.on_budget
    integers = {t.name for t in model.graph.initializer if t.data_type in (2, 3)}
    assert {tensor for tensor, axis in covered(content)} & integers
    gap = distance(run(model, feeds), run(permuted(model, content), feeds))
    assert gap <= (2e-3 if how == "operators" else 0.1)  # one rounding of an activation to 8 bits may fall the other way
    left = run(result.model, feeds)
    assert all(np.isfinite(v).all() for v in left.values())
    before = {t.name: t.data_type for t in model.graph.initializer}
    assert all(before.get(t.name, t.data_type) == t.data_type for t in result.model.graph.initializer)


MS = "com.microsoft"
RNG = np.random.default_rng(5)


def bytes_of(*shape: int, kind: type = np.uint8) -> np.ndarray:
    return RNG.integers(np.iinfo(kind).min, np.iinfo(kind).max, shape, endpoint=True).astype(kind)


def number(value: float, kind: type = np.float32) -> np.ndarray:
    return np.array(value, kind)


QUANTIZED: Weights = {"s": number(0.02), "z": number(3, np.uint8), "o": number(0, np.int8), "t": number(0.004)}


def operators() -> Iterator[Case]:
    """x -> QuantizeLinear -> the operator between quantized layers -> DequantizeLinear."""
    rows, images = "float[2,5,6] x", "float[2,3,6,6] x"
    first = "q = QuantizeLinear (x, s, z) h = QLinearMatMul (q, s, z, w1, t, o, s, z) "
    last = " e = QLinearMatMul (n, s, z, w2, t, o, s, z) y = DequantizeLinear (e, s, z)"
    weights = QUANTIZED | {"w1": bytes_of(6, 8, kind=np.int8), "w2": bytes_of(8, 4, kind=np.int8)}
    told = {"outputs": "float[2,5,4] y", "masks": False}
    for opset in (11, 13):
        softmax = f"n = {MS}.QLinearSoftmax <axis=-1, opset={opset}> (h, s, z, s, z)"
        yield Case(f"QLinearSoftmax-{opset}", rows, first + softmax + last, weights, "w1:1=8 w2:0=8", "w1:0 w2:1", statistics=True, **told)
    where = f"n = {MS}.QLinearWhere (c, h, s, z, v, s, z, s, z)"
    more = weights | {"c": RNG.integers(0, 2, (5, 8)).astype(bool), "v": bytes_of(8)}
    yield Case("QLinearWhere", rows, first + where + last, more, "w1:1=8 c:1=8 v:0=8 w2:0=8", "c:0", **told)
    kernels = QUANTIZED | {
        "w1": bytes_of(8, 3, 1, 1, kind=np.int8),
        "w2": bytes_of(4, 8, 1, 1, kind=np.int8),
        "b": np.arange(8, dtype=np.int32),
    }
    kernels |= {"t": RNG.uniform(0.002, 0.006, 8).astype(np.float32), "o": np.zeros(8, np.int8)}
    body = (
        f"u = QuantizeLinear (x, s, z) q = Transpose <perm=[0,2,3,1]> (u) "
        f"h = {MS}.QLinearConv <channels_last=1> (q, s, z, w1, t, o, s, z, b) "
        f"m = {MS}.NhwcMaxPool <kernel_shape=[2,2], strides=[2,2]> (h) "
        f"e = {MS}.QLinearConv <channels_last=1> (m, s, z, w2, t2, o2, s, z) "
        "d = Transpose <perm=[0,3,1,2]> (e) y = DequantizeLinear (d, s, z)"
    )
    kernels |= {"t2": number(0.004), "o2": number(0, np.int8)}
    covers = "w1:0=8 b:0=8 t:0=8 o:0=8 w2:1=8"
    yield Case("QLinearConv-channels-last", images, body, kernels, covers, "w1:1 w2:0", outputs="float[2,4,3,3] y", masks=False)


def pools() -> Iterator[Case]:
    """Global pooling over an axis that a layer makes, as layer normalization is written for it; over pixels, channels last."""
    body = (
        "q = QuantizeLinear (x, s, z) h = QLinearMatMul (q, s, z, w1, t, o, s, z) r = Reshape (h, there) "
        f"p = {MS}.QLinearGlobalAveragePool (r, s, z, s, z) b = Reshape (p, back) n = {MS}.QLinearAdd (h, s, z, b, s, z, s, z) "
        "e = QLinearMatMul (n, s, z, w2, t, o, s, z) y = DequantizeLinear (e, s, z)"
    )
    weights = QUANTIZED | {"w1": bytes_of(6, 8, kind=np.int8), "w2": bytes_of(8, 4, kind=np.int8), "there": [2, 5, 8, 1], "back": [2, 5, 1]}
    told = {"masks": False, "outputs": "float[2,5,4] y"}
    yield Case("QLinearGlobalAveragePool", "float[2,5,6] x", body, weights, "w1:1=8 w2:0=8", "w1:0", statistics=True, **told)
    body = (
        f"q = QuantizeLinear (x, s, z) h = QLinearConv (q, s, z, w1, t, o, s, z) t1 = Transpose <perm=[0,2,3,1]> (h) "
        f"p = {MS}.QLinearAveragePool <channels_last=1, kernel_shape=[2,2], strides=[2,2]> (t1, s, z, s, z) "
        f"g = {MS}.QLinearGlobalAveragePool <channels_last=1> (p, s, z, s, z) f = Flatten (g) "
        "e = QLinearMatMul (f, s, z, w2, t, o, s, z) y = DequantizeLinear (e, s, z)"
    )
    weights = weights | {"w1": bytes_of(8, 3, 1, 1, kind=np.int8)}
    told |= {"outputs": "float[2,4] y"}
    yield Case("QLinearAveragePool-channels-last", "float[2,3,6,6] x", body, weights, "w1:0=8 w2:0=8", "w1:1", **told)


def of_weights() -> Iterator[Case]:
    """Weights in blocks, attention and recurrent layers with quantized weights, float in and out."""
    rows = "float[2,5,6] x"
    for flat in (False, True):
        shape = (lambda *sizes: (int(np.prod(sizes)),)) if flat else (lambda *sizes: sizes)
        packed: Weights = {"w1": (6, 32), "b": bytes_of(8, 2, 8), "w2": (8, 4), "e": (8,)}
        packed |= {"s": RNG.uniform(0.01, 0.1, shape(8, 2)).astype(np.float32), "z": bytes_of(*shape(8, 1))}
        body = f"h = MatMul (x, w1) n = {MS}.MatMulNBits <K=32, N=8, bits=4, block_size=16> (h, b, s, z, , e) y = MatMul (n, w2)"
        covers = "b:0=8 s:0 z:0=8 e:0=8 w2:0=8"
        yield Case(f"MatMulNBits-{flat}", rows, body, packed, covers, "w1:1 b:1 b:2", outputs="float[2,5,4] y")
    attention = QUANTIZED | {
        "w": bytes_of(6, 72, kind=np.int8),
        "b": (72,),
        "wo": (24, 4),
        "t": RNG.uniform(0.002, 0.006, 72).astype(np.float32),
    }
    attention |= {"o": np.zeros(72, np.int8)}
    body = f"q = QuantizeLinear (x, s, z) a = {MS}.QAttention <num_heads=4> (q, w, b, s, t, , z, o) y = MatMul (a, wo)"
    yield Case("QAttention", rows, body, attention, "w:1 b:0 t:0 o:0 wo:0=4+6", "w:0", outputs="float[2,5,4] y", tolerance=1e-3)
    state: Weights = {"w": bytes_of(1, 6, 28, kind=np.int8), "r": bytes_of(1, 7, 28, kind=np.int8), "b": (1, 56), "wo": (7, 4)}
    for name, scale, zero in (("", (1,), (1,)), ("-columns", (1, 28), (1, 28))):
        scales: Weights = {"sw": RNG.uniform(0.002, 0.006, scale).astype(np.float32), "zw": np.zeros(zero, np.int8)}
        body = f"h, n, c = {MS}.DynamicQuantizeLSTM <hidden_size=7> (x, w, r, b, , , , , sw, zw, sw, zw) y = MatMul (n, wo)"
        covers = "w:2=7 r:1=7 r:2=7 b:1=7 wo:0=7" + (" sw:1=7" if name else "")
        yield Case(
            f"DynamicQuantizeLSTM{name}", "float[5,2,6] x", body, state | scales, covers, "w:1", outputs="float[1,2,4] y", masks=False
        )


@pytest.mark.parametrize("case", [*operators(), *pools(), *of_weights()], ids=lambda case: case.name)
def test_quantized_rule(case: Case) -> None:
    test_op_rules.test_rule(case)


@pytest.mark.parametrize("how", ["qdq", "operators", "dynamic"])
def test_quantized_weights_are_parameters(how: str, tmp_path: Path) -> None:
    model = quantized("digits-mlp", how, True, tmp_path)
    original = sum(int(np.prod(t.dims)) for t in onnx.load(MODELS / "digits-mlp.onnx").graph.initializer)
    result = onnxprune.prune(model, 0.4, of="params", verify=False)
    assert result.parameters[0] == pytest.approx(original, rel=0.03)  # biases became int32, scales came
    weights = [sum(int(np.prod(t.dims)) for t in m.graph.initializer if len(t.dims) > 1) for m in (model, result.model)]
    assert 1 - weights[1] / weights[0] == pytest.approx(0.4, abs=0.02)
    onnx.save(result.model, tmp_path / "pruned.onnx")
    assert benchmark([tmp_path / "pruned.onnx"], memory=False, seconds=0)[0].parameters == result.parameters[1]


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mlp", "digits-mobilenet", "digits-conv1d"])
def test_a_pruned_model_can_be_quantized(name: str, tmp_path: Path) -> None:
    """The order that docs/deployment.md recommends: prune with samples, then onnxruntime's static quantization."""
    arrays = MODELS / EVAL[name].replace("eval", "calibration")
    result = onnxprune.prune(MODELS / f"{name}.onnx", 0.3, calibration=arrays, samples=256, target="cpu")
    onnx.save(result.model, tmp_path / "pruned.onnx")
    quantization.quantize_static(tmp_path / "pruned.onnx", tmp_path / "both.onnx", Samples(arrays), per_channel=True)
    both, data = onnx.load(tmp_path / "both.onnx"), np.load(MODELS / EVAL[name])
    onnx.checker.check_model(both, full_check=True)
    assert any(n.op_type == "QuantizeLinear" for n in both.graph.node)
    found = evaluate(onnx.load(MODELS / f"{name}.onnx"), both, {k: data[k] for k in data.files})
    assert found.before is not None
    assert found.after is not None
    assert found.after >= found.before - 0.05
    sizes = [(tmp_path / file).stat().st_size for file in ("pruned.onnx", "both.onnx")]
    assert sizes[1] < sizes[0]


HALVES = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)}


def narrowed(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Every float tensor and value in another type."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(HALVES[kind]), tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return model


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_is_pruned_in_its_own_type_by_scores_in_float32(kind: int, calibrated: bool) -> None:
    source = onnx.load(MODELS / "digits-mobilenet.onnx")
    wide = onnx.load(MODELS / "digits-mobilenet.onnx")
    model = narrowed(source, kind)
    for tensor in wide.graph.initializer:  # the same numbers as float32
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(HALVES[kind]).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    data = np.load(MODELS / "digits-images.calibration.npz")["input"][:128]
    results = [onnxprune.prune(one, 0.4, calibration={"input": data} if calibrated else None) for one in (model, wide)]
    removed = [{g: units.tolist() for g, units in result.plan.remove.items()} for result in results]
    assert removed[0] == removed[1]
    assert {t.data_type for t in results[0].model.graph.initializer} == {t.data_type for t in model.graph.initializer}
    assert results[0].on_budget
    flat = [[numpy_helper.to_array(t).astype(np.float32).ravel() for t in result.model.graph.initializer] for result in results]
    one, other = (np.concatenate(arrays) for arrays in flat)
    assert np.linalg.norm(one - other) <= (0.05 if calibrated else 0) * np.linalg.norm(other)  # what is fitted is rounded as it goes


FORMS: dict[str, dict[str, Any]] = {
    "asymmetric": {},
    "by channel": {"per_channel": True},
    "symmetric by channel": {
        "per_channel": True,
        "activation_type": quantization.QuantType.QInt8,
        "extra_options": {"ActivationSymmetric": True, "QuantizeBias": False},
    },
    "unsigned": {"weight_type": quantization.QuantType.QUInt8, "activation_type": quantization.QuantType.QUInt8},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet", "digits-mlp"])
def test_quantized_weights_are_fitted_and_quantized_again(name: str, form: str, tmp_path: Path) -> None:
    arrays = MODELS / EVAL[name].replace("eval", "calibration")
    (tmp_path / "model.onnx").write_bytes((MODELS / f"{name}.onnx").read_bytes())
    quantization.quantize_static(tmp_path / "model.onnx", tmp_path / "q.onnx", Samples(arrays), **FORMS[form])
    model, data = onnx.load(tmp_path / "q.onnx"), np.load(MODELS / EVAL[name])
    result = onnxprune.prune(model, 0.4, calibration=arrays, samples=256)
    assert result.on_budget
    assert result.proof is not None
    assert result.refits
    found = evaluate(model, result.model, {k: data[k] for k in data.files})
    assert found.before is not None
    assert found.after is not None
    assert found.after >= found.before - 0.05
    nodes = [Counter(n.op_type for n in m.graph.node if n.op_type != "Constant") for m in (model, result.model)]
    added = nodes[1] - nodes[0]
    assert added.keys() <= {"DequantizeLinear"}  # of biases that layers did not have
    assert not nodes[0] - nodes[1]
    types = [{t.name: t.data_type for t in m.graph.initializer} for m in (model, result.model)]
    new = {name: kind for name, kind in types[1].items() if types[0].get(name) != kind}
    assert len(new) == 3 * added["DequantizeLinear"] or FORMS[form].get("extra_options", {}).get("QuantizeBias") is False
    onnx.checker.check_model(result.model, full_check=True)
    content = result.plan.to_json()  # speaks of the file's own tensors
    assert {m["tensor"] for g in content["groups"] for m in g["members"]} <= types[0].keys()
    again = onnxprune.apply(model, result.plan, verify=True)
    shapes = [{t.name: list(t.dims) for t in m.graph.initializer} for m in (again.model, result.model)]
    assert all(shapes[1][name] == shape for name, shape in shapes[0].items())


@pytest.mark.parametrize("per_channel", [False, True])
def test_integers_that_no_fit_changes_stay_as_they_are(per_channel: bool, tmp_path: Path) -> None:
    model = quantized("digits-resnet", "qdq", per_channel, tmp_path)
    result = onnxprune.prune(model, 0.4)
    alone = onnxprune.apply(model, result.plan)
    arrays = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (result.model, alone.model)]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])


def test_units_are_scored_by_what_integers_stand_for(tmp_path: Path) -> None:
    """By channel, all integers are as large: only with their scales do they say which channels are small."""
    rng = np.random.default_rng(0)
    sizes = np.where(np.arange(32) % 2, 1.0, 0.01).astype(np.float32)
    u = rng.standard_normal((32, 16)).astype(np.float32) * sizes[:, None]
    weights: dict[str, Any] = {"u": u, "v": rng.standard_normal((4, 32)).astype(np.float32), "a": np.zeros(32, np.float32)}
    model = build("float[N, 16] x", "h = Gemm<transB=1>(x, u, a) r = Tanh(h) y = Gemm<transB=1>(r, v)", "float[N, 4] y", weights)
    onnx.save(model, tmp_path / "model.onnx")

    class Noise(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"x": rng.standard_normal((64, 16)).astype(np.float32)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantization.quantize_static(tmp_path / "model.onnx", tmp_path / "q.onnx", Noise(), per_channel=True)
    result = onnxprune.prune(tmp_path / "q.onnx", 0.5, of="channels", verify=False)
    (removed,) = result.plan.remove.values()
    assert removed.tolist() == list(range(0, 32, 2))


def per_channel(folder: Path, hidden: int = 256, others: int = 512) -> onnx.ModelProto:
    """Two layers whose integers are as large in all channels, and whose scales are not; written by hand, as exporters do."""
    rng = np.random.default_rng(3)
    sizes = (0.001 * (1 + rng.permutation(hidden))).astype(np.float32)
    weights: dict[str, Any] = {"u": bytes_of(others, hidden, kind=np.int8), "su": sizes, "v": bytes_of(hidden, others, kind=np.int8)}
    weights |= {"sv": number(0.01)}
    body = "a = DequantizeLinear <axis=1> (u, su) b = DequantizeLinear (v, sv) h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)"
    model = build(f"float[N, {others}] x", body, f"float[N, {others}] y", weights)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return onnx.load(folder / "m.onnx")


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "lamp"])
def test_units_are_scored_so_too_where_weights_are_read_one_at_a_time(criterion: str, tmp_path: Path) -> None:
    model = per_channel(tmp_path)
    whole = onnxprune.prune(model, 0.5, criterion=criterion)
    parts = onnxprune.prune(tmp_path / "m.onnx", 0.5, criterion=criterion, memory=10_000)
    assert parts.plan.grouping.model.external.places.keys() == {"u", "v"}
    assert [units.tolist() for units in whole.plan.remove.values()] == [units.tolist() for units in parts.plan.remove.values()]
    sizes = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "su"))
    if criterion == "l2":
        kept = np.setdiff1d(np.arange(256), parts.plan.remove[0])
        assert sizes[parts.plan.remove[0]].mean() < 0.7 * sizes[kept].mean()


def test_equal_scales_do_not_hide_that_integers_are_exercised() -> None:
    """Without biases the scales are the only floats that a group has, and any order of equal ones is the same."""
    weights: dict[str, Any] = {"u": bytes_of(16, 32, kind=np.int8), "su": np.full(32, 0.01, np.float32)}
    weights |= {"v": bytes_of(32, 8, kind=np.int8), "sv": np.full(8, 0.01, np.float32)}
    body = "a = DequantizeLinear <axis=1> (u, su) b = DequantizeLinear <axis=1> (v, sv) h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)"
    proof = onnxprune.verify(build("float[N, 16] x", body, "float[N, 8] y", weights))
    assert (proof.proven, proof.unexercised) == ((0,), ())
    dead = weights | {"u": np.zeros((16, 32), np.int8)}  # nothing comes out of Relu, whatever the inputs
    assert onnxprune.verify(build("float[N, 16] x", body, "float[N, 8] y", dead)).unexercised == (0,)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet"])
def test_a_quantized_file_is_as_sensitive_as_its_original(name: str, tmp_path: Path) -> None:
    arrays = MODELS / EVAL[name].replace("eval", "calibration")
    model = quantized(name, "qdq", True, tmp_path)
    options: dict[str, Any] = {"ratios": [0.5], "samples": 64, "verify": False}
    original = onnxprune.sensitivity(MODELS / f"{name}.onnx", arrays, **options)
    found = onnxprune.sensitivity(model, arrays, **options)
    groups = {g.id: g for g in onnxprune.groups(model, verify=False).groups if g.branch is None}
    assert {p.group: p.units for p in found.points} == {i: g.units for i, g in groups.items()}
    assert all(found.tensors[i] == groups[i].members[0].tensor for i in groups)
    changes = [sorted(p.change or 0.0 for p in each.points) for each in (found, original)]
    assert np.allclose(*changes, rtol=0.5)
    assert np.isclose(np.sum(changes[0]), np.sum(changes[1]), rtol=0.2)


def test_globs_speak_of_the_names_in_a_quantized_file(tmp_path: Path) -> None:
    model = quantized("digits-mlp", "qdq", False, tmp_path)
    before = {t.name: list(t.dims) for t in model.graph.initializer}
    weights = [name for name, dims in before.items() if len(dims) == 2 and name.endswith("_quantized")]
    result = onnxprune.prune(model, 0.2, exclude=[weights[1]], align={weights[0]: 32, "*": 8}, verify=False)
    after = {t.name: list(t.dims) for t in result.model.graph.initializer}
    assert after[weights[1]] == before[weights[1]]
    assert any(after[name] != before[name] for name in weights)
    assert after[weights[0]][0] % 32 == 0


@pytest.mark.parametrize("said", [True, False], ids=["with the types of values", "without"])
@pytest.mark.parametrize("compensation", ["none", "update", "moments", "reconstruct", "distill"])
def test_a_quantized_value_that_is_dequantized_for_each_reader(compensation: str, said: bool) -> None:
    body = """a = MatMul(x, w0) b = Relu(a) bq = QuantizeLinear(b, s, z) b0 = DequantizeLinear(bq, s, z) b1 = DequantizeLinear(bq, s, z)
              c = MatMul(b0, w1) d = Relu(c) y = MatMul(d, w3) t = MatMul(b1, w2)"""
    shapes: dict[str, Any] = {"w0": (8, 16), "w1": (16, 12), "w2": (16, 4), "w3": (12, 4)}
    model = build("float[N,8] x", body, "float y, float t", {**shapes, "s": np.array(0.05, np.float32), "z": np.array(0, np.int8)})
    if not said:
        del model.graph.value_info[:]
    data = {"x": np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)}
    result = onnxprune.prune(model, 0.3, calibration=data, compensation=compensation, allocation="uniform", criterion="l2")
    goal, made = (run(proto, data) for proto in (model, result.model))
    for name in ("y", "t"):
        assert np.mean((made[name] - goal[name]) ** 2) < (0.8 if compensation == "none" else 0.3) * np.var(goal[name]), name

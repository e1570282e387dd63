"""Pruning with samples at the command line and in Python: unusual samples, unusual models, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from conftest import MODELS
from onnx import ModelProto, TensorProto, helper, numpy_helper
from outside import Weight, build, run, tensors
from test_least_squares import arrays, not_worse

import onnxprune
from onnxprune.cli import main


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = drawn(24, 3, 6, 6)
WEIGHTS: dict[str, Weight] = {"u": (8, 3, 3, 3), "a": (8,), "v": (12, 8, 3, 3), "b": (12,), "w": (4, 12), "c": (4,)}
BODY = """h = Conv<pads=[1,1,1,1]>(x, u, a) r = Relu(h) i = Conv<pads=[1,1,1,1]>(r, v, b) s = Tanh(i)
          p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w, c)"""
IMAGES, LOGITS = "float[N, 3, 6, 6] x", "float[N, 4] y"


def net(body: str = BODY, outputs: str = LOGITS, inputs: str = IMAGES, more: Mapping[str, Weight] | None = None) -> ModelProto:
    return build(inputs, body, outputs, {k: w for k, w in {**WEIGHTS, **(more or {})}.items() if k in body})


def onnxprune_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def pruned(folder: Path, model: ModelProto, samples: Mapping[str, np.ndarray], *arguments: object) -> tuple[ModelProto, dict[str, Any]]:
    """What `onnxprune model.onnx --calibration samples.npz` writes, and its --json."""
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "samples.npz", **samples)  # type: ignore[arg-type]
    line = ["model.onnx", "-r", "0.4", "--calibration", "samples.npz", "-o", "out.onnx", "-q", "--json", "out.json", *arguments]
    found = onnxprune_cli(*[folder / a if str(a).endswith((".onnx", ".npz", ".json")) else a for a in line])
    assert found.exit_code in (0, 3), found.output
    assert found.exit_code == 0 or "out of reach" in found.output
    said = json.loads((folder / "out.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    for refit in (r for r in said["refits"] if r["before"] is not None):
        assert refit["after"] <= refit["before"] * (1 + 1e-5) + 1e-9
    return onnx.load(folder / "out.onnx"), said


def refused(found: Result, folder: Path, *words: str) -> None:
    """Exit code 2, one line with the words, nothing written."""
    lines = [line for line in found.output.splitlines() if line.strip()]
    assert (found.exit_code, len(lines)) == (2, 1), found.output
    assert all(word in lines[0] for word in ("error: ", *words)), lines[0]
    assert not list(folder.glob("out*"))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", [[], ["--calibration", "none"]])
@pytest.mark.parametrize(
    "asked",
    [
        *(["--criterion", name] for name in ("auto", "pca", "distortion")),
        *(["--allocation", name] for name in ("distortion", "auto")),
        *(["--compensation", name] for name in ("mean", "update", "moments", "reconstruct")),
    ],
)
def test_what_looks_at_activations_needs_samples(asked: list[str], calibration: list[str], tmp_path: Path) -> None:
    found = onnxprune_cli(MODELS / "digits-mlp.onnx", "-r", "0.4", *asked, *calibration, "-o", tmp_path / "out.onnx")
    refused(found, tmp_path, *asked, "--calibration")


@pytest.mark.parametrize("name", ["obs", "fluctuation", "wanda"])
def test_what_goes_by_moments_needs_samples_or_a_word_that_there_are_none(name: str, tmp_path: Path) -> None:
    line = [MODELS / "digits-mlp.onnx", "-r", "0.4", "--criterion", name, "-q", "-o", tmp_path / "out.onnx"]
    refused(onnxprune_cli(*line), tmp_path, name, "--calibration", "'none'")
    assert onnxprune_cli(*line, "--calibration", "none").exit_code == 0


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"z": X}, ["x"]),
        ({"x": X[:, :2]}, ["'x'", "[24, 2, 6, 6]"]),
        ({"x": X[:0]}, ["x"]),
        ({"x": np.where(np.arange(6) == 3, np.nan, X)}, ["'x'", "NaN"]),
        ({"x": X.astype(np.complex64)}, ["'x'", "complex64"]),
    ],
)
def test_samples_that_do_not_fit(samples: Mapping[str, np.ndarray], words: list[str], tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", **samples)  # type: ignore[arg-type]
    found = onnxprune_cli(tmp_path / "model.onnx", "-r", "0.4", "--calibration", tmp_path / "samples.npz", "-o", tmp_path / "out.onnx")
    refused(found, tmp_path, "samples.npz", *words)


@pytest.mark.parametrize("asked", [["--compensation", "magic"], ["--steps", "0"], ["--samples", "0"], ["--criterion", "magic"]])
def test_options_that_are_none(asked: list[str], tmp_path: Path) -> None:
    found = onnxprune_cli(MODELS / "digits-mlp.onnx", "-r", "0.4", *asked, "--calibration", "noise", "-o", tmp_path / "out.onnx")
    refused(found, tmp_path, asked[1])


# --- unusual samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", ["mean", "update", "moments", "reconstruct"])
@pytest.mark.parametrize(
    "x",
    [X[:1], X[:2], X[:3], np.zeros_like(X), np.ones_like(X), np.repeat(X[:1], 24, axis=0), X * 1e-20, X * 1e15, X * 1e25, X + 1e4],
    ids=["one", "two", "three", "zeros", "ones", "one many times", "tiny", "huge", "beyond float32 when squared", "far from zero"],
)
def test_unusual_samples(x: np.ndarray, compensation: str, tmp_path: Path) -> None:
    model, said = pruned(tmp_path, net(), {"x": x.astype(np.float32)}, "--compensation", compensation)
    assert all(np.isfinite(a).all() for a in arrays(model).values() if a.dtype.kind == "f")
    assert np.isfinite(run(model, {"x": X})["y"]).all()
    assert said["fidelity"] is not None


@pytest.mark.parametrize("criterion", ["obs", "fluctuation", "wanda"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e25])
def test_unusual_samples_of_a_transformer(scale: float, criterion: str, tmp_path: Path) -> None:
    body = """n = LayerNormalization(x, g, e) q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv) t = Transpose<perm=[0,2,1]>(k)
              l = MatMul(q, t) p = Softmax(l) a = MatMul(p, v) o = MatMul(a, wo) s = Add(x, o) m = LayerNormalization(s, f, b)
              h = MatMul(m, w1) d = Add(h, b1) c = Relu(d) z = MatMul(c, w2) r = Add(z, b2) y = Add(s, r)"""
    square: dict[str, Weight] = dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8))
    more: dict[str, Weight] = {"g": (8,), "e": (8,), "f": (8,), "b": (8,), "w1": (8, 16), "b1": (16,), "w2": (16, 8), "b2": (8,)}
    model = build("float[N, 5, 8] x", body, "float[N, 5, 8] y", square | more)
    x = (scale * drawn(24, 5, 8)).astype(np.float32)
    out, said = pruned(tmp_path, model, {"x": x}, "--criterion", criterion)
    assert all(np.isfinite(a).all() for a in arrays(out).values())
    assert said["fidelity"] is not None


def test_two_batches_are_enough_to_fit() -> None:
    result = onnxprune.prune(net(), 0.4, calibration={"x": X[:2]})
    assert any(refit.after < 0.9 * refit.before for refit in result.refits)


@pytest.mark.parametrize("passes", [1, 2])
def test_layers_that_share_a_pass_are_fitted_well_too(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.passes.FEWEST", passes)
    monkeypatch.setattr("onnxprune.passes.WORK", 0)
    result = onnxprune.prune(net(), 0.4, calibration={"x": X}, allocation="uniform", compensation="reconstruct")
    assert [refit.node for refit in result.refits] == ["i", "y"]
    not_worse(result)
    assert result.fidelity is not None
    assert result.fidelity[1].loss < result.fidelity[0].loss


@pytest.mark.parametrize("compensation", ["mean", "moments", "update", "reconstruct", "refine", "distill"])
def test_half_precision_keeps_what_it_can_hold(compensation: str) -> None:
    """Weights that would be larger than a float16 can be are not written."""
    model = converted(net(), TensorProto.FLOAT16)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor) * {"v": 1e-3, "w": 6e4}.get(tensor.name, 1.0)
        tensor.CopyFrom(numpy_helper.from_array(np.clip(array, -6e4, 6e4).astype(np.float16), tensor.name))
    result = onnxprune.prune(model, 0.6, calibration={"x": X}, allocation="uniform", compensation=compensation)
    assert all(np.isfinite(array).all() for array in arrays(result.model).values() if array.dtype.kind == "f")


def test_samples_of_several_sizes(tmp_path: Path) -> None:
    body = "h = Conv<pads=[1,1]>(x, u, a) r = Relu(h) i = Conv<pads=[1,1]>(r, v, b) y = Tanh(i)"
    weights: dict[str, Weight] = {"u": (8, 3, 3), "a": (8,), "v": (4, 8, 3), "b": (4,)}
    model = build("float[N, 3, L] x", body, "float[N, 4, L] y", weights)
    (tmp_path / "data").mkdir()
    for i, length in enumerate((5, 9, 7, 9, 12, 5)):
        np.savez(tmp_path / "data" / f"{i}.npz", x=drawn(4, 3, length, seed=i))
    result = onnxprune.prune(model, 0.4, calibration=tmp_path / "data", allocation="auto")
    not_worse(result)
    assert result.fidelity is not None
    assert result.fidelity[1].loss < result.fidelity[0].loss


# --- unusual models --------------------------------------------------------------------------------------------------


def converted(model: ModelProto, kind: int) -> ModelProto:
    """The model in another type of floats."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = kind
    return copy


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_models_in_other_floats_keep_them(kind: int, tmp_path: Path) -> None:
    model, said = pruned(tmp_path, converted(net(BODY.replace(", b)", ")")), kind), {"x": X})
    assert {t.data_type for t in tensors(model).values()} == {kind}  # the bias that the Conv was given too
    before, after = (sum(o["sqnr"] for o in one["outputs"]) for one in said["fidelity"])
    assert after > before


@pytest.mark.parametrize("batch", [1, 3])
def test_a_static_batch(batch: int, tmp_path: Path) -> None:
    model = net(inputs=f"float[{batch}, 3, 6, 6] x", outputs=f"float[{batch}, 4] y")
    out, said = pruned(tmp_path, model, {"x": X})
    assert out.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert said["refits"]
    assert said["fidelity"][1]["outputs"][0]["sqnr"] > said["fidelity"][0]["outputs"][0]["sqnr"]


def test_external_data(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    result = onnxprune.prune(tmp_path / "m.onnx", 0.4, calibration={"x": X})
    other = onnxprune.prune(net(), 0.4, calibration={"x": X})
    assert result.plan.to_json()["groups"] == other.plan.to_json()["groups"]
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], run(other.model, {"x": X})["y"])


BRANCHED = """h = Conv<pads=[1,1,1,1]>(x, u, a) r = Relu(h) m = ReduceMax<keepdims=0>(r) t = Greater(m, z)
    i = If(t) <then_branch = one () => (float[N, 12, 6, 6] o) { o = Conv<pads=[1,1,1,1]>(r, v, b) },
               else_branch = two () => (float[N, 12, 6, 6] q) { e = Conv<pads=[1,1,1,1]>(r, v, b) q = Neg(e) }>
    s = Tanh(i) p = GlobalAveragePool(s) f = Flatten(p) g = Gemm<transB=1>(f, w, c) k = Relu(g) y = Gemm<transB=1>(k, d)"""
LOOPED = """h0 = Conv<pads=[1,1,1,1]>(x, u, a)
    h = Loop (five, go, h0) <body = step (int64 n, bool t, float[N, 8, 6, 6] s) => (bool e, float[N, 8, 6, 6] o)
        { e = Identity(t) g = Conv<pads=[1,1,1,1]>(s, l) o = Tanh(g) }>
    r = Relu(h) i = Conv<pads=[1,1,1,1]>(r, v, b) s1 = Tanh(i) p = GlobalAveragePool(s1) f = Flatten(p) y = Gemm<transB=1>(f, w, c)"""
TIED = """h = Conv<pads=[1,1,1,1]>(x, u, a) r = Relu(h) i = Conv<pads=[1,1,1,1]>(r, l, a) r2 = Tanh(i) k = Conv<pads=[1,1,1,1]>(r2, l, a)
    j = Conv<pads=[1,1,1,1]>(k, v, b) s = Tanh(j) p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w, c)"""
OUTPUTS = {
    "If": (BRANCHED, {"z": np.array(0, np.float32), "d": (3, 4)}, "float[N, 3] y"),
    "Loop": (LOOPED, {"five": np.array(2), "go": np.array(True), "l": (8, 8, 3, 3)}, LOGITS),
    "shared weights and biases": (TIED, {"l": (8, 8, 3, 3)}, LOGITS),
    "shared biases alone": (
        BODY.replace("Relu(h)", "Relu(h) g = Conv(r, k, a) q = Tanh(g)").replace("(r, v, b)", "(q, v, b)"),
        {"k": (8, 8, 1, 1)},
        LOGITS,
    ),
    "an integer": (BODY.replace("y = G", "z = G") + " y = ArgMax<axis=1>(z)", {}, "int64[N, 1] y"),
    "no reader": ("h = Conv<pads=[1,1,1,1]>(x, u, a) r = Relu(h) y = ReduceMean<axes=[1]>(r)", {}, "float[N, 1, 6, 6] y"),
    "LayerNormalization": (
        "h = Conv<pads=[1,1,1,1]>(x, u, a) t = Transpose<perm=[0,2,3,1]>(h) n = LayerNormalization(t, k, l) y = MatMul(n, m)",
        {"k": (8,), "l": (8,), "m": (8, 4)},
        "float[N, 6, 6, 4] y",
    ),
    "a scalar": (BODY.replace("y = G", "z = G") + " y = ReduceMean<keepdims=0>(z)", {}, "float y"),
}


@pytest.mark.parametrize("allocation", ["distortion", "auto"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_unusual_models(name: str, allocation: str, tmp_path: Path) -> None:
    body, more, outputs = OUTPUTS[name]
    model, said = pruned(tmp_path, net(body, outputs, more=more), {"x": X}, "--allocation", allocation)  # type: ignore[arg-type]
    made = run(model, {"x": X})["y"]
    assert made.dtype.kind != "f" or np.isfinite(made).all()
    assert said["proof"] is not None
    assert said["reached"] > 0.2


def test_a_bias_that_a_body_or_an_output_reads_too_keeps_its_numbers() -> None:
    body = (
        BODY
        + """ m = ReduceMax<keepdims=0>(x) t = Greater(m, z)
        k = If(t) <then_branch = one () => (float[4] o) { o = Neg(c) }, else_branch = two () => (float[4] q) { q = Abs(c) }>"""
    )
    model = net(body, LOGITS + ", float[4] k", more={"z": np.array(0, np.float32)})
    model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [12]))
    samples = {"x": X}
    before = run(model, samples)
    for name in ("mean", "reconstruct"):
        result = onnxprune.prune(model, 0.4, calibration=samples, compensation=name)
        after = run(result.model, samples)
        np.testing.assert_array_equal(after["k"], before["k"])
        np.testing.assert_array_equal(after["b"], before["b"])
        assert not np.array_equal(after["y"], before["y"])


def test_integers_alone_say_which_group_matters(tmp_path: Path) -> None:
    """Of two groups the one that the answer does not hang on goes."""
    weights: dict[str, Weight] = {"u": (8, 4), "v": (8, 4), "w": (3, 16)}
    body = "h = Gemm<transB=1>(x, u) r = Tanh(h) i = Gemm<transB=1>(x, v) s = Tanh(i) k = Concat<axis=1>(r, s) z = Gemm<transB=1>(k, w)"
    model = build("float[N, 4] x", body + " y = ArgMax<axis=1>(z)", "int64[N, 1] y", weights)
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            array = numpy_helper.to_array(tensor).copy()
            array[:, 8:] *= 1e-4
            tensor.CopyFrom(numpy_helper.from_array(array, "w"))
    x = drawn(64, 4)
    result = onnxprune.prune(model, 0.3, calibration={"x": x}, criterion="random", allocation="distortion", compensation="none")
    left = tensors(result.model)
    assert left["u"].dims[0] > left["v"].dims[0]


def test_outputs_that_may_change_size(tmp_path: Path) -> None:
    body = "h = Gemm<transB=1>(x, u) r = Relu(h) y = Gemm<transB=1>(r, v) k = Relu(y) z = Gemm<transB=1>(k, w)"
    model = build("float[N, 4] x", body, "float[N, 12] y, float[N, 3] z", {"u": (16, 4), "v": (12, 16), "w": (3, 12)})
    x = drawn(48, 4)
    for allocation in ("distortion", "auto"):
        _, said = pruned(tmp_path, model, {"x": x}, "--allow-io", "y", "--allocation", allocation)
        assert said["reached"] == pytest.approx(0.4, abs=0.05)  # a unit is some points
        names = [output["output"] for output in said["fidelity"][1]["outputs"]]
        assert "z" in names


@pytest.mark.parametrize("granularity", ["all", "block", "channel"])
def test_branches_and_channels_together(granularity: str) -> None:
    with np.load(MODELS / "digits-images.calibration.npz") as content:
        samples = {name: content[name][:32] for name in content.files}
    result = onnxprune.prune(MODELS / "digits-resnet.onnx", 0.4, calibration=samples, granularity=granularity, allocation="global", steps=2)
    not_worse(result)
    assert result.fidelity is not None
    assert result.fidelity[1].loss <= result.fidelity[0].loss


def test_weights_behind_a_dequantization_are_left_alone(tmp_path: Path) -> None:
    body = """d = DequantizeLinear<axis=0>(q, e) h = Conv<pads=[1,1,1,1]>(x, u, a) r = Relu(h) i = Conv<pads=[1,1,1,1]>(r, d, b)
              s = Tanh(i) p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w, c)"""
    more: dict[str, Weight] = {
        "q": np.random.default_rng(0).integers(-127, 128, (12, 8, 3, 3)).astype(np.int8),
        "e": np.full(12, 0.004, np.float32),
    }
    model = net(body, more=more)
    out, said = pruned(tmp_path, model, {"x": X}, "--compensation", "refine")
    assert [refit["node"] for refit in said["refits"]] == ["y"]
    surgery = onnxprune.apply(model, onnxprune.plan(model, 0.4, calibration={"x": X})).model
    left, right = arrays(out), arrays(surgery)
    assert all(np.array_equal(left[name], right[name]) for name in "qe")


def test_the_plan_of_a_compensated_run_applies_as_surgery_alone(tmp_path: Path) -> None:
    model = net()
    out, said = pruned(tmp_path, model, {"x": X}, "--plan-out", tmp_path / "plan.json")
    found = onnxprune_cli("apply", tmp_path / "model.onnx", tmp_path / "plan.json", "-o", tmp_path / "surgery.onnx", "-q")
    assert found.exit_code == 0
    surgery, whole = arrays(onnx.load(tmp_path / "surgery.onnx")), arrays(model)
    assert set(surgery) == set(arrays(out))
    for name, array in surgery.items():  # every number is the original's
        assert np.isin(array, whole[name]).all()
    assert any(not np.array_equal(array, arrays(out)[name]) for name, array in surgery.items())
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["options"]["criterion"], plan["options"]["compensation"]) == ("obs", "distill")
    assert said["options"] == plan["options"]

"""Calibration on models whose sizes, inputs or outputs are not of the usual kind: what can be fitted is, and all ends in a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS
from onnx import numpy_helper

import onnxprune
from onnxprune.calibration import read_calibration
from onnxprune.cautions import cautions
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluation import evaluate
from onnxprune.expectation import expect
from onnxprune.importer import load
from onnxprune.lessons import Lesson, targets
from onnxprune.running import session

RNG = np.random.default_rng(0)
COMPENSATIONS = ["mean", "update", "moments", "reconstruct", "refine", "distill"]
BODY = "h = Gemm(x, w1, b1) r = Relu(h) h2 = Gemm(r, w2, b2) r2 = Relu(h2) y = Gemm(r2, w3, b3)"
X = RNG.standard_normal((200, 8)).astype(np.float32)


def weights(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(max(1, shape[0]))).astype(np.float32)


LAYERS = {"w1": weights(8, 24), "b1": weights(24), "w2": weights(24, 24), "b2": weights(24), "w3": weights(24, 4), "b3": weights(4)}


def model(text: str, **tensors: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def pruned(proto: onnx.ModelProto, calibration: Any, **options: Any) -> onnxprune.Result:
    return onnxprune.prune(proto, 0.4, calibration=calibration, **options)


def sqnr(result: onnxprune.Result) -> tuple[float, float]:
    """Of the first output, by the surgery alone and with the compensation."""
    assert result.fidelity
    before, after = (one.outputs[0].sqnr for one in result.fidelity)
    assert before is not None
    assert after is not None
    return before, after


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_a_default_that_the_samples_override_is_overridden_in_distillation_too() -> None:
    body = "xs = Mul(x, scale) h = Gemm(xs, w1, b1) r = Tanh(h) h2 = Gemm(r, w2, b2) r2 = Relu(h2) y = Gemm(r2, w3, b3)"
    proto = model(f"g (float[N,8] x, float[1] scale) => (float[N,4] y) {{ {body} }}", scale=np.ones(1, np.float32), **LAYERS)
    feeds = {"x": X, "scale": np.array([4], np.float32)}
    layers, whole = (sqnr(pruned(proto, feeds, compensation=name))[1] for name in ("reconstruct", "distill"))
    assert whole > layers


@pytest.mark.parametrize(("takes", "number", "given"), [("int8", 200, np.uint8), ("uint32", -1, np.int32), ("uint8", -1, np.int8)])
def test_integers_that_would_wrap_round_are_refused(takes: str, number: int, given: type) -> None:
    proto = load(model(f"g ({takes}[N,8] i) => (float[N,4] y) {{ x = Cast<to=1>(i) {BODY} }}", **LAYERS))
    with pytest.raises(OnnxPruneError, match=f"'i' holds numbers that {takes} does not"):
        next(read_calibration({"i": np.full((20, 8), number, given)}, proto).batches(1))
    kept = next(read_calibration({"i": np.full((20, 8), 100, given)}, proto).batches(1))
    assert (kept["i"] == 100).all()


def test_rows_of_several_lengths_are_refused() -> None:
    proto = model(f"g (float[N,8] x) => (float[N,4] y) {{ {BODY} }}", **LAYERS)
    with pytest.raises(OnnxPruneError, match="no array"):
        pruned(proto, lambda: iter([{"x": [[1.0, 2.0], [3.0]]}]))


def test_labels_matter_to_an_evaluation_alone() -> None:
    proto = model(f"g (float[N,8] x) => (float[N,4] y) {{ {BODY} }}", **LAYERS)
    feeds = {"x": X, "labels": np.zeros((7, 5))}
    result = pruned(proto, feeds, compensation="mean")
    assert result.fidelity
    with pytest.raises(OnnxPruneError, match="labels of the shape"):
        evaluate(proto, result.model, feeds)


@pytest.mark.parametrize(("lengths", "words"), [((0, 4, 8), "'ids' has no elements"), ((4, 0, 8), r"ids \[1, 0\]")])
def test_texts_without_a_token_are_named(lengths: tuple[int, ...], words: str) -> None:
    """A model that takes the first token of each."""
    body = "e = Gather(t, ids) x = Gather<axis=1>(e, none) " + BODY
    proto = model(f"g (int64[N,T] ids) => (float[N,4] y) {{ {body} }}", t=weights(20, 8), none=np.array(0), **LAYERS)
    with pytest.raises(OnnxPruneError, match=words) as error:
        pruned(proto, lambda: ({"ids": np.ones((1, n), np.int64)} for n in lengths))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


UNBATCHED = """u = Unsqueeze(x, z) h = Conv(u, c1) r = Relu(h) h2 = Conv(r, c2) r2 = Relu(h2) g = GlobalAveragePool(r2) f = Flatten(g)
    yy = Gemm(f, w3) y = Squeeze(yy, z)"""


def test_an_image_without_an_axis_of_batches_is_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its colours nor its rows are counted, put together with those of another, or mixed."""
    tensors = {"z": np.array([0]), "c1": weights(16, 3, 3, 3), "c2": weights(16, 16, 1, 1), "w3": weights(16, 4)}
    proto = model(f"g (float[3,8,8] x) => (float[4] y) {{ {UNBATCHED} }}", **tensors)
    images = (np.arange(60)[:, None, None, None] + RNG.standard_normal((60, 3, 8, 8))).astype(np.float32)
    seen: list[np.ndarray] = []
    gradient = Lesson.gradient

    def watched(self: Lesson, feeds: Any, at: Any) -> Any:
        seen.append(feeds["x"])
        return gradient(self, feeds, at)

    monkeypatch.setattr(Lesson, "gradient", watched)
    result = pruned(proto, lambda: ({"x": image} for image in images), criterion="l2", allocation="uniform")
    assert result.fidelity
    assert result.fidelity[1].samples == 60
    assert {array.tobytes() for array in seen} <= {image.tobytes() for image in images}
    assert len(seen) > 60
    with pytest.raises(OnnxPruneError, match=r"'x' has the shape \[60, 3, 8, 8\]; the model takes float32 \[3, 8, 8\]"):
        pruned(proto, {"x": images})


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("count", [17, 31, 32])
def test_a_fixed_batch_that_leaves_none_to_hold_out(compensation: str, count: int) -> None:
    proto = model(f"g (float[16,8] x) => (float[16,4] y) {{ {BODY} }}", **LAYERS)
    result = pruned(proto, {"x": X[:count]}, compensation=compensation)
    assert result.fidelity
    if count < 32 and compensation not in ("mean", "update", "moments"):
        assert any("no layer was fitted" in line or "left was fitted" in line for line in cautions(result))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_samples_of_alternating_lengths_for_a_batch_of_two(compensation: str) -> None:
    body = "h = MatMul(x, w1) r = Relu(h) h2 = MatMul(r, w2) r2 = Relu(h2) y = MatMul(r2, w3)"
    proto = model(f"g (float[2,S,8] x) => (float[2,S,4] y) {{ {body} }}", **{n: LAYERS[n] for n in ("w1", "w2", "w3")})
    with pytest.raises(OnnxPruneError, match="no batch of 2 samples is full"):
        pruned(proto, lambda: ({"x": np.ones((1, 3 + i % 2, 8), np.float32)} for i in range(40)), compensation=compensation)


def test_the_oracle_on_samples_of_several_lengths() -> None:
    body = "h = MatMul(x, w1) r = Relu(h) h2 = MatMul(r, w2) r2 = Relu(h2) y = MatMul(r2, w3)"
    proto = model(f"g (float[N,S,8] x) => (float[N,S,4] y) {{ {body} }}", **{n: LAYERS[n] for n in ("w1", "w2", "w3")})

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for i in range(40):
            yield {"x": X[:16].reshape(16, 1, 8)[: 2 + i % 5].reshape(1, -1, 8)}

    assert sqnr(pruned(proto, feeds, criterion="distortion"))[1] > 5


# --- sizes that the samples, or what is computed of them, decide -----------------------------------------------------

CHOSEN = """s = MatMul(r, ws) q = Squeeze(s, one) z = Constant<value=float {0.0}>() k = Greater(q, z) i0 = NonZero(k) i = Squeeze(i0, zero)
    p = Gather<axis=0>(r, i) h2 = Gemm(p, w2, b2) r2 = Relu(h2) y = Gemm(r2, w3, b3)"""
GIVEN = """t = Constant<value=float {1.5}>() f = Flatten(x) s = Slice(f, zero, one, one) q = Squeeze(s, one) k = Greater(q, t)
    i0 = NonZero(k) i = Squeeze(i0, zero) p = Gather<axis=0>(x, i)"""
ONE = {"one": np.array([1]), "zero": np.array([0])}


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_rows_that_units_choose_are_not_compared_with_others(compensation: str, tmp_path: Path) -> None:
    """The pruned model chooses other rows: neither its layers' targets nor its outputs are the original's."""
    tensors = LAYERS | ONE | {"ws": weights(24, 1)}
    proto = model(f"g (float[N,8] x) => (float[M,4] y) {{ h = Gemm(x, w1, b1) r = Relu(h) {CHOSEN} }}", **tensors)
    result = pruned(proto, {"x": X}, feeds={"x": X[:20] * 2}, compensation=compensation)
    assert result.fidelity
    for found in result.fidelity:
        assert found.samples == max((output.samples for output in found.outputs), default=0)
    evaluate(proto, result.model, {"x": X})
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in result.model.graph.initializer)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("kind", ["gemm", "conv"])
def test_batches_of_which_nothing_is_chosen(kind: str, compensation: str) -> None:
    if kind == "gemm":
        proto = model(f"g (float[N,8] x) => (float[M,4] y) {{ {GIVEN} {BODY.replace('(x,', '(p,')} }}", **LAYERS, **ONE)
        feeds = X
    else:
        body = "h = Conv<pads=[1,1,1,1]>(p, c1) r = Relu(h) h2 = Conv(r, c2) r2 = Relu(h2)"
        body += " g = GlobalAveragePool(r2) v = Flatten(g) y = Gemm(v, w3)"
        tensors = {"c1": weights(24, 3, 3, 3), "c2": weights(24, 24, 1, 1), "w3": LAYERS["w3"]} | ONE
        proto = model(f"g (float[N,3,6,6] x) => (float[M,4] y) {{ {GIVEN} {body} }}", **tensors)
        feeds = RNG.standard_normal((96, 3, 6, 6)).astype(np.float32)
    before, after = sqnr(pruned(proto, {"x": feeds}, feeds={"x": feeds[:32] * 3}, compensation=compensation))
    assert after > before - 1
    if compensation in ("reconstruct", "refine"):
        assert after > before


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[1, 3], [2, 2]])
def test_a_sequence_among_the_outputs_is_proved_and_goes_along(split: list[int]) -> None:
    body = f"{BODY} q = SplitToSequence<axis=1>(y, s)"
    proto = model(f"g (float[N,8] x) => (seq(float[N,K]) q, float[N,4] y) {{ {body} }}", s=np.array(split), **LAYERS)
    result = pruned(proto, {"x": X}, criterion="distortion", allocation="uniform")
    assert result.proof is not None
    assert result.fidelity
    assert [output.output for output in result.fidelity[1].outputs] == ["y"]


def test_one_number_for_the_batch_among_the_outputs_is_distilled() -> None:
    said: list[str] = []
    proto = model(f"g (float[N,8] x) => (float[N,4] y, float s) {{ {BODY} s = ReduceMean<keepdims=0>(y) }}", **LAYERS)
    pruned(proto, {"x": X}, progress=said.append)
    assert any(line.startswith("distilling") for line in said)


def test_outputs_that_numpy_has_no_type_for_are_compared_as_floats() -> None:
    proto = model(f"g (float[N,8] x) => (bfloat16[N,4] o) {{ {BODY} o = Cast<to=16>(y) }}", **LAYERS)
    before, after = sqnr(pruned(proto, {"x": X}))
    assert after > before


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["", "r = Relu(hb)"])
def test_a_layer_before_a_recurrent_one_is_no_pair_to_refine(between: str) -> None:
    body = f"""t = Transpose<perm=[1,0,2]>(x) h = MatMul(t, w1) hb = Add(h, b1) {between}
        a, hn = LSTM<hidden_size=16>({"r" if between else "hb"}, W, R, B) y = Squeeze(hn, ax)"""
    tensors = {"w1": LAYERS["w1"], "b1": LAYERS["b1"], "W": weights(1, 64, 24), "R": weights(1, 64, 16), "B": weights(1, 128)}
    proto = model(f"g (float[N,5,8] x) => (float[N,16] y) {{ {body} }}", ax=np.array([0]), **tensors)
    before, after = sqnr(pruned(proto, {"x": RNG.standard_normal((64, 5, 8)).astype(np.float32)}, compensation="refine"))
    assert after > before


@pytest.mark.parametrize("compensation", ["mean", "update", "reconstruct"])
def test_a_layer_behind_a_body_that_changed_is_fitted(compensation: str) -> None:
    branches = """r2 = If (c) <then_branch = t () => (float[N,24] o) { a = Gemm(r, w2, b2) o = Relu(a) },
        else_branch = e () => (float[N,24] o2) { a2 = Gemm(r, w4, b2) o2 = Tanh(a2) }>"""
    body = f"h = Gemm(x, w1, b1) r = Relu(h) {branches} y = Gemm(r2, w3, b3)"
    proto = model(f"g (float[N,8] x, bool c) => (float[N,4] y) {{ {body} }}", w4=weights(24, 24), **LAYERS)
    before, after = sqnr(pruned(proto, {"x": X, "c": np.array(True)}, compensation=compensation))
    assert after > before + 0.1


def test_a_bias_that_is_given_takes_no_name_of_a_body() -> None:
    branches = """r2 = If (c) <then_branch = t () => (float[N,24] o) { w2_bias = Relu(h2) o = Neg(w2_bias) },
        else_branch = e () => (float[N,24] o2) { o2 = Tanh(h2) }>"""
    body = f"h = Gemm(x, w1, b1) r = Relu(h) h2 = Gemm(r, w2) {branches} y = Gemm(r2, w3, b3)"
    tensors = {name: array for name, array in LAYERS.items() if name != "b2"}
    proto = model(f"g (float[N,8] x, bool c) => (float[N,4] y) {{ {body} }}", **tensors)
    result = pruned(proto, {"x": X, "c": np.array(True)}, compensation="mean", allocation="uniform")
    onnx.checker.check_model(result.model, full_check=True)


@pytest.mark.parametrize("equation", ["bsd,dh->bsh", "...d,dh->...h"])
def test_the_dots_of_an_einsum_count(equation: str) -> None:
    """Multiply-accumulates of all places, and that what reads is only cut."""
    body = f'h = MatMul(x, w1) r = Relu(h) h2 = Einsum<equation = "{equation}">(r, w2) r2 = Relu(h2) y = MatMul(r2, w3)'
    proto = model(f"g (float[N,3,8] x) => (float[N,3,4] y) {{ {body} }}", **{n: LAYERS[n] for n in ("w1", "w2", "w3")})
    result = pruned(proto, {"x": X[:180].reshape(60, 3, 8)}, compensation="update")
    first, second = numpy_helper.to_array(next(t for t in result.model.graph.initializer if t.name == "w2")).shape
    assert tuple(result.macs) == (6 * (8 * 24 + 24 * 24 + 24 * 4), 6 * (8 * first + first * second + second * 4))
    assert any("only cut" in line for line in cautions(result))


# --- what has no gradient, and what is no number ---------------------------------------------------------------------


def distilled(proto: onnx.ModelProto, feeds: Any) -> bool:
    """Whether the whole round found something better on samples that were held out."""
    said: list[str] = []
    pruned(proto, feeds, criterion="l2", allocation="uniform", verify=False, progress=said.append)
    return any(line.startswith("distilling") for line in said) and not any("not distilled" in line for line in said)


@pytest.mark.parametrize("pool", ["GlobalMaxPool(r)", "ReduceMax<axes=[2]>(r)", "Max(r, rest)"])
def test_places_that_tie_are_distilled(pool: str) -> None:
    """Padded tokens are alike, so the largest of a channel is often several of them."""
    many = "" if pool.startswith("Max") else "f = Flatten(g)"
    body = f"""e = Gather(t, ids) x = Transpose<perm=[0,2,1]>(e) h = Conv(x, a, p) r = Relu(h) flip = Slice(r, last, least, axis, step)
        rest = Identity(flip) g = {pool} {many} y = {"MatMul(turned, c)" if not many else "Gemm(f, c, q)"}"""
    body = body.replace("y = MatMul", "turned = Transpose<perm=[0,2,1]>(g) y = MatMul")
    out = "float[n,6,5] y" if not many else "float[n,5] y"
    slices = {"last": np.array([-1]), "least": np.array([-9]), "axis": np.array([2]), "step": np.array([-1])}
    tensors = {"t": weights(20, 8) * 4, "a": weights(24, 8, 1), "p": weights(24), "c": weights(24, 5), "q": weights(5)} | slices
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (256, 6))
    ids[np.arange(6) >= rng.integers(1, 6, 256)[:, None]] = 0
    assert distilled(model(f"g (int64[n,6] ids) => ({out}) {{ {body} }}", **tensors), {"ids": ids})


@pytest.mark.parametrize("length", ["l = ReduceL2<axes=[2],keepdims=1>(m)", "s = Mul(m, m) v = ReduceSum(s, two) l = Sqrt(v)"])
def test_rows_of_zeros_that_are_normalized_are_distilled(length: str) -> None:
    body = f"""h = MatMul(x, a) r = Relu(h) z = MatMul(r, b) k = Cast<to=1>(mask) u = Unsqueeze(k, two) m = Mul(z, u) {length}
        c = Clip(l, tiny) y = Div(m, c)"""
    tensors = {"a": weights(12, 32) * 2, "b": weights(32, 8), "two": np.array([2]), "tiny": np.float32(1e-12)}
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(3, 7, 256)[:, None]).astype(np.int64)
    feeds = {"x": rng.normal(size=(256, 6, 12)).astype(np.float32), "mask": mask}
    assert distilled(model(f"g (float[n,6,12] x, int64[n,6] mask) => (float[n,6,8] y) {{ {body} }}", **tensors), feeds)


@pytest.mark.parametrize("low", [-np.inf, -1e9])
def test_classes_that_are_masked_have_no_say(low: float) -> None:
    body = "h = Gemm(x, a, p) r = Relu(h) l = Gemm(r, b, q) m = Where(legal, l, low) y = Softmax(m)"
    tensors = {"a": weights(12, 32) * 3, "p": weights(32), "b": weights(32, 8) * 2, "q": weights(8), "low": np.float32(low)}
    rng = np.random.default_rng(0)
    legal = rng.random((256, 8)) < 0.7
    legal[:, 0] = True
    feeds = {"x": rng.normal(size=(256, 12)).astype(np.float32), "legal": legal}
    assert distilled(model(f"g (float[n,12] x, bool[n,8] legal) => (float[n,8] y) {{ {body} }}", **tensors), feeds)


@pytest.mark.parametrize("at", [0, 70])
@pytest.mark.parametrize("compensation", ["update", "reconstruct", "refine"])
def test_one_sample_that_gives_no_numbers_leaves_the_others_to_fit_to(compensation: str, at: int) -> None:
    """A mask of nothing but zeros makes a Softmax of nothing but infinities."""

    def layer(x: str, weights: str, i: int) -> str:
        q, k, v, o = (f"{name}{weights}" for name in "qkvo")
        return f"""q_{i} = MatMul({x}, {q}) k_{i} = MatMul({x}, {k}) v_{i} = MatMul({x}, {v}) t_{i} = Transpose<perm=[0,2,1]>(k_{i})
            l_{i} = MatMul(q_{i}, t_{i}) m_{i} = Add(l_{i}, add) s_{i} = Softmax<axis=-1>(m_{i}) z_{i} = MatMul(s_{i}, v_{i})
            y{i} = MatMul(z_{i}, {o})"""

    body = f"b = Cast<to=9>(mask) a = Where(b, zero, ninf) add = Unsqueeze(a, one) {layer('x', '1', 0)} {layer('y0', '2', 1)}"
    tensors = {f"{name}{i}": weights(16, 16) * 1.5 for name in "qkvo" for i in (1, 2)}
    tensors |= {"zero": np.float32(0), "ninf": np.float32(-np.inf), "one": np.array([1])}
    proto = model(f"g (float[n,6,16] x, int64[n,6] mask) => (float[n,6,16] y1) {{ {body} }}", **tensors)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 6, 16)).astype(np.float32)
    mask = (np.arange(6) < rng.integers(1, 7, 128)[:, None]).astype(np.int64)
    good = [sqnr(pruned(proto, {"x": x, "mask": mask}, compensation=compensation, criterion="l2", allocation="uniform"))[1]]
    mask[at] = 0
    good += [sqnr(pruned(proto, {"x": x, "mask": mask}, compensation=compensation, criterion="l2", allocation="uniform"))[1]]
    assert good[1] > good[0] - 0.5


def test_a_norm_over_the_channels_of_maps_weighs_their_places() -> None:
    body = """x0 = Conv(x, s) h = Conv(x0, a) r = Relu(h) k = Conv(r, b) t = Add(x0, k) mu = ReduceMean<axes=[1]>(t) d = Sub(t, mu)
        d2 = Mul(d, d) v = ReduceMean<axes=[1]>(d2) w = Sqrt(v) z = Div(d, w) y = Conv(z, o)"""
    tensors = {"s": weights(8, 3, 1, 1), "a": weights(16, 8, 1, 1), "b": weights(8, 16, 1, 1), "o": weights(5, 8, 1, 1)}
    proto = model(f"g (float[n,3,6,7] x) => (float[n,5,6,7] y) {{ {body} }}", **tensors)
    plan = onnxprune.plan(proto, 0.4, verify=False)
    assert [(t.name, t.normed) for t in targets(plan, onnxprune.apply(proto, plan).model)] == [("y", None), ("t", 1)]


# --- without samples -------------------------------------------------------------------------------------------------


def test_channels_of_one_dimensional_convolutions_are_seen_without_samples() -> None:
    path = MODELS / "digits-conv1d.onnx"
    with np.load(MODELS / "digits-conv1d.eval.npz") as content:
        feeds, labels = {"input": content["input"].astype(np.float32)}, content["labels"]
    right = []
    for criterion, compensation in (("l2", "none"), ("obs", "merge")):
        made = onnxprune.prune(path, 0.5, calibration="none", criterion=criterion, compensation=compensation, allocation="global").model
        right.append(float((session(made).run(None, feeds)[0].argmax(axis=1) == labels).mean()))
    assert right[1] > right[0] + 0.1
    fields = expect(load(path))
    convolved = [node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    assert [fields[name].axis for name in convolved] == [1] * len(convolved)


def test_channels_that_come_last_are_seen_without_samples() -> None:
    body = "t = Transpose<perm=[0,3,1,2]>(x) h = Conv(t, a) r = Relu(h) y = Conv(r, b)"
    proto = model(f"g (float[n,6,6,3] x) => (float[n,4,6,6] y) {{ {body} }}", a=weights(16, 3, 1, 1), b=weights(4, 16, 1, 1))
    fields = expect(load(proto))
    covariance = proto_weights(proto, "a")[:, :, 0, 0]
    wanted = covariance @ (0.1 * np.eye(3) + 0.9) @ covariance.T  # colours go together
    np.testing.assert_allclose(fields["h"].covariance, wanted, rtol=1e-5)


def test_a_long_signal_takes_no_room_for_its_length() -> None:
    body = "h = Conv<strides=[8]>(x, a) r = Relu(h) h2 = Conv(r, b) r2 = Relu(h2) y = Conv(r2, c)"
    proto = model(
        f"g (float[1,1,48000] x) => (float[1,4,k] y) {{ {body} }}", a=weights(16, 1, 16), b=weights(16, 16, 1), c=weights(4, 16, 1)
    )
    assert pruned(proto, "none").reached > 0.35


@pytest.mark.parametrize("before", [0, 4])
def test_channels_that_are_padded_are_padded_where_they_are(before: int) -> None:
    tensors = {"a": weights(16, 3, 1, 1), "pads": np.array([0, before, 0, 0, 0, 4 - before, 0, 0]), "b": weights(8, 20, 1, 1)}
    body = "c = Conv(x, a) s = Pad(c, pads) y = Conv(s, b)"
    proto = model(f"g (float[n,3,6,7] x) => (float[n,8,6,7] y) {{ {body} }}", **tensors)
    power = np.diag(expect(load(proto))["s"].covariance)
    assert (power == 0).tolist() == [i < before or i >= before + 16 for i in range(20)]


def test_channels_that_are_cut_off_by_a_pad_are_unknown() -> None:
    body = "c = Conv(x, a) s = Pad(c, pads) h = Conv(s, b) r = Relu(h) y = Conv(r, o)"
    tensors = {"a": weights(16, 3, 1, 1), "pads": np.array([0, 0, 0, 0, 0, -2, 0, 0]), "b": weights(8, 14, 1, 1), "o": weights(4, 8, 1, 1)}
    proto = model(f"g (float[n,3,6,7] x) => (float[n,4,6,7] y) {{ {body} }}", **tensors)
    assert pruned(proto, "none").reached > 0.2


def proto_weights(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return np.asarray(numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name)), np.float64)

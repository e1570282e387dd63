"""Linear bottlenecks turned so that their last units say least: the same function, and less lost when those go."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto
from outside import Weight, build, feeds_of, run
from test_attention_compensation import HEADS, ROWS, SIZE, SPREAD, WIDE, batches, dims, error, forms, made, outputs

import onnxprune
from onnxprune.evidence import gather
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.plans import Plan
from onnxprune.reconstruction import reconstruct
from onnxprune.rewriter import rewrite
from onnxprune.turning import Turned, turned

QUERIES = " ".join(f"{a}r = Reshape ({a}, {'there' if a == 'q' else 'alone'}) {a}t = Transpose <perm=[0,2,1,3]> ({a}r)" for a in "qkv")
SHARED = (
    " ".join(f"{a} = MatMul (x, w{a})" for a in "qkv")
    + f" {QUERIES} ks = Transpose <perm=[0,1,3,2]> (kt) s = MatMul (qt, ks) p = Softmax (s) o = MatMul (p, vt) "
    + "ot = Transpose <perm=[0,2,1,3]> (o) z = Reshape (ot, back) y = MatMul (z, wo)"
)
ONE_KEY: dict[str, Weight] = {"wq": (8, WIDE), "wk": (8, SIZE), "wv": (8, SIZE), "alone": [0, 0, 1, SIZE]}


def turn(model: ModelProto, seed: int = 0) -> Turned:
    found = group(load(model))
    shape = [d.dim_value or 6 for d in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(6)]
    return turned(found, gather(found, lambda: iter(feeds)), feeds[0])


def same(model: ModelProto, other: Turned) -> bool:
    feeds = feeds_of(model, seed=9)
    one, two = run(model, feeds), run(other.grouping.model.proto, feeds)
    return all(np.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)


@pytest.mark.parametrize("name", forms())
def test_heads_turn_in_every_form_and_compute_the_same(name: str) -> None:
    model = made(name)
    found = turn(model)
    values = [g.id for g in found.grouping.groups if any(m.tensor == "wo" for m in g.members) and g.units == SIZE]
    assert set(found.scores) == {dims(group(load(model))).id, *values}
    assert len(values) == 1
    assert all((np.diff(scores) <= 0).all() for scores in found.scores.values())
    assert same(model, found)
    was = group(load(model)).model
    changed = {name for name in was.tensors if not np.array_equal(was.array(name), found.grouping.model.array(name))}
    assert "wo" in changed
    assert len(changed) > 1


def test_heads_that_share_keys_and_values_turn_together() -> None:
    model = build(ROWS, SHARED, "float y", {**SPREAD, **ONE_KEY}, opset=13, seed=5)
    found = turn(model)
    assert len(found.scores) == 2
    assert same(model, found)


@pytest.mark.parametrize(
    ("inputs", "body", "weights"),
    [
        ("float[4,6] x", "h = MatMul (x, a) y = MatMul (h, b)", {"a": (6, 5), "b": (5, 3)}),
        ("float[4,6] x", "h = Gemm <transB=1> (x, a, c) y = Gemm <transB=1> (h, b)", {"a": (5, 6), "c": (5,), "b": (3, 5)}),
        ("float[1,3,7,7] x", "h = Conv (x, a, c) y = Conv <strides=[2,2]> (h, b)", {"a": (5, 3, 3, 3), "c": (5,), "b": (4, 5, 3, 3)}),
        ("float[1,3,7,7] x", "h = ConvTranspose (x, a) p = GlobalAveragePool (h) y = Conv (p, b)", {"a": (3, 5, 2, 2), "b": (4, 5, 1, 1)}),
    ],
)
def test_layers_with_nothing_between_turn(inputs: str, body: str, weights: dict[str, Weight]) -> None:
    model = build(inputs, body, "float y", weights)
    found = turn(model)
    [scores] = found.scores.values()
    assert len(scores) == 5
    assert same(model, found)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)",
        "h = MatMul (x, a) e = Erf (h) m = Mul (h, e) y = MatMul (m, b)",
        "h = MatMul (x, a) m = Mul (h, gain) y = MatMul (m, b)",
        "h = MatMul (x, a) s = Softmax (h) y = MatMul (s, b)",
        "h = MatMul (x, a) t = Add (h, gain) z = MatMul (t, b) r = Relu (t) w = MatMul (r, d) y = Add (z, w)",
        "h = MatMul (x, a) t = Add (h, gain) z = MatMul (t, b) m = Add (z, z2) z2 = MatMul (x, gains) y = Identity (m)",
    ],
)
def test_what_is_not_linear_or_not_alone_stays(body: str) -> None:
    weights: dict[str, Weight] = {"a": (6, 5), "b": (5, 3), "gain": (5,), "d": (5, 3)}
    if "gains" in body:  # the bias is read twice
        body = body.replace("z2 = MatMul (x, gains) ", "").replace(
            "z = MatMul", "e = MatMul (x, d) f = Add (e, gain) w = MatMul (f, c) z = MatMul"
        )
        body = body.replace("m = Add (z, z2)", "m = Add (z, w)")
        weights = {"a": (6, 5), "b": (5, 3), "gain": (5,), "d": (6, 5), "c": (5, 3)}
    model = build("float[4,6] x", body, "float y", weights)
    found = turn(model)
    if "gains" not in body:
        assert same(model, found)
    was = load(model)
    for name in ("a", "b"):
        assert found.scores or np.array_equal(was.array(name), found.grouping.model.array(name))
    assert not found.scores


def test_what_is_left_is_the_best_of_each_head() -> None:
    """The products of rank SIZE − 1 nearest to each head's, for whitened inputs: Eckart and Young."""
    body = f"{' '.join(f'{a} = MatMul (x, w{a})' for a in 'qkv')} " + forms()["separate"][2].split("b" + "v)")[1]
    model = build(ROWS, body, "float y", {**SPREAD, **{f"w{a}": (8, WIDE) for a in "qkv"}}, opset=13, seed=3)
    found = group(load(model))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 5, 8))
    flat = x.reshape(-1, 8)
    flat -= flat.mean(axis=0)
    x = (flat @ np.linalg.inv(np.linalg.cholesky(flat.T @ flat / len(flat))).T).reshape(x.shape)
    feeds = [{"x": x[i : i + 50].astype(np.float32)} for i in range(0, 400, 50)]
    made_ = turned(found, gather(found, lambda: iter(feeds)), feeds[0])
    mine = dims(found).id
    plan = made_.plan(Plan(found, {mine: np.array([1])}))
    assert list(plan.remove[mine]) == [SIZE - 1]
    pruned = load(rewrite(plan.grouping, plan.remove))
    wq, wk = (found.model.array(f"w{a}").astype(np.float64) for a in "qk")
    vq, vk = (pruned.array(f"w{a}").astype(np.float64) for a in "qk")
    for head in range(HEADS):
        whole = wq[:, head * SIZE :][:, :SIZE] @ wk[:, head * SIZE :][:, :SIZE].T
        left = vq[:, head * (SIZE - 1) :][:, : SIZE - 1] @ vk[:, head * (SIZE - 1) :][:, : SIZE - 1].T
        u, s, v = np.linalg.svd(whole)
        best = (u[:, : SIZE - 1] * s[: SIZE - 1]) @ v[: SIZE - 1]
        assert np.abs(left - best).max() < 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["separate", "packed-gather", "pixels"])
def test_turning_first_loses_less(name: str) -> None:
    model = made(name)
    found, feeds = group(load(model)), batches(model)
    values = next(g.id for g in found.groups if any(m.tensor == "wo" for m in g.members) and g.units == SIZE)
    plan = Plan(found, {dims(found).id: np.array([1, 2]), values: np.array([0, 2])})
    goal = outputs(model, feeds)
    plain, _ = reconstruct(plan, rewrite(found, plan.remove), feeds)
    first = turned(found, gather(found, feeds), next(feeds())).plan(plan)
    again, _ = reconstruct(first, rewrite(first.grouping, first.remove), feeds)
    assert error(outputs(again, feeds), goal) < error(outputs(plain, feeds), goal)
    assert [list(t.dims) for t in again.graph.initializer] == [list(t.dims) for t in plain.graph.initializer]


def test_the_evidence_turns_with_the_model() -> None:
    model = made("separate")
    found, feeds = group(load(model)), batches(model)
    made_ = turned(found, gather(found, feeds), next(feeds()))
    fresh = gather(made_.grouping, feeds)
    for name, reading in made_.evidence.layers.items():
        assert np.allclose(reading.covariance, fresh.layers[name].covariance, rtol=1e-2, atol=1e-3)
        assert np.allclose(reading.mean, fresh.layers[name].mean, rtol=1e-2, atol=1e-3)
        assert np.allclose(reading.matrix, fresh.layers[name].matrix)


def test_prune_turns_for_what_fits_and_plans_for_the_file_itself() -> None:
    model = made("packed-split")
    x = np.concatenate([f["x"] for f in batches(model)()])
    options = {"calibration": {"x": x}, "allocation": "uniform", "min_keep": 1}
    fitted = onnxprune.prune(model, 0.3, compensation="update", **options)  # type: ignore[arg-type]
    plain = onnxprune.prune(model, 0.3, compensation="none", **options)  # type: ignore[arg-type]
    assert fitted.plan.to_json()["groups"] == plain.plan.to_json()["groups"]
    again = onnxprune.apply(model, fitted.plan.to_json())
    one, two = (run(m, {"x": x[:8]}) for m in (again.model, plain.model))
    assert np.allclose(one["y"], two["y"], atol=1e-5)
    goal, after, before = (run(m, {"x": x})["y"] for m in (model, fitted.model, plain.model))
    assert error(after, goal) < error(before, goal)

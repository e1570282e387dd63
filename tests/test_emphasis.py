"""Rows count by what a norm makes of them: where a norm is seen, the weighted least squares, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from outside import Weight, build, run

from onnxprune import leastsquares, moments, refinement
from onnxprune.emphasis import emphasis
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.linear import linears
from onnxprune.plans import Plan
from onnxprune.reconstruction import reconstruct
from onnxprune.refinement import refiner
from onnxprune.rewriter import rewrite

Feeds = dict[str, np.ndarray]
WEIGHTS: dict[str, Weight] = {"a": (6, 16), "b": (16, 8), "c": (8,), "g": (8,), "d": (8,), "e": (8, 3), "k": (8,), "w": (6, 8)}
HIDDEN = "h = MatMul (x, a) r = Relu (h) m = MatMul (r, b) y0 = Add (m, c) other = MatMul (x, w) s = Add (y0, other)"
FUSED = "n = LayerNormalization <axis=-1> (s, g, d) y = MatMul (n, e)"
PARTS = "u = ReduceMean <axes=[-1]> (s) v = Sub (s, u) p = Pow (v, two) q = ReduceMean <axes=[-1]> (p) t = Sqrt (q) n = Div (v, t) "
PARTS += "y = MatMul (n, e)"
SQUARES = "f = Cast <to=1> (s) p = Mul (f, f) q = ReduceMean <axes=[-1]> (p) t = Sqrt (q) n = Div (f, t) y = MatMul (n, e)"


def model_of(after: str) -> ModelProto:
    return build("float[N,5,6] x", f"{HIDDEN} {after}", "float y", {**WEIGHTS, "two": np.array(2, np.float32)})


def seen(model: ModelProto, weight: str) -> bool:
    return next(layer.normed for layer in linears(load(model)) if layer.weight == weight)


@pytest.mark.parametrize("after", [FUSED, PARTS, SQUARES, f"{FUSED.replace('y =', 'z =')} y = Add (z, z2) z2 = MatMul (s, e)"])
def test_a_norm_is_seen_in_its_forms(after: str) -> None:
    model = model_of(after) if "z2" not in after else model_of(FUSED.replace("y =", "o =") + " s2 = Add (s, s) y = Identity (s2)")
    assert seen(model, "b")
    assert not seen(model, "a")


@pytest.mark.parametrize(
    "after",
    [
        "n = Relu (s) y = MatMul (n, e)",
        "n = LayerNormalization <axis=1> (s, gg, dd) y = MatMul (n, e)",
        "u = ReduceMean <axes=[1]> (s) y = MatMul (u, e)",
        f"{FUSED} y2 = Tanh (s)",
    ],
)
def test_no_norm_is_seen_where_the_scale_counts(after: str) -> None:
    more: dict[str, Weight] = {"gg": (5, 8), "dd": (5, 8)}
    body = after.replace("y =", "y1 =").replace("y2 = Tanh (s)", "y2 = Tanh (s) ys = ReduceSum (y2) y = Add (y1, ys)")
    body = body if "y2" in body else body.replace("y1 =", "y =")
    assert not seen(build("float[N,5,6] x", f"{HIDDEN} {body}", "float y", {**WEIGHTS, **more}), "b")


def samples(count: int = 16, large: float = 100.0) -> list[Feeds]:
    """Of every fifth sample the first position is large."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        x = rng.standard_normal((10, 5, 6)).astype(np.float32)
        x[::5, 0] = large * (1 + 0.1 * x[::5, 0])
        found.append({"x": x})
    return found


def pruned(model: ModelProto) -> tuple[Plan, ModelProto]:
    found = group(load(model))
    mine = next(g for g in found.groups if g.units == 16)
    plan = Plan(found, {mine.id: np.arange(6)})
    return plan, rewrite(found, plan.remove)


def test_the_fit_is_weighted_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leastsquares, "SHRINKAGES", (1e-12,))
    plan, small = pruned(model_of(FUSED))
    feeds = samples(large=10.0)
    whole, _ = reconstruct(plan, small, lambda: iter(feeds))
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in plan.grouping.model.proto.graph.initializer}
    now = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in whole.graph.initializer}
    rows, goals, counts = [], [], []
    for one in feeds:
        x = one["x"].astype(np.float64).reshape(-1, 6)
        stream = np.maximum(x @ weights["a"], 0) @ weights["b"] + weights["c"] + x @ weights["w"]
        rows.append(np.maximum(x @ now["a"], 0))
        goals.append(stream - x @ weights["w"])
        share = 1 / stream.var(axis=1)
        counts.append(share / share.mean())
    left = np.concatenate([np.concatenate(rows), np.ones((800, 1))], axis=1) * np.sqrt(np.concatenate(counts))[:, None]
    right = np.concatenate(goals) * np.sqrt(np.concatenate(counts))[:, None]
    solved = np.linalg.lstsq(left, right, rcond=None)[0]
    assert np.allclose(now["b"], solved[:-1], atol=1e-3)
    assert np.allclose(now["c"], solved[-1], atol=1e-3)


@pytest.mark.parametrize("refined", [False, True])
def test_positions_that_are_large_do_not_drown_the_others(refined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FUSED)
    plan, small = pruned(model)

    def error() -> float:
        feeds = samples()
        batches: Callable[[], Iterator[Feeds]] = lambda: iter(feeds)  # noqa: E731
        after = refiner(plan, small, batches) if refined else None
        made, _ = reconstruct(plan, small, batches, after=after)
        gaps = [run(model, f)["y"] - run(made, f)["y"] for f in samples(20)[16:]]
        return float(np.mean([np.mean(gap**2) for gap in gaps]))

    weighted = error()

    def flat(wanted: np.ndarray, channels: tuple[int, ...] = (0, 2)) -> np.ndarray:
        return np.ones_like(emphasis(wanted, channels))

    monkeypatch.setattr(moments, "emphasis", flat)
    monkeypatch.setattr(refinement, "emphasis", flat)
    assert weighted < error()


def test_weights_are_finite_and_one_on_average() -> None:
    rows = np.random.default_rng(0).standard_normal((1, 40, 6))
    rows[0, 3] = 5.0  # no deviation at all
    rows[0, 4] = np.inf
    found = emphasis(rows)
    assert found.shape == (1, 40, 1)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found.mean() == pytest.approx(1, rel=1e-4)
    assert found[0, 4, 0] == 0

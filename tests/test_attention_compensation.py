"""Queries and keys that lost dimensions, in the forms that exporters write: scores and what is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, numpy_helper
from outside import Weight, build

from onnxprune import matching
from onnxprune.capture import Tap
from onnxprune.evidence import gather
from onnxprune.grouping import Group, Grouping, group
from onnxprune.importer import load
from onnxprune.plans import Plan
from onnxprune.products import products, summed
from onnxprune.reconstruction import reconstruct
from onnxprune.rewriter import rewrite
from onnxprune.saliency import energy, obs

Feeds = dict[str, np.ndarray]
HEADS, SIZE, WIDE = 3, 4, 12
SPREAD: dict[str, Weight] = {"there": [0, 0, HEADS, SIZE], "back": [0, 0, WIDE], "wo": (WIDE, 5), "root": np.array(2, np.float32)}
PARTED = " ".join(f"{a}r = Reshape ({a}, there) {a}t = Transpose <perm={'[0,2,3,1]' if a == 'k' else '[0,2,1,3]'}> ({a}r)" for a in "qkv")
ATTEND = (
    "s = MatMul (qt, kt) e = Div (s, root) p = Softmax (e) o = MatMul (p, vt) ot = Transpose <perm=[0,2,1,3]> (o) z = Reshape (ot, back)"
)
SEPARATE: dict[str, Weight] = {f"{kind}{a}": (8, WIDE) if kind == "w" else (WIDE,) for a in "qkv" for kind in "wb"}
LAYERS = " ".join(f"{a}m = MatMul (x, w{a}) {a} = Add ({a}m, b{a})" for a in "qkv")
ROWS = "float[N,5,8] x"
PACKED: dict[str, Weight] = {"w": (8, 3 * WIDE), "b": (3 * WIDE,)}


def forms() -> dict[str, tuple[str, dict[str, Weight], str]]:
    """{name: inputs, weights, body}."""
    end = f"{ATTEND} y = MatMul (z, wo)"
    gemms = " ".join(f"{a}g = Gemm (flat, w{a}, b{a}) {a} = Reshape ({a}g, cube)" for a in "qkv")
    picked = "h = MatMul (x, w) hb = Add (h, b) r = Reshape (hb, five) t = Transpose <perm=[2,0,3,1,4]> (r) "
    picked += (
        "qt = Gather <axis=0> (t, zero) ks = Gather <axis=0> (t, one) vt = Gather <axis=0> (t, two) kt = Transpose <perm=[0,1,3,2]> (ks)"
    )
    numbers: dict[str, Weight] = {"zero": np.array(0), "one": np.array(1), "two": np.array(2), "five": [0, 0, 3, HEADS, SIZE]}
    pixels = "h = Conv (x, w, b) r = Reshape (h, there) q, k, v = Split <axis=2> (r, sizes) qt = Transpose <perm=[0,1,3,2]> (q) "
    pixels += "s = MatMul (qt, k) e = Div (s, root) p = Softmax (e) vt = Transpose <perm=[0,1,3,2]> (v) o = MatMul (p, vt) "
    pixels += "ot = Transpose <perm=[0,1,3,2]> (o) z = Reshape (ot, back) y = Conv (z, wo)"
    planes: dict[str, Weight] = {"w": (3 * WIDE, 8, 1, 1), "b": (3 * WIDE,), "wo": (5, WIDE, 1, 1), "sizes": [SIZE] * 3}
    return {
        "separate": (ROWS, SEPARATE, f"{LAYERS} {PARTED} {end}"),
        "no-bias": (
            ROWS,
            SEPARATE,
            LAYERS.replace("Add (", "Identity (").replace(", bq", "").replace(", bk", "").replace(", bv", "") + f" {PARTED} {end}",
        ),
        "scaled-queries": (ROWS, SEPARATE, f"{LAYERS.replace('q = Add', 'qb = Add')} q = Mul (qb, root) {PARTED} {end}"),
        "gemm": (ROWS, SEPARATE | {"two": [-1, 8], "cube": [-1, 5, WIDE]}, f"flat = Reshape (x, two) {gemms} {PARTED} {end}"),
        "packed-split": (ROWS, PACKED, f"h = MatMul (x, w) hb = Add (h, b) q, k, v = Split <axis=2> (hb) {PARTED} {end}"),
        "packed-gather": (ROWS, PACKED | numbers, f"{picked} {end}"),
        "pixels": ("float[N,8,2,3] x", planes | {"there": [0, HEADS, 3 * SIZE, -1], "back": [0, WIDE, 2, 3]}, pixels),
    }


def made(name: str, change: Callable[[str], str] = str) -> ModelProto:
    inputs, weights, body = forms()[name]
    return build(inputs, change(body), "float y", {**SPREAD, **weights}, opset=13, seed=3)


def batches(model: ModelProto, many: int = 12) -> Callable[[], Iterator[Feeds]]:
    rng = np.random.default_rng(1)
    shape = [d.dim_value or 8 for d in model.graph.input[0].type.tensor_type.shape.dim]
    mixed = rng.standard_normal((8, 8)) / 3
    axis = 1 if len(shape) == 4 else 2
    found = [
        {"x": np.moveaxis(np.moveaxis(rng.standard_normal(shape), axis, -1) @ mixed, -1, axis).astype(np.float32)} for _ in range(many)
    ]
    return lambda: iter(found)


def dims(found: Grouping) -> Group:
    """The group of the dimensions over which queries and keys are summed."""
    product = next(p for p in products(found.model) if p.left in ("qt", "q"))
    return next(g for g in found.groups if summed(found, product, g) is not None)


def logits(model: ModelProto, feeds: Callable[[], Iterator[Feeds]]) -> np.ndarray:
    """Less the mean of each row, which Softmax does not see."""
    values = np.concatenate([Tap(model, ["s"]).run(f)["s"] for f in feeds()]).astype(np.float64)
    return np.asarray(values - values.mean(axis=-1, keepdims=True))


def outputs(model: ModelProto, feeds: Callable[[], Iterator[Feeds]]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, f)[0] for f in feeds()])


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one - other) ** 2).mean())


@pytest.mark.parametrize("name", forms())
def test_logits_come_nearer_to_the_originals_in_every_form(name: str) -> None:
    model = made(name)
    found, feeds = group(load(model)), batches(model)
    mine = dims(found)
    plan = Plan(found, {mine.id: np.array([1])})
    pruned = rewrite(found, plan.remove)
    [product] = matching.narrowed(plan, pruned)
    fitted = ModelProto()
    fitted.CopyFrom(pruned)
    report = matching.match(plan, fitted, product, feeds)
    assert report is not None
    wanted = logits(model, feeds)
    before, after = (error(logits(m, feeds), wanted) / np.mean(wanted**2) for m in (pruned, fitted))
    assert (report.before, report.after) == pytest.approx((before, after), rel=1e-3)
    assert after < 0.9 * before
    assert [list(n.input) for n in fitted.graph.node] == [list(n.input) for n in pruned.graph.node]
    values = [Tap(m, ["vt", "p"]).run(next(feeds()))["vt"] for m in (pruned, fitted)]
    assert np.abs(values[0] - values[1]).max() < 1e-5  # the values of a packed layer are not touched
    whole, _ = reconstruct(plan, pruned, feeds)
    alone, _ = reconstruct(plan, pruned, feeds, matched=None)
    goal = outputs(model, feeds)
    assert error(outputs(whole, feeds), goal) < error(outputs(alone, feeds), goal) < error(outputs(pruned, feeds), goal)


def test_the_fit_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's own solution of the linear system in all numbers of the matrices, one head after the other."""
    monkeypatch.setattr(matching, "SHRINKAGES", (1e-12,))
    monkeypatch.setattr(matching, "STEPS", 2000)
    model = made("separate")
    found, feeds = group(load(model)), batches(model)
    plan = Plan(found, {dims(found).id: np.array([2])})
    pruned = rewrite(found, plan.remove)
    [product] = matching.narrowed(plan, pruned)
    report = matching.match(plan, pruned, product, feeds)
    assert report is not None
    left = missed = 0.0
    sides = [Tap(load(model).proto, ["qt", "kt"]).run(f) for f in feeds()]
    queries, keys = (np.concatenate([s[n] for s in sides]).astype(np.float64) for n in ("qt", "kt"))
    keys -= keys.mean(axis=-1, keepdims=True)
    for head in range(HEADS):
        q, k = queries[:, head], keys[:, head]
        less = np.concatenate([q[..., [0, 1, 3]], np.ones((*q.shape[:-1], 1))], axis=-1)
        system = np.einsum("pia,pbj->pijab", less, k[:, [0, 1, 3]]).reshape(-1, 12)
        goal = (q @ k).ravel()
        missed += float(((goal - system @ np.linalg.lstsq(system, goal, rcond=None)[0]) ** 2).sum())
        left += float((goal**2).sum())
    assert report.after == pytest.approx(missed / left, rel=2e-3)
    wanted = logits(model, feeds)
    assert error(logits(pruned, feeds), wanted) / np.mean(wanted**2) == pytest.approx(missed / left, rel=2e-3)


def test_where_queries_are_bent_the_keys_are_fitted_and_where_both_are_none() -> None:
    for bent, possible in (("q", True), ("qk", False)):

        def bend(body: str, bent: str = bent) -> str:
            for a in bent:
                body = body.replace(f"{a} = Add", f"{a}b = Add").replace(f"{a}r = Reshape ({a},", f"{a} = Tanh ({a}b) {a}r = Reshape ({a},")
            return body

        model = made("separate", bend)
        found, feeds = group(load(model)), batches(model)
        plan = Plan(found, {dims(found).id: np.array([0])})
        pruned = rewrite(found, plan.remove)
        said: list[str] = []
        fitted, refits = reconstruct(plan, pruned, feeds, progress=said.append)
        tensors = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (pruned, fitted)]
        assert np.array_equal(tensors[0]["wq"], tensors[1]["wq"])
        assert np.array_equal(tensors[0]["wk"], tensors[1]["wk"]) is not possible
        assert any("left alone" in line for line in said) is not possible
        assert len(refits) == 1 + possible


def test_columns_that_are_read_elsewhere_are_not_fitted() -> None:
    """Queries that are keys as well: what is right for the one side would be wrong for the other."""
    model = made(
        "separate", lambda body: body.replace("kr = Reshape (k,", "kr = Reshape (q,").replace("k = Add (km, bk)", "k = Identity (km)")
    )
    found, feeds = group(load(model)), batches(model)
    mine = next(g for g in found.groups if g.units == SIZE and any(m.tensor == "wq" for m in g.members))
    plan = Plan(found, {mine.id: np.array([0])})
    pruned = rewrite(found, plan.remove)
    [product] = matching.narrowed(plan, pruned)
    assert matching.match(plan, pruned, product, feeds) is None


def test_what_a_mask_turns_off_has_no_say() -> None:
    text = "float[N,5,8] x, float[N,5] mask"
    _, weights, body = forms()["separate"]
    off = "far = Sub (mask, unit) deep = Mul (far, big) wide = Unsqueeze (deep, ones) e = Add (s, wide)"
    body = body.replace("e = Div (s, root)", off)
    extra: dict[str, Weight] = {"unit": np.array(1, np.float32), "big": np.array(1e4, np.float32), "ones": [1, 2]}
    model = build(text, body, "float y", {**SPREAD, **weights, **extra}, opset=13, seed=3)
    found = group(load(model))
    plan = Plan(found, {dims(found).id: np.array([3])})
    results, scores = [], []
    for noise in (0.0, 50.0):
        rng = np.random.default_rng(0)
        given = []
        for _ in range(8):
            mask = (np.arange(5) < rng.integers(2, 6, (8, 1))).astype(np.float32)
            x = rng.standard_normal((8, 5, 8)).astype(np.float32)
            given.append({"x": np.where(mask[:, :, None] > 0, x, np.float32(noise)), "mask": mask})
        pruned = rewrite(found, plan.remove)
        [product] = matching.narrowed(plan, pruned)
        assert product.logits
        results.append(matching.match(plan, pruned, product, lambda given=given: iter(given)))
        scores.append(energy(gather(found, lambda given=given: iter(given)), dims(found), np.random.default_rng(0)))
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].after < results[0].before
    assert results[1].after == pytest.approx(results[0].after, rel=1e-2)
    assert np.allclose(scores[0], scores[1], rtol=1e-3)


def test_no_product_is_worse_than_it_was_on_the_samples_it_was_fitted_to() -> None:
    for many in (1, 2, 4, 5):  # too few to fit twenty numbers a head from
        model = made("packed-split")
        found, feeds = group(load(model)), batches(model, many)
        plan = Plan(found, {dims(found).id: np.array([1, 2])})
        pruned = rewrite(found, plan.remove)
        wanted, before = logits(model, feeds), logits(pruned, feeds)
        for product in matching.narrowed(plan, pruned):
            matching.match(plan, pruned, product, feeds)
        assert error(logits(pruned, feeds), wanted) <= error(before, wanted) * (1 + 1e-6)


def test_a_dimension_counts_by_its_share_of_the_logits() -> None:
    model = made("separate")
    found, feeds = group(load(model)), batches(model)
    mine, evidence = dims(found), gather(found, feeds)
    [reading] = evidence.of(mine)
    sides = [Tap(model, ["qt", "kt"]).run(f) for f in feeds()]
    queries, keys = (np.concatenate([s[n] for s in sides]).astype(np.float64) for n in ("qt", "kt"))
    keys -= keys.mean(axis=-1, keepdims=True)
    whole = ((queries @ keys) ** 2).sum()
    by_hand = [((queries[..., [u]] @ keys[..., [u], :]) ** 2).sum() / whole for u in range(SIZE)]
    assert energy(evidence, mine, np.random.default_rng(0)) == pytest.approx(by_hand, rel=1e-3)
    assert reading.layer is None
    assert obs(evidence, mine, np.random.default_rng(0)).max() <= max(by_hand) * len(by_hand)


@pytest.mark.parametrize("name", forms())
def test_what_reads_values_and_heads_is_the_layer_behind(name: str) -> None:
    model = made(name)
    found = group(load(model))
    evidence = gather(found, batches(model, 2))
    readers = {g.kind + str(g.units): [r.layer.weight if r.layer else "product" for r in evidence.of(g)] for g in found.groups}
    assert readers["head3"] == ["wo"]
    sizes = [r.layer.weight if r.layer else "product" for g in found.groups if g.units == SIZE for r in evidence.of(g)]
    assert sorted(sizes) == ["product", "wo"]

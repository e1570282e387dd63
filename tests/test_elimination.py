"""Which units go, and what the others make up for in closed form, against brute force and direct numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outside import Weight, build, run, tensors
from test_least_squares import HIDDEN, arrays, as_matrix, by_row, three_deep, two_deep, unfolded, watched

import onnxprune
from onnxprune.elimination import DAMPING, eliminate
from onnxprune.evidence import Reading, gather
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.linear import Linear
from onnxprune.oneshot import DAMPING as ONE_SHOT

quick = settings(max_examples=40, derandomize=True, deadline=None, database=None)
LAYER = Linear(0, "MatMul", "x", "w", "", "y")


def reading(rng: np.random.Generator, units: int, places: int, groups: int, out: int) -> Reading:
    """A layer that reads some features of each unit, in any order, and one that is no unit's."""
    features = units * places + 1
    order = rng.permutation(features)[: units * places].reshape(units, places)
    mixed = rng.standard_normal((groups, features, features))
    covariance = mixed @ mixed.transpose(0, 2, 1) / features
    matrix = rng.standard_normal((groups, out, features))
    return Reading(LAYER, order, matrix, np.zeros((groups, features)), np.ones((groups, features)), covariance, float(rng.uniform(0.5, 2)))


def lost(reading: Reading, gone: Sequence[int]) -> float:
    """The error of the best weights without some units, by least squares on rows that have the damped covariance."""
    total = 0.0
    for sigma, matrix in zip(reading.covariance, reading.matrix, strict=True):
        damped = sigma + DAMPING * np.trace(sigma) / len(sigma) * np.eye(len(sigma))
        rows = np.linalg.cholesky(damped).T  # rowsᵀ·rows is the covariance
        kept = np.setdiff1d(np.arange(len(sigma)), reading.features[list(gone)].ravel())
        targets = rows @ matrix.T
        made = rows[:, kept] @ np.linalg.lstsq(rows[:, kept], targets, rcond=None)[0]
        total += float(((targets - made) ** 2).sum())
    return total / reading.power


@quick
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 3, 128]))
def test_elimination_is_greedy_least_squares(seed: int, units: int, places: int, groups: int, readers: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    readings = [reading(rng, units, places, groups, 1 + i) for i in range(readers)]
    gone: list[int] = []
    costs: list[float] = []
    while len(gone) < units:
        before = sum(lost(r, gone) for r in readings)
        found = {u: sum(lost(r, [*gone, u]) for r in readings) - before for u in range(units) if u not in gone}
        cheapest = sorted(found, key=found.__getitem__)[: -(-units // steps)]
        gone += cheapest
        costs += [found[u] for u in cheapest]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxprune.elimination.STEPS", steps)
        scores = eliminate(readings, units)
    assert list(np.argsort(scores, kind="stable")) == gone or len(set(scores)) < units  # costs that fall are raised to a tie
    np.testing.assert_allclose(scores[gone], np.maximum.accumulate(costs), rtol=1e-6, atol=1e-9)


def test_of_units_that_are_alike_all_but_one_are_free() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3))
    x = np.hstack([x, x[:, :1], x[:, :1]])
    covariance = np.cov(x.T, bias=True)[None]
    scores = eliminate([Reading(LAYER, np.arange(5)[:, None], np.ones((1, 4, 5)), x.mean(0)[None], x.std(0)[None], covariance, 4.0)], 5)
    assert set(np.argsort(scores)[:2]) < {0, 3, 4}
    assert scores[list({0, 3, 4} & set(np.argsort(scores)[:2]))].max() < 0.5 * scores[[1, 2]].min()


def test_a_layer_that_makes_nothing_costs_nothing_and_breaks_nothing() -> None:
    rng = np.random.default_rng(0)
    dead = Reading(LAYER, np.arange(4)[:, None], np.zeros((1, 2, 4)), np.zeros((1, 4)), np.zeros((1, 4)), np.zeros((1, 4, 4)), 0.0)
    alive = reading(rng, 4, 1, 1, 2)
    assert np.isfinite(eliminate([dead], 4)).all()
    np.testing.assert_allclose(eliminate([dead, alive], 4), eliminate([alive], 4))


# --- what is gathered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HIDDEN)
def test_evidence_is_the_moments_of_what_the_reader_sees(kind: str) -> None:
    model, x = two_deep(kind)
    grouping = group(load(model))
    found = gather(grouping, lambda: ({"x": part} for part in np.array_split(x, 5)))
    (owner,) = grouping.groups
    (seen,) = found.of(owner)
    outputs = run(watched(model, "a", "y"), {"x": x})
    rows = unfolded(model, outputs["a"] if kind != "Gemm" else outputs["a"].mean(axis=(2, 3)))
    np.testing.assert_allclose(seen.mean[0], rows.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(seen.covariance[0], np.cov(rows.T, bias=True), atol=1e-4)
    np.testing.assert_allclose(seen.rms[0], np.sqrt((rows.astype(np.float64) ** 2).mean(axis=0)), atol=1e-4)
    assert seen.power == pytest.approx(float((by_row(kind, outputs["y"]).astype(np.float64) ** 2).sum(axis=1).mean()), rel=1e-4)
    for unit, places in enumerate(seen.features):  # without a unit the reader's rows are those without its features
        silent = outputs["a"].copy()
        silent[(..., unit) if kind.startswith("MatMul") else (slice(None), unit)] = 0
        changed = np.flatnonzero((unfolded(model, silent if kind != "Gemm" else silent.mean(axis=(2, 3))) != rows).any(axis=0))
        assert set(changed) <= set(places)
        assert len(places) == rows.shape[1] // 12


def test_the_scores_of_a_criterion_are_its_formula() -> None:
    model, x = two_deep("Conv")
    outputs = run(watched(model, "a"), {"x": x})
    rows, targets = unfolded(model, outputs["a"]).astype(np.float64), by_row("Conv", outputs["y"]).astype(np.float64)
    weight = as_matrix("Conv", arrays(model)["w"])
    power, squares = (targets**2).sum(axis=1).mean(), (weight**2).sum(axis=0)
    formulas = {
        "fluctuation": rows.var(axis=0) * squares / power,
        "energy": (rows**2).mean(axis=0) * squares / power,
        "wanda": np.sqrt((rows**2).mean(axis=0)) * np.abs(weight).sum(axis=0) / np.sqrt(power),
        "activation": np.sqrt((np.abs(rows).reshape(len(x), -1, rows.shape[1]).mean(axis=1) ** 2).mean(axis=0)),
    }
    for name, features in formulas.items():
        result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion=name, allocation="uniform", compensation="none")
        ((owner, gone),) = result.plan.remove.items()
        scores = features.reshape(12, -1).sum(axis=1)
        assert set(gone) == set(np.argsort(scores)[: len(gone)]), (owner, name)


# --- compensation in closed form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HIDDEN)
def test_the_update_in_one_shot_is_the_closed_form(kind: str) -> None:
    model, x = two_deep(kind)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="obs", allocation="uniform", compensation="update")
    hidden = run(watched(model, "a"), {"x": x})["a"]
    rows = unfolded(model, hidden if kind != "Gemm" else hidden.mean(axis=(2, 3))).astype(np.float64)
    whole = as_matrix(kind, arrays(model)["w"])
    (removed,) = result.plan.remove.values()
    kept = np.setdiff1d(np.arange(len(whole[0])).reshape(12, -1), np.arange(len(whole[0])).reshape(12, -1)[removed].ravel())
    sigma = np.cov(rows.T, bias=True)
    damping = ONE_SHOT * np.trace(sigma) / len(sigma)
    if kind == "MatMul without a bias":  # which could take what the features are on average
        sigma = rows.T @ rows / len(rows)
    left = sigma[np.ix_(kept, kept)] + damping * np.eye(len(kept))
    wanted = np.linalg.solve(left, (whole @ sigma[:, kept] + damping * whole[:, kept]).T).T
    after = arrays(result.model)
    np.testing.assert_allclose(as_matrix(kind, after["w"]), wanted, atol=1e-3, rtol=1e-3)
    if kind == "MatMul without a bias":
        return
    added = next((name for node in result.model.graph.node if "w" in node.input for name in node.input[2:]), "b")
    shift = arrays(model).get("b", np.zeros(3)) + whole @ rows.mean(axis=0) - wanted @ rows.mean(axis=0)[kept]
    np.testing.assert_allclose(after[added], shift, atol=2e-3)


def means(model: object, x: np.ndarray, *names: str, channels: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each channel of some values."""
    found = run(watched(model, *names), {"x": x})  # type: ignore[arg-type]
    wide = {name: np.moveaxis(found[name].astype(np.float64), channels, 0).reshape(found[name].shape[channels], -1) for name in names}
    return {n: (a.mean(axis=1), a.var(axis=1)) for n, a in wide.items()}


@pytest.mark.parametrize("kind", ["Conv", "Conv without a bias", "ConvTranspose", "Gemm"])
def test_mean_compensation_keeps_the_mean_of_what_the_readers_make(kind: str) -> None:
    model, x = two_deep(kind)
    options = {"calibration": {"x": x}, "criterion": "fluctuation", "allocation": "uniform"}
    plain, mended = (onnxprune.prune(model, 0.4, compensation=name, **options) for name in ("none", "mean"))  # type: ignore[arg-type]
    wanted = means(model, x, "y")["y"][0]
    np.testing.assert_allclose(means(mended.model, x, "y")["y"][0], wanted, atol=1e-4)
    assert np.abs(means(plain.model, x, "y")["y"][0] - wanted).max() > 0.05
    np.testing.assert_array_equal(arrays(plain.model)["w"], arrays(mended.model)["w"])  # in the bias alone


def test_moment_matching_keeps_mean_and_variance_of_every_channel() -> None:
    model, x = three_deep("Tanh")
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="l2", allocation="uniform", compensation="moments")
    wanted, made = means(model, x, "i", "y"), means(result.model, x, "i", "y")
    owner = next(g for g in result.plan.groups if any(m.tensor == "v" and m.axis == 0 for m in g.members))
    kept = np.setdiff1d(np.arange(12), result.plan.remove[owner.id])
    for part in (0, 1):
        np.testing.assert_allclose(made["i"][part], wanted["i"][part][kept], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(made["y"][part], wanted["y"][part], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["Conv", "MatMul before a norm"])
def test_moments_in_a_residual_branch_are_those_that_the_branch_had(kind: str) -> None:
    """Not those of what the Add lacks: the stream's error, which the branch cannot see, would scale up block after block."""
    rng = np.random.default_rng(0)
    if kind == "Conv":
        body = (
            "s = Conv(x, u) h = Conv(s, a) p = Relu(h) b = Conv(p, c) t = Add(s, b) i = Conv(t, d) q = Relu(i) e = Conv(q, f) y = Add(t, e)"
        )
        weights: dict[str, Weight] = {
            "u": (10, 3, 1, 1),
            "a": (16, 10, 1, 1),
            "c": (10, 16, 1, 1),
            "d": (16, 10, 1, 1),
            "f": (10, 16, 1, 1),
        }
        shape, rank = (48, 3, 6, 6), "6, 6"
        model, x = build(f"float[N, 3, {rank}] x", body, f"float[N, 10, {rank}] y", weights), rng.standard_normal(shape)
    else:
        body = """s = MatMul(x, u) h = MatMul(s, a) p = Relu(h) z = MatMul(p, c) b = Add(z, k) t = Add(s, b) n = LayerNormalization(t, g, l)
                  i = MatMul(n, d) q = Relu(i) w = MatMul(q, f) e = Add(w, o) r = Add(t, e) y = LayerNormalization(r, g, l)"""
        weights = {"u": (3, 10), "a": (10, 16), "c": (16, 10), "d": (10, 16), "f": (16, 10), **dict.fromkeys("kgolo", (10,))}
        model, x = build("float[N, 36, 3] x", body, "float[N, 36, 10] y", weights), rng.standard_normal((48, 36, 3))
    x = x.astype(np.float32)
    options = {"calibration": {"x": x}, "criterion": "l2", "allocation": "uniform"}
    names = ("none", "moments")
    cut, mended = (onnxprune.prune(model, 0.5, compensation=name, **options).model for name in names)  # type: ignore[arg-type]
    channels = 1 if kind == "Conv" else 2
    wanted, plain, made = (np.array(list(means(proto, x, "b", "e", channels=channels).values())) for proto in (model, cut, mended))
    np.testing.assert_allclose(made, wanted, rtol=2e-3, atol=1e-3)
    assert np.abs(plain - wanted).max() > 0.1


@pytest.mark.parametrize("name", ["mean", "update", "moments", "reconstruct"])
def test_compensation_adds_no_node_and_changes_no_shape(name: str) -> None:
    weights: dict[str, Weight] = {"u": (10, 3, 3, 3), "v": (12, 10, 3, 3), "w": (4, 12, 1, 1), "c": (4,)}
    body = "h = Conv<pads=[1,1,1,1]>(x, u) r = Relu(h) i = Conv(r, v) s = Relu(i) y = Conv(s, w, c)"
    model = build("float[N, 3, 6, 6] x", body, "float[N, 4, 4, 4] y", weights)
    x = np.random.default_rng(0).standard_normal((48, 3, 6, 6)).astype(np.float32)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, compensation=name)
    surgery = onnxprune.apply(model, result.plan).model
    plain = onnxprune.prune(model, 0.4, calibration={"x": x}, compensation="none")
    assert plain.plan.to_json()["groups"] == result.plan.to_json()["groups"]
    assert plain.model == surgery
    assert [(n.op_type, list(n.output)) for n in result.model.graph.node] == [(n.op_type, list(n.output)) for n in surgery.graph.node]
    before, after = tensors(surgery), tensors(result.model)
    assert {n: list(t.dims) for n, t in before.items()} == {n: list(after[n].dims) for n in before}
    assert all(t.data_type == after[n].data_type for n, t in before.items())
    assert set(after) - set(before) <= {"v_bias"}  # of a Conv that had none; the first layer reads what it read
    assert (result.model.graph.input, result.model.graph.output) == (surgery.graph.input, surgery.graph.output)
    np.testing.assert_array_equal(arrays(result.model)["u"], arrays(surgery)["u"])
    assert result.proof is not None
    assert plain.proof is not None
    assert plain.proof.to_json().keys() == result.proof.to_json().keys()
    exact, mended = (onnxprune.verify(model, one, result.plan) for one in (surgery, result.model))
    assert exact.matches is not None
    assert mended.matches is not None
    assert exact.matches <= exact.tolerance < mended.matches  # the proof is of the surgery, not of the new numbers
    ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])

"""How a budget is split between groups, chosen for a model, and met in steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from outside import Weight, build, distance, feeds_of, macs, run
from test_least_squares import three_deep

import onnxprune
from onnxprune import selection
from onnxprune.allocations import BINS, split
from onnxprune.evidence import gather
from onnxprune.importer import load
from onnxprune.rewriter import rewrite
from onnxprune.rounds import put_back
from onnxprune.saliency import measured

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)
Curves = dict[int, np.ndarray]


def curves(rng: np.random.Generator, units: list[int]) -> tuple[Curves, Curves]:
    """Rising losses, convex or not, and what is saved at each number of units removed."""
    losses = {g: np.cumsum(np.concatenate([[0.0], rng.exponential(1.0, n) ** 2])) for g, n in enumerate(units)}
    saved = {g: np.linspace(0, rng.uniform(0.1, 1), n + 1) for g, n in enumerate(units)}
    return losses, saved


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0, 1))
def test_the_split_of_a_budget_is_the_best_of_all(seed: int, units: list[int], strength: float) -> None:
    losses, _ = curves(np.random.default_rng(seed), units)
    each = BINS // 20  # so that what is saved is whole bins: a unit saves a twentieth, what no group holds is another's
    rest = 20 - sum(units)
    losses |= {99: np.concatenate([np.zeros(1), np.full(1, 1e6)])} if rest else {}
    saved = {g: np.arange(len(loss)) / 20 for g, loss in losses.items()} | ({99: np.array([0, rest / 20])} if rest else {})
    goal = round(strength * BINS)
    found = split(losses, saved, strength)
    assert sum(float(saved[g][n]) for g, n in found.items()) * BINS >= goal - 1e-6
    options = itertools.product(*(range(len(loss)) for loss in losses.values()))
    bins = {g: [round(float(s) * BINS) for s in saved[g]] for g in losses}
    enough = (o for o in options if sum(bins[g][n] for g, n in zip(losses, o, strict=True)) >= goal)
    least = min(sum(float(losses[g][n]) for g, n in zip(losses, o, strict=True)) for o in enough)
    assert sum(float(losses[g][n]) for g, n in found.items()) == pytest.approx(least)
    assert each * 20 == BINS


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_no_uniform_or_greedy_split_loses_less(seed: int, units: list[int], strength: float) -> None:
    losses, saved = curves(np.random.default_rng(seed), units)
    whole = sum(float(s[-1]) for s in saved.values())
    goal = strength * whole
    found = split(losses, saved, strength)
    lost = sum(float(losses[g][n]) for g, n in found.items())
    assert sum(float(saved[g][n]) for g, n in found.items()) >= goal - whole / BINS
    enough = goal + (len(units) + 1) * whole / BINS  # what a group saves is rounded to bins
    others = [{g: round(share * n) for g, n in enumerate(units)} for share in np.linspace(0, 1, 101)]
    greedy = dict.fromkeys(losses, 0)
    while any(greedy[g] < units[g] for g in greedy):
        price = {g: (losses[g][n + 1] - losses[g][n]) / (saved[g][n + 1] - saved[g][n]) for g, n in greedy.items() if n < units[g]}
        greedy[min(price, key=price.__getitem__)] += 1
        others.append(dict(greedy))
    feasible = [o for o in others if sum(float(saved[g][n]) for g, n in o.items()) >= enough]
    assert all(lost <= sum(float(losses[g][n]) for g, n in o.items()) + 1e-9 for o in feasible)


def test_a_group_of_many_units_is_split_as_finely_as_the_others_need() -> None:
    losses = {0: np.arange(513) * 1.0, 1: np.arange(513) * 1.0}
    saved = {0: np.arange(513) / 512, 1: np.arange(513) / 512}
    found = split(losses, saved, 0.25)
    assert sum(found.values()) == pytest.approx(256, abs=16)


# --- models ----------------------------------------------------------------------------------------------------------


def images(count: int = 48) -> dict[str, np.ndarray]:
    with np.load(MODELS / "digits-images.calibration.npz") as content:
        return {name: content[name][:count] for name in content.files}


@pytest.mark.parametrize("rule", ["uniform", "global", "standardized", "distortion"])
@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_every_allocation_lands_on_the_budget(rule: str, ratio: float) -> None:
    model = load(MODELS / "digits-resnet.onnx").proto
    result = onnxprune.prune(model, ratio, calibration=images(), criterion="fluctuation", allocation=rule, compensation="none")
    feeds = feeds_of(model)
    assert 1 - macs(result.model, feeds) / macs(model, feeds) == pytest.approx(ratio, abs=0.01)
    assert result.on_budget


@pytest.mark.parametrize("rule", ["uniform", "global", "standardized", "distortion"])
@pytest.mark.parametrize("align", [1, 4])
def test_units_that_score_alike_need_not_go_together(rule: str, align: int) -> None:
    weights: dict[str, Weight] = {name: np.ones(shape, np.float32) for name, shape in (("u", (120, 8)), ("v", (80, 120)), ("w", (8, 80)))}
    model = build(
        "float[N, 8] x",
        "h = Gemm<transB=1>(x, u) r = Tanh(h) i = Gemm<transB=1>(r, v) s = Tanh(i) y = Gemm<transB=1>(s, w)",
        "float[N, 8] y",
        weights,
    )
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    for criterion in ("l2", "fluctuation"):
        result = onnxprune.prune(
            model, 0.35, calibration={"x": x}, criterion=criterion, allocation=rule, align=align, compensation="none", verify=False
        )
        assert result.reached == pytest.approx(0.35, abs=0.01 if align == 1 else 0.02)


@pytest.mark.parametrize("rule", ["uniform", "global", "pq", "distortion"])
@pytest.mark.parametrize("ratio", [0.3, 0.4, 0.5, 0.65])
@pytest.mark.parametrize("units", [(5, 7), (16, 32), (6, 9), (3, 4)])
def test_no_other_widths_of_few_groups_come_closer_than_a_point(units: tuple[int, int], ratio: float, rule: str) -> None:
    a, b = units
    model = build(
        "float[N, 4] x",
        "h = MatMul(x, u) r = Tanh(h) i = MatMul(r, v) s = Tanh(i) y = MatMul(s, w)",
        "float[N, 2] y",
        {"u": (4, a), "v": (a, b), "w": (b, 2)},
    )
    x = np.random.default_rng(1).standard_normal((32, 4)).astype(np.float32)
    result = onnxprune.prune(model, ratio, calibration={"x": x}, allocation=rule, compensation="none")
    whole = 4 * a + a * b + 2 * b
    nearest = min(abs(1 - (4 * i + i * j + 2 * j) / whole - ratio) for i in range(1, a + 1) for j in range(1, b + 1))
    if rule != "distortion" or nearest <= 0.01:  # else what is measured to lose far less may go
        assert abs(result.reached - ratio) <= max(0.01, nearest) + 1e-9
    assert result.on_budget == (abs(result.reached - ratio) <= 0.01)


def sided(kind: str = "good") -> ModelProto:
    """Two layers of 16 channels whose first 8 carry nearly all there is."""
    weights: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for name, shape in (("u", (16, 4)), ("v", (16, 16)), ("w", (3, 16))):
        weights[name] = rng.standard_normal(shape).astype(np.float32)
        if name != "w":
            weights[name][8:] *= 0.01
    weights |= {"a": np.zeros(16, np.float32), "b": np.zeros(16, np.float32)}
    body = "h = Gemm<transB=1>(x, u, a) r = Tanh(h) i = Gemm<transB=1>(r, v, b) s = Tanh(i) y = Gemm<transB=1>(s, w)"
    return build("float[N, 4] x", body, "float[N, 3] y", weights)


@pytest.fixture
def worst() -> Iterator[str]:
    """A criterion by which the largest go first."""
    name = "largest-first"
    if name not in measured.names():
        measured(name)(lambda evidence, group, rng: -measured.get("energy")(evidence, group, rng))
    return name


@pytest.mark.parametrize("first", [True, False])
def test_auto_takes_the_pair_that_changes_the_outputs_least(worst: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(worst, "uniform"), ("energy", "uniform")]
    monkeypatch.setattr(selection, "CANDIDATES", tuple(pairs if first else pairs[::-1]))
    x = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
    result = onnxprune.prune(sided(), 0.4, calibration={"x": x}, criterion="auto", allocation="auto")
    assert (result.plan.options["criterion"], result.plan.options["allocation"]) == ("energy", "uniform")
    plain = onnxprune.prune(sided(), 0.4, calibration={"x": x}, criterion="energy", allocation="uniform")
    assert plain.plan.to_json()["groups"] == result.plan.to_json()["groups"]


@pytest.mark.parametrize("compensation", ["none", "mean", "update"])
def test_auto_judges_by_the_compensation_that_follows(compensation: str) -> None:
    """On samples that it may not fit to; what it chooses of is seen on the same ones."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 4)).astype(np.float32)
    options: dict[str, Any] = {"calibration": {"x": x}, "criterion": "obs", "compensation": compensation}
    rules = ("uniform", "global", "distortion", "balanced", "standardized", "auto")
    results = {rule: onnxprune.prune(sided(), 0.4, allocation=rule, **options) for rule in rules}
    wanted = run(sided(), {"x": x})

    def loss(model: ModelProto) -> float:
        return sum(float(((wanted[name] - found) ** 2).mean()) for name, found in run(model, {"x": x}).items())

    lost = {rule: loss(result.model) for rule, result in results.items()}
    chosen = results["auto"].plan.options["allocation"]
    assert lost["auto"] == pytest.approx(lost[chosen], rel=1e-4)
    assert lost["auto"] <= 1.1 * min(lost.values())


def test_auto_measures_losses_once_a_criterion_and_chooses_by_what_each_alone_chooses() -> None:
    x = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
    said: list[str] = []
    result = onnxprune.prune(sided(), 0.4, calibration={"x": x}, criterion="obs", allocation="auto", progress=said.append)
    assert sum(text.startswith("measuring") for text in said) == 1
    chosen = result.plan.options["allocation"]
    assert {text.partition(":")[0] for text in said if text.startswith("obs by")} >= {"obs by balanced", "obs by distortion"}
    alone = onnxprune.prune(sided(), 0.4, calibration={"x": x}, criterion="obs", allocation=chosen)
    assert alone.plan.to_json()["groups"] == result.plan.to_json()["groups"]


@pytest.mark.parametrize(("batch", "samples"), [("N", 1), ("N", 3), ("4", 4), ("4", 8), ("4", 10)])
def test_auto_works_with_few_samples_and_with_static_batches(batch: str, samples: int) -> None:
    model = sided()
    if batch != "N":
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = int(batch)
        del model.graph.value_info[:]
    x = np.random.default_rng(1).standard_normal((samples, 4)).astype(np.float32)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="auto", allocation="auto")
    assert result.reached == pytest.approx(0.4, abs=0.05)
    assert result.fidelity is not None


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("criterion", "rule"), [("obs", "distortion"), ("fluctuation", "global"), ("l2", "uniform")])
def test_what_goes_in_one_step_stays_gone_in_the_next(criterion: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[int, np.ndarray]] = []

    def recorded(plan: Any, model: ModelProto) -> Any:
        steps.append(dict(plan.remove))
        return put_back(plan, model)

    monkeypatch.setattr(selection, "put_back", recorded)
    model, x = three_deep("Tanh")
    found = [onnxprune.prune(model, 0.6, calibration={"x": x}, criterion=criterion, allocation=rule, steps=3, seed=5) for _ in range(2)]
    assert len(steps) == 4
    steps = [*steps[:2], dict(found[0].plan.remove)]
    for one, other in itertools.pairwise(steps):
        assert all(set(units) <= set(other[g]) for g, units in one.items() if g in other)
        assert sum(map(len, one.values())) < sum(map(len, other.values()))
    assert found[0].model == found[1].model  # deterministic for a seed
    assert found[0].reached == pytest.approx(0.6, abs=0.03)  # a unit is a point or more


@pytest.mark.parametrize("name", ["mean", "reconstruct"])
@pytest.mark.parametrize("biased", [True, False])
def test_what_is_put_back_computes_what_was_left(name: str, biased: bool) -> None:
    weights: dict[str, Weight] = {"u": (8, 3, 3, 3), "v": (12, 8, 3, 3), "w": (4, 12)}
    body = "h = Conv<pads=[1,1,1,1]>(x, u{a}) r = Tanh(h) i = Conv(r, v{b}) s = Tanh(i) p = GlobalAveragePool(s) f = Flatten(p)"
    body += " y = Gemm<transB=1>(f, w{c})"
    weights |= {"a": (8,), "b": (12,), "c": (4,)} if biased else {}
    model = build("float[N, 3, 6, 6] x", body.format(**{n: f", {n}" if biased else "" for n in "abc"}), "float[N, 4] y", weights)
    x = np.random.default_rng(0).standard_normal((48, 3, 6, 6)).astype(np.float32)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, compensation=name)
    back = put_back(result.plan, result.model)
    assert distance(run(result.model, {"x": x}), run(back.model.proto, {"x": x})) < 1e-5
    cut = rewrite(back, result.plan.remove)  # what later rounds measure
    assert distance(run(result.model, {"x": x}), run(cut, {"x": x})) < 1e-5
    shapes = [{t.name: list(t.dims) for t in one.graph.initializer} for one in (model, back.model.proto)]
    assert shapes[0].items() <= shapes[1].items()
    whole = gather(result.plan.grouping, lambda: [{"x": x}])
    again = gather(back, lambda: [{"x": x}])
    assert {g: len(r) for g, r in again.readings.items()} == {g: len(r) for g, r in whole.readings.items()}


def test_numbers_keep_their_rank_from_step_to_step() -> None:
    body = """k = Range(zero, eight, one) m = Cast<to=1>(k) h = Gemm<transB=1>(x, u) r = Tanh(h) e = Gemm<transB=1>(r, v)
              n = Add(e, m) s = Mul(n, half) y = Gemm<transB=1>(s, w)"""
    numbers = {"zero": np.array(0), "eight": np.array(8), "one": np.array(1), "half": np.array(0.5, np.float32)}
    model = build("float[N, 4] x", body, "float[N, 3] y", {"u": (16, 4), "v": (8, 16), "w": (3, 8), **numbers})
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, steps=3)
    assert result.reached == pytest.approx(0.4, abs=0.05)


def test_losses_are_those_of_samples_that_the_readers_were_not_updated_by() -> None:
    """48 samples of 96 hidden units: half of the units are a combination of the others there, and not elsewhere."""
    body = "h = Gemm<transB=1>(x, u, a) r = Relu(h) y = Gemm<transB=1>(r, v, b)"
    model = build("float[N, 64] x", body, "float[N, 8] y", {"u": (96, 64), "a": (96,), "v": (8, 96), "b": (8,)})
    rng = np.random.default_rng(0)
    some, others = (rng.standard_normal((n, 64)).astype(np.float32) for n in (48, 2000))
    result = onnxprune.prune(model, 0.5, calibration={"x": some}, allocation="distortion", compensation="update")
    [losses], [units] = result.losses.values(), result.plan.remove.values()
    wanted, found = (run(one, {"x": others})["y"] for one in (model, result.model))
    change = float(((wanted - found) ** 2).mean() / wanted.var())
    assert change / 2 < losses[len(units)] < 2 * change

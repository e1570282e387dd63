"""Criteria and allocations against their formulas, computed directly; what merges channels without any sample."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
from conftest import MODELS, two_layers
from onnx import numpy_helper

import onnxprune
from onnxprune.allocations import allocation
from onnxprune.calibration import read_calibration
from onnxprune.compensation import compensation
from onnxprune.criteria import criterion
from onnxprune.equivalence import distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.expectation import expect
from onnxprune.grouping import Group, Grouping, group
from onnxprune.importer import load
from onnxprune.plans import Plan
from onnxprune.rewriter import rewrite
from onnxprune.running import Runner
from onnxprune.saliency import measured
from onnxprune.study import Study

RNG = np.random.default_rng(1)
NET = two_layers(hidden=6, seed=3)
W1, B1, W2 = (numpy_helper.to_array(t).astype(np.float64) for t in NET.graph.initializer)
X = RNG.standard_normal((96, 4)).astype(np.float32) + 0.5
HIDDEN = np.maximum(X @ W1 + B1, 0)


def hidden() -> tuple[Grouping, Group]:
    found = group(load(NET))
    return found, found.groups[0]


def scored(name: str) -> np.ndarray:
    found, one = hidden()
    return criterion.get(name)(found.model, one, np.random.default_rng(0))


def looked(name: str, arrays: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    found, one = hidden()
    study = Study(found, read_calibration({"x": X} if arrays is None else arrays, found.model))
    return measured.get(name)(study.evidence, one, np.random.default_rng(0))


def alike(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal but for a factor, to float32's precision."""
    return bool(np.allclose(found / found.sum(), wanted / wanted.sum(), rtol=2e-4))


def shares(values: np.ndarray) -> np.ndarray:
    return values / values.mean()


# A layer's rows for the six units: what makes them, and what reads them
ROWS = (W1.T, W2)


# --- by the weights -------------------------------------------------------------------------------------------------------------


def test_l1_and_l2_sum_both_layers_by_their_means() -> None:
    assert alike(scored("l1"), sum(shares(np.abs(r).sum(1)) for r in ROWS))
    assert alike(scored("l2"), sum(shares(np.sqrt((r**2).sum(1))) for r in ROWS))


def test_fpgm_is_the_distance_to_all_others() -> None:
    gaps = [np.linalg.norm(r[:, None] - r[None], axis=2).sum(1) for r in ROWS]
    assert alike(scored("fpgm"), sum(shares(g) for g in gaps))


def test_lamp_divides_by_all_that_is_not_smaller() -> None:
    squares = sum((r**2).sum(1) for r in ROWS)
    wanted = np.array([s / squares[squares >= s].sum() for s in squares])
    assert np.allclose(scored("lamp"), wanted, rtol=1e-4)


def test_dimap_ranks_every_weight_among_the_weights_of_all_layers_of_the_group() -> None:
    squares = np.concatenate(ROWS, axis=1) ** 2
    wanted = np.array([[w / squares[squares >= w].sum() for w in row] for row in squares]).sum(1)
    assert np.allclose(scored("dimap"), wanted, rtol=1e-4)


def test_prunenet_is_the_shift_of_the_singular_values_as_a_unit_fades() -> None:
    def shift(rows: np.ndarray, unit: int, step: float = 1e-5) -> float:
        faded = rows.copy()
        faded[unit] *= 1 - step
        return float((np.linalg.svd(rows, compute_uv=False) - np.linalg.svd(faded, compute_uv=False)).sum()) / step

    wanted = sum(shares(np.array([shift(r, u) for u in range(6)])) for r in ROWS)
    assert np.allclose(shares(scored("prunenet")), shares(wanted), rtol=1e-3)


def test_pq_index_counts_the_weights_that_a_unit_is_worth() -> None:
    def index(row: np.ndarray, p: float = 0.5, q: float = 1.0) -> float:
        d, sizes = len(row), np.abs(row)
        return float(1 - d ** (1 / q - 1 / p) * (sizes**p).sum() ** (1 / p) / (sizes**q).sum() ** (1 / q))

    wanted = sum(shares(np.array([len(row) * (1 - index(row)) for row in r])) for r in ROWS)
    assert alike(scored("pq-index"), wanted)


def test_random_is_of_the_seed_alone() -> None:
    found, one = hidden()
    first, same, other = (criterion.get("random")(found.model, one, np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


# --- by the activations -----------------------------------------------------------------------------------------------------------


def test_wanda_energy_and_fluctuation() -> None:
    sizes, squares = np.abs(W2).sum(1), (W2**2).sum(1)
    assert alike(looked("wanda"), sizes * np.sqrt((HIDDEN**2).mean(0)))
    assert alike(looked("energy"), squares * (HIDDEN**2).mean(0))
    assert alike(looked("fluctuation"), squares * HIDDEN.var(0))


def test_obs_counts_the_mean_where_the_reader_has_no_bias_to_take_it() -> None:
    power = ((HIDDEN @ W2) ** 2).mean(0).sum()

    def cheapest(moment: np.ndarray) -> float:
        inverse = np.linalg.inv(moment + 0.1 * HIDDEN.var(0).mean() * np.eye(6))
        return float(((W2**2).sum(1) / np.diag(inverse)).min() / power)

    second, centred = HIDDEN.T @ HIDDEN / len(HIDDEN), np.cov(HIDDEN.T, bias=True)
    assert looked("obs").min() == pytest.approx(cheapest(second), rel=1e-3)
    assert cheapest(second) != pytest.approx(cheapest(centred), rel=1e-2)


def test_update_of_a_layer_without_a_bias_is_least_squares_through_the_origin() -> None:
    options = {"criterion": "l1", "allocation": "uniform", "calibration": {"x": X + 2}, "verify": False}
    result = onnxprune.prune(NET, 0.34, compensation="update", **options)
    gone = next(iter(result.plan.remove.values()))
    hidden, kept = np.maximum((X + 2) @ W1 + B1, 0), np.setdiff1d(np.arange(6), gone)
    wanted = hidden @ W2
    best = np.linalg.lstsq(hidden[:, kept], wanted, rcond=None)[0]
    found = numpy_helper.to_array(next(t for t in result.model.graph.initializer if t.name == NET.graph.initializer[2].name))
    lost = [float(((hidden[:, kept] @ matrix - wanted) ** 2).mean()) for matrix in (best, found, W2[kept])]
    assert lost[0] <= lost[1] < min(1.1 * lost[0], lost[2])


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda units: np.ones(units - 1), ["[5]", "6 scores"]),
        (lambda units: None, ["None", "6 scores"]),
        (lambda units: np.full(units, np.nan), ["NaN"]),
        (lambda units: [1.0] * units, []),
    ],
)
def test_scores_of_ones_own_are_a_number_a_unit(scores: Callable[[int], object], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion, "known", dict(criterion.known))
    criterion("mine")(lambda model, group, rng: scores(group.units))
    for rule in ("uniform", "global"):
        if words:
            with pytest.raises(OnnxPruneError, match="'mine'") as refused:
                onnxprune.plan(NET, 0.34, criterion="mine", allocation=rule, verify=False)
            assert refused.value.exit_code == 2
            assert all(word in str(refused.value) for word in words)
        else:
            assert onnxprune.plan(NET, 0.34, criterion="mine", allocation=rule, verify=False).remove


def test_functions_of_ones_own_that_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> object:
        raise ValueError("mine broke")

    for registry, option in ((criterion, "criterion"), (allocation, "allocation"), (compensation, "compensation")):
        monkeypatch.setattr(registry, "known", {**registry.known, "mine": broken})
        with pytest.raises(OnnxPruneError, match=f"the {option} 'mine' fails \\(ValueError: mine broke\\)") as refused:
            onnxprune.prune(NET, 0.34, calibration={"x": X}, **{"allocation": "uniform", "compensation": "none", option: "mine"})
        assert refused.value.exit_code == 2
    monkeypatch.setattr(criterion, "known", {**criterion.known, "mine": lambda *given: sys.exit(7)})
    with pytest.raises(OnnxPruneError, match="SystemExit: 7"):
        onnxprune.plan(NET, 0.34, criterion="mine")
    monkeypatch.setattr(allocation, "known", {**allocation.known, "mine": lambda scores, strength: dict.fromkeys(scores, np.nan)})
    with pytest.raises(OnnxPruneError, match=r"the allocation 'mine' gives .*0 to 1"):
        onnxprune.plan(NET, 0.34, criterion="l1", allocation="mine")


def test_activation_is_the_norm_over_samples_of_the_mean_size_over_places() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[N, 5, 4] x) => (float[N, 5, 3] y) { h = MatMul(x, w1)  b = Add(h, b1)  t = Tanh(b)  y = MatMul(t, w2) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(NET.graph.initializer)
    x = RNG.standard_normal((40, 5, 4)).astype(np.float32) * np.linspace(0.1, 2, 40, dtype=np.float32)[:, None, None]
    found = group(load(model))
    study = Study(found, read_calibration({"x": x}, found.model))
    scores = measured.get("activation")(study.evidence, found.groups[0], np.random.default_rng(0))
    made = np.tanh(x @ W1 + B1)
    assert alike(scores, np.linalg.norm(np.abs(made).mean(axis=1), axis=0))


def test_beta_rank_weighs_filters_by_what_they_do_to_the_deviation() -> None:
    found, one = hidden()
    made = np.abs(W1).sum(0) * (X @ W1).std(0) / X.std()
    study = Study(found, read_calibration({"x": X}, found.model))
    assert alike(measured.get("beta-rank")(study.evidence, one, np.random.default_rng(0)), made)


def test_distortion_is_the_change_of_the_outputs_without_the_unit() -> None:
    found, one = hidden()
    whole = Runner(found.model.proto).run({"x": X})
    wanted = [distortion(whole, Runner(rewrite(found, {one.id: np.array([u])})).run({"x": X})) for u in range(6)]
    assert np.allclose(looked("distortion"), wanted, rtol=1e-3)
    plan = onnxprune.plan(NET, 0.34, criterion="distortion", allocation="uniform", calibration={"x": X}, verify=False)
    assert list(plan.remove[one.id]) == sorted(np.argsort(wanted)[:2])


def test_distortion_runs_the_model_and_so_wants_samples() -> None:
    with pytest.raises(OnnxPruneError, match=r"distortion.*--calibration"):
        onnxprune.prune(NET, 0.3, criterion="distortion", calibration="none")


def test_distortion_of_a_large_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.saliency.WORK", 1.0)
    with pytest.raises(OnnxPruneError, match=r"6 passes.*--scope"):
        looked("distortion")


# --- allocation by the PQ index ----------------------------------------------------------------------------------------------------


def test_pq_takes_more_of_the_group_whose_scores_are_less_equal() -> None:
    scores = {0: np.array([1.0, 1.0, 1.0, 1.0]), 1: np.array([9.0, 1.0, 0.0, 0.0])}
    share = allocation.get("pq")(scores, 0.75)
    kept = {0: 1.0, 1: (3 + 1) ** 2 / (4 * 10)}  # (Σ√s)² / (d·Σs)
    assert share[1] == pytest.approx(0.75)
    assert (1 - share[0]) / (1 - share[1]) == pytest.approx(kept[0] / kept[1])
    assert allocation.get("pq")(scores, 0.0) == {0: 0.0, 1: 0.0}
    assert allocation.get("pq")(scores, 1.0) == {0: 1.0, 1: 1.0}


# --- without samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Relu", "Tanh", "Sigmoid", "HardSwish", "LeakyRelu", "Elu"])
def test_moments_that_the_weights_let_expect_are_those_of_normal_inputs(name: str) -> None:
    model = two_layers(hidden=6, seed=5)
    model.graph.node[2].op_type = name
    found = expect(load(model))
    x = np.random.default_rng(0).standard_normal((200_000, 4)).astype(np.float32)
    model.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, ["N", 6]))
    made = Runner(model).run({"x": x})
    assert np.allclose(found["r"].mean, made["r"].mean(0), atol=0.02)
    assert np.allclose(found["r"].covariance, np.cov(made["r"].T), atol=0.06)
    assert np.allclose(np.diag(found["y"].covariance), made["y"].var(0), rtol=0.05)


def test_behind_a_batch_norm_the_moments_are_those_it_was_trained_to() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[N, 3, 8, 8] x) => (float[N, 2, 8, 8] y)
        <float[4] s = {1.5, -2, 0.5, 1}, float[4] b = {0.1, 0.2, -0.3, 0}, float[4] m0 = {5, 5, 5, 5}, float[4] v = {9, 9, 9, 9}>
        { h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)  n = BatchNormalization(h, s, b, m0, v)  y = Conv(n, w2) }"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("w", (4, 3, 3, 3)), ("w2", (2, 4, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name))
    found = expect(load(model))["n"]
    assert np.allclose(found.mean, [0.1, 0.2, -0.3, 0])
    assert np.allclose(np.sqrt(np.diag(found.covariance)), [1.5, 2, 0.5, 1])
    assert found.sure


def copied() -> onnx.ModelProto:
    """Two layers where units 6 and 7 are 2 and 3 times unit 0 and 1, so that nothing is lost without them."""
    model = two_layers(hidden=8, seed=2)
    w1, b1, w2 = (numpy_helper.to_array(t).copy() for t in model.graph.initializer)
    for copy, of, scale in ((6, 0, 2.0), (7, 1, 3.0)):
        w1[:, copy], b1[copy] = scale * w1[:, of], scale * b1[of]
    for tensor, array in zip(model.graph.initializer, (w1, b1, w2), strict=True):
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def test_a_channel_like_another_is_merged_into_it() -> None:
    model = copied()
    found = group(load(model))
    plan = Plan(found, {0: np.array([6, 7])})
    pruned = rewrite(found, plan.remove)
    merged, _ = compensation.get("merge")(Study(found, read_calibration("none", found.model)), plan, pruned)
    feeds = {"x": np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)}
    whole, left, mended = (Runner(m).run(feeds) for m in (model, pruned, merged))
    assert distortion(whole, mended) < 1e-3 < 0.05 < distortion(whole, left)
    assert [(t.name, list(t.dims)) for t in merged.graph.initializer] == [(t.name, list(t.dims)) for t in pruned.graph.initializer]


@pytest.mark.parametrize("given", [None, "none"])
def test_merging_is_had_by_asking_for_it_without_samples(given: str | None) -> None:
    options = {"criterion": "l2", "allocation": "uniform", "calibration": given, "verify": False}
    left, merged = (onnxprune.prune(copied(), 0.5, compensation=c, **options) for c in ("none", "merge"))  # type: ignore[arg-type]
    feeds = {"x": np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)}
    whole = Runner(copied()).run(feeds)
    assert distortion(whole, Runner(merged.model).run(feeds)) < distortion(whole, Runner(left.model).run(feeds)) / 2


@pytest.mark.parametrize(
    "last",
    [
        "p = GlobalAveragePool (r)  f = Flatten (p)",
        "p = ReduceMean <axes = [2, 3], keepdims = 1> (r)  f = Flatten (p)",
        "f = ReduceMean <axes = [-1, -2], keepdims = 0> (r)",
        "t = Transpose <perm = [0, 2, 3, 1]> (r)  f = ReduceMean <axes = [1, 2], keepdims = 0> (t)",
        "t = Transpose <perm = [3, 0, 2, 1]> (r)  m = ReduceMean <axes = [0, 2], keepdims = 0> (t)  f = Identity (m)",
    ],
)
def test_however_places_are_averaged_the_layer_behind_is_merged(last: str) -> None:
    """PyTorch's newer exporter writes pooling as a mean, TensorFlow's channels come last."""
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        m (float[N, 3, 6, 6] x) => (float[N, 3] y)
        {{ h = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (h)  {last}  y = MatMul (f, w2) }}"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    w1, b1, w2 = rng.standard_normal((8, 3, 3, 3)), rng.standard_normal(8), rng.standard_normal((8, 3))
    w1[6:], b1[6:] = 2 * w1[:2], 2 * b1[:2]
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for a, n in ((w1, "w1"), (b1, "b1"), (w2, "w2")))
    result = onnxprune.prune(model, 0.25, calibration="none", criterion="l1", allocation="uniform")
    feeds = {"x": rng.standard_normal((32, 3, 6, 6)).astype(np.float32)}
    whole, left, merged = (Runner(m).run(feeds) for m in (model, onnxprune.apply(model, result.plan).model, result.model))
    assert distortion(whole, merged) < 1e-3 < 0.01 < distortion(whole, left)


def test_what_no_rule_says_anything_of_is_left_alone() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[N, 4] x) => (float[N, 3] y) { h = MatMul(x, w1)  b = Add(h, b1)  r = Softmax(b)  y = MatMul(r, w2) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(NET.graph.initializer)
    found = expect(load(model))
    assert np.array_equal(found["r"].covariance, np.eye(6))
    assert not found["r"].sure


def test_data_free_pruning_of_a_trained_model_keeps_what_plain_l2_loses() -> None:
    path = MODELS / "digits-resnet.onnx"
    data = np.load(MODELS / "digits-images.eval.npz")
    feeds = {onnx.load(path).graph.input[0].name: next(data[k] for k in data if k != "labels")}

    def accuracy(model: onnx.ModelProto) -> float:
        return float((next(iter(Runner(model).run(feeds).values())).argmax(1) == data["labels"]).mean())

    free = onnxprune.prune(path, 0.3, calibration="none")
    plain = onnxprune.prune(path, 0.3, verify=False)
    assert (free.plan.options["criterion"], free.plan.options["compensation"], free.fidelity) == ("obs", "merge", None)
    assert plain.plan.options["compensation"] == "none"
    assert abs(free.reached - 0.3) <= 0.01
    assert accuracy(free.model) > accuracy(plain.model) + 0.5


def test_what_fits_to_activations_is_refused_without_samples() -> None:
    for options in ({"compensation": "reconstruct"}, {"allocation": "distortion"}, {"criterion": "auto"}):
        with pytest.raises(OnnxPruneError, match="--calibration"):
            onnxprune.prune(NET, 0.3, calibration="none", **options)  # type: ignore[arg-type]
    with pytest.raises(OnnxPruneError, match="--calibration"):
        onnxprune.prune(NET, 0.3, criterion="obs")

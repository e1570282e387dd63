"""LSTM, GRU and RNN as readers of their inputs: scores, and weights that are fitted to the gates' pre-activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, numpy_helper
from outside import Weight, build

import onnxprune
from onnxprune import leastsquares
from onnxprune.capture import Tap
from onnxprune.evidence import gather
from onnxprune.grouping import Group, Grouping, group
from onnxprune.importer import load
from onnxprune.oneshot import updated
from onnxprune.plans import Plan
from onnxprune.reconstruction import reconstruct
from onnxprune.rewriter import rewrite
from onnxprune.rounds import put_back
from onnxprune.saliency import energy, obs

Feeds = dict[str, np.ndarray]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
WIDE, HIDDEN = 8, 5


def made(op: str, ways: int = 1, bias: bool = True) -> ModelProto:
    """x (T, N, 6) -> MatMul -> Relu -> the recurrent layer -> MatMul -> y; without a Y of its own where there is no bias."""
    form = "bidirectional" if ways == 2 else "forward"
    tail = "(h, w, r, b) t = Transpose <perm=[0,2,1,3]> (a) z = Reshape (t, order)" if bias else "(h, w, r) z = Identity (a)"
    made = "a" if bias else '"", a'
    body = f'm = MatMul (x, w1) h = Relu (m) {made} = {op} <direction="{form}", hidden_size={HIDDEN}> {tail} y = MatMul (z, w2)'
    rows = GATES[op] * HIDDEN
    weights: dict[str, Weight] = {"w1": (6, WIDE), "w": (ways, rows, WIDE), "r": (ways, rows, HIDDEN), "order": [0, 0, -1]}
    biases = np.random.default_rng(4).standard_normal((ways, 2 * rows)).astype(np.float32)
    return build("float[4,3,6] x", body, "float y", {**weights, "b": biases, "w2": (HIDDEN * (ways if bias else 1), 4)})


def batches(many: int = 40) -> Callable[[], Iterator[Feeds]]:
    rng = np.random.default_rng(7)
    found = [{"x": rng.standard_normal((4, 3, 6)).astype(np.float32)} for _ in range(many)]
    return lambda: iter(found)


def inputs(found: Grouping) -> Group:
    return next(g for g in found.groups if g.units == WIDE)


def tensors(model: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def outputs(model: ModelProto, feeds: Callable[[], Iterator[Feeds]]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, f)[0] for f in feeds()])


CASES = [(op, ways, bias) for op in GATES for ways in (1, 2) for bias in (True, False)]


@pytest.mark.parametrize(("op", "ways", "bias"), CASES)
def test_input_weights_are_the_least_squares_solution(op: str, ways: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leastsquares, "SHRINKAGES", (1e-9,))
    model, feeds = made(op, ways, bias), batches()
    found = group(load(model))
    plan = Plan(found, {inputs(found).id: np.array([0, 4]), next(g for g in found.groups if g.units == HIDDEN).id: np.array([2])})
    pruned = rewrite(found, plan.remove)
    fitted, refits = reconstruct(plan, pruned, feeds)
    x = np.concatenate([Tap(model, ["h"]).run(f)["h"] for f in feeds()]).reshape(-1, WIDE).astype(np.float64)
    whole, now, before = tensors(model), tensors(fitted), tensors(pruned)
    rows = [gate * HIDDEN + i for gate in range(GATES[op]) for i in range(HIDDEN) if i != 2]
    weight, half = whole["w"][:, rows], whole["b"][:, rows] if bias else np.zeros((ways, len(rows)))
    left = x[:, [1, 2, 3, 5, 6, 7]]
    for way in range(ways):
        target = x @ weight[way].T + half[way]
        if bias:
            solution = np.linalg.lstsq(np.column_stack([left, np.ones(len(left))]), target, rcond=None)[0]
            assert now["b"][way, : len(rows)] == pytest.approx(solution[-1], abs=2e-4)
            assert np.array_equal(now["b"][way, len(rows) :], before["b"][way, len(rows) :])
        else:
            solution = np.linalg.lstsq(left, target, rcond=None)[0]
        assert np.abs(now["w"][way] - solution[:6].T).max() < 2e-4
    assert refits[0].after < refits[0].before
    assert {name: a.shape for name, a in now.items()} == {name: a.shape for name, a in before.items()}


@pytest.mark.parametrize("op", GATES)
def test_outputs_come_nearer_to_the_originals(op: str) -> None:
    model, feeds = made(op, 2), batches()
    found = group(load(model))
    plan = Plan(found, {inputs(found).id: np.array([1, 6])})
    pruned = rewrite(found, plan.remove)
    goal = outputs(model, feeds)
    assert [t.name for t in put_back(plan, reconstruct(plan, pruned, feeds)[0]).model.proto.graph.initializer] == list(tensors(model))
    errors = [
        np.mean((outputs(m, feeds) - goal) ** 2)
        for m in (pruned, updated(plan, pruned, gather(found, feeds)), reconstruct(plan, pruned, feeds)[0])
    ]
    assert max(errors[1:]) < 0.9 * errors[0]


@pytest.mark.parametrize("op", GATES)
def test_inputs_count_by_their_share_of_the_gates(op: str) -> None:
    model, feeds = made(op, 2), batches()
    copy = next(t for t in model.graph.initializer if t.name == "w1")
    array = numpy_helper.to_array(copy).copy()
    array[:, 5] = array[:, 3]
    copy.CopyFrom(numpy_helper.from_array(array, "w1"))
    found = group(load(model))
    evidence = gather(found, feeds)
    mine = inputs(found)
    [reading] = evidence.of(mine)
    assert reading.features.tolist() == [[u] for u in range(WIDE)]
    x = np.concatenate([Tap(model, ["h"]).run(f)["h"] for f in feeds()]).reshape(-1, WIDE).astype(np.float64)
    whole = tensors(model)
    gates = x @ whole["w"].reshape(-1, WIDE).T + whole["b"][:, : GATES[op] * HIDDEN].ravel()
    by_hand = (x**2).mean(axis=0) * (whole["w"].reshape(-1, WIDE) ** 2).sum(axis=0) / (gates**2).sum(axis=1).mean()
    assert energy(evidence, mine, np.random.default_rng(0)) == pytest.approx(by_hand, rel=1e-4)
    assert obs(evidence, mine, np.random.default_rng(0)).argmin() in (3, 5)


@pytest.mark.parametrize(("op", "late"), [("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0)])
def test_all_weights_of_recurrent_layers_are_distilled(op: str, late: int) -> None:
    form = ", linear_before_reset=1" if late else ""
    body = f"""p = Transpose <perm=[1,0,2]> (x) m = MatMul (p, w1) h = Relu (m) a = {op} <hidden_size={WIDE}{form}> (h, w, r, b)
               t = Transpose <perm=[2,0,1,3]> (a) z = Reshape (t, order) y = MatMul (z, w2)"""
    rows = GATES[op] * WIDE
    weights: dict[str, Weight] = {"w1": (6, WIDE), "w": (1, rows, WIDE), "r": (1, rows, WIDE), "b": (1, 2 * rows), "w2": (WIDE, 4)}
    model = build("float[N,7,6] x", body, "float y", {**weights, "order": [0, 0, -1]}, seed=2)
    x = np.random.default_rng(0).standard_normal((512, 7, 6)).astype(np.float32)
    found = {
        name: onnxprune.prune(model, 0.3, calibration={"x": x[:256]}, criterion="obs", allocation="uniform", compensation=name)
        for name in ("reconstruct", "distill")
    }
    goal, *others = (outputs(m, lambda: iter([{"x": x[256:]}])) for m in (model, *(result.model for result in found.values())))
    before, after = (error / np.mean(goal**2) for error in (np.mean((other - goal) ** 2) for other in others))
    assert after < 0.8 * before
    one, other = (tensors(result.model) for result in found.values())
    for name in ("w", "r", "b"):
        assert np.abs(one[name] - other[name]).max() > 1e-3


def test_a_recurrent_layer_that_makes_nothing_is_no_layer() -> None:
    """The checker allows it: all outputs are optional."""
    weights: dict[str, Weight] = {"w0": (8, 16), "w1": (16, 4), "w": (1, 4, 8), "r": (1, 4, 4), "three": [1, -1, 8]}
    body = 'c = Reshape (x, three) "", e = RNN <hidden_size=4> (c, w, r) a = MatMul (x, w0) b = Relu (a) y = MatMul (b, w1)'
    model = build("float[N,8] x", body, "float[N,4] y", weights)
    model.graph.node[1].output[1] = ""
    data = {"x": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}
    for name in ("reconstruct", "distill"):
        assert onnxprune.prune(model, 0.3, calibration=data, compensation=name).fidelity is not None

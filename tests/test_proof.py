"""The proof of the pruned model: what it lets pass, what it stops, and what it does with the rest of the model."""

from __future__ import annotations

import numpy as np
import pytest
from outside import Weight, build, covered, distance, feeds_of, masked, run

import onnxprune
from onnxprune import relations
from onnxprune.rules import reductions

CHAIN: dict[str, Weight] = {"w1": (6, 8), "w2": (4, 10), "w3": (10, 3)}
LAST: dict[str, Weight] = {"l1": [1]}


def test_a_missing_statistic_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean said to be a sum passes every permutation; that zeros differ from removing has then no reason in the graph."""
    monkeypatch.setitem(relations._RULES, "ReduceMean", reductions.reduce_sum)
    body = "h = MatMul (x, w1) m = ReduceMean <axes=[1]> (h) z = MatMul (x, v) r = Relu (z) q = Add (r, m) y = MatMul (q, w3)"
    model = build("float[5,6] x", body, "float[5,3] y", {"w1": (6, 8), "v": (6, 10), "w3": (10, 3)})
    result = onnxprune.prune(model, 0.4, of="channels", min_keep=1)
    assert {place for place in covered(result.plan.to_json()) if place[0] == "w1"} == set()
    assert {tuple(t.dims) for t in result.model.graph.initializer if t.name == "w1"} == {(6, 8)}
    assert result.proof is not None
    assert any("zeros in place of its units" in reason for reason in result.proof.frozen.values())
    claimed = onnxprune.plan(model, 0.4, of="channels", min_keep=1, verify=False)
    with pytest.raises(onnxprune.OnnxPruneError, match="'w1'") as caught:
        onnxprune.apply(model, claimed, verify=True)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("body", "marked"),
    [
        ("s = Sigmoid (h) m = ReduceSum (s, l1)", True),
        ("s = Sigmoid (h) m = MatMul (s, w2)", False),
        ("s = Tanh (h) m = ReduceSum (s, l1)", False),
        ("a = Add (h, one) s = Relu (a) m = ReduceSum (s, l1)", True),
        ("a = Add (h, b) s = Relu (a) m = ReduceSum (s, l1)", False),
        ("s = Cos (h) t = Transpose (s) m = MatMul (s, t)", True),
        ("s = Clip (h, one) m = ReduceSum (s, l1)", True),
        ("s = Clip (h, zero) m = ReduceSum (s, l1)", False),
    ],
)
def test_what_makes_something_of_zeros_is_marked(body: str, marked: bool) -> None:
    weights = {"l1": [1], "w2": (8, 4), "one": np.array(1, np.float32), "zero": np.array(0, np.float32), "b": (8,)}
    used = {k: w for k, w in weights.items() if f"{k})" in body}
    model = build("float[5,6] x", f"h = MatMul (x, w1) {body} y = Relu (m)", "float y", {"w1": (6, 8), **used})
    result = onnxprune.prune(model, 0.4, of="channels")
    assert [g.statistics for g in result.plan.groups] == [marked]
    assert result.proof is not None
    assert (result.proof.masked is None) == marked
    feeds, plan = feeds_of(model), result.plan.to_json()
    if not marked:
        assert distance(run(masked(model, plan), feeds), run(result.model, feeds)) < 1e-4


def test_what_the_rewriter_cannot_do_stays_and_the_rest_is_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Reshape whose number nobody mends."""

    def forgetful(site: relations.Site) -> None:
        site.product(site.x[0], site.y[0])

    monkeypatch.setitem(relations._RULES, "Reshape", forgetful)
    body = "h = MatMul (x, w1) r = Reshape (h, to) k = MatMul (r, v) s = Relu (k) y = MatMul (s, w3)"
    model = build("float[5,6] x", body, "float y", {"w1": (6, 8), "to": [5, 1, 8], "v": (8, 10), "w3": (10, 3)})
    result = onnxprune.prune(model, 0.3, of="channels")
    shapes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert shapes["w1"] == (6, 8)
    assert shapes["v"][0] == 8
    assert shapes["v"][1] == shapes["w3"][0] < 10
    assert result.proof is not None
    assert list(result.proof.frozen) == [0]
    assert 0 not in result.proof.proven
    assert any("fail the proof" in reason for _, _, reason in result.plan.grouping.fixed)
    with pytest.raises(onnxprune.OnnxPruneError) as caught:
        onnxprune.prune(model, 0.3, of="channels", scope=["w1"])
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("shape", [(1, 5, 6), (5, 4, 6)])
def test_squeeze_does_not_take_an_axis_that_pruning_made_one(shape: tuple[int, ...], opset: int) -> None:
    dims = ",".join(map(str, shape))
    body = "h = MatMul (x, w1) r = Relu (h) s = Squeeze (r) y = MatMul (s, w2)"
    model = build(f"float[{dims}] x", body, "float y", {"w1": (6, 2), "w2": (2, 3)}, opset)
    result = onnxprune.prune(model, 0.5, of="channels", min_keep=1)
    assert [t.dims[1] for t in result.model.graph.initializer if t.name == "w1"] == [1]
    feeds = feeds_of(model)
    assert distance(run(masked(model, result.plan.to_json()), feeds), run(result.model, feeds)) < 1e-5


CHAOS = " ".join(f"m{i} = Mul (x{i}, o{i}) x{i + 1} = Mul (four, m{i}) o{i + 1} = Sub (one, x{i + 1})" for i in range(18))


def chaotic() -> onnxprune.api.ModelProto:
    """A logistic map after two layers: it doubles every rounding eighteen times."""
    body = f"h = MatMul (x, w1) r = Relu (h) k = MatMul (r, w2) x0 = Sigmoid (k) o0 = Sub (one, x0) {CHAOS} y = Identity (x18)"
    numbers = {"one": np.array(1, np.float32), "four": np.array(4, np.float32)}
    return build("float[5,6] x", body, "float y", {"w1": (6, 16), "w2": (16, 40), **numbers})


def test_groups_that_rounding_hides_stay_whole() -> None:
    model = chaotic()
    assert len(onnxprune.groups(model, verify=False).groups) == 1
    with pytest.raises(onnxprune.OnnxPruneError, match="rounding alone changes the outputs") as caught:
        onnxprune.prune(model, 0.4)
    assert caught.value.exit_code == 3


def test_inputs_and_outputs_that_may_shrink_are_proven_too() -> None:
    body = "h = MatMul (x, w1) a = Add (h, cache) now = Relu (a) y = MatMul (now, w2)"
    model = build("float[5,6] x, float[5,8] cache", body, "float[5,3] y, float[5,8] now", {"w1": (6, 8), "w2": (8, 3)})
    result = onnxprune.prune(model, 0.5, of="channels", allow_io=["cache", "now"])
    assert result.proof is not None
    assert result.proof.proven == (0,)
    assert result.proof.masked is not None
    assert result.proof.masked < 1e-3
    assert onnxprune.verify(model, result.model, result.plan).matches == 0
    kept = np.delete(np.arange(8), result.plan.remove[0])
    feeds = feeds_of(model)
    whole = run(masked(model, result.plan.to_json()), feeds)
    ours = run(result.model, {**feeds, "cache": feeds["cache"][:, kept]})
    assert distance({"now": whole["now"][:, kept]}, {"now": ours["now"]}) < 1e-5

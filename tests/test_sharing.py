"""Tensors that an exporter merged because they were equal: all of one number, they tie nothing; else they do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from outside import as_constants, build, covered, distance, feeds_of, following, masked, permuted, run, shrunk, tensors

import onnxprune

LAYERS = {"w1": (8, 6), "w2": (8, 8), "w3": (8, 8), "w4": (8, 4), "s": (8,)}
CHAIN = "a = MatMul (x, w1) b = Add (a, shared) c = MatMul (b, w2) d = Add (c, shared) e = Relu (d) f = MatMul (e, w3) "
CHAIN += "g = Add (f, shared) h = Mul (g, s) y = MatMul (h, w4)"
STATES = "o, h, c = LSTM <hidden_size=8> (x, w, r, , , state, state) t = Squeeze (o, one) o2, h2, c2 = LSTM <hidden_size=8> "
STATES += "(t, v, q, , , state, state) u = Squeeze (o2, one) y = MatMul (u, w4)"


def chain(shared: np.ndarray) -> ModelProto:
    return build("float[B,8] x", CHAIN, "float y", {**LAYERS, "w1": (8, 8), "shared": shared})


def states(shared: np.ndarray) -> ModelProto:
    weights = {"w": (1, 32, 6), "r": (1, 32, 8), "v": (1, 32, 8), "q": (1, 32, 8), "w4": (8, 4), "one": [1], "state": shared}
    return build("float[5,2,6] x", STATES, "float y", weights)


@pytest.mark.parametrize("wrap", [lambda model: model, as_constants], ids=["initializers", "constants"])
@pytest.mark.parametrize(
    ("model", "apart"),
    [
        (chain(np.zeros(8, np.float32)), {("w1", 1), ("w2", 0), ("w2", 1), ("w3", 0), ("w3", 1), ("w4", 0)}),
        (chain(np.full(8, 0.75, np.float32)), {("w1", 1), ("w2", 0), ("w2", 1), ("w3", 0), ("w3", 1), ("w4", 0)}),
        (states(np.zeros((1, 2, 8), np.float32)), {("r", 2), ("q", 2), ("v", 2), ("w4", 0)}),
    ],
    ids=["zeros", "other-number", "states"],
)
def test_readers_of_one_number_are_pruned_apart(
    model: ModelProto, apart: set[tuple[str, int]], wrap: Callable[[ModelProto], ModelProto]
) -> None:
    model = wrap(model)
    result = onnxprune.prune(model, 0.4, criterion="random")
    content = result.plan.to_json()
    assert apart <= set(covered(content))
    assert not {("shared", 0), ("state", 2)} & set(covered(content))
    assert len({g["id"] for g in content["groups"]}) >= len(apart) // 2
    content["groups"] = [g | {"remove": list(range(k + 1))} for k, g in enumerate(content["groups"])]  # of each another number
    pruned = onnxprune.apply(model, content).model
    onnx.checker.check_model(pruned, full_check=True)
    assert not shrunk(model, pruned, content)
    feeds, other = feeds_of(model), permuted(model, content)
    assert distance(run(model, feeds), run(other, feeds)) < 1e-4
    assert distance(run(pruned, feeds), run(onnxprune.apply(other, following(content)).model, feeds)) < 1e-4
    assert distance(run(masked(model, content), feeds), run(pruned, feeds)) < 1e-4


def test_different_numbers_tie_their_readers() -> None:
    model = chain(np.linspace(-1, 1, 8, dtype=np.float32))
    groups = onnxprune.groups(model).to_json()["groups"]
    assert len(groups) == 1
    assert ("shared", 0) in covered({"groups": groups})
    pruned = onnxprune.prune(model, 0.4).model
    assert [t.dims[0] for name, t in tensors(pruned).items() if name == "shared"] == [tensors(pruned)["w4"].dims[0]]


def test_a_tensor_that_stays_whole_is_not_copied() -> None:
    model = chain(np.zeros(8, np.float32))
    pruned = onnxprune.prune(model, 0.2, exclude=["w1", "w4"]).model
    own = [t for t in pruned.graph.initializer if not np.any(onnx.numpy_helper.to_array(t))]
    assert sorted(t.dims[0] for t in own) == sorted({t.dims[0] for t in own}), "one tensor for each size"
    assert "shared" in {t.name for t in own}

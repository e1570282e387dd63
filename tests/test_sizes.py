"""Sizes that reach data, bodies, outputs or run-time arithmetic: the pruned model computes with them as the original did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from outside import Weight, build, distance, feeds_of, masked, run

import onnxprune
from onnxprune.importer import load

LAYERS = {"w1": (6, 8), "w2": (8, 4)}
X, SEQUENCE = "float[B,6] x", "float[B,S,6] x"
NUMBERS = {"i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "o1": np.array(1), "one": [1], "l0": [0], "l1": [1], "l2": [2]}

CASES = {
    "read-in-if": (
        "float[B,6] x, bool c",
        "h = MatMul (x, w1) s = Shape (h) k = Gather (s, i1) kf = Cast <to=1> (k) "
        "sc = If (c) <then_branch = g1 () => (float a) {a = Sqrt (kf)}, else_branch = g2 () => (float b) {b = Identity (kf)}> "
        "z = MatMul (h, w2) y = Div (z, sc)",
    ),
    "range": (
        X,
        "h = MatMul (x, w1) s = Shape (h) c = Gather (s, i1) r = Range (i0, c, o1) rf = Cast <to=1> (r) m = ReduceMean (rf) "
        "z = MatMul (h, w2) y = Mul (z, m)",
    ),
    "tile": (
        X,
        "h = MatMul (x, w1) s = Shape (h) k = Gather (s, l1) r = Concat <axis=0> (one, k) t = Tile (x, r) u = ReduceSum (t, l1) "
        "z = MatMul (h, w2) y = Add (z, u)",
    ),
    "smallest-of-two-sizes": (
        SEQUENCE,
        "h = MatMul (x, w1) s = Shape (h) c = Gather (s, i2) n = Gather (s, i1) k = Min (c, n) kf = Cast <to=1> (k) "
        "z = MatMul (h, w2) y = Div (z, kf)",
    ),
    "slice-end": (
        "float[B,8] x",
        "h = MatMul (x, v1) s = Shape (h) k = Gather (s, l1) t = Slice (x, l0, k, l1) u = ReduceSum (t, l1) "
        "z = MatMul (h, w2) y = Add (z, u)",
    ),
    "positions-by-arithmetic": (
        SEQUENCE,
        "s = Shape (x) n = Gather (s, l1) q = Div (n, l2) e = Add (q, one) ids = Slice (ar, l0, e, l0) p = Gather (tab, ids) "
        "u = ReduceMean <axes=[0], keepdims=0> (p) a = Add (x, u) h = MatMul (a, w1) y = MatMul (h, w2)",
    ),
    "size-is-an-output": (X, "h = MatMul (x, w1) s = Shape (h) k = Gather (s, i1) y = Cast <to=1> (k) z = MatMul (h, w2)"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_sizes_keep_their_numbers(name: str) -> None:
    inputs, body = CASES[name]
    outputs = "float y, float z" if name == "size-is-an-output" else "float y"
    weights = {**LAYERS, **NUMBERS, "v1": (8, 8), "tab": (16, 6), "ar": np.arange(16)}
    used = {word.strip("(),") for word in body.replace("(", "( ").split()}
    model = build(inputs, body, outputs, {k: v for k, v in weights.items() if k in used})
    del model.graph.value_info[:]
    result = onnxprune.prune(model, 0.4, of="channels")
    plan = result.plan.to_json()
    assert any(len(r) for r in result.plan.remove.values())
    assert not any(m.tensor == "tab" and m.axis == 0 for g in result.plan.groups for m in g.members)
    for batch, length in ((2, 2), (1, 1), (3, 20)):
        feeds = {k: sized(v, batch, length) for k, v in feeds_of(model).items()}
        assert distance(run(masked(model, plan), feeds), run(result.model, feeds)) < 1e-4


def sized(array: np.ndarray, batch: int, length: int) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    leading = (batch, length)[: array.ndim - 1]
    return np.random.default_rng(batch).standard_normal((*leading, array.shape[-1])).astype(np.float32)


def test_sizes_that_depend_on_data_are_not_constants() -> None:
    body = (
        "c = Compress <axis=0> (x, m) h = MatMul (c, w1) s = Shape (c) k = Gather (s, l0) t = Concat <axis=0> (k, l2, four) "
        "r = Reshape (h, t) p = Transpose <perm=[0,2,1]> (r) q = Relu (p) f = Flatten (q) y = MatMul (f, w2)"
    )
    model = build("float[4,6] x, bool[4] m", body, "float[n,4] y", {**LAYERS, "l0": [0], "l2": [2], "four": [4]})
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    every = {"x": x, "m": np.ones(4, bool)}
    try:
        result = onnxprune.prune(model, 0.4, of="channels", feeds=every)
    except onnxprune.OnnxPruneError as error:
        if error.exit_code == 3:
            return
        raise
    some = {"x": x, "m": np.array([True, False, True, False])}
    assert distance(run(masked(model, result.plan.to_json()), some), run(result.model, some)) < 1e-4


def test_inputs_with_defaults_stay_inputs() -> None:
    model = build("float[B,6] x", "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)", "float[B,4] y", dict(LAYERS))
    model.graph.input.append(onnx.helper.make_tensor_value_info("unused", 1, [4]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "unused"))
    pruned = onnxprune.prune(model, 0.4, of="channels").model
    assert [v.name for v in pruned.graph.input] == ["x", "unused"]
    assert "unused" in {t.name for t in pruned.graph.initializer}


def test_a_symbol_has_one_size_in_all_inputs() -> None:
    """A state [1, n, 4] beside x [n, 3, h, w] whose kernel takes no pictures of 2 by 2; and a shape given for one says it for the other."""
    body = "h = Conv (x, a) p = GlobalAveragePool (h) f = Flatten (p) l = MatMul (s, b) m = Squeeze (l, zero) y = Add (f, m)"
    weights: dict[str, Weight] = {"a": (6, 3, 5, 5), "b": (4, 6), "zero": [0]}
    model = build("float[n,3,h,w] x, float[1,n,4] s", body, "float y", weights)
    assert load(model).input_shapes == {"x": (2, 3, 32, 32), "s": (1, 2, 4)}
    assert load(model, None, {"x": (5, 3, 8, 8)}).input_shapes["s"] == (1, 5, 4)

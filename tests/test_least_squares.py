"""Layers as matrix products, and the weights that are fitted to samples, against direct numpy solutions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from conftest import MODELS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from outside import Weight, build, changed, feeds_of, run, tensors
from random_graphs import models

import onnxprune
from onnxprune import Result
from onnxprune.cautions import cautions
from onnxprune.importer import load
from onnxprune.leastsquares import SHRINKAGES, shrunk
from onnxprune.linear import CONVOLUTIONS, SAME, linears
from onnxprune.moments import Gathering, Moments
from onnxprune.ridge import fit

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Case:
    """One layer between x and y, in the text of onnx.parser; weight `w`, bias `b` where there is one."""

    body: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    weights: Mapping[str, Weight]

    def model(self) -> ModelProto:
        sizes = (
            "".join(f"{'float' if not i else ''}{'[' if not i else ''}{n}," for i, n in enumerate(s))[:-1] + "]" for s in (self.x, self.y)
        )
        taken, made = sizes
        return build(f"{taken} x", self.body, f"{made} y", self.weights)


def attribute(**lists: object) -> str:
    return ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in lists.items())


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Conv in one to three spatial axes, of any groups: full, grouped and depthwise."""
    axes = draw(st.integers(1, 3))
    group, into, wide = draw(st.sampled_from([(1, 3, 2), (1, 1, 4), (2, 2, 3), (3, 1, 1), (3, 1, 2)]))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(axes)]

    kernel, strides, auto = each(1, 3), each(1, 3), draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    dilations = [1] * axes if auto.startswith("SAME") else each(1, 2)
    pads = each(0, 2) + each(0, 2) if auto == "NOTSET" else [0] * 2 * axes
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [r + draw(st.integers(0, 4)) for r in reach]
    given = {"group": group, "strides": strides, "dilations": dilations} | ({"pads": pads} if auto == "NOTSET" else {"auto_pad": auto})
    weights: dict[str, Weight] = {"w": (group * wide, into, *kernel)}
    if draw(st.booleans()):
        weights["b"] = (group * wide,)
    made = []
    for i, n in enumerate(size):
        made.append(-(-n // strides[i]) if auto.startswith("SAME") else (n + pads[i] + pads[axes + i] - reach[i]) // strides[i] + 1)
    batch = draw(st.integers(1, 3))
    body = f"y = Conv<{attribute(**given)}>({', '.join(['x', *weights])})"
    return Case(body, (batch, group * into, *size), (batch, group * wide, *made), weights)


@st.composite
def transposed(draw: st.DrawFn) -> Case:
    """ConvTranspose in one or two spatial axes, of any groups."""
    axes = draw(st.integers(1, 2))
    group, into, wide = draw(st.sampled_from([(1, 3, 2), (2, 2, 3), (3, 1, 1), (1, 1, 4)]))
    kernel, size, strides = ([draw(st.integers(1, 3)) for _ in range(axes)] for _ in range(3))
    dilations = [draw(st.integers(1, 2)) for _ in range(axes)]
    extra = [draw(st.integers(0, s - 1)) for s in strides]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [draw(st.integers(0, r - 1)) for r in reach] + [draw(st.integers(0, r - 1)) for r in reach]
    whole = [(n - 1) * s + r + e for n, s, r, e in zip(size, strides, reach, extra, strict=True)]
    made = [n - pads[i] - pads[axes + i] for i, n in enumerate(whole)]
    assume(min(made) > 0)
    given: dict[str, object] = {"group": group, "strides": strides, "dilations": dilations, "output_padding": extra}
    said, auto = draw(st.sampled_from(["pads", "auto_pad", "output_shape"])), draw(st.sampled_from(["VALID", *SAME]))
    if said == "pads":
        given["pads"] = pads
    else:
        given |= {"auto_pad": auto} if said == "auto_pad" or draw(st.booleans()) else {}
        given |= {"output_shape": made} if said == "output_shape" else {}
    if said == "auto_pad":
        made = whole if auto == "VALID" else [min(full, n * s) for full, n, s in zip(whole, size, strides, strict=True)]
    weights: dict[str, Weight] = {"w": (group * into, wide, *kernel)} | ({"b": (group * wide,)} if draw(st.booleans()) else {})
    batch = draw(st.integers(1, 3))
    body = f"y = ConvTranspose<{attribute(**given)}>({', '.join(['x', *weights])})"
    return Case(body, (batch, group * into, *size), (batch, group * wide, *made), weights)


@st.composite
def gemms(draw: st.DrawFn) -> Case:
    rows, into, wide, flipped = (draw(st.integers(1, 5)) for _ in range(4))
    flipped = flipped % 2
    weights: dict[str, Weight] = {"w": (wide, into) if flipped else (into, wide)}
    bias = draw(st.sampled_from([None, (wide,), (1, wide)]))
    weights |= {"b": bias} if bias else {}
    given = attribute(alpha=draw(st.sampled_from([1.0, 0.5, -3.0])), beta=draw(st.sampled_from([1.0, 0.0, 2.0, -0.3])), transB=flipped)
    return Case(f"y = Gemm<{given}>({', '.join(['x', *weights])})", (rows, into), (rows, wide), weights)


@st.composite
def products(draw: st.DrawFn) -> Case:
    """MatMul with a constant on the right, with an Add behind it or not, or on the left."""
    before = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 2)))]
    rows, into, wide = (draw(st.integers(1, 5)) for _ in range(3))
    kind = draw(st.sampled_from(["plain", "bias behind", "bias before", "left"]))
    if kind == "left":
        return Case("y = MatMul(w, x)", (*before, into, rows), (*before, wide, rows), {"w": (wide, into)})
    if kind == "plain":
        return Case("y = MatMul(x, w)", (*before, rows, into), (*before, rows, wide), {"w": (into, wide)})
    added = "Add(h, b)" if kind == "bias behind" else "Add(b, h)"
    bias = draw(st.sampled_from([(wide,), (1, wide)]))
    return Case(f"h = MatMul(x, w) y = {added}", (*before, rows, into), (*before, rows, wide), {"w": (into, wide), "b": bias})


@st.composite
def behind(draw: st.DrawFn) -> Case:
    """A layer that reads its weight behind other nodes."""
    case = draw(st.one_of(convolutions(), gemms(), products()))
    weight, name, steps = case.weights["w"], "w", []
    assert isinstance(weight, tuple)
    for i, op in enumerate(
        draw(st.lists(st.sampled_from(["Identity", "Cast<to=1>", *["Transpose"] * 2 * (len(weight) == 2)]), min_size=1))
    ):
        weight = weight[::-1] if op == "Transpose" else weight
        steps.append(f"w{i} = {op}({name})")
        name = f"w{i}"
    body = re.sub(r"\bw\b(?=[,)])", name, case.body)
    return Case(f"{' '.join(steps)} {body}", case.x, case.y, {**case.weights, "w": weight})


layers = st.one_of(convolutions(), convolutions(), transposed(), transposed(), gemms(), products(), behind())


def seen(case: Case, share: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, targets, matrix and bias of a layer on seeded inputs, at some of its places; its shapes and weights are checked on the way."""
    proto = case.model()
    model = load(proto)
    (layer,) = linears(model)
    weight = model.array("w")
    shape = layer.geometry(model.main[layer.node], weight.ndim)
    feeds = feeds_of(proto, seed=1)
    y = run(proto, feeds)["y"]
    assert (layer.source, layer.weight, layer.bias, layer.output) == ("x", "w", "b" if "b" in case.weights and layer.beta else "", "y")
    assert shape.out(feeds["x"].shape, weight.shape) == y.shape == case.y
    count = shape.places(y.shape)
    places = np.sort(np.random.default_rng(0).choice(count, max(1, round(share * count)), replace=False))
    rows = shape.rows(feeds["x"], y.shape, weight.shape[2:] if layer.op in CONVOLUTIONS else (), places)
    matrix = shape.matrix(weight)
    given = layer.beta * model.array("b").ravel() if layer.bias else np.zeros(matrix.shape[0] * matrix.shape[1], np.float32)
    made = shape.weight(matrix, weight)
    assert made.dtype == weight.dtype
    np.testing.assert_array_equal(made, weight)
    return rows, shape.targets(y, places), matrix, given.reshape(matrix.shape[:2])


@settings(quick, max_examples=300)
@given(layers, st.sampled_from([1.0, 0.5]))
def test_rows_by_the_matrix_are_what_onnxruntime_makes(case: Case, share: float) -> None:
    rows, targets, matrix, bias = seen(case, share)
    np.testing.assert_allclose(rows @ matrix.transpose(0, 2, 1) + bias[:, None], targets, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("y = Gemm(x, w, b)", {"w": (4, 3), "b": (3, 1)}),  # one number a row, not a column
        ("y = Gemm<alpha=0.0>(x, w, b)", {"w": (4, 3), "b": (3,)}),
        ("y = Gemm<transA=1>(x, w)", {"w": (3, 3)}),
        ("h = Transpose(w) t = Neg(h) y = MatMul(x, t)", {"w": (3, 4)}),
        ("h = Transpose(w) i = Identity(h) k = MatMul(x, i) z = Softmax(h) j = MatMul(x, z) y = Add(k, j)", {"w": (3, 4)}),
        ("h = Transpose(w) k = MatMul(x, h) z = Softmax(h) j = MatMul(x, z) y = Add(k, j)", {"w": (3, 4)}),  # what is made of w is shared
        ("h = Mul(w, s) y = MatMul(x, h)", {"w": (4, 3), "s": (3,)}),  # the weight passes through a node
        ("h = MatMul(x, w) z = MatMul(h, v) y = MatMul(z, v)", {"w": (4, 3), "v": (3, 3)}),  # v is shared; w is a layer
    ],
)
def test_what_is_not_rows_by_a_matrix_and_a_bias_is_no_layer(body: str, weights: Mapping[str, Weight]) -> None:
    proto = build("float[3, 4] x", body, "float[N, M] y", weights)
    assert [layer.weight for layer in linears(load(proto))] == (["w"] if "v" in weights else [])


# --- the fit ---------------------------------------------------------------------------------------------------------


def direct(rows: np.ndarray, targets: np.ndarray, start: np.ndarray, shrinkage: float, bias: np.ndarray | None = None) -> np.ndarray:
    """(out, features + 1): weights and bias of one group by numpy.linalg.lstsq on stacked rows; `bias`: where it may not change.

    The ridge is more rows: √(nλs) for each feature, whose target is √(nλs)·W₀.
    """
    x, y = rows.astype(np.float64), targets.astype(np.float64)
    n, k = x.shape
    ones = np.ones((n, 1)) if bias is None else np.zeros((n, 0))
    spread = x.var(axis=0).mean() if bias is None else (x**2).mean()
    pull = np.sqrt(n * shrinkage * spread) * np.eye(k, k + ones.shape[1])
    above = np.hstack([x, ones])
    wanted = y if bias is None else y - bias
    found = np.linalg.lstsq(np.vstack([above, pull]), np.vstack([wanted, pull[:, :k] @ start.T]), rcond=None)[0].T
    return found if bias is None else np.hstack([found, bias[:, None]])


@quick
@given(layers, st.sampled_from([1e-3, 0.1, 10.0]), st.booleans())
def test_a_fit_is_the_ridge_regression_that_pulls_towards_the_weights(case: Case, shrinkage: float, intercept: bool) -> None:
    rows, targets, matrix, bias = seen(case)
    assume(rows.shape[1] > 1 and rows.var(axis=1).mean(axis=1).min() > 1e-3)
    rng = np.random.default_rng(0)
    targets = targets + rng.standard_normal(targets.shape).astype(np.float32)
    moments = Moments.zero(rows.shape[0], rows.shape[2], targets.shape[2])
    for part in np.array_split(np.arange(rows.shape[1]), 3):
        moments.add(rows[:, part], targets[:, part])
    found, shift = fit(moments, matrix, bias, shrinkage, intercept)
    for g in range(len(rows)):
        wanted = direct(rows[g], targets[g], matrix[g], shrinkage, None if intercept else bias[g])
        np.testing.assert_allclose(np.hstack([found[g], shift[g][:, None]]), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("intercept", [True, False])
def test_without_a_ridge_a_fit_is_least_squares(intercept: bool) -> None:
    rng = np.random.default_rng(0)
    rows, targets = rng.standard_normal((2, 200, 5)) + 1, rng.standard_normal((2, 200, 3))
    start, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3))
    moments = Moments.zero(2, 5, 3)
    moments.add(rows, targets)
    found, shift = fit(moments, start, bias, 1e-12, intercept)
    for g in range(2):
        wanted = direct(rows[g], targets[g], start[g], 0.0, None if intercept else bias[g])
        np.testing.assert_allclose(np.hstack([found[g], shift[g][:, None]]), wanted, atol=1e-5)


@quick
@given(st.integers(0, 10**6), st.integers(12, 60), st.floats(0.05, 3), st.booleans())
def test_the_shrinkage_is_the_one_that_does_best_on_held_out_rows(seed: int, rows: int, noise: float, intercept: bool) -> None:
    rng = np.random.default_rng(seed)
    x, true = rng.standard_normal((1, 2 * rows, 8)), rng.standard_normal((3, 8))
    y = x @ true.T + noise * rng.standard_normal((1, 2 * rows, 3)) + 1
    start, bias = true[None] + rng.standard_normal((1, 3, 8)) * 0.3, np.ones((1, 3))
    parts = [Moments.zero(1, 8, 3), Moments.zero(1, 8, 3)]
    for part, half in zip(parts, (slice(0, rows), slice(rows, None)), strict=True):
        part.add(x[:, half], y[:, half])
    found = shrunk(*parts, start, bias, intercept)

    def missed(weights: np.ndarray, half: slice) -> float:
        return float(((y[0, half] - x[0, half] @ weights[:, :-1].T - weights[:, -1]) ** 2).sum(axis=1).mean())

    tried = {}
    for shrinkage in SHRINKAGES:
        tried[shrinkage] = direct(x[0, :rows], y[0, :rows], start[0], shrinkage, None if intercept else bias[0])
    whole = slice(None)
    as_it_is = np.hstack([start[0], bias[0][:, None]])
    scale = y[0].var(axis=0).sum()
    assert found.before == pytest.approx(missed(as_it_is, whole) / scale, rel=1e-3)
    assert found.after == pytest.approx(missed(np.hstack([found.matrix[0], found.bias[0][:, None]]), whole) / scale, rel=1e-3, abs=1e-6)
    assert found.after <= found.before
    least = min(missed(w, slice(rows, None)) for w in tried.values())
    if np.isfinite(found.shrinkage):
        assert missed(tried[found.shrinkage], slice(rows, None)) <= least * 1.001
        again = direct(x[0], y[0], start[0], found.shrinkage, None if intercept else bias[0])
        np.testing.assert_allclose(np.hstack([found.matrix[0], found.bias[0][:, None]]), again, atol=2e-3)
    else:
        np.testing.assert_array_equal(found.matrix, start)
        assert missed(as_it_is, slice(rows, None)) <= least * 1.001 or intercept


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_what_varies_little_for_how_large_it_is_counts_as_well(offset: float) -> None:
    rng = np.random.default_rng(0)
    x, true = (rng.standard_normal((1, 400, 8)) + offset).astype(np.float32), rng.standard_normal((1, 3, 8))
    y = (x @ true[0].T + 0.3 * rng.standard_normal((1, 400, 3)) + offset).astype(np.float32)
    start = true + 0.3 * rng.standard_normal(true.shape)
    parts = [Moments.zero(1, 8, 3), Moments.zero(1, 8, 3)]
    for part, half in zip(parts, (slice(0, 300), slice(300, None)), strict=True):
        part.add(x[:, half], y[:, half])
    found = shrunk(*parts, start, np.zeros((1, 3)))
    missed = np.square(y[0] - x[0] @ found.matrix[0].T - found.bias[0]).sum(axis=1).mean()
    assert found.after == pytest.approx(missed / y[0].var(axis=0).sum(), rel=0.02)
    assert missed == pytest.approx(3 * 0.3**2, rel=0.15)


@pytest.mark.parametrize("weighted", [False, True])
def test_small_batches_come_to_the_same_sums_as_large_ones(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    x, y, weights = rng.standard_normal((2, 41, 60)), rng.standard_normal((2, 41, 3)), rng.random((1, 41, 1)) if weighted else None
    together, apart = Moments.zero(2, 60, 3), Gathering(Moments.zero(2, 60, 3))
    together.add(x, y, weights)
    for i in range(0, 41, 2):
        apart.add(x[:, i : i + 2], y[:, i : i + 2], None if weights is None else weights[:, i : i + 2])
    found = apart.done()
    for name, array in vars(together).items():
        np.testing.assert_allclose(vars(found)[name], array, atol=1e-4)


# --- whole models ----------------------------------------------------------------------------------------------------

HIDDEN = {
    "Conv": ("h = Conv<pads=[1,1,1,1]>(x, v, c) a = Sigmoid(h) y = Conv<strides=[2,1],pads=[0,1,1,0]>(a, w, b)", (3, 12, 2, 3)),
    "Conv without a bias": ("h = Conv<pads=[1,1,1,1]>(x, v, c) a = Sigmoid(h) y = Conv<dilations=[1,2]>(a, w)", (3, 12, 2, 2)),
    "ConvTranspose": (
        "h = Conv<pads=[1,1,1,1]>(x, v, c) a = Tanh(h) y = ConvTranspose<strides=[2,1],output_padding=[1,0],pads=[0,1,1,0]>(a, w, b)",
        (12, 3, 2, 3),
    ),
    "Gemm": (
        "h = Conv<pads=[1,1,1,1]>(x, v, c) a = Sigmoid(h) p = GlobalAveragePool(a) f = Flatten(p) y = Gemm<transB=1>(f, w, b)",
        (3, 12),
    ),
    "ConvTranspose of a size": (
        "h = Conv<pads=[1,1,1,1]>(x, v, c) a = Tanh(h) y = ConvTranspose<strides=[2,1],output_shape=[11,5]>(a, w, b)",
        (12, 3, 2, 3),
    ),
    "MatMul": ("h = MatMul(x, v) i = Add(h, c) a = Tanh(i) z = MatMul(a, w) y = Add(z, b)", (12, 3)),
    "MatMul without a bias": ("h = MatMul(x, v) i = Add(h, c) a = Tanh(i) y = MatMul(a, w)", (12, 3)),
}


def two_deep(kind: str) -> tuple[ModelProto, np.ndarray]:
    """A model whose layer `w` makes the output from 12 hidden channels, and 48 samples."""
    body, shape = HIDDEN[kind]
    flat = kind.startswith("MatMul")
    weights: dict[str, Weight] = {"v": (4, 12) if flat else (12, 4, 3, 3), "c": (12,), "w": shape}
    if "b" in body.split("y =")[1]:
        weights["b"] = (3,)
    model = build("float[N, 5, 4] x" if flat else "float[N, 4, 6, 5] x", body, "float y", weights)
    size = (48, 5, 4) if flat else (48, 4, 6, 5)
    return model, np.random.default_rng(7).standard_normal(size).astype(np.float32)


def watched(model: ModelProto, *names: str) -> ModelProto:
    """The model with more outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    have = {v.name for v in copy.graph.output}
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in have)
    return copy


def arrays(model: ModelProto) -> dict[str, np.ndarray]:
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors(model).items()}


def unfolded(model: ModelProto, source: np.ndarray) -> np.ndarray:
    """The rows (n, features) that the layer `w` of a model reads: what it makes with unit weights, each feature an output."""
    node = next(n for n in model.graph.node if "w" in n.input)
    if node.op_type == "MatMul" or node.op_type == "Gemm":
        return source.reshape(-1, source.shape[-1])
    weight = arrays(model)["w"]
    channels, kernel = source.shape[1], weight.shape[2:]
    features = channels * int(np.prod(kernel))
    unit = np.eye(features, dtype=np.float32).reshape(features, channels, *kernel)
    unit = unit if node.op_type == "Conv" else np.ascontiguousarray(unit.swapaxes(0, 1))
    layer = onnx.helper.make_node(node.op_type, ["x", "w"], ["y"])
    layer.attribute.extend(node.attribute)
    inputs = [onnx.helper.make_tensor_value_info("x", 1, source.shape)]
    graph = onnx.helper.make_graph([layer], "g", inputs, [onnx.helper.make_empty_tensor_value_info("y")])
    graph.initializer.append(numpy_helper.from_array(unit, "w"))
    made = run(onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=8), {"x": source})["y"]
    return np.moveaxis(made, 1, -1).reshape(-1, features)


def by_row(kind: str, y: np.ndarray) -> np.ndarray:
    """A layer's outputs, (rows, out)."""
    return (np.moveaxis(y, 1, -1) if kind.startswith("Conv") else y).reshape(-1, 3)


def as_matrix(kind: str, weight: np.ndarray) -> np.ndarray:
    """(out, features) of a weight."""
    if kind.startswith("ConvTranspose"):
        return weight.swapaxes(0, 1).reshape(3, -1)
    return weight.T if kind.startswith("MatMul") else weight.reshape(3, -1)


@pytest.mark.parametrize(
    "last",
    ["y = Gemm<transB=1>(f, w, z)", "g = Gemm<transB=1, beta=0.0>(f, w, b) y = Add(g, b)", "g = Gemm<transB=1>(f, w, z) y = Add(b, g)"],
)
def test_a_gemm_whose_bias_is_zero_or_behind_it_is_fitted_as_one_with_a_bias(last: str) -> None:
    model, x = two_deep("Gemm")
    body = HIDDEN["Gemm"][0].replace("y = Gemm<transB=1>(f, w, b)", last)
    held = arrays(model)
    weights: dict[str, Weight] = {n: held[n] for n in "vcwb" if n in "vcw" or "b)" in last or "(b" in last} | {"z": np.array(0, np.float32)}
    other = build("float[N, 4, 6, 5] x", body, "float[N, 3] y", weights)
    model = model if "b" in weights else changed(model, {"b": np.zeros(3, np.float32)})
    one, two = (onnxprune.prune(m, 0.4, calibration={"x": x}, criterion="l2", allocation="uniform") for m in (other, model))
    assert [refit.after for refit in one.refits] == pytest.approx([refit.after for refit in two.refits], rel=1e-3)
    np.testing.assert_allclose(run(one.model, {"x": x})["y"], run(two.model, {"x": x})["y"], atol=1e-4)


# another way to write the last layer, and the tensors that make it the same: factors, and whether the weight is turned
OTHERWISE = {
    "y = Gemm<alpha=0.5, beta=4.0, transB=1>(f, w, b)": ("Gemm", {"w": 2.0, "b": 0.25}, False),
    "y = Gemm<alpha=-3.0>(f, w, b)": ("Gemm", {"w": -1 / 3}, True),
    "t = Transpose(w) y = Gemm(f, t, b)": ("Gemm", {}, False),
    'y = ConvTranspose<auto_pad="SAME_UPPER", strides=[2,1]>(a, w, b)': ("ConvTranspose", {}, False),
    "t = Transpose(w) z = MatMul(a, t) y = Add(z, b)": ("MatMul", {}, True),
    "g = Cast<to=11>(w) t = Cast<to=1>(g) z = MatMul(a, t) y = Add(z, b)": ("MatMul", {}, False),
    "k = Identity(b) y = Gemm<beta=0.5, transB=1>(f, w, k)": ("Gemm", {"b": 2.0}, False),
    "k = Cast<to=1>(b) z = MatMul(a, w) y = Add(k, z)": ("MatMul", {}, False),
}


@pytest.mark.parametrize("compensation", ["mean", "moments", "update", "reconstruct", "refine", "distill", "merge"])
@pytest.mark.parametrize("last", OTHERWISE)
def test_however_a_layer_is_written_it_is_fitted_alike(last: str, compensation: str) -> None:
    """alpha, beta, automatic padding and weights behind other nodes, against the same numbers in the plain form."""
    kind, factors, turned = OTHERWISE[last]
    model, x = two_deep(kind)
    body, held = HIDDEN[kind][0], arrays(model)
    if kind == "ConvTranspose":
        body = body.replace("output_padding=[1,0],pads=[0,1,1,0]", "pads=[0,1,0,1]")
    written = {name: (array * factors.get(name, 1)).astype(np.float32) for name, array in held.items()}
    written |= {"w": written["w"].T} if turned else {}
    start = body[: body.rindex("z =" if kind == "MatMul" else "y =")]
    sizes = f"float[N, {', '.join(map(str, x.shape[1:]))}] x"
    plain, other = build(sizes, body, "float y", held), build(sizes, start + last, "float y", written)
    np.testing.assert_allclose(run(other, {"x": x})["y"], run(plain, {"x": x})["y"], atol=1e-4)
    samples = None if compensation == "merge" else {"x": x}
    one, two = (
        onnxprune.prune(m, 0.4, calibration=samples, criterion="random", allocation="uniform", compensation=compensation)
        for m in (plain, other)
    )
    np.testing.assert_allclose(run(two.model, {"x": x})["y"], run(one.model, {"x": x})["y"], atol=2e-4, rtol=2e-3)
    cut = run(onnxprune.apply(other, two.plan).model, {"x": x})["y"]
    assert np.abs(run(two.model, {"x": x})["y"] - cut).max() > 1e-2  # that something was done
    assert not [said for said in cautions(two) if "not fitted" in said]


@pytest.mark.parametrize("compensation", ["mean", "update", "reconstruct", "distill"])
def test_halves_that_are_cast_are_fitted_as_halves_and_given_biases_are_not(compensation: str) -> None:
    """In old files an initializer is an input, too, and a bias that is not there may be an empty name."""
    model, x = two_deep("Conv without a bias")
    before = run(model, {"x": x})["y"]
    plain = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="random", allocation="uniform", compensation=compensation)
    model.graph.node[-1].input.append("")
    for old in (False, True):
        if old:
            model.ir_version, model.opset_import[0].version = 3, 9
            model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer)
        result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="random", allocation="uniform", compensation=compensation)
        onnx.checker.check_model(result.model, full_check=True)
        np.testing.assert_allclose(run(result.model, {"x": x})["y"], run(plain.model, {"x": x})["y"], atol=1e-4)
    held = arrays(model)
    body = HIDDEN["Conv without a bias"][0].replace("y = Conv", "t = Cast<to=1>(w) y = Conv").replace("(a, w)", "(a, t)")
    stored = {name: array.astype(np.float16 if name == "w" else np.float32) for name, array in held.items()}
    halves = build("float[N, 4, 6, 5] x", body, "float y", stored)
    result = onnxprune.prune(halves, 0.4, calibration={"x": x}, criterion="random", allocation="uniform", compensation=compensation)
    assert {array.dtype for name, array in arrays(result.model).items() if name != "w"} == {np.dtype("f4")}
    assert arrays(result.model)["w"].dtype == np.float16
    assert len(arrays(result.model)) == 4  # a bias more
    assert np.square(run(result.model, {"x": x})["y"] - before).mean() < np.square(run(plain.model, {"x": x})["y"] - before).mean() * 1.1


@pytest.mark.parametrize("kind", HIDDEN)
def test_the_consumer_of_pruned_channels_is_the_direct_ridge_solution(kind: str) -> None:
    model, x = two_deep(kind)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="l2", allocation="uniform", compensation="reconstruct")
    (refit,) = result.refits
    surgery = onnxprune.apply(model, result.plan).model
    before, after = arrays(surgery), arrays(result.model)
    hidden = run(watched(result.model, "a" if kind != "Gemm" else "f"), {"x": x})
    rows = unfolded(surgery, hidden["a" if kind != "Gemm" else "f"])
    targets = by_row(kind, run(model, {"x": x})["y"])
    start, bias = as_matrix(kind, before["w"]), before.get("b", np.zeros(3))
    added = next((name for node in result.model.graph.node if "w" in node.input for name in node.input[2:]), "b")
    shift = after.get(added, np.zeros(3))
    fixed = bias if kind == "MatMul without a bias" else None
    assert np.isfinite(refit.shrinkage)
    wanted = direct(rows, targets, start, refit.shrinkage, fixed)
    np.testing.assert_allclose(np.hstack([as_matrix(kind, after["w"]), shift[:, None]]), wanted, atol=5e-3, rtol=5e-3)
    gaps = [targets - rows @ m.T - b for m, b in ((start, bias), (wanted[:, :-1], wanted[:, -1]))]
    errors = [float((gap**2).sum(axis=1).mean() / targets.var(axis=0).sum()) for gap in gaps]
    assert [refit.before, refit.after] == pytest.approx(errors, rel=2e-2)
    assert refit.after < 0.8 * refit.before


def three_deep(activation: str = "Relu") -> tuple[ModelProto, np.ndarray]:
    limits = ", low, high" if activation == "Clip" else ""
    body = f"""h = Conv<pads=[1,1,1,1]>(x, u, a) r = {activation}(h{limits}) i = Conv<pads=[1,1,1,1]>(r, v, b) s = {activation}(i{limits})
               p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w, c)"""
    weights: dict[str, Weight] = {"u": (10, 3, 3, 3), "a": (10,), "v": (12, 10, 3, 3), "b": (12,), "w": (4, 12), "c": (4,)}
    weights |= {"low": np.array(-0.5, np.float32), "high": np.array(1.5, np.float32)} if limits else {}
    return build("float[N, 3, 6, 6] x", body, "float[N, 4] y", weights), np.random.default_rng(3).standard_normal((64, 3, 6, 6)).astype(
        "f4"
    )


@pytest.mark.parametrize("activation", ["Relu", "Clip", "Tanh"])
def test_refits_say_the_errors_that_onnxruntime_finds(activation: str) -> None:
    """Of the middle layer, whose inputs are fitted already, behind the Relu or Clip if there is one."""
    model, x = three_deep(activation)
    result = onnxprune.prune(model, 0.4, calibration={"x": x}, criterion="l2", allocation="uniform", compensation="reconstruct")
    assert [refit.node for refit in result.refits] == ["i", "y"]
    surgery = arrays(onnxprune.apply(model, result.plan).model)
    half = changed(result.model, {name: surgery[name] for name in ("v", "b")})
    removed = {m.tensor: (m.indices, result.plan.remove[g.id]) for g in result.plan.groups for m in g.members if m.axis == 0}
    indices, gone = removed["v"]
    value = "i" if activation == "Tanh" else "s"
    wanted = np.delete(run(watched(model, value), {"x": x})[value], indices[gone].ravel(), axis=1)
    for candidate, said in ((half, result.refits[0].before), (result.model, result.refits[0].after)):
        made = run(watched(candidate, value), {"x": x})[value]
        error = ((made - wanted) ** 2).mean(axis=(0, 2, 3)).sum() / wanted.var(axis=(0, 2, 3)).sum()
        assert said == pytest.approx(float(error), rel=2e-2)
    assert result.refits[0].after < result.refits[0].before


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_a_branch_takes_back_what_the_residual_stream_has_lost(activation: str) -> None:
    """The last layer of the second branch is fitted to the sum, in which the stream is as the pruned model makes it."""
    body = f"""s0 = Conv<pads=[1,1,1,1]>(x, u) h = Conv<pads=[1,1,1,1]>(s0, v, b) r = Relu(h) i = Conv(r, w) s1 = Add(s0, i)
               k = Conv<pads=[1,1,1,1]>(s1, m, c) t = Relu(k) l = Conv(t, n, d) s2 = Add(l, s1) z = {activation}(s2)
               p = GlobalAveragePool(z) f = Flatten(p) y = Gemm<transB=1>(f, o)"""
    shapes = {"u": (8, 3, 3, 3), "v": (12, 8, 3, 3), "w": (8, 12, 1, 1), "m": (12, 8, 3, 3), "n": (8, 12, 1, 1), "o": (4, 8)}
    weights: dict[str, Weight] = {**shapes, "b": (12,), "c": (12,), "d": (8,)}
    model = build("float[N, 3, 6, 6] x", body, "float[N, 4] y", weights)
    x = np.random.default_rng(3).standard_normal((64, 3, 6, 6)).astype(np.float32)
    result = onnxprune.prune(model, 0.5, calibration={"x": x}, criterion="l2", allocation="uniform", compensation="reconstruct")
    refits = {refit.node: refit for refit in result.refits}
    surgery, after = arrays(onnxprune.apply(model, result.plan).model), arrays(result.model)
    stream = next(g for g in result.plan.groups if any(m.tensor == "u" for m in g.members))
    value = "z" if activation == "Relu" else "s2"
    wanted = np.delete(run(watched(model, value), {"x": x})[value], result.plan.remove[stream.id], axis=1)
    errors = []
    for held in (surgery, after):
        made = run(watched(changed(result.model, {name: held[name] for name in "nd"}), value), {"x": x})[value]
        errors.append(float(((made - wanted) ** 2).sum()))
    assert refits["l"].after / refits["l"].before == pytest.approx(errors[1] / errors[0], rel=2e-2)
    assert errors[1] < 0.8 * errors[0]
    not_worse(result)


def not_worse(result: Result) -> None:
    worse = [(r.node, r.before, r.after) for r in result.refits if not r.after <= r.before * (1 + 1e-5) + 1e-9]
    assert not worse


def test_no_layer_of_a_shipped_model_is_worse_than_uncompensated(shipped: str) -> None:
    kinds = {"digits-mlp": "digits-mlp", "digits-conv1d": "digits-conv1d"}
    data = MODELS / f"{kinds.get(shipped, 'digits-images')}.calibration.npz"
    result = onnxprune.prune(
        MODELS / f"{shipped}.onnx", 0.4, calibration=data, samples=64, allocation="global", criterion="l2", compensation="reconstruct"
    )
    assert result.refits
    not_worse(result)
    assert result.fidelity is not None
    assert result.fidelity[1].loss < result.fidelity[0].loss


@settings(quick, max_examples=30)
@given(models(), st.sampled_from((0.3, 0.5)), st.sampled_from((2, 6, 24)))
def test_no_layer_of_a_random_network_is_worse_than_uncompensated(model: ModelProto, ratio: float, samples: int) -> None:
    try:
        result = onnxprune.prune(
            model, ratio, calibration="noise", samples=samples, criterion="fluctuation", allocation="global", compensation="reconstruct"
        )
    except onnxprune.OnnxPruneError as error:
        if error.exit_code == 3:  # nothing can be pruned
            return
        raise
    not_worse(result)
    for array in arrays(result.model).values():
        assert array.dtype.kind != "f" or np.isfinite(array).all()


@pytest.mark.parametrize("count", [16, 64])  # a sample a batch, and more than the model was read with
def test_values_whose_first_axis_is_samples_times_units(count: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (1, 3), "c": (24, 4), "apart": (2,), "together": (2,)}
    tensors = [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in shapes.items()]
    tensors[3:] = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in (("apart", [-1, 1]), ("together", [-1, 24]))]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["one"]),
        helper.make_node("Relu", ["one"], ["two"]),
        helper.make_node("Reshape", ["two", "apart"], ["three"]),  # (samples × 8, 1)
        helper.make_node("MatMul", ["three", "b"], ["four"]),
        helper.make_node("Relu", ["four"], ["five"]),
        helper.make_node("Reshape", ["five", "together"], ["six"]),
        helper.make_node("MatMul", ["six", "c"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 6), ("y", 4))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    found = onnxprune.prune(model, 0.4, calibration={"x": x}, compensation="reconstruct", criterion="l2", allocation="uniform")
    assert [g.units for g in found.plan.groups if len(found.plan.remove.get(g.id, ()))] == [8]
    surgery = onnxprune.apply(model, found.plan).model
    errors = [np.square(run(one, {"x": x})["y"] - run(model, {"x": x})["y"]).sum() for one in (surgery, found.model)]
    assert errors[1] < errors[0]

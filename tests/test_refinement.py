"""Pairs of layers refined together: the linear algebra against its definitions, and that what it finds is better or left."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS, two_layers
from onnx import helper, numpy_helper

import onnxprune
from onnxprune.gaussnewton import Batch, Pair, Weights, adjoint, forward, linearized
from onnxprune.linear import Geometry, geometry
from onnxprune.operators import Operator, operator
from onnxprune.rounds import put_back
from onnxprune.running import session

LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {  # op, attributes, shapes of x and of the weight
    "plain": ("Conv", {"pads": [1, 1, 1, 1]}, (3, 4, 6, 5), (6, 4, 3, 3)),
    "strided": ("Conv", {"strides": [2, 2], "pads": [1, 1, 1, 1]}, (3, 4, 8, 7), (6, 4, 3, 3)),
    "rest unread": ("Conv", {"strides": [3, 2]}, (2, 4, 9, 8), (6, 4, 2, 3)),
    "lopsided": ("Conv", {"pads": [0, 2, 1, 0], "strides": [2, 1]}, (2, 4, 7, 6), (6, 4, 3, 2)),
    "dilated": ("Conv", {"dilations": [2, 3], "pads": [2, 3, 2, 3]}, (2, 4, 8, 9), (6, 4, 3, 3)),
    "grouped": ("Conv", {"group": 2, "pads": [1, 1, 1, 1]}, (2, 4, 5, 5), (6, 2, 3, 3)),
    "depthwise": ("Conv", {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}, (2, 4, 6, 6), (4, 1, 3, 3)),
    "same upper": ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (2, 4, 7, 8), (6, 4, 3, 3)),
    "same lower": ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 1]}, (2, 4, 8, 8), (6, 4, 4, 2)),
    "along one axis": ("Conv", {"pads": [1, 0], "strides": [2]}, (3, 4, 9), (6, 4, 3)),
    "transposed": ("ConvTranspose", {"strides": [2, 2], "pads": [1, 0, 1, 1], "output_padding": [1, 0]}, (2, 4, 4, 5), (4, 6, 3, 3)),
    "transposed groups": ("ConvTranspose", {"group": 2, "strides": [2], "pads": [1, 1]}, (2, 4, 6), (4, 3, 4)),
    "gemm": ("Gemm", {}, (7, 4), (4, 6)),
    "gemm flipped": ("Gemm", {"transB": 1}, (7, 4), (6, 4)),
    "matmul": ("MatMul", {}, (2, 7, 4), (4, 6)),
}


def layer(name: str, x: tuple[int, ...] | None = None) -> tuple[Operator, Geometry, tuple[int, ...], tuple[int, ...], onnx.NodeProto]:
    """The operator, its geometry, the shapes of x and of the weight, and the node."""
    op, given, read, weight = LAYERS[name]
    x = x or read
    node = helper.make_node(op, ["x", "w"], ["y"], **given)
    shape = geometry(node, "w", len(weight))
    found = operator(shape, weight, x, shape.out(x, weight))
    assert found is not None
    return found, shape, x, weight, node


def close(one: float, other: float, scale: float) -> bool:
    return abs(one - other) <= 1e-4 * scale


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_layer_and_its_adjoints(name: str) -> None:
    rng = np.random.default_rng(1)
    made_by, _, read, wide, node = layer(name)
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in (read, wide))
    values = [helper.make_tensor_value_info(n, 1, None) for n in ("x", "w", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:2], values[2:]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    y = made_by.forward(x, weight)
    np.testing.assert_allclose(y, session(model).run(None, {"x": x, "w": weight})[0], atol=1e-4)
    error = rng.standard_normal(y.shape).astype(np.float32)
    product, scale = float((y * error).sum()), float(np.abs(y * error).sum())
    assert made_by.back(error, weight).shape == x.shape
    assert made_by.weigh(x, error).shape == weight.shape
    assert close(float((made_by.back(error, weight) * x).sum()), product, scale)
    assert close(float((made_by.weigh(x, error) * weight).sum()), product, scale)


PAIRS = [
    ("plain", "plain"),
    ("plain", "strided"),
    ("strided", "grouped"),
    ("dilated", "depthwise"),
    ("lopsided", "same upper"),
    ("transposed", "plain"),
    ("plain", "transposed"),
    ("gemm", "gemm flipped"),
    ("matmul", "matmul"),
]


def pair(names: tuple[str, str], bounds: tuple[float, float] | None, activation: str = "tanh") -> tuple[Pair, Weights, Batch]:
    rng = np.random.default_rng(2)
    first, shape, x, wide, _ = layer(names[0])
    op, given, _, second_wide = LAYERS[names[1]]
    middle = shape.out(x, wide)
    inputs = middle[-1] if op in ("Gemm", "MatMul") else middle[1]
    if given.get("group", 1) == 4:  # depthwise
        given, second_wide = {**given, "group": inputs}, (inputs, *second_wide[1:])
    elif op == "Conv":
        second_wide = (second_wide[0], inputs // given.get("group", 1), *second_wide[2:])
    else:
        second_wide = (second_wide[0], inputs) if given.get("transB") else (inputs, *second_wide[1:])
    node = helper.make_node(op, ["x", "w"], ["y"], **given)
    after = geometry(node, "w", len(second_wide))
    out = after.out(middle, second_wide)
    second = operator(after, second_wide, middle, out)
    assert second is not None
    functions = {"tanh": np.tanh, "relu": lambda a: np.maximum(a, 0)}
    wides = middle[first.axis], out[second.axis]
    parts = [rng.standard_normal(s).astype(np.float32) / np.float32(2) for s in (wide, (wides[0],), second_wide, (wides[1],))]
    batch = Batch(*(rng.standard_normal(s).astype(np.float32) for s in (x, out, out)), held=False)
    found = Pair(first, second, (shape, after), functions[activation], (True, True), bounds)
    return found, Weights((parts[0], parts[1], parts[2], parts[3])), batch


def like(weights: Weights, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    a, b, c, d = (rng.standard_normal(part.shape).astype(np.float32) for part in weights.parts)
    return Weights((a, b, c, d))


@pytest.mark.parametrize("names", PAIRS)
def test_the_jacobian_is_what_differences_say(names: tuple[str, str]) -> None:
    two, weights, batch = pair(names, None)
    change = like(weights, 3)

    def made(step: float) -> np.ndarray:
        at = weights.plus(change, step)
        return two.made(batch, at, two.activation(two.between(batch.x, at)))

    expected = (made(1e-2) - made(-1e-2)) / 2e-2
    found = forward(two, linearized(two, batch, weights), weights, change)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("bounds", [None, (0.0, np.inf), (-0.5, 1.0)])
@pytest.mark.parametrize("names", PAIRS)
def test_the_adjoint_belongs_to_the_jacobian(names: tuple[str, str], bounds: tuple[float, float] | None, activation: str) -> None:
    two, weights, batch = pair(names, bounds, activation)
    at = linearized(two, batch, weights)
    change = like(weights, 4)
    error = np.random.default_rng(5).standard_normal(batch.wanted.shape).astype(np.float32)
    made = forward(two, at, weights, change)
    assert close(float((made * error).sum()), change.dot(adjoint(two, at, weights, error)), float(np.abs(made * error).sum()))


def test_gradient_of_the_loss_behind_bounds() -> None:
    """Jᵀ of what is missed is minus half the gradient of the loss, where no target is beyond a bound that the output is not."""
    two, weights, batch = pair(("plain", "strided"), (0.0, np.inf))
    batch = Batch(batch.x, np.abs(batch.wanted) + 20, batch.beside, False)
    two = Pair(two.first, two.second, two.shapes, two.activation, two.free, (-15.0, np.inf))
    at, change = linearized(two, batch, weights), like(weights, 6)
    slope = (two.loss([batch], weights.plus(change, 1e-2)) - two.loss([batch], weights.plus(change, -1e-2))) / 2e-2
    found = -2 * change.dot(adjoint(two, at, weights, at.missed))
    assert abs(found - slope) < 0.02 * abs(slope)


def conv_model(seed: int = 0, activation: str = "Relu", hidden: int = 16, read_twice: bool = False) -> onnx.ModelProto:
    """x -> Conv -> activation -> Conv (stride 2) -> Add of a 1x1 Conv of x -> Relu -> y."""
    rng = np.random.default_rng(seed)
    again = "t = Relu(y0) z = ReduceMean<axes=[2,3],keepdims=0>(a)" if read_twice else "t = Relu(y0)"
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        m (float[N, 4, 8, 8] x) => (float[N, 6, 4, 4] t{", float[N, 16] z" if read_twice else ""}) {{
            a = Conv<pads=[1,1,1,1]>(x, w1)
            h = {activation}(a)
            b = Conv<pads=[1,1,1,1],strides=[2,2]>(h, w2, b2)
            s = Conv<strides=[2,2]>(x, w3)
            y0 = Add(b, s)
            {again}
        }}"""
    model = onnx.parser.parse_model(text)
    shapes = {"w1": (hidden, 4, 3, 3), "w2": (6, hidden, 3, 3), "b2": (6,), "w3": (6, 4, 1, 1)}
    for name, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
        model.graph.initializer.append(numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(np.float32), name))
    return model


def smooth(count: int, seed: int) -> np.ndarray:
    """Images whose channels and neighbours go together."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 4, 10, 10)).astype(np.float32)
    x = x[:, :, :-2, :-2] + x[:, :, 1:-1, 1:-1] + x[:, :, 2:, 2:]
    return x + x[:, ::-1]


def missed(original: onnx.ModelProto, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """Share of the first output's variance."""
    y, made = (session(m).run(None, feeds)[0] for m in (original, model))
    return float(np.square(np.asarray(y) - np.asarray(made)).mean() / np.asarray(y).var())


def pruned(model: onnx.ModelProto, calibration: dict[str, np.ndarray], compensation: str, **more: Any) -> onnxprune.Result:
    given = {"criterion": "obs", "allocation": "uniform", "verify": False, **more}
    return onnxprune.prune(model, given.pop("ratio", 0.5), calibration=calibration, compensation=compensation, **given)


@pytest.mark.parametrize("activation", ["Relu", "Clip", "LeakyRelu<alpha=0.2>", "HardSwish", "Sigmoid"])
def test_a_pair_of_convolutions_comes_nearer(activation: str) -> None:
    """On samples that were not seen, refined layers miss much less than layers fitted one by one."""
    model = conv_model(activation=activation)
    seen, fresh = {"x": smooth(256, 1)}, {"x": smooth(64, 2)}
    least, best = (missed(model, pruned(model, seen, name).model, fresh) for name in ("reconstruct", "refine"))
    assert best < 0.85 * least


GELU = """
    <ir_version: 8, opset_import: ["": 17]>
    ffn (float[N, T, 8] x) => (float[N, T, 8] y) {
        m1 = MatMul(x, w1)
        a = Add(m1, b1)
        d = Div(a, root)
        e = Erf(d)
        f = Add(e, one)
        g = Mul(a, f)
        h = Mul(g, half)
        m2 = MatMul(h, w2)
        o = Add(b2, m2)
        y = Add(o, x)
    }"""


def test_a_gelu_in_pieces_between_matmuls() -> None:
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model(GELU)
    arrays = {
        "w1": rng.standard_normal((8, 32)),
        "b1": rng.standard_normal(32) / 2,
        "w2": rng.standard_normal((32, 8)) / 4,
        "b2": np.zeros(8),
    }
    arrays |= {"root": np.array(np.sqrt(2)), "one": np.array(1.0), "half": np.array(0.5)}
    model.graph.initializer.extend(numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items())
    mixed = rng.standard_normal((8, 8))
    seen, fresh = ({"x": (rng.standard_normal((n, 12, 8)) @ mixed / 2).astype(np.float32)} for n in (256, 64))
    result = pruned(model, seen, "refine")
    assert any(refit.partner for refit in result.refits)
    assert missed(model, result.model, fresh) < 0.85 * missed(model, pruned(model, seen, "reconstruct").model, fresh)


def test_few_samples_do_no_harm() -> None:
    """Where there is too little to learn from, refined layers are no worse than the others on what was not seen."""
    for seed in range(4):
        model = conv_model(seed)
        seen, fresh = {"x": smooth(8, 10 + seed)}, {"x": smooth(64, 20 + seed)}
        least, best = (missed(model, pruned(model, seen, name).model, fresh) for name in ("reconstruct", "refine"))
        assert best < 1.05 * least


def test_what_is_not_refined_for_too_few_samples_is_said() -> None:
    said: list[str] = []
    few = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    result = pruned(two_layers(8), {"x": few}, "refine", progress=said.append)
    assert not any(refit.partner for refit in result.refits)
    assert sum("is not refined: the samples make" in line for line in said) == 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_samples_whose_squares_are_no_numbers_warn_of_nothing_and_do_no_harm() -> None:
    model, seen = conv_model(0), {"x": smooth(8, 10) * np.float32(1e25)}
    result = pruned(model, seen, "refine")
    assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in result.model.graph.initializer)


def test_reported_pairs_are_better_than_before() -> None:
    for seed in range(3):
        refits = [refit for refit in pruned(conv_model(seed), {"x": smooth(256, seed)}, "refine").refits if refit.partner]
        assert len(refits) == 1
        assert 0 <= refits[0].after < refits[0].before


def test_what_others_read_too_is_no_pair() -> None:
    """The first layer's output is read by another node: changing it would change what that makes."""
    result = pruned(conv_model(read_twice=True), {"x": smooth(96, 1)}, "refine", allow_io=["z"])
    assert result.refits
    assert not any(refit.partner for refit in result.refits)


def test_nothing_to_gain_changes_nothing() -> None:
    """Units that do nothing go: least squares is exact, and so are the weights that stay."""
    model = two_layers(8)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            weight = numpy_helper.to_array(tensor).copy()
            weight[4:] = 0
            tensor.CopyFrom(numpy_helper.from_array(weight, "w2"))
    x = np.random.default_rng(0).standard_normal((256, 4)).astype(np.float32)
    result = pruned(model, {"x": x}, "refine")
    assert missed(model, result.model, {"x": x}) < 1e-6


def test_a_bias_that_refining_gives_is_put_back_too() -> None:
    """Rounds go on from the original's shapes with the first layer's new bias, though least squares never touches that layer."""
    model, x = conv_model(), {"x": smooth(128, 1)}
    result = pruned(model, x, "refine")
    whole = put_back(result.plan, result.model).model.proto
    assert missed(whole, result.model, x) < 1e-9
    assert any(len(node.input) == 3 for node in result.model.graph.node if node.output[0] == "a")


def test_digits_resnet_is_nearer_with_refine() -> None:
    """Residual blocks with batch norms between the layers."""
    calibration = dict(np.load(MODELS / "digits-images.calibration.npz"))
    model = onnx.load(MODELS / "digits-resnet.onnx")
    evaluation = {"input": np.load(MODELS / "digits-images.eval.npz")["input"]}
    least, best = (missed(model, pruned(model, calibration, name, ratio=0.65).model, evaluation) for name in ("reconstruct", "refine"))
    assert best < 0.9 * least

"""Every rule of `adjoints` beside a finite difference of the operator itself, and what a missing rule leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

import onnxprune.adjoints  # noqa: F401
from onnxprune.gradients import RULES, Backward, backward
from onnxprune.running import session

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """A node, with the shapes of its float inputs (an array: one that stays as it is; None: left out)."""

    op: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 18
    positive: bool = False
    scale: float = 1.5
    outputs: int = 1
    free: bool = False  # the arrays are not known to the rule

    @property
    def id(self) -> str:
        return f"{self.op}-{self.opset}-" + "-".join(f"{k}={v}" for k, v in self.attributes.items())


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


CASES = [
    *(Case(op, ((2, 3, 4),)) for op in ("Tanh", "Sigmoid", "Exp", "Abs", "Erf", "Softplus", "Sin", "Cos", "Relu", "HardSwish", "Neg")),
    *(Case(op, ((2, 3, 4),)) for op in ("Atan", "Sinh", "Cosh", "Asinh", "Softsign", "Celu")),
    Case("Tan", ((2, 3),), scale=0.5),
    Case("Celu", ((2, 3, 4),), {"alpha": 0.6}),
    Case("ThresholdedRelu", ((2, 3, 4),)),
    Case("ThresholdedRelu", ((2, 3, 4),), {"alpha": 0.3}),
    *(Case(op, ((2, 3, 4),), positive=True) for op in ("Sqrt", "Reciprocal", "Log")),
    *(Case(op, ((2, 3, 4),)) for op in ("Identity", "Elu", "Selu", "Mish", "GlobalAveragePool", "GlobalMaxPool", "Flatten")),
    Case("HardSigmoid", ((2, 3, 4),), {"alpha": 0.4, "beta": 0.5}),
    Case("LeakyRelu", ((2, 3, 4),), {"alpha": 0.3}),
    Case("Elu", ((2, 3, 4),), {"alpha": 0.7}),
    Case("Gelu", ((2, 3, 4),), opset=20),
    Case("Gelu", ((2, 3, 4),), {"approximate": "tanh"}, opset=20),
    Case("Clip", ((2, 3, 4), np.float32(-0.5), np.float32(0.6))),
    Case("Cast", ((2, 3),), {"to": TensorProto.FLOAT}),
    Case("CastLike", ((2, 3), (4, 1))),
    *(Case("Mean", shapes) for shapes in (((2, 3, 4), (3, 1), (4,)), ((2, 3),))),
    *(Case(op, ((2, 3, 4), (3, 1))) for op in ("Add", "Sub", "Mul", "Max", "Min", "Sum")),
    *(Case(op, ((4,), (2, 3, 4))) for op in ("Add", "Sub", "Mul")),
    Case("Div", ((2, 3, 4), (3, 1)), positive=True),
    Case("Pow", ((2, 3), np.float32(2.0))),
    Case("Pow", ((2, 3), np.float32(0.5)), positive=True),
    Case("PRelu", ((2, 3, 4), (3, 1))),
    Case("Where", (np.array([True, False, True]), (2, 3), (1, 3))),
    Case("MatMul", ((2, 3, 4), (4, 5))),
    Case("MatMul", ((3, 4), (4, 5))),
    Case("MatMul", ((2, 6, 3, 4), (6, 4, 5))),
    Case("MatMul", ((3, 4), (2, 4, 5))),
    *(
        Case(
            "Gemm",
            ((3, 4) if a == 0 else (4, 3), (4, 5) if b == 0 else (5, 4), (5,)),
            {"transA": a, "transB": b, "alpha": 0.7, "beta": 1.3},
        )
        for a in (0, 1)
        for b in (0, 1)
    ),
    Case("Conv", ((2, 4, 9, 8), (6, 4, 3, 3), (6,)), {"pads": [1, 1, 1, 1]}),
    Case("Conv", ((2, 4, 9, 8), (6, 2, 3, 2)), {"group": 2, "strides": [2, 2], "pads": [1, 0, 0, 1]}),
    Case("Conv", ((2, 4, 10, 9), (4, 1, 3, 3)), {"group": 4, "dilations": [2, 1], "strides": [1, 3]}),
    Case("Conv", ((2, 4, 9, 9), (6, 4, 3, 3)), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", ((2, 4, 11), (6, 4, 3)), {"strides": [4]}),
    Case("Conv", ((2, 4, 11, 10), (3, 4, 3, 2)), {"dilations": [2, 3], "strides": [2, 1]}),
    Case("Conv", ((2, 3, 15, 14), (4, 3, 7, 5)), {"strides": [2, 3], "pads": [2, 1, 3, 0]}),
    Case("Conv", ((1, 2, 5, 6, 5), (3, 2, 2, 3, 2)), {"pads": [0, 1, 0, 1, 1, 0]}),
    Case("ConvTranspose", ((2, 4, 5, 4), (4, 3, 3, 3), (6,)), {"group": 2, "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("ConvTranspose", ((2, 4, 5), (4, 6, 3)), {"strides": [2], "output_padding": [1]}),
    Case("ConvTranspose", ((2, 2, 5, 4), (2, 3, 3, 4), (3,)), {"strides": [2, 2], "output_shape": [10, 9]}),
    Case("ConvTranspose", ((2, 2, 5, 4), (2, 3, 3, 4)), {"strides": [2, 2], "output_shape": [10, 9], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", ((2, 4, 5, 3), (4, 2, 2, 4)), {"strides": [3, 2], "auto_pad": "SAME_LOWER", "group": 2}),
    Case("ConvTranspose", ((2, 2, 5), (2, 3, 4)), {"strides": [2], "auto_pad": "VALID"}),
    Case("Einsum", ((2, 3, 4), (2, 5, 4)), {"equation": "bic,bjc->bij"}),
    Case("Einsum", ((2, 3, 4, 5), (2, 3, 6, 5)), {"equation": "...qd,...kd->...qk"}),
    Case("Einsum", ((3, 4), (4, 5), (5, 2)), {"equation": "ab, bc, cd -> ad"}),
    Case("Einsum", ((2, 3, 4),), {"equation": "b...c->cb..."}),
    Case("Attention", ((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)), opset=23),
    Case("Attention", ((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5)), {"is_causal": 1, "scale": 0.3}, opset=23),
    *(
        Case("Attention", ((2, 1, 2, 5), (2, 1, 3, 5), (2, 1, 3, 5), np.array(mask, kind)), opset=23)
        for mask, kind in (([[1, 1, 0], [0, 1, 0]], bool), ([[1, -0.4, 0], [0.5, 1, 0]], np.float32))
    ),
    Case("Reshape", ((2, 3, 4), ints(0, -1))),
    Case("Squeeze", ((2, 1, 4), ints(1))),
    Case("Unsqueeze", ((2, 4), ints(0, 2))),
    Case("Transpose", ((2, 3, 4),), {"perm": [2, 0, 1]}),
    Case("Transpose", ((2, 3, 4),)),
    Case("Concat", ((2, 3), (2, 1), (2, 4)), {"axis": -1}),
    Case("Split", ((2, 7), ints(2, 1, 4)), {"axis": 1}, outputs=3),
    Case("Slice", ((5, 7), ints(1, -2), ints(4, 0), ints(0, 1), ints(2, -2))),
    Case("Slice", ((5, 7), ints(2), ints(2**31), ints(1))),
    Case("Slice", ((5, 7), ints(-1), ints(-(2**31)), ints(1), ints(-1))),
    Case("Gather", ((5, 4), np.int64(-2)), {"axis": 0}),
    Case("Gather", ((2, 5, 3), np.array([[4, 0], [1, 3]])), {"axis": 1}),
    Case("Gather", ((5, 4), np.array([[4, -1, 4], [0, 4, -5]])), {"axis": 0}),
    Case("Gather", ((2, 5, 3), np.array([[4, 0], [-1, 3]])), {"axis": 1}, free=True),
    Case("Gather", ((5, 4), np.array(-2, np.int32)), {"axis": -1}, free=True),
    Case("GatherElements", ((3, 4), np.array([[1, -1, 1], [0, 2, 0]])), {"axis": 1}),
    Case("GatherElements", ((3, 4), np.array([[1, -1, 1, 2], [0, 2, 0, 2]])), free=True),
    Case("GatherND", ((3, 4, 5), np.array([[[0, -1], [2, 3]], [[0, 3], [1, 1]]]))),
    Case("GatherND", ((3, 4), np.array([[-2], [0], [1]])), free=True),
    *(Case("ScatterND", ((3, 4, 2), np.array([[0, 1], [2, 3]]), (2, 2)), {"reduction": how}) for how in ("none", "add")),
    Case("ScatterND", ((3, 4), np.array([[1], [-1], [1]]), (3, 4)), {"reduction": "add"}, free=True),
    *(Case("ScatterElements", ((3, 4), np.array([[0, -1], [2, 0]]), (2, 2)), {"axis": 1, "reduction": how}) for how in ("none", "add")),
    Case("TopK", ((3, 7), ints(3)), outputs=2),
    Case("TopK", ((7, 2), ints(4)), {"axis": 0, "largest": 0, "sorted": 0}, outputs=2),
    *(Case("CumSum", ((3, 4), np.array(axis)), {"exclusive": e, "reverse": r}) for axis, e, r in ((0, 0, 0), (-1, 1, 0), (1, 0, 1))),
    *(Case("Pad", ((3, 4), ints(1, 0, 2, 3)), {"mode": mode}) for mode in ("reflect", "edge")),
    Case("Pad", ((3, 4), ints(1, 0, 2, 3)), {"mode": "wrap"}, opset=19),
    Case("Pad", ((3, 4),), {"mode": "reflect", "pads": [2, 0, 1, 3]}, opset=2),
    Case("Pad", ((3, 4, 2), ints(1, 2), None, ints(-2)), {"mode": "reflect"}),
    Case("Pad", ((3, 4), ints(1, 0, 2, 3))),
    Case("Pad", ((3, 4, 2), ints(1, 2), None, ints(1))),
    Case("Expand", ((3, 1), ints(2, 3, 4))),
    Case("Tile", ((2, 3), ints(2, 3))),
    Case("DepthToSpace", ((2, 8, 3, 4),), {"blocksize": 2}),
    Case("DepthToSpace", ((2, 8, 3, 4),), {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", ((2, 3, 4, 6),), {"blocksize": 2}),
    *(Case(op, ((2, 3, 4, 5),), {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [0, 1, 1, 1]}) for op in ("MaxPool", "AveragePool")),
    Case("AveragePool", ((2, 3, 7, 6),), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", ((2, 3, 8, 8),), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("AveragePool", ((2, 3, 8, 7),), {"kernel_shape": [2, 2], "strides": [3, 3]}),
    *(
        Case(op, ((2, 3, 8, 7),), {"kernel_shape": [3, 2], "strides": [2, 3], "auto_pad": auto})
        for op in ("MaxPool", "AveragePool")
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    *(
        Case("AveragePool", ((2, 3, 9, 8),), {"kernel_shape": [4, 3], "strides": [2, 2], "auto_pad": auto, "count_include_pad": 1})
        for auto in ("SAME_UPPER", "SAME_LOWER")
    ),
    Case("AveragePool", ((2, 3, 9),), {"kernel_shape": [1], "strides": [4], "auto_pad": "SAME_LOWER"}),
    Case("AveragePool", ((2, 3, 9, 8),), {"kernel_shape": [3, 2], "dilations": [2, 3], "auto_pad": "SAME_UPPER"}, opset=19),
    Case(
        "AveragePool",
        ((2, 3, 8, 8),),
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 0], "ceil_mode": 1, "count_include_pad": 1},
    ),
    Case("MaxPool", ((2, 3, 8, 8),), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "dilations": [1, 2]}),
    Case(
        "Resize",
        ((2, 3, 4, 5), None, np.array([1, 1, 2, 3], np.float32)),
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    Case("Resize", ((2, 3, 4), None, np.array([1, 1, 3], np.float32))),
    Case(
        "Resize",
        ((1, 2, 5, 5), None, np.float32([1, 1, 2.1, 2.1])),  # 10 places, but not two of each
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    *(
        Case("Resize", ((2, 3, 4, 5), None, np.float32([1, 1, 2, 1.7])), {"mode": mode, "coordinate_transformation_mode": where})
        for mode in ("nearest", "linear", "cubic")
        for where in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
    ),
    *(Case("Resize", ((2, 3, 8, 7), None, None, ints(2, 3, 5, 9)), {"mode": mode}) for mode in ("nearest", "linear", "cubic")),
    Case("Resize", ((2, 3, 8, 7), None, None, ints(3, 9)), {"mode": "linear", "axes": [2, -1], "antialias": 1}),
    Case("Resize", ((2, 3, 4, 6), None, np.float32([1, 1, 0.5, 0.5])), {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}),
    Case("Resize", ((2, 3, 4), None, np.float32([1, 1, 1.3])), {"mode": "linear"}),
    Case("Resize", ((1, 2, 3, 4, 2), None, np.float32([1, 1, 2, 1, 1.5])), {"mode": "linear"}),
    Case("Resize", ((2, 3, 4, 5), np.zeros(0, np.float32), np.float32([1, 1, 2, 2])), {"mode": "linear"}, opset=11),
    Case("Resize", ((2, 3, 4, 5), *[np.zeros(0, np.float32)] * 2, ints(2, 3, 9, 7)), {"mode": "linear"}, opset=11),
    Case("Resize", ((2, 3, 4, 5), np.float32([1, 1, 2, 1.7])), {"mode": "linear"}, opset=10),
    Case("Upsample", ((2, 3, 4, 5), np.float32([1, 1, 2, 3])), {"mode": "linear"}, opset=9),
    Case("Upsample", ((2, 3, 4, 5),), {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 1.6]}, opset=7),
    Case("LSTM", ((5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32), None, (1, 2, 4), (1, 2, 4)), {"hidden_size": 4}, outputs=3),
    Case("LSTM", ((5, 2, 3), (2, 16, 3), (2, 16, 4), (2, 32)), {"hidden_size": 4, "direction": "bidirectional"}, outputs=2),
    Case("LSTM", ((4, 1, 3), (1, 8, 3), (1, 8, 2)), {"hidden_size": 2, "direction": "reverse"}),
    *(
        Case("GRU", shapes, {"hidden_size": 4, "direction": way, "linear_before_reset": late}, outputs=outputs)
        for late in (0, 1)
        for shapes, way, outputs in (
            (((5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24), None, (1, 2, 4)), "forward", 2),
            (((5, 2, 3), (2, 12, 3), (2, 12, 4), (2, 24)), "bidirectional", 2),
            (((4, 1, 3), (1, 12, 3), (1, 12, 4)), "reverse", 1),
        )
    ),
    Case("RNN", ((5, 2, 3), (1, 4, 3), (1, 4, 4), (1, 8), None, (1, 2, 4)), {"hidden_size": 4}, outputs=2),
    Case("RNN", ((5, 2, 3), (2, 4, 3), (2, 4, 4), (2, 8)), {"hidden_size": 4, "direction": "bidirectional"}, outputs=2),
    Case("RNN", ((4, 1, 3), (1, 2, 3), (1, 2, 2)), {"hidden_size": 2, "direction": "reverse"}),
    *(Case("RNN", ((4, 2, 3), (1, 5, 3), (1, 5, 5), (1, 10)), {"hidden_size": 5, "activations": [f]}) for f in ("Relu", "Sigmoid")),
    Case("ReduceMean", ((2, 3, 4), ints(-1)), {"keepdims": 0}),
    Case("ReduceMean", ((2, 3, 4),), {"axes": [0, 2]}, opset=17),
    Case("ReduceSum", ((2, 3, 4), ints(1, 2)), {"keepdims": 1}),
    Case("ReduceSum", ((2, 3, 4),)),
    Case("ReduceL2", ((2, 3, 4), ints(2))),
    Case("ReduceL1", ((2, 3, 4), ints(-1)), {"keepdims": 0}),
    Case("ReduceLogSumExp", ((2, 3, 4), ints(0, 2)), {"keepdims": 0}),
    Case("ReduceLogSumExp", ((2, 3, 4),)),
    Case("ReduceSumSquare", ((2, 3, 4), ints(1)), {"keepdims": 0}),
    *(Case(op, ((2, 3, 4), ints(1))) for op in ("ReduceMax", "ReduceMin")),
    *(Case(op, ((2, 3, 4),), {"axis": 1}) for op in ("Softmax", "LogSoftmax")),
    Case("Softmax", ((2, 3, 4),), {"axis": 2}, opset=11),
    *(Case(op, ((2, 3, 4),), opset=11) for op in ("Softmax", "LogSoftmax")),
    Case("LayerNormalization", ((2, 3, 8), (8,), (8,))),
    Case("LayerNormalization", ((2, 3, 8), (3, 8)), {"axis": 1, "epsilon": 0.1}),
    Case("RMSNormalization", ((2, 3, 8), (8,)), opset=23),
    Case("InstanceNormalization", ((2, 3, 4, 5), (3,), (3,))),
    Case("GroupNormalization", ((2, 6, 4, 3), (2,), (2,)), {"num_groups": 2}),
    Case("GroupNormalization", ((2, 6, 4, 3), (6,), (6,)), {"num_groups": 2, "epsilon": 0.1}, opset=21),
    Case("GroupNormalization", ((3, 4, 5), (4,), (4,)), {"num_groups": 4}, opset=21),
    Case("LRN", ((2, 7, 3, 4),), {"size": 5, "alpha": 0.9, "beta": 0.6, "bias": 1.5}),
    Case("LRN", ((2, 3, 4, 2),), {"size": 3, "alpha": 0.9}),
    Case("BatchNormalization", ((4, 3, 5), (3,), (3,), np.float32([0.1, -0.2, 0.3]), np.float32([0.5, 2.0, 1.0]))),
]


def built(case: Case, rng: np.random.Generator) -> tuple[ModelProto, dict[str, Array]]:
    """The node as a model, and the values of its float inputs that are given at each run."""
    given, constants, names = {}, [], []
    for i, shape in enumerate(case.inputs):
        names.append("" if shape is None else f"x{i}")
        if isinstance(shape, tuple):
            values = rng.normal(size=shape) * case.scale
            given[f"x{i}"] = (np.abs(values) + 0.5 if case.positive else values).astype(np.float32)
        elif shape is not None:
            constants.append(numpy_helper.from_array(np.asarray(shape), f"x{i}"))
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, **case.attributes)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in given.items()]
    graph = helper.make_graph([node], "case", inputs, [helper.make_empty_tensor_value_info(name) for name in outputs], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10), given


def gradient(
    proto: ModelProto, given: dict[str, Array], rng: np.random.Generator, free: bool = False
) -> tuple[Backward, dict[str, Array], dict[str, Array]]:
    """The backward pass for a random change of the float outputs: {input: its change}, and that of the outputs."""
    run = session(proto)
    made = dict(zip((v.name for v in proto.graph.output), run.run(None, given), strict=True))
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    known = given | constants | made
    shapes = {name: array.shape for name, array in known.items()}
    floats = {name for name, array in known.items() if array.dtype == np.float32}
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in known.items()}
    ends = [name for name in made if name in floats]
    graph = backward(proto, ends, list(given), shapes, {} if free else constants, floats, kinds)
    starts = {name: rng.normal(size=made[name].shape).astype(np.float32) for name in ends}
    feeds = {graph.starts[end]: change for end, change in starts.items() if end in graph.starts} | {n: known[n] for n in graph.reads}
    if not graph.weights:
        return graph, {}, starts
    checker.check_model(graph.model)
    found = session(graph.model).run(list(graph.weights.values()), feeds)
    return graph, dict(zip(graph.weights, found, strict=True)), starts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_adjoint_is_what_a_finite_difference_says(case: Case) -> None:
    rng = np.random.default_rng(len(case.id))
    compared(*built(case, rng), rng, case.free)


def compared(proto: ModelProto, given: dict[str, Array], rng: np.random.Generator, free: bool = False) -> None:
    _, found, starts = gradient(proto, given, rng, free)
    assert set(found) == set(given)
    run = session(proto)

    def loss(moved: dict[str, Array]) -> float:
        made = run.run(list(starts), moved)
        return sum(float(np.sum(array.astype(np.float64) * start)) for array, start in zip(made, starts.values(), strict=True))

    for name, change in found.items():
        assert change.shape == given[name].shape
        for _ in range(3):
            towards = rng.normal(size=change.shape).astype(np.float32)
            slope, scale = float(np.sum(change * towards)), float(np.linalg.norm(change) * np.linalg.norm(towards) / np.sqrt(change.size))
            ends = [loss(given | {name: given[name] + np.float32(s * 2e-3) * towards}) for s in (1, -1)]
            assert abs((ends[0] - ends[1]) / 4e-3 - slope) < 0.02 * scale + 1e-4, (name, (ends[0] - ends[1]) / 4e-3, slope)


def test_an_lstm_whose_steps_nothing_reads() -> None:
    rng = np.random.default_rng(0)
    shapes = ((5, 2, 3), (2, 16, 3), (2, 16, 4), (2, 32), None, (2, 2, 4))
    proto, given = built(Case("LSTM", shapes, {"hidden_size": 4, "direction": "bidirectional"}, outputs=3), rng)
    proto.graph.node[0].output[0] = ""
    del proto.graph.output[0]
    compared(proto, given, rng)


def test_every_rule_has_a_case() -> None:
    tried = {case.op for case in CASES}
    alike = {"Dropout", "SimplifiedLayerNormalization", "Swish"}  # as Identity, RMSNormalization, Sigmoid
    assert set(RULES) - tried == alike


def test_a_weight_before_a_node_without_a_rule_gets_no_gradient() -> None:
    """a reaches the output on two ways, one through a node that is unknown: half of its gradient would be wrong."""
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["one"]),
        helper.make_node("Mul", ["x", "b"], ["two"]),
        helper.make_node("Shrink", ["one"], ["three"]),
        helper.make_node("Add", ["one", "two"], ["four"]),
        helper.make_node("Add", ["three", "four"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "a", "b")]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_empty_tensor_value_info("y")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    known = {name: np.ones(3, np.float32) for name in ("x", "a", "b", "one", "two", "three", "four", "y")}
    shapes = {name: array.shape for name, array in known.items()}
    found = backward(proto, ["y"], ["a", "b"], shapes, {}, set(known))
    assert set(found.weights) == {"b"}


def made_by_nodes(nodes: list[Any], given: dict[str, Array], constants: dict[str, Array], outputs: int = 1) -> ModelProto:
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in given.items()]
    ends = [helper.make_empty_tensor_value_info(node.output[0]) for node in nodes[-outputs:]]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, ends, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_condition_that_the_forward_pass_makes_is_read_as_one() -> None:
    nodes = [helper.make_node("Greater", ["x", "a"], ["more"]), helper.make_node("Where", ["more", "x", "a"], ["y"])]
    given = {"x": np.float32([1, -2, 3]), "a": np.float32([0, 0, 4])}
    known = given | {"more": given["x"] > given["a"], "y": np.zeros(3, np.float32)}
    proto = made_by_nodes(nodes, given, {})
    found = backward(proto, ["y"], ["x", "a"], {name: array.shape for name, array in known.items()}, {}, {"x", "a", "y"})
    feeds = {found.starts["y"]: np.float32([5, 6, 7])} | {name: known[name] for name in found.reads}
    to_x, to_a = session(found.model).run([found.weights[name] for name in "xa"], feeds)
    np.testing.assert_array_equal(to_x, [5, 0, 0])
    np.testing.assert_array_equal(to_a, [0, 6, 7])


def test_rows_that_are_masked_as_a_whole_pass_nothing_back() -> None:
    """Where padding leaves nothing to attend to, Softmax makes NaN, which exporters replace by zeros."""
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"]),
        helper.make_node("IsNaN", ["shares"], ["empty"]),
        helper.make_node("Where", ["empty", "zero", "shares"], ["y"]),
    ]
    given, constants = {"x": np.float32([[1, 2], [3, 4]])}, {"mask": np.float32([[0, 0], [-np.inf] * 2]), "zero": np.float32([0])}
    proto = made_by_nodes(nodes, given, constants)
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in ("masked", "shares", "empty"))
    known = given | constants | dict(zip((v.name for v in proto.graph.output), session(proto).run(None, given), strict=True))
    floats = {name for name, array in known.items() if array.dtype == np.float32}
    found = backward(proto, ["y"], ["x"], {name: array.shape for name, array in known.items()}, constants, floats)
    feeds = {found.starts["y"]: np.float32([[1, 0], [1, 0]])} | {name: known[name] for name in found.reads}
    (to_x,) = session(found.model).run(None, feeds)
    share = known["y"][0, 0] * known["y"][0, 1]
    np.testing.assert_allclose(to_x, [[share, -share], [0, 0]], atol=1e-6)


def test_what_reaches_an_end_through_a_sequence_gets_no_gradient() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["one"]),
        helper.make_node("SequenceConstruct", ["one"], ["many"]),
        helper.make_node("SequenceAt", ["many", "first"], ["two"]),
        helper.make_node("Add", ["two", "one"], ["y"]),
    ]
    known = {name: np.ones(3, np.float32) for name in ("x", "a", "one", "two", "y")}
    constants = {"first": np.array(0)}
    proto = made_by_nodes(nodes, {name: known[name] for name in "xa"}, constants)
    shapes = {name: array.shape for name, array in (known | constants).items()}
    assert not backward(proto, ["y"], ["a"], shapes, constants, set(known)).weights


@pytest.mark.parametrize(
    "case",
    [
        Case(
            "Resize",
            ((1, 2, 5, 5), np.float32([0, 0, 0.1, 0.2, 1, 1, 0.9, 0.8]), None, ints(1, 2, 4, 4)),
            {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
        ),
        Case("Resize", ((1, 2, 5, 5), None, None, ints(1, 2, 4, 4)), {"keep_aspect_ratio_policy": "not_larger", "axes": [0, 1, 2, 3]}),
        Case("Pad", ((3, 4), ints(-1, 0, 0, 1)), {"mode": "edge"}),
        Case("GatherND", ((2, 3, 4), np.array([[1], [0]])), {"batch_dims": 1}),
        Case("Einsum", ((2, 3), (3, 3)), {"equation": "ab,bb->a"}),
        Case("Attention", ((1, 4, 3, 5), (1, 2, 3, 5), (1, 2, 3, 5)), opset=23),
        Case("Attention", ((1, 2, 3, 5), (1, 2, 3, 5), (1, 2, 3, 5)), {"softcap": 2.0}, opset=23),
        Case("ScatterND", ((3, 4), np.array([[0], [2]]), (2, 4)), {"reduction": "max"}),
        Case("LSTM", ((4, 2, 3), (1, 8, 3), (1, 8, 2), None, np.array([4, 2], np.int32)), {"hidden_size": 2}),
        Case("LSTM", ((4, 2, 3), (1, 8, 3), (1, 8, 2)), {"hidden_size": 2, "activations": ["Sigmoid", "Relu", "Tanh"]}),
        Case("LSTM", ((4, 2, 3), (1, 8, 3), (1, 8, 2), None, None, None, None, (1, 6)), {"hidden_size": 2}),
        Case("GRU", ((4, 2, 3), (1, 6, 3), (1, 6, 2), None, np.array([4, 2], np.int32)), {"hidden_size": 2}),
        Case("GRU", ((4, 2, 3), (1, 6, 3), (1, 6, 2)), {"hidden_size": 2, "activations": ["Sigmoid", "Relu"]}),
        Case("GRU", ((4, 2, 3), (1, 6, 3), (1, 6, 2)), {"hidden_size": 2, "clip": 0.5}),
        Case("RNN", ((4, 2, 3), (1, 2, 3), (1, 2, 2)), {"hidden_size": 2, "activations": ["Softsign"]}),
        Case(
            "RNN",
            ((4, 2, 3), (2, 2, 3), (2, 2, 2)),
            {"hidden_size": 2, "direction": "bidirectional", "activations": ["Relu", "Tanh"]},
        ),
        Case("Einsum", ((2, 3), (1, 4)), {"equation": "ab,bc->ac"}),
        Case("Einsum", ((2, 3), (3, 4)), {"equation": "ab,bc->b"}),
        Case("Dropout", ((2, 3), np.float32(0.5), np.array(True))),
    ],
    ids=lambda case: case.id,
)
def test_no_gradient_where_a_rule_does_not_hold(case: Case) -> None:
    rng = np.random.default_rng(0)
    assert not gradient(*built(case, rng), rng)[1]

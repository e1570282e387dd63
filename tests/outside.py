"""What tests know of ONNX models without the package: how to run, permute, mask, count and build them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Arrays = Mapping[str, np.ndarray]
Content = Mapping[str, Any]  # `groups --json`, or a plan
Weight = tuple[int, ...] | list[Any] | np.ndarray
CUSTOM = "test.custom"


# building


def values(weight: Weight, rng: np.random.Generator) -> np.ndarray:
    """A shape stands for seeded numbers (positive in vectors: they may be variances), a list for integers, an array for itself."""
    if isinstance(weight, np.ndarray):
        return weight
    if isinstance(weight, list):
        return np.array(weight, np.int64)
    drawn = rng.uniform(0.5, 1.5, weight) if len(weight) < 2 else rng.standard_normal(weight) / 2
    return np.asarray(drawn, np.float32)


def build(inputs: str, body: str, outputs: str, weights: Mapping[str, Weight], opset: int = 17, seed: int = 0) -> ModelProto:
    """A model out of the text of onnx.parser, with every shape that onnx infers written down."""
    header = f'<ir_version: {8 if opset < 19 else 10}, opset_import: ["" : {opset}, "{CUSTOM}" : 1, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header} net ({inputs}) => ({outputs}) {{ {body} }}")
    for value in (v for v in model.graph.output if not v.type.tensor_type.shape.dim):
        value.type.tensor_type.ClearField("shape")  # the parser takes a type alone for a scalar
    rng = np.random.default_rng(seed)
    model.graph.initializer.extend(numpy_helper.from_array(values(w, rng), name) for name, w in weights.items())
    return onnx.shape_inference.infer_shapes(model)


def as_constants(model: ModelProto) -> ModelProto:
    """The same model with Constant nodes instead of initializers."""
    copy = duplicate(model)
    made = [helper.make_node("Constant", [], [t.name], value=t) for t in copy.graph.initializer]
    nodes = [*made, *copy.graph.node]
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(nodes)
    return copy


def duplicate(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def tensors(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers by name, Constant nodes by the name of their output, those of subgraphs too."""
    found: dict[str, TensorProto] = {}
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        made = {n.output[0]: a for n in graph.node if n.op_type == "Constant" for a in n.attribute}
        found |= {t.name: t for t in graph.initializer} | {name: a.t for name, a in made.items() if a.name == "value"}
        graphs += [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


# running


def feeds_of(model: ModelProto, seed: int = 0, symbolic: int = 2) -> dict[str, np.ndarray]:
    """Normal floats, small integers and true booleans; `symbolic` for every size that is not given."""
    rng, feeds, given = np.random.default_rng(seed), {}, tensors(model)
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or symbolic for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        drawn = rng.standard_normal(shape) if dtype.kind == "f" else np.ones(shape) if dtype.kind == "b" else rng.integers(0, 4, shape)
        if value.name not in given:
            feeds[value.name] = np.asarray(drawn).astype(dtype)
    return feeds


def run(model: ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    """Every output by name, as onnxruntime computes it on one thread without optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def distance(left: Arrays, right: Arrays) -> float:
    """The largest difference between outputs of the same names, in standard deviations; infinite where shapes or integers differ."""
    if list(left) != list(right):
        return float("inf")
    gaps = [0.0]
    for a, b in ((np.asarray(left[k]), np.asarray(right[k])) for k in left):
        if a.shape != b.shape or a.dtype != b.dtype or (a.dtype.kind != "f" and not np.array_equal(a, b)):
            return float("inf")
        if a.dtype.kind == "f" and a.size:
            wide = a.astype(np.float64)
            gap = np.abs(wide - b).max() / (wide.std() or np.abs(wide).max() or 1.0)
            gaps.append(float(gap) if np.isfinite(gap) else float("inf"))
    return max(gaps)


def macs(model: ModelProto, feeds: Arrays) -> int:
    """Multiply-accumulates of the main graph's layers: every weight works once a place, every product once a summand."""
    probe, counted = duplicate(model), {"Conv": _window, "ConvTranspose": _window, "Gemm": _product, "MatMul": _product}
    del probe.graph.output[:]
    names = dict.fromkeys(v for n in model.graph.node if n.op_type in counted for v in (*n.input[:2], *n.output))
    if not names:
        return 0
    probe.graph.output.extend(helper.make_empty_tensor_value_info(v) for n in model.graph.node for v in n.output if v in names)
    shapes = {v: tuple(t.dims) for v, t in tensors(model).items()} | {v: a.shape for v, a in feeds.items()}
    shapes |= {v: np.shape(a) for v, a in run(probe, feeds).items()}
    return sum(counted[n.op_type](n, shapes) for n in model.graph.node if n.op_type in counted)


def _window(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    places = shapes[node.output[0] if node.op_type == "Conv" else node.input[0]]
    return places[0] * int(np.prod(places[2:])) * int(np.prod(shapes[node.input[1]]))


def _product(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    left = shapes[node.input[0]]
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return int(np.prod(shapes[node.output[0]])) * (left[0] if turned else left[-1])


# what groups and plans say


def covered(content: Content) -> dict[tuple[str, int], list[int]]:
    """For each (tensor, axis) the unit counts of its groups."""
    found: dict[tuple[str, int], list[int]] = {}
    for group in content["groups"]:
        for member in group["members"]:
            found.setdefault((member["tensor"], member["axis"]), []).append(group["units"])
    return found


def order(group: Content) -> np.ndarray:
    """The unit that comes to each unit's place: a single cycle, so that all move, in every block of its own."""
    rng, moved = np.random.default_rng([group["id"], group["units"]]), np.arange(group["units"])
    for block in group.get("blocks") or [list(moved)]:
        cycle = rng.permutation(block)
        moved[cycle] = np.roll(cycle, 1)
    return moved


def changed(model: ModelProto, arrays: Arrays) -> ModelProto:
    copy = duplicate(model)
    for name, tensor in tensors(copy).items():
        if name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[name], tensor.name))
    return copy


def permuted(model: ModelProto, content: Content) -> ModelProto:
    """Every group's units in another order, wherever they live."""
    arrays = {name: numpy_helper.to_array(t) for name, t in tensors(model).items()}
    for group in content["groups"]:
        for member in group["members"]:
            array, places = arrays[member["tensor"]], np.array(member["indices"])
            source = np.arange(array.shape[member["axis"]])
            source[places] = places[order(group)]
            arrays[member["tensor"]] = array.take(source, axis=member["axis"])
    return changed(model, arrays)


def following(plan: Content) -> dict[str, Any]:
    """The plan that removes from the permuted model what the given one removes from the original."""
    groups = [g | {"remove": np.flatnonzero(np.isin(order(g), g["remove"])).tolist()} for g in plan["groups"]]
    return {**plan, "groups": groups}


def gone(plan: Content) -> dict[tuple[str, int], set[int]]:
    """For each (tensor, axis) the indices that a plan removes."""
    found: dict[tuple[str, int], set[int]] = {}
    for member, remove in ((m, g["remove"]) for g in plan["groups"] for m in g["members"] if g["remove"]):
        found.setdefault((member["tensor"], member["axis"]), set()).update(np.array(member["indices"])[remove].ravel().tolist())
    return found


def masked(model: ModelProto, plan: Content) -> ModelProto:
    """Zeros instead of all that the plan removes."""
    arrays = {name: numpy_helper.to_array(t).copy() for name, t in tensors(model).items()}
    for (name, axis), indices in gone(plan).items():
        np.moveaxis(arrays[name], axis, 0)[sorted(indices)] = 0
    return changed(model, arrays)


def shrunk(model: ModelProto, pruned: ModelProto, plan: Content) -> Sequence[str]:
    """What in the pruned model is not as large as the plan says."""
    before, after = tensors(model), tensors(pruned)
    wanted = {(name, axis): before[name].dims[axis] - len(indices) for (name, axis), indices in gone(plan).items() if name in after}
    return [f"{name}:{axis}" for (name, axis), size in wanted.items() if after[name].dims[axis] != size]

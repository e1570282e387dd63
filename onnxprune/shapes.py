"""Every value's concrete shape, and the numbers of shape arithmetic, for one choice of input sizes.

onnx's own shape inference does the work, on a copy of the graph without weights; what it leaves open because a target
shape is computed at run time is folded here and inferred again; what is still open is seen by a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.errors import OnnxPruneError

Shape = tuple[int, ...]
SMALL = 4096  # elements; larger integer tensors are data, not shapes


@dataclass(frozen=True)
class Folded:
    """A value known without data: its number, where it depends on symbolic input sizes, and whether on any shape at all."""

    number: np.ndarray
    dynamic: np.ndarray
    from_shape: bool


@dataclass(frozen=True)
class Inferred:
    shapes: dict[str, Shape]
    folded: dict[str, Folded]


def infer(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, TensorProto],
    given: Mapping[str, Shape],
    feeds: Mapping[str, np.ndarray] | None,
    name: str,
) -> Inferred:
    """Shapes and folded numbers at the given input shapes; symbolic sizes that are not given take the first size that runs."""
    inputs = [v for v in proto.graph.input if v.name not in tensors]
    unknown = [k for k in given if k not in {v.name for v in inputs}]
    if unknown:
        known = ", ".join(v.name for v in inputs)
        raise OnnxPruneError(f"{name}: no input is named '{unknown[0]}'; its inputs are: {known}")
    symbolic = any(not _static(v) for v in inputs)
    free = symbolic and any(v.name not in given for v in inputs)
    problem = ""
    for size in (2, 32, 64, 224) if free else (2,):
        shapes = {v.name: given.get(v.name) or concrete(v, size) for v in inputs}
        for value in inputs:
            declared = value.type.tensor_type.shape.dim
            if value.name in given and value.type.tensor_type.HasField("shape"):
                fits = len(declared) == len(given[value.name]) and all(
                    not d.dim_value or d.dim_value == s for d, s in zip(declared, given[value.name], strict=False)
                )
                if not fits:
                    wanted = [d.dim_value or d.dim_param or "?" for d in declared]
                    raise OnnxPruneError(f"{name}: input '{value.name}' is {wanted}, the feed is {list(given[value.name])}")
        try:
            return _infer_at(proto, nodes, tensors, shapes, feeds, symbolic)
        except ValueError as error:
            problem = str(error).splitlines()[0][:200]
    raise OnnxPruneError(f"{name}: does not run on inputs of {shapes} ({problem}); give --feeds or --input-shape that it takes")


def concrete(value: onnx.ValueInfoProto, size: int) -> Shape:
    """The declared shape; a symbolic first axis (the batch) is 2 and other symbolic axes are `size`."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value or (2 if i == 0 else size) for i, d in enumerate(dims))


def _static(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    return kind.HasField("shape") and all(d.dim_value for d in kind.shape.dim)


def _infer_at(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, TensorProto],
    shapes: Mapping[str, Shape],
    feeds: Mapping[str, np.ndarray] | None,
    symbolic: bool,
) -> Inferred:
    weights = {k: tuple(t.dims) for k, t in tensors.items()}
    folded: dict[str, Folded] = {}
    known: dict[str, Shape] = {}
    static_everywhere = None
    if symbolic:
        kept = {v.name: v for v in proto.graph.input}
        static_everywhere = _onnx_shapes(proto, nodes, tensors, {}, {k: kept[k] for k in shapes})[1]
    for _ in range(6):
        before = len(known), len(folded)
        known, _ = _onnx_shapes(proto, nodes, tensors, folded, shapes)
        known |= weights | dict(shapes)
        folded = fold(nodes, tensors, known, static_everywhere)
        known |= {k: np.shape(f.number) for k, f in folded.items()}
        if (len(known), len(folded)) == before:
            break
    wanted = {x for n in nodes for x in (*n.input, *n.output) if x and x not in known}
    if wanted:
        known |= _seen(proto, wanted, shapes, feeds)
        folded = fold(nodes, tensors, known, static_everywhere)
    return Inferred(known, folded)


def _onnx_shapes(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, TensorProto],
    folded: Mapping[str, Folded],
    inputs: Mapping[str, Any],
) -> tuple[dict[str, Shape], dict[str, tuple[bool, ...]]]:
    """onnx's shape inference without weights: full shapes, and which axes are the same for all input sizes."""
    types = {v.name: v for v in proto.graph.input}
    skeleton = ModelProto(ir_version=max(proto.ir_version, 4), opset_import=proto.opset_import)
    graph = skeleton.graph
    graph.name = "shapes"
    for name, shape in inputs.items():
        value = graph.input.add()
        value.CopyFrom(types[name])
        if isinstance(shape, tuple):
            value.type.tensor_type.ClearField("shape")
            value.type.tensor_type.shape.SetInParent()
            for size in shape:
                value.type.tensor_type.shape.dim.add().dim_value = size
    for name, tensor in tensors.items():
        if np.prod(tensor.dims) <= SMALL and tensor.data_type in (6, 7, 9, 1) and tensor.data_location != 1:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = name
        else:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    done = set(tensors)
    for name, value in folded.items():
        if name not in done and not name == "":
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value.number), name))
            done.add(name)
    for node in nodes:
        if all(o in done for o in node.output if o):
            continue
        graph.node.add().CopyFrom(node)
    result = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    shapes: dict[str, Shape] = {}
    static: dict[str, tuple[bool, ...]] = {}
    for value in result.graph.value_info:
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            static[value.name] = tuple(d.HasField("dim_value") for d in kind.shape.dim)
            if all(static[value.name]):
                shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    for value in graph.input:
        static[value.name] = tuple(bool(d.dim_value) for d in value.type.tensor_type.shape.dim)
    return shapes, static


def seeded_feeds(proto: ModelProto, shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the given shapes: standard normal floats, integers 0 or 1, booleans true."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in proto.graph.input:
        if value.name not in shapes:
            continue
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shapes[value.name]
        if value.type.tensor_type.elem_type in (1, 10, 11, 16):
            feeds[value.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
        elif dtype == np.bool_:
            feeds[value.name] = np.ones(shape, dtype)
        else:
            feeds[value.name] = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return feeds


def _seen(
    proto: ModelProto, wanted: set[str], shapes: Mapping[str, Shape], feeds: Mapping[str, np.ndarray] | None
) -> dict[str, Shape]:
    """Shapes of the values that only a run can tell; {} where the model does not run here (those axes stay unknown)."""
    import onnxruntime as ort

    made = {o for n in proto.graph.node for o in n.output if o}
    probe = ModelProto()
    probe.CopyFrom(proto)
    del probe.graph.output[:]
    names = sorted(wanted & made)
    probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return {}
    given = {**seeded_feeds(proto, shapes), **(feeds or {})}
    try:
        values = session.run(names, {k: v for k, v in given.items() if k in shapes})
    except Exception as error:
        raise ValueError(str(error)) from error
    return {n: np.shape(v) for n, v in zip(names, values, strict=True) if isinstance(v, np.ndarray)}


# --- folding: numpy says what each operator of shape arithmetic computes --------------------------------------------

Numbers = Sequence[Any]
Attributes = Mapping[str, Any]


def _slice(x: Numbers, a: Attributes) -> np.ndarray:
    data, starts, ends, axes, steps = (*x, *[None] * (5 - len(x)))[:5]
    starts = a.get("starts") if starts is None else starts
    ends = a.get("ends") if ends is None else ends
    axes = a.get("axes", range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        end = None if step < 0 and end < -data.shape[axis] else int(end)
        index[axis] = slice(int(start), end, int(step))
    return np.asarray(data[tuple(index)])


def _unsqueeze(x: Numbers, a: Attributes) -> np.ndarray:
    axes = a["axes"] if "axes" in a else x[1]
    out = x[0]
    rank = out.ndim + len(axes)
    for axis in sorted(int(i) % rank for i in axes):
        out = np.expand_dims(out, axis)
    return np.asarray(out)


def _squeeze(x: Numbers, a: Attributes) -> np.ndarray:
    axes = a.get("axes", x[1] if len(x) > 1 and x[1] is not None else None)
    return np.squeeze(x[0], None if axes is None else tuple(int(i) for i in axes))


def _reshape(x: Numbers, a: Attributes) -> np.ndarray:
    target = [x[0].shape[i] if s == 0 and not a.get("allowzero") else int(s) for i, s in enumerate(x[1])]
    return np.asarray(x[0].reshape(target))


def _reduce(function: Callable[..., Any]) -> Callable[[Numbers, Attributes], np.ndarray]:
    def run(x: Numbers, a: Attributes) -> np.ndarray:
        axes = a.get("axes", x[1] if len(x) > 1 else None)
        axes = None if axes is None else tuple(int(i) for i in axes)
        return np.asarray(function(x[0], axis=axes, keepdims=bool(a.get("keepdims", 1))))

    return run


def _div(x: Numbers, a: Attributes) -> np.ndarray:
    if x[0].dtype.kind in "iu":  # C's division: towards zero
        return (np.sign(x[0]) * np.sign(x[1]) * (np.abs(x[0]) // np.abs(x[1]))).astype(x[0].dtype)
    return np.asarray(x[0] / x[1])


def _clip(x: Numbers, a: Attributes) -> np.ndarray:
    low = a.get("min", x[1] if len(x) > 1 else None)
    high = a.get("max", x[2] if len(x) > 2 else None)
    return np.asarray(x[0] if low is None and high is None else np.clip(x[0], low, high)).astype(x[0].dtype)


def _constant_of_shape(x: Numbers, a: Attributes) -> np.ndarray:
    value = numpy_helper.to_array(a["value"]) if "value" in a else np.zeros(1, np.float32)
    return np.full(tuple(int(i) for i in x[0]), value.ravel()[0], value.dtype)


def _cast(x: Numbers, a: Attributes) -> np.ndarray:
    return np.asarray(x[0]).astype(helper.tensor_dtype_to_np_dtype(a["to"]))


# The same function on the numbers and on the flags of what is dynamic
_MOVES: dict[str, Callable[[Numbers, Attributes], np.ndarray]] = {
    "Identity": lambda x, a: x[0],
    "Concat": lambda x, a: np.concatenate(x, axis=a["axis"]),
    "Gather": lambda x, a: np.take(x[0], x[1], axis=a.get("axis", 0)),
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Transpose": lambda x, a: np.transpose(x[0], a.get("perm")),
}
_COMPUTES: dict[str, Callable[[Numbers, Attributes], np.ndarray]] = {
    "Cast": _cast,
    "Add": lambda x, a: x[0] + x[1],
    "Sub": lambda x, a: x[0] - x[1],
    "Mul": lambda x, a: x[0] * x[1],
    "Div": _div,
    "Mod": lambda x, a: np.fmod(x[0], x[1]) if a.get("fmod") else np.mod(x[0], x[1]),
    "Neg": lambda x, a: -x[0],
    "Abs": lambda x, a: np.abs(x[0]),
    "Floor": lambda x, a: np.floor(x[0]),
    "Ceil": lambda x, a: np.ceil(x[0]),
    "Sqrt": lambda x, a: np.sqrt(x[0]),
    "Pow": lambda x, a: np.power(x[0], x[1]).astype(x[0].dtype),
    "Max": lambda x, a: np.maximum.reduce(np.broadcast_arrays(*x)),
    "Min": lambda x, a: np.minimum.reduce(np.broadcast_arrays(*x)),
    "Clip": _clip,
    "Sign": lambda x, a: np.sign(x[0]),
    "Round": lambda x, a: np.round(x[0]),
    "LessOrEqual": lambda x, a: x[0] <= x[1],
    "GreaterOrEqual": lambda x, a: x[0] >= x[1],
    "Equal": lambda x, a: x[0] == x[1],
    "Less": lambda x, a: x[0] < x[1],
    "Greater": lambda x, a: x[0] > x[1],
    "Not": lambda x, a: ~x[0],
    "And": lambda x, a: x[0] & x[1],
    "Or": lambda x, a: x[0] | x[1],
    "Where": lambda x, a: np.where(x[0], x[1], x[2]),
    "Expand": lambda x, a: np.broadcast_to(x[0], np.broadcast_shapes(x[0].shape, tuple(int(i) for i in x[1]))),
    "Tile": lambda x, a: np.tile(x[0], [int(i) for i in x[1]]),
    "ConstantOfShape": _constant_of_shape,
    "Range": lambda x, a: np.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
}


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values (strings decoded)."""
    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        found[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return found


def constant_numbers(tensors: Mapping[str, TensorProto]) -> dict[str, Folded]:
    """The small integer, boolean and scalar constants."""
    found = {}
    for name, tensor in tensors.items():
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_location == TensorProto.EXTERNAL:
            continue
        if (tensor.data_type in (2, 3, 5, 6, 7, 9) and count <= SMALL) or (tensor.data_type in (1, 10, 11) and count <= 8):
            number = numpy_helper.to_array(tensor)
            found[name] = Folded(number, np.zeros(number.shape, bool), False)
    return found


def fold(
    nodes: Iterable[NodeProto],
    tensors: Mapping[str, TensorProto],
    shapes: Mapping[str, Shape],
    static: Mapping[str, tuple[bool, ...]] | None = None,
) -> dict[str, Folded]:
    """The values that follow from constants and shapes alone.

    static: {value: which of its axes have the same size for all inputs}; None where every axis has.
    """
    folded = constant_numbers(tensors)
    for node in nodes:
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1 or not node.output[0]:
            continue
        op, out = node.op_type, node.output[0]
        if op == "Shape" and node.input[0] in shapes:
            given = attributes(node)
            span = slice(given.get("start", 0), given.get("end"))
            number = np.array(shapes[node.input[0]], np.int64)
            flags = np.zeros(number.shape, bool)
            if static is not None and node.input[0] not in tensors:
                known = static.get(node.input[0])
                flags = ~np.array(known, bool) if known is not None and len(known) == len(number) else ~flags
            folded[out] = Folded(number[span], flags[span], True)
            continue
        if op == "Size" and node.input[0] in shapes:
            flag = static is not None and not all(static.get(node.input[0], (False,)))
            folded[out] = Folded(np.array(np.prod(shapes[node.input[0]], dtype=np.int64)), np.array(flag), True)
            continue
        if op == "Constant":
            given = attributes(node)
            for key, dtype in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
                if key in given:
                    number = np.array(given[key], dtype)
                    folded[out] = Folded(number, np.zeros(number.shape, bool), False)
            continue
        if (op not in _MOVES and op not in _COMPUTES) or any(x and x not in folded for x in node.input):
            continue
        sources = [folded[x] if x else None for x in node.input]
        given = attributes(node)
        try:
            with np.errstate(all="ignore"):
                numbers = [s.number if s else None for s in sources]
                number = np.asarray((_MOVES.get(op) or _COMPUTES[op])(numbers, given))
            if op in _MOVES:
                flags = [s.dynamic if s and (i == 0 or op == "Concat") else numbers[i] for i, s in enumerate(sources)]
                dynamic = np.asarray(_MOVES[op](flags, given)).astype(bool)
            elif op in ("Expand", "Tile", "ConstantOfShape", "Range") or op.startswith("Reduce"):
                dynamic = np.full(number.shape, any(s is not None and s.dynamic.any() for s in sources))
            else:
                dynamic = np.zeros(number.shape, bool)
                for s in sources:
                    dynamic = dynamic | (s.dynamic if s else False)
        except Exception:  # an odd attribute or type: the value is then not known, which is always safe
            continue
        if number.size <= SMALL:
            folded[out] = Folded(number, dynamic, any(s is not None and s.from_shape for s in sources))
    return folded

"""Shape arithmetic before any input is there: numpy says what each operator computes, on the numbers and on what is dynamic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
SMALL = 4096  # elements; larger integer tensors are data, not shapes


@dataclass(frozen=True)
class Folded:
    """A value known without data: its number, where it depends on symbolic input sizes, and whether on any shape at all."""

    number: np.ndarray
    dynamic: np.ndarray
    from_shape: bool


Numbers = Sequence[Any]
Attributes = Mapping[str, Any]


def _slice(x: Numbers, a: Attributes) -> np.ndarray:
    data, starts, ends, axes, steps = (*x, *[None] * (5 - len(x)))[:5]
    starts = a["starts"] if starts is None else starts
    ends = a["ends"] if ends is None else ends
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
    return np.asarray(np.squeeze(x[0], None if axes is None else tuple(int(i) for i in axes)))


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
        return np.asarray(np.sign(x[0]) * np.sign(x[1]) * (np.abs(x[0]) // np.abs(x[1]))).astype(x[0].dtype)
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
    "Mod": lambda x, a: np.asarray(np.fmod(x[0], x[1]) if a.get("fmod") else np.mod(x[0], x[1])),
    "Neg": lambda x, a: -x[0],
    "Abs": lambda x, a: np.asarray(np.abs(x[0])),
    "Floor": lambda x, a: np.asarray(np.floor(x[0])),
    "Ceil": lambda x, a: np.asarray(np.ceil(x[0])),
    "Sqrt": lambda x, a: np.asarray(np.sqrt(x[0])),
    "Pow": lambda x, a: np.power(x[0], x[1]).astype(x[0].dtype),
    "Max": lambda x, a: np.asarray(np.maximum.reduce(np.broadcast_arrays(*x))),
    "Min": lambda x, a: np.asarray(np.minimum.reduce(np.broadcast_arrays(*x))),
    "Clip": _clip,
    "Sign": lambda x, a: np.asarray(np.sign(x[0])),
    "Round": lambda x, a: np.asarray(np.round(x[0])),
    "LessOrEqual": lambda x, a: x[0] <= x[1],
    "GreaterOrEqual": lambda x, a: x[0] >= x[1],
    "Equal": lambda x, a: x[0] == x[1],
    "Less": lambda x, a: x[0] < x[1],
    "Greater": lambda x, a: x[0] > x[1],
    "Not": lambda x, a: ~x[0],
    "And": lambda x, a: x[0] & x[1],
    "Or": lambda x, a: x[0] | x[1],
    "Where": lambda x, a: np.asarray(np.where(x[0], x[1], x[2])),
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
        count = math.prod(tensor.dims)
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
                same = static.get(node.input[0])
                flags = ~np.array(same, bool) if same is not None and len(same) == len(number) else ~flags
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
                known = [s.dynamic if s and (i == 0 or op == "Concat") else numbers[i] for i, s in enumerate(sources)]
                dynamic = np.asarray(_MOVES[op](known, given)).astype(bool)
                if op != "Concat" and any(s is not None and s.dynamic.any() for s in sources[1:]):
                    dynamic = np.ones(number.shape, bool)  # which elements are taken depends on input sizes
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

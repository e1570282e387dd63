"""Zeros in place of units: where they are the same as removing, and which operators make something else of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, numpy_helper

from onnxprune import layouts
from onnxprune.folding import attributes
from onnxprune.grouping import Group, Grouping, Member
from onnxprune.importer import Model
from onnxprune.moves import by_tensor
from onnxprune.running import Arrays, Lazy


def contractions(model: Model) -> set[tuple[str, int]]:
    """The (tensor, axis) pairs of constants that a layer sums over."""
    return {pair for node in model.nodes for pair in summed(node, model) if pair[0] in model.tensors}


def summed(node: NodeProto, model: Model) -> list[tuple[str, int]]:
    """The axes of its inputs that a layer sums over; of a convolution's only the weight's."""
    op, found = node.op_type, []
    for position, name in enumerate(node.input):
        rank = len(model.shapes.get(name, ()))
        if op in ("Conv", "ConvTranspose") and position == 1:
            found.append((name, 1 if op == "Conv" else 0))
        elif op == "Gemm" and position < 2:
            flipped = attributes(node).get("transB" if position else "transA", 0)
            found.append((name, 1 - position if not flipped else position))
        elif op == "MatMul" and rank:
            found.append((name, max(rank - 2, 0) if position else rank - 1))
        elif op in ("LSTM", "GRU", "RNN") and position in (1, 2):
            found.append((name, 2))
    return found


def zeroed(arrays: Arrays, groups: Sequence[Group], remove: Mapping[int, np.ndarray], readers: set[tuple[str, int]] | None) -> Arrays:
    """The tensors with the removed units' slices zero: everywhere, or only where `readers` sum over them."""
    if isinstance(arrays, Lazy):
        many, homes = arrays, by_tensor(groups)

        def one(name: str) -> np.ndarray:
            array = many[name]
            return zeroed({name: array}, homes[name], remove, readers).get(name, array)

        return Lazy(homes, one)
    changed: dict[str, np.ndarray] = {}
    for group in groups:
        members: Sequence[Member] = group.members
        if readers is not None:
            members = [m for m in members if (m.tensor, m.axis) in readers] or members
        for member in (m for m in members if m.tensor in arrays):
            array = changed[member.tensor] if member.tensor in changed else arrays[member.tensor].copy()
            index: list[Any] = [slice(None)] * array.ndim
            index[member.axis] = member.indices[remove[group.id]].ravel()
            array[tuple(index)] = 0
            changed[member.tensor] = array
    return changed


# One input that is zero makes a zero: f(0) = 0, products, and what only moves elements
_ODD = """
    Abs Asin Asinh Atan Atanh BatchNormalization Cast CastLike Ceil Celu DynamicQuantizeLinear Elu Erf FastGelu Floor Gelu HardSwish
    Identity InstanceNormalization LeakyRelu LpNormalization LRN MaxUnpool Mish Mul Neg PRelu QuickGelu Relu Round Selu Sign Sin
    Sinh Softsign Sqrt Swish Tan Tanh ThresholdedRelu
""".split()
_MOVING = """
    AveragePool DepthToSpace Dropout Einsum Expand Flatten Gather GatherND GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample
    LpPool MatMul MaxPool ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Reshape Resize
    RotaryEmbedding Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Upsample FusedMatMul
""".split()
_ONE_ZERO = {*_ODD, *_MOVING}
# All that stand along the axis have to be zero: a shift that stays would make something of it
_ALL_ZERO = {"Add", "BiasGelu", "Concat", "Max", "Mean", "Min", "ScatterND", "Sub", "Sum"}
_LAYERS = {"Conv", "ConvTranspose", "Gemm"}
_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention"}


def keeps_zeros(node: NodeProto, zero: Sequence[bool], model: Model) -> bool:
    """Whether zeros along an axis of some inputs (`zero`, a flag an input) leave nothing but zeros along the output's."""
    op, given = node.op_type, attributes(node)
    bias = [z for z, name in zip(zero[2:], node.input[2:], strict=True) if name]
    if op in _ALL_ZERO:
        return all(z for z, name in zip(zero, node.input, strict=True) if name)
    if op in _LAYERS:
        return all(bias)
    if op in _ONE_ZERO:
        return any(zero)
    if op in _ATTENTION:
        return True  # values that are zero stay zero, and so do scores of zero keys
    if op == "Div":
        return zero[0] and not zero[1]
    if op == "Where":
        return all(zero[1:])
    if op == "Clip":
        low, high = (_number(model, node, i, given.get(key)) for i, key in ((1, "min"), (2, "max")))
        return (low is None or bool((low <= 0).all())) and (high is None or bool((high >= 0).all()))
    if op == "Pow":
        exponent = _number(model, node, 1)
        return zero[0] and exponent is not None and bool((exponent > 0).all())
    if op == "Pad":
        value = _number(model, node, 2, given.get("value"))
        return zero[0] and (given.get("mode", "constant") != "constant" or value is None or not value.any())
    if op == "ConstantOfShape":
        return "value" not in given or not numpy_helper.to_array(given["value"]).any()
    if op in ("LSTM", "GRU", "RNN"):
        states = [z for z, name in zip(zero[5:7], node.input[5:7], strict=True) if name]
        return "activations" not in given and all(states)
    if op in ("QuantizeLinear", "DequantizeLinear"):
        constant = node.input[0] in model.tensors  # zeros of a weight are zeros before its zero point is taken off
        shift = _number(model, node, 2)
        shifted = len(node.input) > 2 and not zero[2] and constant and (shift is None or bool(shift.any()))
        return zero[0] and not shifted and not (op == "QuantizeLinear" and zero[1])
    return False


def _number(model: Model, node: NodeProto, position: int, default: Any = None) -> np.ndarray | None:
    """A number that the model says, as an input or as an attribute; not finite where it is only known at run time."""
    if position < len(node.input) and node.input[position]:
        found = model.folded.get(node.input[position])
        return np.array(np.nan) if found is None else found.number
    return None if default is None else np.asarray(default)


# Where integers are and where their zero points: a zero of the tensor is no zero of what it stands for
_INTEGERS = {
    "QLinearMatMul": ((0, 2), (3, 5)),
    "QLinearConv": ((0, 2), (3, 5)),
    "QGemm": ((0, 2), (3, 5)),
    "MatMulInteger": ((0, 2), (1, 3)),
    "ConvInteger": ((0, 2), (1, 3)),
    "MatMulIntegerToFloat": ((0, 4), (1, 5)),
    "DynamicQuantizeMatMul": ((1, 3),),
}


def _biased(model: Model, node: NodeProto) -> list[int]:
    """The positions of integer inputs whose zero point is not known to be zero."""
    points = {value: _number(model, node, point) for value, point in _INTEGERS.get(node.op_type, ())}
    return [value for value, number in points.items() if number is not None and not (np.isfinite(number).all() and not number.any())]


def excuses(grouping: Grouping) -> dict[int, str]:
    """{group id: why zeros in place of its units may differ from removing them}; no other group has a reason to.

    Zeros where a constant weight is summed over are the same as removing, whatever comes before.  So it takes two: an
    operator that makes something else of zeros, and one that sums over the units without such a weight.
    """
    model = grouping.model
    home = {leaf: group.id for group in grouping.groups for leaf in group.leaves}
    shifted: dict[int, NodeProto] = {}
    read: dict[int, str] = {}

    def carried(name: str, axes: Sequence[int] | None = None) -> set[int]:
        places = range(len(model.shapes.get(name, ()))) if axes is None else axes
        return {home[leaf] for i in places for leaf in layouts.leaves(grouping.layout((name, i))) if leaf in home}

    for node in model.nodes:
        inputs = [carried(name) if name else set() for name in node.input]
        outputs: set[int] = set().union(*(carried(name) for name in node.output if name))
        for group in outputs:
            if not keeps_zeros(node, [group in found for found in inputs], model):
                shifted.setdefault(group, node)
        for position in _biased(model, node):
            for group in inputs[position]:
                shifted.setdefault(group, node)
        if node.op_type in ("Shape", "Size"):
            continue
        sums = {(name, axis): carried(name, [axis]) for name, axis in summed(node, model)}
        weighed = set().union(*(found for (name, _), found in sums.items() if name in model.tensors))
        for group in set().union(*inputs) - weighed:
            if group not in outputs or any(group in found for found in sums.values()):
                read.setdefault(group, f"'{node.name or node.output[0]}' ({node.op_type})")
    return {
        group: f"'{node.name or node.output[0]}' ({node.op_type}) makes something else of zeros, and {read[group]} sums over it"
        for group, node in shifted.items()
        if group in read
    }

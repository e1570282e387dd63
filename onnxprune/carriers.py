"""Which outputs of which layer a value holds, where nothing but reshapes and a scale lies between: found by a probe.

The layer's output is replaced by its own column numbers; where they come out again at the value, times one scale, each of its
numbers is that column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.capture import Tap
from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.importer import FLOATS, Model
from onnxprune.linear import CONVOLUTIONS, Linear, linears, made_by
from onnxprune.running import Arrays
from onnxprune.scopes import captured
from onnxprune.seats import Seat, tensors_of

MOVES = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class Carrier:
    """seat: the layer; columns: for each number of the value the output of the layer that it is, times `scale`."""

    seat: Seat
    columns: np.ndarray
    scale: float


def carrier(model: Model, pruned: ModelProto, value: str, feeds: Arrays) -> Carrier | None:
    """The layer that makes a value of the pruned model; None where something else than reshapes and a scale lies between.

    model: the original; feeds: one batch, and other values of the pruned model as far as they are known.  None too where the same
    columns of the layer are read elsewhere, and where it is a grouped convolution.
    """
    layer = _behind(model, pruned, value)
    if layer is None:
        return None
    seat, width = _seat(model, pruned, layer)
    ends = _ends(model, pruned, layer.output)
    if seat.shape.group > 1 or ends.get(value) != 1:
        return None
    try:
        found = _probed(pruned, seat, width, ends, feeds)
    except OnnxPruneError:  # column numbers are not what the rest of the model takes
        return None
    mine = found.pop(value, None)
    if mine is None or any(other is None or np.intersect1d(mine[0], other[0]).size for other in found.values()):
        return None
    return Carrier(seat, *mine)


def _seat(model: Model, pruned: ModelProto, layer: Linear) -> tuple[Seat, int]:
    """The layer in the pruned model, with the bias that it has by now, and how many outputs."""
    made = made_by(pruned.graph.node)
    node = made[model.main[layer.node].output[0]]
    tensor = tensors_of(pruned)[layer.weight]
    shape = layer.geometry(node, len(tensor.dims))
    if layer.add >= 0:
        bias = next(name for name in made[layer.output].input if name != node.output[0])
    else:
        bias = node.input[2] if len(node.input) > 2 else ""
    source = node.input[0 if node.input[1] == layer.operand else 1]
    groups, out, _ = shape.matrix(numpy_helper.to_array(tensor)).shape
    return Seat(layer, node, shape, source, layer.weight, bias), groups * out


def _moves(model: Model, node: NodeProto, value: str) -> bool:
    """Whether a node only moves a value's numbers, or scales all of them alike."""
    if node.domain not in ("", "ai.onnx") or list(node.input).count(value) != 1:
        return False
    if node.op_type == "Cast":
        return attributes(node).get("to") in FLOATS
    if node.op_type in ("Mul", "Div"):
        other = node.input[1 - list(node.input).index(value)]
        single = other in model.shapes and math.prod(model.shapes[other]) == 1
        return single and (node.op_type == "Mul" or node.input[0] == value)
    return node.op_type in MOVES and node.input[0] == value


def _behind(model: Model, pruned: ModelProto, value: str) -> Linear | None:
    layers = {layer.output: layer for layer in linears(model)}
    made, tensors = made_by(pruned.graph.node), tensors_of(pruned)
    while value not in layers:
        node = made.get(value)
        source = next((name for name in node.input if name and _moves(model, node, name)), None) if node is not None else None
        if source is None:
            return None
        value = source
    layer = layers[value]
    node = made.get(model.main[layer.node].output[0])
    there = node is not None and node.op_type == layer.op and layer.operand in node.input and layer.weight in tensors
    return layer if there and layer.output in made else None


def _ends(model: Model, pruned: ModelProto, start: str) -> dict[str, int]:
    """The values at which what a layer makes stops being only moved, and how many nodes read each there."""
    outputs = {v.name for v in pruned.graph.output}
    ends: dict[str, int] = {}
    todo = [start]
    while todo:
        value = todo.pop()
        ends[value] = int(value in outputs)
        for node in pruned.graph.node:
            if value in captured(node):
                ends[value] += 1
            elif value in node.input and node.op_type not in ("Shape", "Size"):
                moved = _moves(model, node, value)
                todo += node.output if moved else []
                ends[value] += 0 if moved else 1
    return {value: count for value, count in ends.items() if count}


def _probed(pruned: ModelProto, seat: Seat, width: int, values: Iterable[str], feeds: Arrays) -> dict[str, tuple[np.ndarray, float] | None]:
    """{value: the column of each of its numbers, and their scale}; None where it holds something else."""
    layer, probed = seat.layer, ModelProto()
    probed.CopyFrom(pruned)
    nodes = probed.graph.node
    place = next(i for i, node in enumerate(nodes) if layer.output in node.output)
    spare, numbers, sizes = (f"{layer.output}:{word}" for word in ("made", "numbers", "sizes"))
    nodes[place].output[list(nodes[place].output).index(layer.output)] = spare
    nodes.insert(place + 1, helper.make_node("Shape", [spare], [sizes]))
    nodes.insert(place + 2, helper.make_node("Expand", [numbers, sizes], [layer.output]))
    after = len(seat.shape.strides) if layer.op in CONVOLUTIONS else int(seat.shape.left)  # axes behind the channels
    shape = [width, *[1] * after]
    probed.graph.input.append(helper.make_tensor_value_info(numbers, TensorProto.FLOAT, shape))
    tap = Tap(probed, values, known=_before(pruned, layer.output, feeds))
    counted = tap.run({**feeds, numbers: np.arange(1, width + 1, dtype=np.float32).reshape(shape)})
    ones = tap.run({**feeds, numbers: np.ones(shape, np.float32)})
    found: dict[str, tuple[np.ndarray, float] | None] = {}
    for name, scales in ones.items():
        scale = float(scales.ravel()[0]) if scales.size else 0.0
        found[name] = None
        if np.isfinite(scale) and scale and np.abs(scales / scale - 1).max() < 1e-5:
            columns = counted[name] / scale
            whole = np.rint(columns)
            if np.abs(columns - whole).max() < 0.1:
                found[name] = whole.astype(np.int64) - 1, scale
    return found


def _before(proto: ModelProto, value: str, feeds: Arrays) -> dict[str, np.dtype[Any]]:
    """The types of what is known beside the inputs, if none of it is made of a value."""
    known = {name: array.dtype for name, array in feeds.items() if name not in {v.name for v in proto.graph.input}}
    behind = {value}
    for node in proto.graph.node:
        if behind.intersection(node.input) or behind & captured(node):
            behind.update(node.output)
    return {} if behind & known.keys() else known

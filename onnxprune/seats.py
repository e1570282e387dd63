"""The linear layers of a pruned model, each beside what it was: where it is, what it reads now, and what its output goes into."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from onnxprune.evidence import WIDEST
from onnxprune.folding import attributes
from onnxprune.importer import Model
from onnxprune.linear import Geometry, Linear, geometry, linears, made_by
from onnxprune.plans import Plan


@dataclass(frozen=True)
class Seat:
    """A layer in the pruned model: the node there, and what it reads.

    other: the other operand of the residual Add that its output goes into, "" where there is none; narrowed: it has lost inputs;
    bounds: what a Relu or Clip right behind lets through.
    """

    layer: Linear
    node: NodeProto
    shape: Geometry
    source: str
    weight: str
    bias: str
    other: str = ""
    narrowed: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def goal(self) -> str:
        """The original's value that the layer is to make, together with `other`."""
        return self.layer.added[0] if self.other and self.layer.added else self.layer.output


def seats(plan: Plan, pruned: ModelProto) -> list[Seat]:
    """The layers that see less than they did, or read something that has changed, in the order of the graph."""
    model = plan.grouping.model
    made = made_by(pruned.graph.node)
    tensors = tensors_of(pruned)
    changed = {name for name, tensor in tensors.items() if name in model.tensors and list(tensor.dims) != list(model.tensors[name].dims)}
    originally = made_by(model.main)
    for node in pruned.graph.node:
        old = originally.get(node.output[0]) if node.output else None
        fresh = old is None or list(old.input) != list(node.input)
        if fresh or changed.intersection(node.input):
            changed.update(node.output)
    found = []
    for layer in linears(model):
        name = model.main[layer.node].output[0]
        node = made.get(name)
        if node is None or node.op_type != layer.op or layer.weight not in node.input or layer.weight not in tensors:
            continue
        shape = geometry(node, layer.weight, len(tensors[layer.weight].dims))
        source = node.input[0 if node.input[1] == layer.weight else 1]
        if layer.add >= 0:
            add = made.get(layer.output)
            if add is None or layer.bias not in add.input:
                continue
        other = ""
        if layer.added is not None:
            add = made.get(layer.added[0])
            if add is not None and add.op_type == "Add" and layer.output in add.input:
                other = add.input[1 - list(add.input).index(layer.output)]
        if source in changed or other in changed:
            wide = shape.matrix(numpy_helper.to_array(tensors[layer.weight])).shape[2]
            if wide > WIDEST:
                continue
            whole = geometry(model.main[layer.node], layer.weight, len(tensors[layer.weight].dims))
            narrowed = wide < whole.matrix(model.array(layer.weight)).shape[2]
            seat = Seat(layer, node, shape, source, layer.weight, layer.bias, other, narrowed)
            found.append(replace(seat, bounds=_bounds(model, seat.goal)))
    return found


def _bounds(model: Model, value: str) -> tuple[float, float] | None:
    """The range that the only reader of a value, a Relu or a Clip, lets through."""
    readers = [node for node in model.nodes if value in node.input]
    if len(readers) != 1 or value in model.outputs:
        return None
    node = readers[0]
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    given = attributes(node)
    limits = [float(given.get("min", -np.inf)), float(given.get("max", np.inf))]
    for position, name in enumerate(node.input[1:3]):
        if name and name not in model.tensors:
            return None
        if name:
            limits[position] = float(model.array(name).ravel()[0])
    return limits[0], limits[1]


def tensors_of(proto: ModelProto) -> dict[str, TensorProto]:
    """The initializers and Constants of the main graph."""
    found = {t.name: t for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found


def give_bias(proto: ModelProto, seat: Seat, bias: np.ndarray) -> None:
    """Write a layer's bias: into its tensor if no other node reads it, else into one of its own."""
    made = made_by(proto.graph.node)
    node = made[seat.layer.output if seat.layer.add >= 0 else seat.node.output[0]]
    readers = sum(list(other.input).count(seat.bias) for other in proto.graph.node) if seat.bias else 0
    if readers == 1:
        write(tensors_of(proto)[seat.bias], bias)
        return
    taken = {t.name for t in proto.graph.initializer} | set(made) | {v.name for v in proto.graph.input}
    name = next(n for i in range(len(taken) + 1) if (n := f"{seat.weight}_bias{i or ''}") not in taken)
    proto.graph.initializer.append(numpy_helper.from_array(bias, name))
    if seat.bias:
        node.input[list(node.input).index(seat.bias)] = name
    else:
        del node.input[2:]
        node.input.append(name)


def write(tensor: TensorProto, array: np.ndarray) -> None:
    kind, name = tensor.data_type, tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))  # 0-d stays 0-d
    tensor.data_type = kind

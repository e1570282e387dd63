"""The linear layers of a pruned model, each beside what it was: where it is, what it reads now, and what its output goes into."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.evidence import WIDEST
from onnxprune.folding import attributes
from onnxprune.importer import Model
from onnxprune.linear import CONVOLUTIONS, RECURRENT, Geometry, Linear, linears, made_by
from onnxprune.masking import summed
from onnxprune.plans import Plan
from onnxprune.recurrences import recurrences
from onnxprune.rewriter import Widths
from onnxprune.scopes import all_graphs, captured, declared


@dataclass(frozen=True)
class Seat:
    """A layer in the pruned model: the node there, and what it reads.

    other: the other operand of the residual Add that its output goes into, "" where there is none; narrowed: it has lost inputs;
    changed: it reads something, or is added to something, that is not what it was; bounds: what a Relu or Clip right behind lets
    through.
    """

    layer: Linear
    node: NodeProto
    shape: Geometry
    source: str
    weight: str
    bias: str
    other: str = ""
    narrowed: bool = False
    changed: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def goal(self) -> str:
        """The original's value that the layer is to make, together with `other`."""
        return self.layer.added[0] if self.other and self.layer.added else self.layer.output


def seats(plan: Plan, pruned: ModelProto) -> list[Seat]:
    """The layers that see less than they did, or read something that has changed, in the order of the graph."""
    return [seat for seat in all_seats(plan, pruned) if seat.changed]


def all_seats(plan: Plan, pruned: ModelProto) -> list[Seat]:
    """The linear layers that are still there, in the order of the graph."""
    model = plan.grouping.model
    made = made_by(pruned.graph.node)
    tensors = tensors_of(pruned)
    changed = {name for name, tensor in tensors.items() if name in model.tensors and list(tensor.dims) != list(model.tensors[name].dims)}
    originally = made_by(model.main)
    for node in pruned.graph.node:
        made_here = [name for name in node.output if name]
        old = originally.get(made_here[0]) if made_here else None
        fresh = old is None or list(old.input) != list(node.input)
        if fresh or changed.intersection(node.input) or changed & captured(node):
            changed.update(made_here)
    found = []
    for layer in sorted((*linears(model), *recurrences(model)), key=lambda layer: layer.node):
        name = next(out for out in model.main[layer.node].output if out)
        node = made.get(name)
        if node is None or node.op_type != layer.op or layer.operand not in node.input or layer.weight not in tensors:
            continue
        if layer.bias and layer.bias not in tensors:
            continue
        shape = layer.geometry(node, len(tensors[layer.weight].dims))
        source = node.input[0 if node.input[1] == layer.operand else 1]
        if layer.add >= 0:
            add = made.get(layer.output)
            if add is None or layer.addend not in add.input:
                continue
        other = ""
        if layer.added is not None:
            add = made.get(layer.added[0])
            if add is not None and add.op_type == "Add" and layer.output in add.input:
                other = add.input[1 - list(add.input).index(layer.output)]
        wide = shape.features(tensors[layer.weight].dims)
        if wide > WIDEST:
            continue
        whole = layer.geometry(model.main[layer.node], len(tensors[layer.weight].dims))
        narrowed = wide < whole.features(model.tensors[layer.weight].dims)
        seat = Seat(layer, node, shape, source, layer.weight, layer.bias, other, narrowed, source in changed or other in changed)
        found.append(replace(seat, bounds=_bounds(model, seat.goal)))
    return found


def as_cut(plan: Plan, compensated: ModelProto) -> list[Seat]:
    """The layers that have lost inputs and are what the surgery alone makes of them."""
    model, widths, tensors = plan.grouping.model, Widths(plan.grouping, plan.remove), tensors_of(compensated)
    found = []
    for seat in all_seats(plan, compensated):
        given = bias_name(compensated, seat) not in ("", seat.layer.addend)
        names = [name for name in (seat.weight, seat.bias) if name]
        if seat.narrowed and not given:
            cut = {name: widths.cut(name, model.array(name)) for name in names}
            found += [seat] if all(np.array_equal(cut[name], numpy_helper.to_array(tensors[name])) for name in names) else []
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


def unknown_readers(plan: Plan) -> list[NodeProto]:
    """The nodes that sum a constant times units some of which go, and that are no layer here: what reads is cut, never fitted."""
    model, widths = plan.grouping.model, Widths(plan.grouping, plan.remove)
    known = {id(model.main[layer.node]) for layer in (*linears(model), *recurrences(model))}
    constants = set(model.tensors)
    found = []
    for node in model.nodes:
        if node.input and constants.issuperset(name for name in node.input if name):
            constants.update(node.output if node.op_type != "DequantizeLinear" else ())  # fitted in floats
        elif id(node) not in known and constants.intersection(node.input[:2]):
            found += [node] if any(widths.mask(axis) is not None for axis in (*summed(node, model), *_letters(node, model))) else []
    return found


def _letters(node: NodeProto, model: Model) -> list[tuple[str, int]]:
    """The axes that an Einsum sums over, where its equation says what it makes; behind "..." counted from the last."""
    equation = str(attributes(node).get("equation", "") if node.op_type == "Einsum" else "").replace(" ", "")
    terms, arrow, out = equation.partition("->")
    found = []
    for name, term in zip(node.input, terms.split(","), strict=True) if arrow else ():
        first, _, last = term.partition("...")
        found += [(name, axis) for axis, one in enumerate(first) if one not in out]
        found += [(name, len(model.shapes[name]) - 1 - axis) for axis, one in enumerate(last[::-1]) if one not in out]
    return found


def outputs_left(widths: Widths, seat: Seat) -> np.ndarray | None:
    """Which of the original layer's outputs stay, bool (out,); None where all do."""
    model = widths.grouping.model
    if seat.layer.op in RECURRENT:
        mask = widths.mask((seat.weight, 1))
        return None if mask is None else np.tile(mask, model.tensors[seat.weight].dims[0])
    rank = len(model.shapes[seat.layer.output])
    return widths.mask((seat.layer.output, 1 if seat.layer.op in CONVOLUTIONS else rank - (2 if seat.shape.left else 1)))


def original_goal(widths: Widths, seat: Seat, array: np.ndarray) -> np.ndarray:
    """What the original's layer made, without the removed units."""
    if seat.layer.op not in RECURRENT:
        return widths.cut(seat.goal, array)
    mask = outputs_left(widths, seat)
    return array if mask is None else np.compress(mask, array, axis=-1)


def bias_of(proto: ModelProto, seat: Seat, wide: int) -> np.ndarray:
    """What a layer adds, float64 (wide,): of a recurrent layer the half that goes with its inputs; zeros where there is none."""
    name = bias_name(proto, seat)
    if not name:
        return np.zeros(wide)
    tensors = tensors_of(proto)
    given = numpy_helper.to_array(tensors[_origin(proto, tensors, name)[-1]])
    given = given[:, : given.shape[1] // 2] if seat.layer.op in RECURRENT else given
    return np.asarray(given, np.float64).reshape(wide) * seat.layer.beta


def bias_name(proto: ModelProto, seat: Seat) -> str:
    """What a layer reads as its bias now, "" where it has none: one may have been given since the seats were found."""
    node = _adds_bias(proto, seat)
    if seat.layer.add >= 0:
        return str(next(name for name in node.input if name != seat.node.output[0]))
    position = 3 if seat.layer.op in RECURRENT else 2
    name = node.input[position] if len(node.input) > position else ""
    if seat.layer.op in RECURRENT:
        return str(name)
    if not name or seat.layer.beta == 0:
        return ""
    tensors = tensors_of(proto)
    wide = math.prod(seat.shape.matrix(numpy_helper.to_array(tensors[seat.weight])).shape[:2])
    return name if math.prod(tensors[_origin(proto, tensors, name)[-1]].dims) == wide else ""  # a number that stands for no bias


def _adds_bias(proto: ModelProto, seat: Seat) -> NodeProto:
    """The node that takes a layer's bias."""
    made = made_by(proto.graph.node)
    return made[seat.layer.output if seat.layer.add >= 0 else next(out for out in seat.node.output if out)]


def give_bias(proto: ModelProto, seat: Seat, bias: np.ndarray) -> None:
    """Have a layer add a bias (out,): by its tensor if no other node reads it, else by one of its own."""
    tensors, node, now = tensors_of(proto), _adds_bias(proto, seat), bias_name(proto, seat)
    names = _origin(proto, tensors, now or seat.layer.operand)
    held = numpy_helper.to_array(tensors[names[-1]])
    bias = bias / seat.layer.beta
    if now and seat.layer.op in RECURRENT:
        bias = np.concatenate([bias.reshape(len(held), -1), held[:, held.shape[1] // 2 :]], axis=1)
    bias = bias.reshape(held.shape) if now else bias
    readers = Counter(name for other in proto.graph.node for name in (*other.input, *captured(other)))
    readers.update(value.name for value in proto.graph.output)
    if now and all(readers[name] == 1 for name in names):
        write(tensors[names[-1]], bias.astype(held.dtype))
        return
    taken = set[str]().union(*(declared(graph) for graph in all_graphs(proto.graph)))
    name = next(n for i in range(len(taken) + 1) if (n := f"{seat.weight}_bias{i or ''}") not in taken)
    given = numpy_helper.from_array(bias.astype(_read_as(proto, names, held)), name)
    proto.graph.initializer.append(given)
    if proto.ir_version < 4:  # every initializer is an input
        proto.graph.input.append(helper.make_tensor_value_info(name, given.data_type, given.dims))
    if now:
        node.input[list(node.input).index(now)] = name
    else:
        del node.input[2:]
        node.input.append(name)


def _origin(proto: ModelProto, tensors: Mapping[str, TensorProto], name: str) -> list[str]:
    """A tensor's name behind what Transpose, Cast and Identity make of it: all names, its own last."""
    names, made = [name], made_by(proto.graph.node)
    while names[-1] not in tensors:
        names.append(made[names[-1]].input[0])
    return names


def _read_as(proto: ModelProto, names: Sequence[str], held: np.ndarray) -> np.dtype[Any]:
    """The type of what a layer reads, the first of these names; held: the tensor, the last one."""
    made = made_by(proto.graph.node)
    casts = [attributes(made[name])["to"] for name in names[:-1] if made[name].op_type == "Cast"]
    return helper.tensor_dtype_to_np_dtype(casts[0]) if casts else held.dtype


def put(proto: ModelProto, seat: Seat, matrix: np.ndarray | None, bias: np.ndarray) -> bool:
    """Write a layer's weight (groups, out, features; None: it stays) and the bias that it takes, if its type holds them."""
    tensor = tensors_of(proto)[seat.weight]
    now = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        weight = now if matrix is None else seat.shape.weight(matrix, now)
    if not held_by(now.dtype, weight, bias):
        return False
    if matrix is not None:
        write(tensor, weight)
    if seat.layer.takes_bias:
        give_bias(proto, seat, bias.ravel())
    return True


def held_by(kind: np.dtype[Any], *arrays: np.ndarray) -> bool:
    """Whether a type holds numbers as finite ones: those of half precision end at 65504."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(np.isfinite(array.astype(kind).astype(np.float32)).all() for array in arrays)


def write(tensor: TensorProto, array: np.ndarray) -> None:
    kind, name = tensor.data_type, tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))  # 0-d stays 0-d
    tensor.data_type = kind

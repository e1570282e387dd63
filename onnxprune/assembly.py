"""The last of step 7: a ModelProto out of changed nodes and sliced tensors; what nothing reads any more is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, ValueInfoProto

from onnxprune.importer import Model
from onnxprune.scopes import captured

if TYPE_CHECKING:
    from onnxprune.rewriter import Widths


class Edited(Protocol):
    """What the rewriter made of a model's nodes: `nodes` like the model's, `before` each what is to stand before it.

    bodies: by the position of a control flow node its attributes that hold graphs; places: the position of the node that
    makes a value; tensors: sliced, by name; added: new ones.
    """

    nodes: list[NodeProto]
    before: dict[int, list[NodeProto]]
    bodies: dict[int, list[tuple[str, GraphProto]]]
    places: dict[str, int]
    tensors: dict[str, TensorProto]
    added: list[TensorProto]


def assemble(model: Model, widths: Widths, editor: Edited) -> ModelProto:
    """The new ModelProto: what nothing reads is gone, everything else is as it was."""
    source, out = model.proto, ModelProto()
    for one, value in source.ListFields():
        if one.name not in ("graph", "functions", "training_info"):
            copy_field(out, one.name, value)
    overridable = {v.name for v in source.graph.input} & set(model.tensors) if source.ir_version >= 4 else set()
    inner = {editor.places[o] for bodies in editor.bodies.values() for _, body in bodies for o in _outputs(body)}
    main = [index for index in range(len(model.nodes)) if index not in inner]
    _fill(out.graph, source.graph, main, overridable, model, widths, editor)
    return out


def _outputs(graph: GraphProto) -> list[str]:
    """One name for each node."""
    return [next(o for o in node.output if o) for node in graph.node if any(node.output)]


def _fill(
    graph: GraphProto, source: GraphProto, numbers: Sequence[int], needed: set[str], model: Model, widths: Widths, editor: Edited
) -> None:
    """A graph, bodies included, out of the nodes of these numbers; needed: what is read besides the graph's outputs."""
    needed, alive = needed | {v.name for v in source.output}, []
    for index in reversed(numbers):
        for node in (editor.nodes[index], *reversed(editor.before.get(index, []))):
            if not any(o in needed for o in node.output):
                continue
            for key, body in editor.bodies.get(index, ()) if node is editor.nodes[index] else ():
                attribute = node.attribute.add(name=key, type=AttributeProto.GRAPH)
                _fill(attribute.g, body, [editor.places[o] for o in _outputs(body)], set(), model, widths, editor)
            alive.append(node)
            needed |= set(node.input) | captured(node)
    for one, value in source.ListFields():
        if one.name not in ("node", "initializer", "value_info", "input", "output"):
            copy_field(graph, one.name, value)
    graph.node.extend(reversed(alive))
    for tensor in source.initializer:
        if tensor.name in needed:
            graph.initializer.add().CopyFrom(editor.tensors[tensor.name])  # append copies twice
    read = {name for node in alive for name in node.input}
    graph.initializer.extend(t for t in editor.added if t.name in read)
    made = {o for n in alive for o in n.output}
    for values, target in ((source.input, graph.input), (source.output, graph.output)):
        for value in values:
            if value.name in needed or value.name not in model.tensors:
                target.append(_resized(value, model, widths) or value)
    for value in source.value_info:
        if value.name in made or value.name in needed:
            resized = _resized(value, model, widths)
            if resized is not None:
                graph.value_info.append(resized)


def copy_field(target: ModelProto | GraphProto | NodeProto, name: str, value: object) -> None:
    """Give a message what another has in a field, as ListFields returns it."""
    if hasattr(value, "MergeFrom"):
        getattr(target, name).MergeFrom(value)
    elif isinstance(value, str | int | float | bytes):
        setattr(target, name, value)
    else:
        getattr(target, name).extend(value)


def _resized(value: ValueInfoProto, model: Model, widths: Widths) -> ValueInfoProto | None:
    """The value's declared shape with its new sizes; None where the declaration was stale."""
    shape = model.shapes.get(value.name)
    if shape is None or not (dims := _dims(value)):
        return value
    if len(dims) != len(shape) or any(d.dim_value and d.dim_value != s for d, s in zip(dims, shape, strict=True)):
        return None
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    for i, dim in enumerate(_dims(copy)):
        if widths.mask((value.name, i)) is not None and dim.dim_value:
            dim.dim_value = widths.size((value.name, i))
    return copy


def _dims(value: ValueInfoProto) -> Sequence[TensorShapeProto.Dimension]:
    kind = value.type.sequence_type.elem_type if value.type.HasField("sequence_type") else value.type
    return kind.tensor_type.shape.dim if kind.HasField("tensor_type") else []

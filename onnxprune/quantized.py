"""Files with quantized weights behind DequantizeLinear: scored and fitted as floats, cut and proven as they are, rounded last.

Weights of 8 bits with a scale a channel say nothing of a channel's size, and steps of a scale cannot be fitted to samples.  So
units are chosen, and what stays is compensated, in a copy of the model whose weights are floats (activations keep their pairs of
QuantizeLinear and DequantizeLinear); the same units go from the file itself, and numbers that changed are quantized again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.certificate import Bench, Proof
from onnxprune.cost import Measure
from onnxprune.folding import attributes
from onnxprune.grouping import Group, Grouping
from onnxprune.importer import Model, load
from onnxprune.running import Arrays

TYPES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32)
BIASED = ("Conv", "ConvTranspose", "Gemm")
Tensors = Mapping[str, TensorProto]


@dataclass(frozen=True)
class Stored:
    """The file itself beside its copy in floats: its groups and proof, and {group of the copy: the same group of the file}."""

    grouping: Grouping
    proof: Proof | None
    bench: Bench | None
    numbers: Mapping[int, int]


@dataclass(frozen=True)
class Measured:
    """What is left of a budget of the file, as a function of the units kept of its copy's groups: a `cost.Measure`."""

    file: Measure
    numbers: Mapping[int, int]

    @property
    def steps(self) -> Mapping[int, int]:
        return {i: self.file.steps[own] for i, own in self.numbers.items() if own in self.file.steps}

    def __call__(self, kept: Mapping[int, int]) -> float:
        return self.file({self.numbers[i]: units for i, units in kept.items()})


def dequantizers(graph: GraphProto) -> list[NodeProto]:
    """The DequantizeLinear nodes of stored weights and biases, with one scale or one a channel."""
    tensors = {t.name: t for t in graph.initializer}
    outputs = {v.name for v in graph.output}
    found = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or any(name and name not in tensors for name in node.input) or node.output[0] in outputs:
            continue
        blocks = attributes(node).get("block_size", 0)
        if tensors[node.input[0]].data_type in TYPES and len(tensors[node.input[1]].dims) <= 1 and not blocks:
            found.append(node)
    return found


def unquantized(proto: ModelProto) -> ModelProto | None:
    """A copy whose quantized weights are floats by the names of what their DequantizeLinear makes; None where there are none."""
    nodes = dequantizers(proto.graph)
    if not nodes:
        return None
    gone = {node.output[0] for node in nodes}
    tensors = {t.name: t for t in proto.graph.initializer}
    copy = ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    del graph.node[:], graph.initializer[:]
    graph.node.extend(n for n in proto.graph.node if n.output[0] not in gone)
    quantities = {name for node in nodes for name in node.input}
    read = {name for node in graph.node for name in node.input} | {v.name for v in (*graph.input, *graph.output)}
    graph.initializer.extend(t for t in proto.graph.initializer if t.name not in quantities or t.name in read)
    graph.initializer.extend(numpy_helper.from_array(_numbers(node, tensors), node.output[0]) for node in nodes)
    return copy


def counterparts(floats: Grouping, stored: Grouping) -> dict[int, int]:
    """{group of the copy in floats: the group of the file with the same units in the same places}."""
    names = {node.output[0]: node.input[0] for node in dequantizers(stored.model.proto.graph)}
    places: dict[tuple[str, int], list[Group]] = {}
    for group in stored.groups:
        for member in group.members:
            places.setdefault((member.tensor, member.axis), []).append(group)
    cut = {g.branch.output: g.id for g in stored.groups if g.branch is not None}
    found: dict[int, int] = {}
    for group in floats.groups:
        if group.branch is not None:
            found |= {group.id: cut[group.branch.output]} if group.branch.output in cut else {}
            continue
        where = {(names.get(m.tensor, m.tensor), m.axis): m.indices for m in group.members}
        for own in places.get(next(iter(where)), []):
            theirs = {(m.tensor, m.axis): m.indices for m in own.members}
            if all(place in theirs and np.array_equal(theirs[place], indices) for place, indices in where.items()):
                found[group.id] = own.id
                break
    return found


def in_floats(stored: Grouping, feeds: Arrays | None, find: Callable[[Model], Grouping]) -> tuple[Grouping, dict[int, int]] | None:
    """The groups, as `find` finds them, of a file's copy in floats, those alone that the file has too, and their `counterparts`.

    None where the file has no quantized weights that are read at once.  What the file couples closer than its copy is left out.
    """
    model = stored.model
    copy = unquantized(model.proto) if not model.external.places else None
    if copy is None:
        return None
    inner = find(replace(load(copy, feeds, model.input_shapes), name=model.name))
    found = counterparts(inner, stored)
    times = Counter(found.values())
    numbers = {i: own for i, own in found.items() if times[own] == 1}
    return (replace(inner, groups=tuple(g for g in inner.groups if g.id in numbers)), numbers) if numbers else None


def requantized(floats: ModelProto, stored: ModelProto, pruned: ModelProto) -> ModelProto:
    """The pruned copy in floats with the weights quantized again.

    stored: the file before pruning; pruned: after it, whose integers and scales are taken where no number changed.  Else scales
    are made anew from the largest number of a channel, and a bias's scale follows that of the weight beside it.
    """
    own, left, old = ({t.name: t for t in model.graph.initializer} for model in (floats, pruned, stored))
    nodes = [node for node in dequantizers(stored.graph) if node.output[0] in own]
    readers = Counter(name for node in nodes for name in node.input)
    beside = {n.input[2]: n.input[1] for n in floats.graph.node if n.op_type in BIASED and len(n.input) > 2}
    nodes.sort(key=lambda node: node.output[0] in beside)  # weights before the biases whose scales follow theirs
    made: dict[str, TensorProto] = {}
    ratios: dict[str, np.ndarray] = {}
    again: list[NodeProto] = []
    for node in nodes:
        name, numbers = node.output[0], numpy_helper.to_array(own[node.output[0]])
        again.append(NodeProto())
        again[-1].CopyFrom(node)
        if all(n in left for n in node.input if n) and np.array_equal(_numbers(node, left), numbers):
            made |= {n: left[n] for n in node.input if n}
            continue
        scale, zero = _quantities(node, left if all(n in left for n in node.input if n) else old)
        fresh = _fitted(node, numbers, scale, zero, ratios.get(beside.get(name, "")))
        ratios[name] = fresh[1].astype(np.float64) / scale.astype(np.float64)
        for i, array in enumerate(fresh[: len(node.input)]):
            again[-1].input[i] = node.input[i] if readers[node.input[i]] == 1 else f"{node.input[i]}:{name}"
            made[again[-1].input[i]] = numpy_helper.from_array(array, again[-1].input[i])
    layers = [_copied(node) for node in floats.graph.node]
    if any(old[node.input[0]].data_type == TensorProto.INT32 for node in nodes):
        again += _new_biases(layers, again, made, own, old)
    copy = ModelProto()
    copy.CopyFrom(floats)
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend([*again, *layers])
    replaced = {node.output[0] for node in nodes} | made.keys()
    replaced |= {was.input[2] for was, now in zip(floats.graph.node, layers, strict=True) if list(was.input) != list(now.input)}
    kept = [t for t in floats.graph.initializer if t.name not in replaced]
    copy.graph.initializer.extend([*kept, *made.values()])
    return copy


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _new_biases(
    layers: list[NodeProto], weights: list[NodeProto], made: dict[str, TensorProto], own: Tensors, old: Tensors
) -> list[NodeProto]:
    """Biases that layers did not have before, in the way of the file's others: 32 bits, by the scales of what is multiplied."""
    makers = {node.output[0]: node for node in (*layers, *weights)}
    found = []
    for layer in layers:
        name = layer.input[2] if layer.op_type in BIASED and len(layer.input) > 2 else ""
        factors = [makers.get(value) for value in layer.input[:2]]
        if name not in own or name in old or name in makers:
            continue
        scales = [f.input[1] for f in factors if f is not None and f.op_type == "DequantizeLinear"]
        if len(scales) != 2 or any(scale not in made and scale not in own for scale in scales):
            continue
        one, other = (numpy_helper.to_array(made[scale] if scale in made else own[scale]) for scale in scales)
        step, numbers = np.asarray(one * other, one.dtype), numpy_helper.to_array(own[name])
        if one.size > 1 or step.shape not in ((), (1,), numbers.shape):
            continue
        span = np.iinfo(np.int32)
        steps = np.clip(np.round(numbers.astype(np.float64) / step.astype(np.float64)), span.min, span.max).astype(np.int32)
        inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        for key, array in zip(inputs, (steps, step, np.zeros(step.shape, np.int32)), strict=True):
            made[key] = numpy_helper.from_array(array, key)
        layer.input[2] = f"{name}_dequantized"
        found.append(helper.make_node("DequantizeLinear", inputs, [layer.input[2]], name=f"{name}_DequantizeLinear"))
        if step.shape == numbers.shape:
            found[-1].attribute.append(helper.make_attribute("axis", 0))
    return found


def _quantities(node: NodeProto, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
    scale = numpy_helper.to_array(tensors[node.input[1]])
    kind = numpy_helper.to_array(tensors[node.input[0]]).dtype
    zero = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 and node.input[2] else np.zeros(scale.shape, kind)
    return scale, zero


def meant(model: Model, tensor: str) -> np.ndarray:
    """The values of a tensor; of integers that a DequantizeLinear reads, with stored scales, the numbers that they stand for."""
    values, node = model.array(tensor), dequantizer(model, tensor)
    if node is None:
        return values
    scale, zero = model.array(node.input[1]), model.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.int8)
    return _dequantized(node, values, scale, zero)


def dequantizer(model: Model, tensor: str) -> NodeProto | None:
    """The first DequantizeLinear that reads a tensor of integers, with stored scales."""
    if model.tensors[tensor].data_type not in (*TYPES, TensorProto.INT4, TensorProto.UINT4):
        return None
    readers = (n for n in model.main if n.op_type == "DequantizeLinear" and n.input[0] == tensor)
    return next((n for n in readers if all(name in model.tensors for name in n.input if name)), None)


def _along(node: NodeProto, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point so that it broadcasts to the tensor."""
    rank = len(shape)
    axis = int(attributes(node).get("axis", 1)) % rank if rank else 0
    if array.ndim > 1:  # one for each block along the axis
        return np.repeat(array, int(attributes(node).get("block_size", 1)), axis).take(range(shape[axis]), axis)
    return array.reshape([-1 if i == axis else 1 for i in range(rank)]) if array.size > 1 else array.reshape(())


def _numbers(node: NodeProto, tensors: Tensors) -> np.ndarray:
    """What a DequantizeLinear of stored tensors makes."""
    return _dequantized(node, numpy_helper.to_array(tensors[node.input[0]]), *_quantities(node, tensors))


def _dequantized(node: NodeProto, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """(q − zero) · scale."""
    wide = np.int64 if stored.dtype.itemsize > 2 else np.float32  # which holds 16 bits
    scales, zeros = (_along(node, array, stored.shape) for array in (scale, zero))
    steps = stored.astype(wide) - zeros.astype(wide)
    return np.asarray(steps.astype(np.float32) * scales.astype(np.float32), scale.dtype)


def _fitted(
    node: NodeProto, numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray, ratio: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scale and zero point for new numbers, of the old ones' shapes and types; ratio: what the weight's scale beside grew by."""
    wide, kind, rank = numbers.astype(np.float64), zero.dtype, numbers.ndim
    span = np.iinfo(kind)
    new, offset = scale.astype(np.float64), zero.astype(np.int64)
    if span.bits == 32:
        new = new * ratio if ratio is not None and ratio.shape in (new.shape, (1,), ()) else new
    else:
        axis = int(attributes(node).get("axis", 1)) % rank if scale.size > 1 else None
        others = tuple(i for i in range(rank) if i != axis)
        low, high = (np.atleast_1d(edge(wide, axis=others)).reshape(scale.shape) for edge in (np.min, np.max))
        if np.any(offset):
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            new = np.where(high > low, (high - low) / (span.max - span.min), new)
            offset = np.clip(np.round(span.min - low / new), span.min, span.max).astype(np.int64)
        else:
            largest = np.maximum(np.abs(low), np.abs(high))
            new = np.where(largest > 0, largest / span.max, new)
    new = new.astype(scale.dtype)
    steps = np.round(wide / _along(node, new.astype(np.float64), numbers.shape)) + _along(node, offset, numbers.shape)
    return np.clip(steps, span.min, span.max).astype(kind), new, offset.astype(kind)

"""Pruning in rounds: what a round left and fitted is put back into the original's shapes, with zeros where units are gone.

So all rounds speak of the same groups, and the plan of the last is one plan for the original model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from onnxprune.grouping import Grouping
from onnxprune.linear import CONVOLUTIONS, RECURRENT, made_by
from onnxprune.plans import Plan
from onnxprune.relations import Axis
from onnxprune.rewriter import Widths
from onnxprune.seats import all_seats, tensors_of, write


def put_back(plan: Plan, compensated: ModelProto) -> Grouping:
    """The plan's grouping on a model of the original's shapes that computes what the pruned one does, wherever zeros are neutral."""
    grouping, model = plan.grouping, plan.grouping.model
    widths, now = Widths(grouping, plan.remove), tensors_of(compensated)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for name, tensor in tensors_of(proto).items():
        if name in now and name in model.tensors:
            array = numpy_helper.to_array(now[name])
            whole = _whole(array, [widths.mask((name, i)) for i in range(array.ndim)], tuple(tensor.dims))
            if whole is not None:
                write(tensor, whole)
    dims, shapes, readers = dict(grouping.dims), dict(model.shapes), {}
    for fresh in _given(plan, compensated):
        array = numpy_helper.to_array(now[fresh.name])
        size = model.shapes[fresh.axis[0]][fresh.axis[1]]
        whole = _whole(array, [None] * (array.ndim - 1) + [widths.mask(fresh.axis)], (*array.shape[:-1], size))
        if whole is None:
            continue
        proto.graph.initializer.append(numpy_helper.from_array(whole, fresh.name))
        shapes[fresh.name] = whole.shape
        readers[fresh.node] = fresh
        if fresh.axis in dims:
            dims[fresh.name, whole.ndim - 1] = dims[fresh.axis]
    for node in proto.graph.node:
        if node.output and node.output[0] in readers:
            readers[node.output[0]].give(node)
    tensors = {name: tensors_of(proto).get(name, tensor) for name, tensor in model.tensors.items()}
    tensors |= {fresh.name: tensors_of(proto)[fresh.name] for fresh in readers.values()}
    main, nodes = (tuple(_reading(node, readers) for node in some) for some in (model.main, model.nodes))
    left = replace(model, proto=proto, main=main, nodes=nodes, tensors=tensors, shapes=shapes, _arrays={}, sums={})
    return replace(grouping, model=left, dims=dims)


@dataclass(frozen=True)
class _Fresh:
    """A bias that compensation gave: the value that its node makes, in the place of which input (or none), and the axis it lies along."""

    name: str
    node: str
    old: str
    axis: Axis

    def give(self, node: NodeProto) -> None:
        if self.old:
            node.input[list(node.input).index(self.old)] = self.name
        else:
            del node.input[2:]
            node.input.append(self.name)


def _given(plan: Plan, compensated: ModelProto) -> list[_Fresh]:
    """The biases of a compensated model that the original has not."""
    model, made, now = plan.grouping.model, made_by(compensated.graph.node), tensors_of(compensated)
    found = []
    for seat in all_seats(plan, compensated):
        layer = seat.layer
        if layer.op in RECURRENT:
            continue  # never given one
        node = made[layer.output] if layer.add >= 0 else seat.node
        inputs = node.input if layer.add >= 0 else node.input[2:]
        axis = 1 if layer.op in CONVOLUTIONS else len(model.shapes[layer.output]) - 1
        found += [_Fresh(n, node.output[0], layer.addend, (layer.output, axis)) for n in inputs if n in now and n not in model.tensors]
    return found


def _reading(node: NodeProto, readers: Mapping[str, _Fresh]) -> NodeProto:
    """The node, or a copy that reads the bias that it was given."""
    fresh = readers.get(node.output[0]) if node.output else None
    if fresh is None:
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    fresh.give(copy)
    return copy


def _whole(array: np.ndarray, masks: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray | None:
    """An array with zeros where the masks are False; None where it does not fit."""
    kept = [np.flatnonzero(m) if m is not None else np.arange(n) for m, n in zip(masks, shape, strict=True)]
    if tuple(len(k) for k in kept) != array.shape:
        return None
    whole = np.zeros(shape, array.dtype)
    whole[np.ix_(*kept)] = array
    return whole

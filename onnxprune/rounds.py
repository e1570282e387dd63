"""Pruning in rounds: what a round left and fitted is put back into the original's shapes, with zeros where units are gone.

So all rounds speak of the same groups, and the plan of the last is one plan for the original model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import ModelProto, numpy_helper

from onnxprune.grouping import Grouping
from onnxprune.plans import Plan
from onnxprune.rewriter import Widths
from onnxprune.seats import all_seats, tensors_of, write


def put_back(plan: Plan, compensated: ModelProto) -> Grouping:
    """The plan's grouping on a model of the original's shapes that computes what the pruned one does, wherever zeros are neutral."""
    model = plan.grouping.model
    widths = Widths(plan.grouping, plan.remove)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    now = tensors_of(compensated)
    for name, tensor in tensors_of(proto).items():
        if name in now and name in model.tensors:
            array = numpy_helper.to_array(now[name])
            masks = [widths.mask((name, i)) for i in range(len(tensor.dims))]
            kept = [np.flatnonzero(m) if m is not None else np.arange(n) for m, n in zip(masks, tensor.dims, strict=True)]
            if tuple(len(k) for k in kept) == array.shape:
                whole = np.zeros(tuple(tensor.dims), array.dtype)
                whole[np.ix_(*kept)] = array
                write(tensor, whole)
    tensors = {name: tensors_of(proto).get(name, tensor) for name, tensor in model.tensors.items()}
    made = {o: node for node in proto.graph.node for o in node.output}
    for seat in all_seats(plan, compensated):
        fresh = seat.node.input[2] if seat.layer.add < 0 and len(seat.node.input) > 2 else ""
        if fresh and fresh not in model.tensors and not seat.layer.bias:
            bias = numpy_helper.to_array(now[fresh])
            mask = widths.mask((seat.layer.output, 1))
            whole = np.zeros(model.shapes[seat.layer.output][1], bias.dtype)
            whole[slice(None) if mask is None else mask] = bias
            node = made[seat.layer.output]
            del node.input[2:]
            node.input.append(fresh)
            proto.graph.initializer.append(numpy_helper.from_array(whole, fresh))
    return replace(plan.grouping, model=replace(model, proto=proto, tensors=tensors, _arrays={}, sums={}))

"""The input side of LSTM, GRU and RNN, seen as a layer: gates' pre-activations = W·x + the input half of B, both directions end to end.

No value of the graph holds these, so they are computed beside it, from the original's weights and inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from onnxprune.importer import FLOATS, Model
from onnxprune.linear import RECURRENT, Linear


def recurrences(model: Model) -> list[Linear]:
    """The recurrent layers of the main graph, in its order, whose W no one else reads; `output` names what `spelled_out` makes."""
    reads = Counter(name for node in model.nodes for name in node.input if name)
    reads.update(model.outputs)
    found = []
    for index, node in enumerate(model.main):
        if node.op_type not in RECURRENT or node.domain not in ("", "ai.onnx") or not any(node.output):
            continue
        source, weight, bias = node.input[0], node.input[1], node.input[3] if len(node.input) > 3 else ""
        tensor = model.tensors.get(weight)
        if tensor is None or tensor.data_type not in FLOATS or weight in model.copies or reads[weight] > 1:
            continue
        if source in model.tensors or source not in model.shapes or (bias and (bias not in model.tensors or bias in model.copies)):
            continue
        bias = bias if reads[bias] == 1 else ""  # one that other layers read too stays as it is
        found.append(
            Linear(
                index, node.op_type, source, weight, bias, f"{next(out for out in node.output if out)}:gates", operand=weight, addend=bias
            )
        )
    return found


def spelled_out(model: Model, layers: Iterable[Linear]) -> ModelProto:
    """The model with the pre-activations of these recurrent layers as values of its own; as it is where there are none."""
    mine = [layer for layer in layers if layer.op in RECURRENT]
    if not mine:
        return model.proto
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    for layer in mine:
        weight = model.array(layer.weight)
        product = f"{layer.output}:product" if layer.bias else layer.output
        graph.initializer.append(numpy_helper.from_array(weight.reshape(-1, weight.shape[-1]).T.copy(), f"{layer.output}:weight"))
        graph.node.append(helper.make_node("MatMul", [layer.source, f"{layer.output}:weight"], [product]))
        if layer.bias:
            bias = model.array(layer.bias)[:, : weight.shape[1]]
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(bias.ravel()), f"{layer.output}:bias"))
            graph.node.append(helper.make_node("Add", [product, f"{layer.output}:bias"], [layer.output]))
    return proto

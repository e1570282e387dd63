"""New numbers for what some nodes read, whoever else reads the same tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.scopes import captured

BIAS = -1  # the position of a bias that a layer does not have yet


class Use(NamedTuple):
    """An input of a node of the main graph, which is named by its first output."""

    node: str
    position: int


@dataclass(frozen=True)
class Rewired:
    """apart: tensors that some of their readers now have another one for; renamed: {first output of a node: what it is now}."""

    model: ModelProto
    apart: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def with_inputs(proto: ModelProto, values: Mapping[Use, np.ndarray]) -> Rewired:
    """A copy whose nodes read these arrays.

    A tensor is changed in place where all of its readers agree.  A layer without a bias gets one at Use(node, BIAS): as its
    third input, or from an Add behind it (MatMul).
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    nodes = {node.output[0]: node for node in graph.node}
    tensors = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    taken = set(tensors) | {o for n in graph.node for o in n.output} | {v.name for v in graph.input}
    reads = Counter(v.name for v in graph.output)
    if proto.ir_version >= 4:
        reads.update(v.name for v in graph.input)
    reads.update(name for node in graph.node for name in (*node.input, *captured(node)))

    def fresh(name: str) -> str:
        found = next(one for k in count(1) if (one := f"{name}_{k}") not in taken)
        taken.add(found)
        return found

    def added(name: str, array: np.ndarray, kind: int) -> str:
        new = fresh(name)
        graph.initializer.append(_tensor(array, new, kind))
        copy.ir_version = max(copy.ir_version, 4)  # before, every initializer had to be an input
        return new

    wanted: dict[str, list[Use]] = {}
    biases: dict[str, NodeProto] = {}  # {what the node before it now makes: the Add}
    for use, array in values.items():
        node = nodes[use.node]
        position = use.position if use.position != BIAS else 2
        if use.position != BIAS and position < len(node.input) and node.input[position]:
            wanted.setdefault(node.input[position], []).append(use)
            continue
        kind = next(tensors[name].data_type for name in _weights(node, nodes) if name in tensors)
        name = added(f"{use.node}_bias", array, kind)
        if node.op_type == "MatMul":
            product = fresh(use.node)
            biases[product] = helper.make_node("Add", [product, name], [use.node], name=name)
            node.output[0] = product
        else:
            for attribute in node.attribute:
                if attribute.name == "beta":  # of Gemm
                    attribute.f = 1.0
            node.input.extend([""] * (position + 1 - len(node.input)))
            node.input[position] = name
    apart = []
    for tensor, uses in wanted.items():
        kinds: list[tuple[np.ndarray, list[Use]]] = []
        old = tensors[tensor]
        for use in uses:
            array = values[use].astype(helper.tensor_dtype_to_np_dtype(old.data_type))
            same = next((group for other, group in kinds if np.array_equal(other, array)), None)
            if same is None:
                kinds.append((array, [use]))
            else:
                same.append(use)
        others = reads[tensor] > len(uses)
        if others and all(_kept(old, array) for array, _ in kinds):
            continue
        apart += [tensor] if others or len(kinds) > 1 else []
        for array, group in kinds if others else kinds[1:]:
            if others and _kept(old, array):
                continue
            new = added(tensor, array, old.data_type)
            for use in group:
                nodes[use.node].input[use.position] = new
        if not others:
            tensors[tensor].CopyFrom(_tensor(kinds[0][0], old.name, old.data_type))
    if biases:
        before = list(graph.node)
        ordered: list[NodeProto] = []
        for node in before:
            ordered += [node, biases[node.output[0]]] if node.output[0] in biases else [node]
        made = ModelProto()
        made.graph.node.extend(ordered)
        del graph.node[:]
        graph.node.extend(made.graph.node)
    return Rewired(copy, tuple(apart), {add.output[0]: product for product, add in biases.items()})


def _weights(node: NodeProto, nodes: Mapping[str, NodeProto]) -> list[str]:
    """The constants that a node reads, through what moves them."""
    found, waiting = [], list(node.input[::-1])
    while waiting:
        name = waiting.pop(0)
        found.append(name)
        if name in nodes and nodes[name].op_type in ("Identity", "Transpose", "Cast"):
            waiting.append(nodes[name].input[0])
    return found


def _kept(tensor: TensorProto, array: np.ndarray) -> bool:
    return np.array_equal(numpy_helper.to_array(tensor), array)


def _tensor(array: np.ndarray, name: str, kind: int) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array, helper.tensor_dtype_to_np_dtype(kind), order="C"), name)  # 0-d stays 0-d

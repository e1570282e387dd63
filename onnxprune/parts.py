"""Run a model whose weights do not fit into memory: part by part, with the weights of one part at a time.

The main graph's nodes, in order, are cut wherever the weights so far are as much as may be held; what later parts read is handed
on.  What comes out is what the whole model would have given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.assembly import copy_field
from onnxprune.errors import OnnxPruneError
from onnxprune.running import Arrays, as_float32, first_line, session, taken_outside, widened
from onnxprune.scopes import captured

Values = Callable[[str], np.ndarray]  # the values of a tensor that stands elsewhere


@dataclass(frozen=True)
class _Part:
    """Nodes that run together; weights: tensors from other files that they read; reads, makes: values from parts before, for later."""

    nodes: tuple[NodeProto, ...]
    weights: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


class Parts:
    """A float32 copy of a model, whose weights that stand elsewhere are asked for at every run.

    order: nodes of these outputs, sorted; limit: bytes of such weights, as float32, in one part (more where one node reads more);
    watch: values to return besides the outputs.
    """

    def __init__(self, proto: ModelProto, order: Sequence[NodeProto], limit: int, values: Values, watch: Sequence[str] = ()) -> None:
        self._values, self.limit = values, limit
        outside = {t.name: 4 * math.prod(t.dims) for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL}
        self._proto = as_float32(without(proto, set(outside)))
        self._inside = {t.name: t for t in self._proto.graph.initializer}
        places = {next(o for o in node.output if o): i for i, node in enumerate(order) if any(node.output)}
        fixed = {
            node.output[0]: a.t
            for node in self._proto.graph.node
            if node.op_type == "Constant"
            for a in node.attribute
            if a.name == "value"
        }
        self._inside |= {name: _named(tensor, name) for name, tensor in fixed.items()}
        free = [node for node in self._proto.graph.node if not (node.output and node.output[0] in fixed)]
        nodes = sorted(free, key=lambda node: places.get(next((o for o in node.output if o), ""), -1))
        self._wanted = {*(v.name for v in self._proto.graph.output), *watch}
        self.parts = self._cut(nodes, outside, limit)

    def _cut(self, nodes: Sequence[NodeProto], outside: dict[str, int], limit: int) -> list[_Part]:
        runs: list[list[NodeProto]] = [[]]
        held: set[str] = set()
        for node in nodes:
            new = _read(node) & set(outside)
            if runs[-1] and new - held and sum(outside[name] for name in held | new) > limit:
                runs.append([])
                held = set()
            runs[-1].append(node)
            held |= new
        parts: list[_Part] = []
        later = set(self._wanted)
        for run in reversed(runs):
            made = {o for node in run for o in node.output if o}
            read = set().union(*(_read(node) for node in run)) - made
            kept = read - set(outside) - set(self._inside)
            parts.append(_Part(tuple(run), tuple(sorted(read & set(outside))), tuple(sorted(kept)), tuple(sorted(made & later))))
            later |= kept
        return parts[::-1]

    def run(self, feeds: Arrays, arrays: Arrays | None = None) -> dict[str, np.ndarray]:
        """{output: array}, with some tensors given anew.

        Raises OnnxPruneError (exit code 4) where a part does not run on what comes into it.
        """
        changed = arrays if arrays is not None else {}
        state = {k: widened(v) for k, v in feeds.items()}
        for number, part in enumerate(self.parts):
            state |= self._ran(part, {name: state[name] for name in part.reads if name in state}, changed)
            needed = self._wanted.union(*(other.reads for other in self.parts[number + 1 :]))
            state = {name: array for name, array in state.items() if name in needed}
        held = {name: numpy_helper.to_array(self._inside[name]) for name in self._wanted & set(self._inside)}
        return held | {name: array for name, array in state.items() if name in self._wanted}

    def _ran(self, part: _Part, given: Arrays, changed: Arrays) -> Arrays:
        if not part.makes:
            return {}
        weights = {name: changed[name] if name in changed else self._values(name) for name in part.weights}
        weights = {name: np.ascontiguousarray(widened(array)) for name, array in weights.items()}
        proto = ModelProto(ir_version=max(self._proto.ir_version, 4), opset_import=self._proto.opset_import)
        graph = proto.graph
        graph.name = "part"
        graph.node.extend(part.nodes)
        read = set().union(*(_read(node) for node in part.nodes))
        anew = (read & set(self._inside) & set(changed)) | taken_outside(graph, changed)
        arrays = {**given, **weights, **{name: widened(changed[name]) for name in sorted(anew)}}
        graph.initializer.extend(self._inside[name] for name in sorted(read & set(self._inside) - set(arrays)))
        for name, array in arrays.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, array.shape if name in weights else [None] * array.ndim))
        graph.output.extend(helper.make_empty_tensor_value_info(name) for name in part.makes)
        first = part.nodes[0]
        where = f"the part that begins at '{first.name or first.output[0]}' ({first.op_type})"
        try:
            made = session(proto).run(list(part.makes), arrays)
        except Exception as error:
            raise OnnxPruneError(f"onnxruntime does not run {where} on these inputs ({first_line(error)})", 4) from error
        if not all(isinstance(value, np.ndarray) for value in made):
            raise OnnxPruneError(f"{where} hands on a sequence, with which a model is not run in parts; give more --memory", 4)
        return dict(zip(part.makes, made, strict=True))


def _read(node: NodeProto) -> set[str]:
    return (set(node.input) | captured(node)) - {""}


def _named(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def without(proto: ModelProto, names: set[str]) -> ModelProto:
    """The model without some of its initializers, and without what it says of values."""
    out = ModelProto()
    for key, value in proto.ListFields():
        if key.name != "graph":
            copy_field(out, key.name, value)
    for key, value in proto.graph.ListFields():
        if key.name not in ("initializer", "value_info"):
            copy_field(out.graph, key.name, value)
    out.graph.initializer.extend(t for t in proto.graph.initializer if t.name not in names)
    return out

"""Activations: run a part of a model over samples, batch by batch, and hand out the values that are watched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from onnxprune.errors import OnnxPruneError
from onnxprune.running import Arrays, as_float32, first_line, session, widened, with_sizes
from onnxprune.scopes import captured


def towards(proto: ModelProto, values: Iterable[str], known: Mapping[str, np.dtype[Any]] | None = None) -> ModelProto:
    """The part of a model that makes some values, which are its outputs; ones that are inputs or constants are left out.

    known: values that are given, as inputs of these types.
    """
    known = known or {}
    wanted = [name for name in dict.fromkeys(values) if name not in known]
    needed, alive = set(wanted), []
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            alive.append(_beside(node, known))
            needed |= (set(node.input) | captured(node)) - known.keys() - {""}
    read = {name for node in alive for name in (*node.input, *captured(node))} & known.keys()
    part = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    part.functions.extend(proto.functions)
    graph = part.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(reversed(alive))
    graph.initializer.extend(t for t in proto.graph.initializer if t.name in needed)
    graph.sparse_initializer.extend(t for t in proto.graph.sparse_initializer if t.values.name in needed)
    given = {t.name for t in graph.initializer}
    graph.input.extend(v for v in proto.graph.input if v.name in needed and (v.name not in given or proto.ir_version >= 4))
    kinds = {name: helper.np_dtype_to_tensor_dtype(known[name]) for name in sorted(read)}
    graph.input.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
    made = {out for node in alive for out in node.output}
    graph.output.extend(_declared(proto.graph, name) for name in wanted if name in made)
    return part


def _beside(node: NodeProto, known: Mapping[str, Any]) -> NodeProto:
    """The node, with other names for what it makes that is known."""
    if not any(name in known for name in node.output):
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.output[:] = [f"{name}:again" if name in known else name for name in node.output]
    return copy


def _declared(graph: GraphProto, name: str) -> ValueInfoProto:
    return next((v for v in graph.output if v.name == name), helper.make_empty_tensor_value_info(name))


def unquantized(proto: ModelProto) -> ModelProto:
    """The model before it is cut: of a quantized value that is cut off the way back to floats nothing else would be known."""
    return as_float32(proto) if any(node.op_type == "QuantizeLinear" for node in proto.graph.node) else proto


class Tap:
    """A model cut down to what makes some values, run as float32 with all optimizations and threads.

    known: values that its feeds hold beside the inputs, and their types.  Raises OnnxPruneError (exit code 4) where onnxruntime does
    not take or run it.
    """

    def __init__(
        self, proto: ModelProto, values: Iterable[str], threads: int = 0, known: Mapping[str, np.dtype[Any]] | None = None
    ) -> None:
        values = list(dict.fromkeys(values))
        part = towards(unquantized(proto) if known else proto, values, known)
        self._inputs = [v.name for v in part.graph.input]
        self._outputs = [v.name for v in part.graph.output]
        self._given = [name for name in values if name not in self._outputs]
        self._session: ort.InferenceSession | None = session(as_float32(part), optimize=True, threads=threads) if self._outputs else None

    @property
    def others(self) -> set[str]:
        """Of the values those that are no tensors, but sequences and the like."""
        return {v.name for v in self._session.get_outputs() if not v.type.startswith("tensor")} if self._session else set()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """{value: array} on one batch; a value that is a graph input is the feed itself."""
        found = {name: widened(feeds[name]) for name in self._given if name in feeds}
        if self._session is not None:
            given = {k: widened(feeds[k]) for k in self._inputs if k in feeds}
            try:
                outputs = self._session.run(self._outputs, given)
            except Exception as error:
                raise OnnxPruneError(f"the model does not run on samples of {with_sizes(given)}: {first_line(error)}") from error
            found |= {k: np.asarray(v) for k, v in zip(self._outputs, outputs, strict=True) if not _ragged(v)}
        return found


def _ragged(value: Any) -> bool:
    """Whether a value is a sequence of arrays of several shapes, which are no array together."""
    return isinstance(value, list) and len({np.shape(each) for each in value}) > 1

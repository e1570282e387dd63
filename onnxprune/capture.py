"""Activations: run a part of a model over samples, batch by batch, and hand out the values that are watched."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, ValueInfoProto, helper

from onnxprune.errors import OnnxPruneError
from onnxprune.running import Arrays, as_float32, first_line, session, widened
from onnxprune.scopes import captured


def towards(proto: ModelProto, values: Iterable[str]) -> ModelProto:
    """The part of a model that makes some values, which are its outputs; ones that are inputs or constants are left out."""
    wanted = list(dict.fromkeys(values))
    needed, alive = set(wanted), []
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            alive.append(node)
            needed |= set(node.input) | captured(node)
    part = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    part.functions.extend(proto.functions)
    graph = part.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(reversed(alive))
    graph.initializer.extend(t for t in proto.graph.initializer if t.name in needed)
    graph.sparse_initializer.extend(t for t in proto.graph.sparse_initializer if t.values.name in needed)
    given = {t.name for t in graph.initializer}
    graph.input.extend(v for v in proto.graph.input if v.name in needed and (v.name not in given or proto.ir_version >= 4))
    made = {out for node in alive for out in node.output}
    graph.output.extend(_declared(proto.graph, name) for name in wanted if name in made)
    return part


def _declared(graph: GraphProto, name: str) -> ValueInfoProto:
    return next((v for v in graph.output if v.name == name), helper.make_empty_tensor_value_info(name))


class Tap:
    """A model cut down to what makes some values, run as float32 with all optimizations and threads.

    Raises OnnxPruneError (exit code 4) where onnxruntime does not take or run it.
    """

    def __init__(self, proto: ModelProto, values: Iterable[str], threads: int = 0) -> None:
        values = list(dict.fromkeys(values))
        part = towards(proto, values)
        self._inputs = [v.name for v in part.graph.input]
        self._outputs = [v.name for v in part.graph.output]
        self._given = [name for name in values if name not in self._outputs]
        self._session: ort.InferenceSession | None = session(as_float32(part), optimize=True, threads=threads) if self._outputs else None

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """{value: array} on one batch; a value that is a graph input is the feed itself."""
        found = {name: widened(feeds[name]) for name in self._given if name in feeds}
        if self._session is not None:
            try:
                outputs = self._session.run(self._outputs, {k: widened(feeds[k]) for k in self._inputs if k in feeds})
            except Exception as error:
                raise OnnxPruneError(f"onnxruntime does not run the model on the calibration data ({first_line(error)})") from error
            found |= {k: np.asarray(v) for k, v in zip(self._outputs, outputs, strict=True)}
        return found

"""Step 1: read any ONNX file into a `Model`: its own tensors, every value's shape, every shape constant's number."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.errors import OnnxPruneError
from onnxprune.shapes import Folded, infer

Shape = tuple[int, ...]
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Model:
    """An ONNX model as the later steps see it.

    `proto` is the file's model with local functions inlined and is never changed.  `shapes` holds every value's concrete
    sizes at the sizes of `input_shapes`; `folded` the values that are known before any input is (shape arithmetic).
    """

    proto: ModelProto
    name: str
    nodes: tuple[NodeProto, ...]
    opsets: Mapping[str, int]
    tensors: Mapping[str, TensorProto]
    shapes: Mapping[str, Shape]
    folded: Mapping[str, Folded]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: Mapping[str, Shape]
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def array(self, tensor: str) -> np.ndarray:
        """The values of an initializer or Constant, read when first asked for."""
        if tensor not in self._arrays:
            self._arrays[tensor] = numpy_helper.to_array(self.tensors[tensor])
        return self._arrays[tensor]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node's attributes hold."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def captured(node: NodeProto) -> set[str]:
    """Names that a node's subgraphs may take from outside."""
    names: set[str] = set()
    for graph in subgraphs(node):
        own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
        for inner in graph.node:
            names |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        names |= {v.name for v in graph.output}
        names -= own
    return names - {""}


def read(source: str | os.PathLike[str] | ModelProto) -> tuple[ModelProto, str]:
    """The ModelProto and a name for it.

    Raises OnnxPruneError where the file is missing, is not ONNX, is cut short or lacks its external data.
    """
    if isinstance(source, ModelProto):
        return source, source.graph.name or "model"
    path = Path(source)
    if not path.is_file():
        raise OnnxPruneError(f"{path}: no such file; give the path of an .onnx file")
    try:
        proto = onnx.load(str(path))
    except (FileNotFoundError, onnx.checker.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise OnnxPruneError(f"{path}: its external data cannot be read ({reason}); put it beside the model") from error
    except Exception as error:
        raise OnnxPruneError(f"{path}: not an ONNX model, or cut short; export it again") from error
    if not proto.graph.node or not proto.opset_import:
        raise OnnxPruneError(f"{path}: not an ONNX model, or an empty one; export it again")
    return proto, path.name


def load(
    source: str | os.PathLike[str] | ModelProto,
    feeds: Mapping[str, np.ndarray] | None = None,
    input_shapes: Mapping[str, Shape] | None = None,
) -> Model:
    """Import a model; `feeds` or `input_shapes` say the sizes of symbolic axes (else 2, or more where 2 does not run).

    Raises OnnxPruneError for what is not a well-formed model.
    """
    proto, name = read(source)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _check_tensors(proto, name)
    nodes = _sorted(proto, name)
    tensors = {t.name: t for t in proto.graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            tensors |= {node.output[0]: a.t for a in node.attribute if a.name == "value"}
    given = {k: tuple(np.shape(v)) for k, v in (feeds or {}).items()} | dict(input_shapes or {})
    result = infer(proto, nodes, tensors, given, feeds, name)
    opsets = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    inputs = tuple(v.name for v in proto.graph.input if v.name not in tensors)
    return Model(
        proto=proto,
        name=name,
        nodes=nodes,
        opsets=opsets,
        tensors=tensors,
        shapes=result.shapes,
        folded=result.folded,
        inputs=inputs,
        outputs=tuple(v.name for v in proto.graph.output),
        input_shapes={k: result.shapes[k] for k in inputs if k in result.shapes},
    )


def _check_tensors(proto: ModelProto, name: str) -> None:
    for tensor in proto.graph.initializer:
        if not tensor.HasField("raw_data") or tensor.data_location == TensorProto.EXTERNAL:
            continue
        if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
            continue
        try:
            width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        except (KeyError, TypeError):
            continue
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_type <= TensorProto.BFLOAT16 and len(tensor.raw_data) != count * width:
            raise OnnxPruneError(
                f"{name}: initializer '{tensor.name}' of shape {list(tensor.dims)} needs {count * width} bytes "
                f"and holds {len(tensor.raw_data)}; export the model again"
            )


def _sorted(proto: ModelProto, name: str) -> tuple[NodeProto, ...]:
    """The main graph's nodes in an order in which each comes after what it reads."""
    made: set[str] = set()
    producers = {out: i for i, node in enumerate(proto.graph.node) for out in node.output if out}
    nodes, waiting = [], list(proto.graph.node)
    while waiting:
        later = []
        for node in waiting:
            needs = [x for x in (*node.input, *captured(node)) if x in producers and x not in made]
            if needs:
                later.append(node)
            else:
                nodes.append(node)
                made |= set(node.output)
        if len(later) == len(waiting):
            node = later[0]
            raise OnnxPruneError(
                f"{name}: the graph has a cycle at node '{node.name or node.output[0]}' ({node.op_type}); export it again"
            )
        waiting = later
    return tuple(nodes)

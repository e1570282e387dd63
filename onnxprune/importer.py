"""Step 1: read any ONNX file into a `Model`: its own tensors, every value's shape, every shape constant's number."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune import external
from onnxprune.errors import OnnxPruneError
from onnxprune.external import AT_ONCE, External
from onnxprune.folding import Folded
from onnxprune.scopes import all_graphs, captured, declared, flat, open_graphs, subgraphs, unique_names
from onnxprune.shapes import infer
from onnxprune.sharing import unshare

Shape = tuple[int, ...]
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Model:
    """An ONNX model as the later steps see it.

    `proto` is the file's model with local functions inlined and every name unique, and is never changed.  `main` are its main
    graph's nodes, sorted; `nodes` those and the nodes of the bodies in it that are understood, each body before its node.
    `shapes` holds every value's concrete sizes at the sizes of `input_shapes`; `folded` the values that are known before any
    input is (shape arithmetic); `ambiguous` the tensors that the file's names do not identify, as subgraphs reuse them;
    `copies` {name that one reader has for it: tensor of one number that several share}; `static` which axes of a value are known
    to have one size for all inputs, None where every axis of every value has.  `external`: which of its weights stand in other
    files; those that were left there have no values in `proto`.
    """

    proto: ModelProto
    name: str
    main: tuple[NodeProto, ...]
    nodes: tuple[NodeProto, ...]
    opsets: Mapping[str, int]
    tensors: Mapping[str, TensorProto]
    shapes: Mapping[str, Shape]
    folded: Mapping[str, Folded]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: Mapping[str, Shape]
    ambiguous: frozenset[str] = frozenset()
    copies: Mapping[str, str] = field(default_factory=dict)
    static: Mapping[str, tuple[bool, ...]] | None = None
    external: External = field(default_factory=External)
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    sums: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict, repr=False)  # of criteria: tensor, axis, power

    def unchanging(self, name: str) -> tuple[bool, ...]:
        """Which axes of a value are known to have the same size for all inputs."""
        sizes = self.shapes.get(name, ())
        if self.static is None or name in self.tensors:
            return (True,) * len(sizes)
        found = self.static.get(name, ())
        return found if len(found) == len(sizes) else (False,) * len(sizes)

    def array(self, tensor: str) -> np.ndarray:
        """The values of an initializer or Constant, read when first asked for; those left in other files every time."""
        if tensor in self.external.places:
            return self.external.places[tensor].array()
        if tensor not in self._arrays:
            self._arrays[tensor] = numpy_helper.to_array(self.tensors[tensor])
        return self._arrays[tensor]


class File(NamedTuple):
    """A file as it was read; external: which of its weights stand in other files."""

    proto: ModelProto
    name: str
    external: External


def read(source: str | os.PathLike[str] | ModelProto, memory: int = AT_ONCE) -> File:
    """A model's file; what stands in other files is read at once up to so many bytes (`memory`).

    Raises OnnxPruneError where the file is missing, is not ONNX, is cut short or lacks its external data.
    """
    if isinstance(source, ModelProto):
        return File(source, source.graph.name or "model", External(limit=memory))
    path = check_file(source)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise OnnxPruneError(f"{path}: not an ONNX model, or cut short; export it again") from error
    if not proto.graph.node or not proto.opset_import:
        raise OnnxPruneError(f"{path}: not an ONNX model, or an empty one; export it again")
    return File(proto, path.name, external.attach(proto, path.parent, path.name, memory))


def check_file(path: str | os.PathLike[str]) -> Path:
    """Raises OnnxPruneError where there is no file to read."""
    path = Path(path)
    if path.is_dir():
        raise OnnxPruneError(f"{path}: is a folder; give the path of an .onnx file")
    if path.is_file() and not os.access(path, os.R_OK):
        raise OnnxPruneError(f"{path}: may not be read; change its permissions")
    if not path.is_file():
        raise OnnxPruneError(f"{path}: no such file; give the path of an .onnx file")
    return path


def load(
    source: str | os.PathLike[str] | ModelProto | File,
    feeds: Mapping[str, np.ndarray] | None = None,
    input_shapes: Mapping[str, Shape] | None = None,
    memory: int = AT_ONCE,
) -> Model:
    """Import a model; `feeds` or `input_shapes` say the sizes of symbolic axes (else 2, or more where 2 does not run).

    memory: bytes of weights in other files up to which they are read at once; beyond, when `Model.array` is asked for them; of a
    `File` that was read, `read` was told so.

    Raises OnnxPruneError for what is not a well-formed model.
    """
    proto, name, outside = source if isinstance(source, File) else read(source, memory)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    proto, ambiguous = unique_names(_without_duplicates(proto))
    _check_tensors(proto, name)
    opsets = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    main, opset = _sorted(proto, name), opsets.get("ai.onnx", 1)
    tensors = {t.name: t for graph in open_graphs(proto.graph, opset) for t in graph.initializer}
    for node in flat(main, opset):
        if node.op_type == "Constant":
            tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    named = {v.name for v in (*proto.graph.input, *proto.graph.output)} | {x for n in main if any(subgraphs(n)) for x in n.input}
    used = set(tensors).union(*(declared(graph) for graph in all_graphs(proto.graph)))
    main, copies = unshare(main, tensors, named.union(*(captured(node) for node in main)), used)
    tensors |= {copy: tensors[original] for copy, original in copies.items()}
    nodes = tuple(flat(main, opset))
    if feeds is not None:
        needed = [v.name for v in proto.graph.input if v.name not in tensors]
        missing = [k for k in needed if k not in feeds]
        if missing:
            raise OnnxPruneError(f"{name}: the feeds have no '{missing[0]}'; they need {', '.join(needed)}")
    given = {k: tuple(np.shape(v)) for k, v in (feeds or {}).items()} | dict(input_shapes or {})
    result = infer(proto, nodes, tensors, given, feeds, name)
    inputs = tuple(v.name for v in proto.graph.input if v.name not in tensors)
    return Model(
        proto=proto,
        name=name,
        main=main,
        nodes=nodes,
        opsets=opsets,
        tensors=tensors,
        shapes=result.shapes,
        folded=result.folded,
        inputs=inputs,
        outputs=tuple(v.name for v in proto.graph.output),
        input_shapes={k: result.shapes[k] for k in inputs if k in result.shapes},
        ambiguous=ambiguous,
        copies=copies,
        static=result.static,
        external=outside,
    )


def _without_duplicates(proto: ModelProto) -> ModelProto:
    """Node names made unique and, of initializers of one name, the last (onnxruntime takes that one, and no node name twice)."""
    nodes = Counter(n.name for n in proto.graph.node if n.name)
    tensors = Counter(t.name for t in proto.graph.initializer)
    if max(nodes.values(), default=1) == 1 and max(tensors.values(), default=1) == 1:
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    seen: Counter[str] = Counter()
    for node in copy.graph.node:
        seen[node.name] += 1
        if node.name and seen[node.name] > 1:
            fresh = next(f"{node.name}_{k}" for k in count(seen[node.name]) if f"{node.name}_{k}" not in nodes)
            nodes[fresh] += 1
            node.name = fresh
    last = {t.name: i for i, t in enumerate(copy.graph.initializer)}
    for i in reversed(range(len(copy.graph.initializer))):
        if last[copy.graph.initializer[i].name] != i:
            del copy.graph.initializer[i]
    return copy


def _check_tensors(proto: ModelProto, name: str) -> None:
    """Every tensor's data has the size that its shape says."""
    graphs = list(all_graphs(proto.graph))
    constants = [a.t for g in graphs for n in g.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    for tensor in (*(t for g in graphs for t in g.initializer), *constants):
        kind = tensor.data_type
        if tensor.data_location == TensorProto.EXTERNAL or kind == TensorProto.UNDEFINED:
            continue
        elements = int(np.prod(tensor.dims, dtype=np.int64))
        try:
            width = helper.tensor_dtype_to_np_dtype(kind).itemsize
            field = helper.tensor_dtype_to_field(kind)
        except (KeyError, TypeError):
            continue
        if tensor.HasField("raw_data"):
            if kind > TensorProto.BFLOAT16:  # types that pack several elements into a byte
                continue
            needs, holds, what = elements * width, len(tensor.raw_data), "bytes"
        else:
            twice = 2 if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
            needs, holds, what = elements * twice, len(getattr(tensor, field)), "elements"
            if kind > TensorProto.BFLOAT16:
                continue
        if needs != holds:
            shape = list(tensor.dims)
            raise OnnxPruneError(
                f"{name}: tensor '{tensor.name}' of shape {shape} needs {needs} {what} and holds {holds}; export the model again"
            )


def _sorted(proto: ModelProto, name: str) -> tuple[NodeProto, ...]:
    """The main graph's nodes in an order in which each comes after what it reads."""
    made: set[str] = set()
    producers: dict[str, int] = {}
    known = {v.name for v in proto.graph.input} | {t.name for t in proto.graph.initializer}
    known |= {t.values.name for t in proto.graph.sparse_initializer} | {""}
    for i, node in enumerate(proto.graph.node):
        for out in node.output:
            if out and (out in producers or out in known):
                raise OnnxPruneError(
                    f"{name}: the value '{out}' is made twice, again by node '{node.name}' ({node.op_type}); export it again"
                )
            producers |= {out: i} if out else {}
    for node in proto.graph.node:
        for value in node.input:
            if value not in known and value not in producers:
                raise OnnxPruneError(
                    f"{name}: node '{node.name or node.output[0]}' ({node.op_type}) reads '{value}', which nothing makes; export it again"
                )
    for output in proto.graph.output:
        if output.name not in known and output.name not in producers:
            raise OnnxPruneError(f"{name}: the output '{output.name}' is made by no node; export it again")
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
            raise OnnxPruneError(f"{name}: the graph has a cycle at node '{node.name or node.output[0]}' ({node.op_type}); export it again")
        waiting = later
    return tuple(nodes)

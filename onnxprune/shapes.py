"""Every value's concrete shape, and the numbers of shape arithmetic, for one choice of input sizes.

onnx's own shape inference does the work, on a copy of the graph without weights; what it leaves open because a target
shape is computed at run time is folded here and inferred again; what is still open is seen by a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.errors import OnnxPruneError
from onnxprune.folding import SMALL, Folded, Shape, fold
from onnxprune.passing import Passing, opset_of
from onnxprune.scopes import flow
from onnxprune.sequences import Partial, Sequences
from onnxprune.traced import written_sizes

SIZES = (2, 32, 64, 224)  # that open axes take, the first that runs


@dataclass(frozen=True)
class Inferred:
    """static: {value: which of its axes are known to have one size for all inputs}; None where every axis has."""

    shapes: dict[str, Shape]
    folded: dict[str, Folded]
    static: Mapping[str, tuple[bool, ...]] | None = None


def infer(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, TensorProto],
    given: Mapping[str, Shape],
    feeds: Mapping[str, np.ndarray] | None,
    name: str,
) -> Inferred:
    """Shapes and folded numbers at the given input shapes; symbolic sizes that are not given take the first size that runs."""
    inputs = [v for v in proto.graph.input if v.name not in tensors]
    unknown = [k for k in given if k not in {v.name for v in inputs}]
    if unknown:
        known = ", ".join(v.name for v in inputs)
        raise OnnxPruneError(f"{name}: no input is named '{unknown[0]}'; its inputs are: {known}")
    for value in inputs:
        if value.name not in given and value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            raise OnnxPruneError(f"{name}: input '{value.name}' has no shape in the file; give it with --feeds or --input-shape")
    symbolic = any(not _static(v) for v in inputs)
    free = symbolic and any(v.name not in given for v in inputs)
    problem, symbols = "", _symbols(inputs, given)
    outputs, last = {v.name for v in proto.graph.output}, None
    for size in SIZES if free else SIZES[:1]:
        shapes = {v.name: given.get(v.name) or concrete(v, size, symbols) for v in inputs}
        for value in inputs:
            declared = value.type.tensor_type.shape.dim
            if value.name in given and value.type.tensor_type.HasField("shape"):
                fits = len(declared) == len(given[value.name]) and all(
                    not d.dim_value or d.dim_value == s for d, s in zip(declared, given[value.name], strict=False)
                )
                if not fits:
                    wanted = [d.dim_value or d.dim_param or "?" for d in declared]
                    raise OnnxPruneError(
                        f"{name}: input '{value.name}' takes {wanted}, not {list(given[value.name])}; mend --feeds or --input-shape"
                    )
        try:
            found = _infer_at(proto, nodes, tensors, shapes, feeds, symbolic)
            if free and any(not d.dim_value for v in inputs for d in v.type.tensor_type.shape.dim[1:]):
                last = found
                _seen(proto, outputs, shapes, feeds)  # inference may take a size that no run does
            return found
        except ValueError as error:
            from onnxprune.running import first_line

            problem = first_line(error)
    for size, batch in itertools.product(written_sizes(nodes, tensors), (2, 1)) if free else ():
        stand = _symbols(inputs, given, batch)
        other = {v.name: given.get(v.name) or concrete(v, size, stand, batch) for v in inputs}
        try:
            _seen(proto, outputs, other, feeds)
            return _infer_at(proto, nodes, tensors, other, feeds, symbolic)
        except ValueError:
            continue
    if last is not None:
        return last
    said = ", ".join(f"{k} {list(v)}" for k, v in shapes.items())
    tried = f" (nor on {', '.join(map(str, SIZES[:-1]))}, nor on sizes that stand in the file)" if free else ""
    advice = (
        "give inputs that it takes with --feeds, or their sizes with --input-shape (where an exporter wrote the traced length into the "
        "file, that length)"
    )
    empty = next((k for k, v in shapes.items() if k in given and 0 in v), None)
    if empty is not None:
        advice = f"'{empty}' has no elements: leave out samples that are empty"
    raise OnnxPruneError(f"{name}: does not run on inputs of {said}{tried}: {problem}; {advice}")


_RESIZING = {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "SequenceAt", "Unique"}


def _sized_by_data(nodes: Sequence[NodeProto], inputs: Iterable[onnx.ValueInfoProto]) -> bool:
    """Whether a value's size may depend on data: operators that pick elements, or small integer inputs that may say sizes."""
    numbers = (v for v in inputs if v.type.tensor_type.elem_type in (6, 7) and len(v.type.tensor_type.shape.dim) < 2)
    return any(node.op_type in _RESIZING for node in nodes) or any(True for _ in numbers)


def concrete(value: onnx.ValueInfoProto, size: int, symbols: Mapping[str, int] | None = None, batch: int = 2) -> Shape:
    """The declared shape; symbols are what they stand for, another open first axis is `batch` and other open axes are `size`."""
    dims = value.type.tensor_type.shape.dim
    known = symbols or {}
    return tuple(d.dim_value or known.get(d.dim_param) or (batch if i == 0 else size) for i, d in enumerate(dims))


def _symbols(inputs: Sequence[onnx.ValueInfoProto], given: Mapping[str, Shape], batch: int = 2) -> dict[str, int]:
    """What symbols stand for in all inputs: as in the shapes given, else `batch` where they are the first axis of any."""
    found = {d.dim_param: batch for v in inputs for d in list(v.type.tensor_type.shape.dim)[:1] if d.dim_param}
    for value in inputs:
        for d, n in zip(value.type.tensor_type.shape.dim, given.get(value.name, ()), strict=False):
            if d.dim_param:
                found[d.dim_param] = n
    return found


def left_open(inputs: Sequence[onnx.ValueInfoProto], given: Mapping[str, Shape]) -> list[onnx.ValueInfoProto]:
    """The inputs that have sizes besides the batch which neither the file nor the shapes given for inputs say."""
    known = _symbols(inputs, given)

    def unknown(value: onnx.ValueInfoProto) -> bool:
        kind = value.type.tensor_type
        return not kind.HasField("shape") or any(i and not d.dim_value and d.dim_param not in known for i, d in enumerate(kind.shape.dim))

    return [v for v in inputs if v.name not in given and v.type.HasField("tensor_type") and unknown(v)]


def completed(inputs: Sequence[onnx.ValueInfoProto], given: Mapping[str, Shape], told: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes given, and for the other inputs those `told`; a symbol that the given ones say keeps its size."""
    named = {v.name: list(v.type.tensor_type.shape.dim) for v in inputs}
    said = {d.dim_param: n for k, shape in given.items() for d, n in zip(named.get(k, []), shape, strict=False) if d.dim_param}
    found = dict(given)
    for name in named.keys() & told.keys() - given.keys():
        dims = named[name] or [onnx.TensorShapeProto.Dimension()] * len(told[name])
        found[name] = tuple(d.dim_value or said.get(d.dim_param) or n for d, n in zip(dims, told[name], strict=True))
    return found


def _static(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    return kind.HasField("shape") and all(d.dim_value for d in kind.shape.dim)


def _infer_at(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, TensorProto],
    shapes: Mapping[str, Shape],
    feeds: Mapping[str, np.ndarray] | None,
    symbolic: bool,
) -> Inferred:
    weights = {k: tuple(t.dims) for k, t in tensors.items()}
    # since IR version 4 an initializer that is also an input is only a default
    defaults = {v.name for v in proto.graph.input} if proto.ir_version >= 4 else set()
    constants = {k: t for k, t in tensors.items() if k not in defaults}
    static_everywhere = None
    if symbolic:
        kept = {v.name: v for v in proto.graph.input}
        static_everywhere = _statics(proto, nodes, tensors, {k: kept[k] for k in shapes})

    def settle(seen: Mapping[str, Shape], types: Mapping[str, int]) -> tuple[dict[str, Shape], dict[str, Folded], dict[str, Partial]]:
        folded: dict[str, Folded] = {}
        known: dict[str, Shape] = {}
        found: dict[str, Partial] = {}
        passing = Passing(nodes, proto, types)
        most = 6 + 12 * len(passing.flows)
        for turn in range(most + 6):
            if turn == most:
                passing.give_up()
                known, folded = {}, {}
            before = len(known), len(folded)
            found = _onnx_shapes(proto, nodes, tensors, folded, shapes, passing.shapes(folded) | dict(seen), passing)
            known = {k: np.shape(f.number) for k, f in folded.items()}
            known |= {k: full for k, v in found.items() if (full := _full(v)) is not None} | weights | dict(shapes) | dict(seen)
            complete = not passing.flows and all(o in known for n in nodes for o in n.output if o)
            folded = fold(nodes, constants, known, static_everywhere)
            known |= {k: np.shape(f.number) for k, f in folded.items()}
            passing.learn(found | known)
            if complete or (len(known), len(folded)) == before:
                if passing.confirmed():
                    break
                known, folded = {}, {}
        return known, folded, found | known

    flows = [(node, links) for node in nodes if (links := flow(node, opset_of(proto))) is not None]
    known, folded, found = settle({}, {})
    wanted = {x for n in nodes for x in (*n.input, *n.output) if x and x not in known}
    if wanted:
        if static_everywhere is None and _sized_by_data(nodes, proto.graph.input):
            static_everywhere = {name: tuple(size is not None for size in shape) for name, shape in found.items()}
        values = _seen(proto, wanted, shapes, feeds)  # sizes that may depend on data
        seen = {k: np.shape(v) for k, v in values.items()}
        if flows:  # bodies may read them
            known, folded, _ = settle(seen, {k: helper.np_dtype_to_tensor_dtype(v.dtype) for k, v in values.items()})
        known |= seen
        folded = fold(nodes, constants, known, static_everywhere)
    for value in (*proto.graph.value_info, *proto.graph.output):  # of operators that onnx and this onnxruntime lack the file may tell
        if value.name in wanted and value.name not in known and _static(value):
            known[value.name] = concrete(value, 0)
    held = Sequences(nodes, flows).shapes(dict(known))
    return Inferred(known | {k: full for k, v in held.items() if (full := _full(v)) is not None}, folded, static_everywhere)


def _full(shape: Partial) -> Shape | None:
    return None if None in shape else tuple(int(size) for size in shape if size is not None)


def _statics(
    proto: ModelProto, nodes: Sequence[NodeProto], tensors: Mapping[str, TensorProto], inputs: Mapping[str, onnx.ValueInfoProto]
) -> dict[str, tuple[bool, ...]]:
    """Which axes are the same for all input sizes."""
    passing = Passing(nodes, proto, {})
    before: dict[str, Partial] = {}
    found: dict[str, Partial] = {}
    most = 1 + 12 * len(passing.flows)
    for turn in range(most + 6):
        if turn == most:
            passing.give_up()
        before, found = found, _onnx_shapes(proto, nodes, tensors, {}, inputs, passing.shapes({}), passing)
        passing.learn(found | {k: tuple(t.dims) for k, t in tensors.items()})
        if not passing.flows or (found == before and passing.confirmed()):
            break
    return {k: tuple(size is not None for size in v) for k, v in found.items()}


def _onnx_shapes(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, TensorProto],
    folded: Mapping[str, Folded],
    inputs: Mapping[str, Any],
    passed: Mapping[str, Partial],
    passing: Passing,
) -> dict[str, Partial]:
    """onnx's shape inference without weights, over bodies too: they stand beside the main graph, given what is passed to them."""
    types = {v.name: v for v in proto.graph.input}
    skeleton = ModelProto(ir_version=max(proto.ir_version, 4), opset_import=proto.opset_import)
    graph = skeleton.graph
    graph.name = "shapes"
    for name, shape in inputs.items():
        value = graph.input.add()
        value.CopyFrom(types[name])
        if isinstance(shape, tuple):
            value.type.tensor_type.ClearField("shape")
            value.type.tensor_type.shape.SetInParent()
            for size in shape:
                value.type.tensor_type.shape.dim.add().dim_value = size
    for name, tensor in tensors.items():
        if math.prod(tensor.dims) <= SMALL and tensor.data_type in (6, 7, 9, 1) and tensor.data_location != 1:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = name
        else:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    done = set(tensors)
    for name, value in folded.items():
        if name not in done and name != "":
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value.number), name))
            done.add(name)
    found: dict[str, Partial] = {}
    for name, sizes in passed.items():
        if name not in done and name in passing.types:
            graph.input.append(helper.make_tensor_value_info(name, passing.types[name], sizes))
            found[name] = sizes
            done.add(name)
    for node in nodes:
        if all(o in done for o in node.output if o) or passing.understands(node):
            continue
        graph.node.add().CopyFrom(node)
    try:
        result = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except onnx.shape_inference.InferenceError:  # an operator that onnx does not know in this opset: a run has to tell
        result = skeleton
    for value in result.graph.value_info:
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type"):
            passing.types[value.name] = kind.elem_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    for value in graph.input:
        found.setdefault(value.name, tuple(d.dim_value or None for d in value.type.tensor_type.shape.dim))
    return found


def seeded_feeds(proto: ModelProto, shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the given shapes: standard normal floats, integers 0 or 1, booleans true."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in proto.graph.input:
        if value.name not in shapes:
            continue
        if not value.type.HasField("tensor_type"):
            raise OnnxPruneError(f"input '{value.name}' is not a tensor, so the model cannot be run for its proof; use --no-verify", 4)
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shapes[value.name]
        if value.type.tensor_type.elem_type in (1, 10, 11, 16):
            feeds[value.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
        elif dtype == np.bool_:
            feeds[value.name] = np.ones(shape, dtype)
        else:
            feeds[value.name] = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return feeds


def _seen(
    proto: ModelProto, wanted: set[str], shapes: Mapping[str, Shape], feeds: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """The main graph's values whose shapes only a run can tell; {} where the model does not run here (those axes stay unknown).

    Neither does one whose weights were left in other files: it is larger than memory may hold.
    """
    if any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer):
        return {}
    import onnxruntime as ort

    from onnxprune.running import as_float32, widened

    made = {o for n in proto.graph.node for o in n.output if o}
    probe = ModelProto()
    probe.CopyFrom(proto)
    del probe.graph.output[:]
    names = sorted(wanted & made)
    if not names:
        return {}
    probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        given = {**seeded_feeds(proto, shapes), **(feeds or {})}
        try:
            session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # no kernels in its types
            session = ort.InferenceSession(as_float32(probe).SerializeToString(), options, providers=["CPUExecutionProvider"])
            given = {k: widened(v) for k, v in given.items()}
    except Exception:  # not a model for this onnxruntime, or inputs that are no tensors
        return {}
    try:
        values = session.run(names, {k: v for k, v in given.items() if k in shapes})
    except Exception as error:
        raise ValueError(str(error)) from error
    return {n: v for n, v in zip(names, values, strict=True) if isinstance(v, np.ndarray)}

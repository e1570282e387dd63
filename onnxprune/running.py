"""Run a model with changed weights, many times, and say how far its outputs moved.

Everything runs as float32 without optimizations: half precision would drown the proof in rounding, and one onnxruntime
fusion (Pad into MaxPool) changes results.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune import writing
from onnxprune.errors import OnnxPruneError
from onnxprune.scopes import all_graphs, subgraphs

Arrays = Mapping[str, np.ndarray]
STRETCH = 1 << 22  # numbers that are moved at a time, of arrays that are large
LOADING = "onnxruntime does not load the model"
REASON = 300  # characters of a reason
_NOISE = (  # of its messages: its own code, and where in its sources it was
    (re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : "), ""),
    (re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: "), r"\1 node '\2': "),
    (re.compile(r"/\S+\.(?:h|hpp|cc|cpp):\d+ (?:[^()\s][^()]*?\((?:[^()]|\([^()]*\))*\) )?"), ""),
)
LEAST, MOST = 1e-3, 2.5e-2  # standard deviations of a value: what always counts as equal, and what never does
_WIDE = (TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def session(proto: ModelProto, provider: str = "CPUExecutionProvider", optimize: bool = False, threads: int = 1) -> ort.InferenceSession:
    """An onnxruntime session (threads 0: one a core); raises OnnxPruneError (exit code 4) where onnxruntime does not take the model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if threads != 1:  # threads that wait for work must not keep a core busy
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    skipped = ["Pad_Fusion"] if optimize else None
    try:
        message = writing.packed(proto)
        if message is not None:
            return ort.InferenceSession(message, options, providers=[provider], disabled_optimizers=skipped)
        with tempfile.TemporaryDirectory() as folder:  # more than one message holds
            path = Path(folder) / "model.onnx"
            writing.write_model(proto, path)
            return ort.InferenceSession(str(path), options, providers=[provider], disabled_optimizers=skipped)
    except OnnxPruneError:
        raise
    except Exception as error:
        raise OnnxPruneError(f"{LOADING} ({first_line(error)})", 4) from error


def first_line(error: Exception) -> str:
    """What onnxruntime says, without the places in its own sources; a long one ends at a word, with `…` (`-v` shows all of it)."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for noise, instead in _NOISE:
        text = noise.sub(instead, text)
    text = text or type(error).__name__
    return text if len(text) <= REASON else text[:REASON].rsplit(" ", 1)[0].rstrip(",;:") + " …"


def as_float32(proto: ModelProto) -> ModelProto:
    """A copy whose float16, bfloat16 and double tensors, casts and values are float32, and whose activations are not rounded.

    A value that is quantized and at once dequantized, with one scale, is only clipped to the range that the integers span.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    if any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        _only_clip(copy.graph)
    if _uses_other_floats(proto.graph):
        _widen(copy.graph)
    return copy


_SPANS = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127), TensorProto.UINT16: (0, 65535), TensorProto.INT16: (-32768, 32767)}


def _only_clip(graph: GraphProto) -> None:
    del graph.value_info[:]  # what was said of the integers
    tensors = {t.name: t for t in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {v.name for v in graph.output}
    for node in graph.node:
        after = readers.get(node.output[0], [])
        pair = after and all(n.op_type == "DequantizeLinear" and list(n.input[1:]) == list(node.input[1:]) for n in after)
        if node.op_type != "QuantizeLinear" or not pair or node.output[0] in outputs:
            continue
        if any(name not in tensors or np.prod(tensors[name].dims) != 1 for name in node.input[1:]) or len(node.input) < 3:
            continue
        scale, zero = (float(numpy_helper.to_array(tensors[name]).ravel()[0]) for name in node.input[1:3])
        low, high = _SPANS.get(tensors[node.input[2]].data_type, (-np.inf, np.inf))
        bounds = [f"{node.output[0]}:low", f"{node.output[0]}:high"]
        for name, bound in zip(bounds, (low, high), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.float32((bound - zero) * scale), name))
        node.op_type = "Clip"
        node.input[1:] = bounds
        del node.attribute[:]
        for reader in after:
            reader.op_type = "Identity"
            del reader.input[1:], reader.attribute[:]


def _uses_other_floats(graph: GraphProto) -> bool:
    if any(v.type.tensor_type.elem_type in _WIDE for v in (*graph.input, *graph.output)):
        return True
    if any(t.data_type in _WIDE for t in graph.initializer):
        return True
    for node in graph.node:
        for attribute in node.attribute:
            if (attribute.HasField("t") and attribute.t.data_type in _WIDE) or (attribute.name in ("to", "dtype") and attribute.i in _WIDE):
                return True
        if any(_uses_other_floats(inner) for inner in subgraphs(node)):
            return True
    return False


def _widen(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _WIDE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype", "stash_type") and attribute.i in _WIDE:
                attribute.i = TensorProto.FLOAT
        for inner in subgraphs(node):
            _widen(inner)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _WIDE:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def with_sizes(feeds: Arrays) -> str:
    """For messages: `ids [2, 8], mask [2, 8]`."""
    return ", ".join(f"{name} {list(np.shape(array))}" for name, array in feeds.items())


def widened(array: np.ndarray) -> np.ndarray:
    """float16, bfloat16 and double arrays as float32; others as they are."""
    array = np.asarray(array)
    if array.dtype == np.float32 or array.dtype.kind in "iubOSU":
        return array
    return array.astype(np.float32) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array


class Runs(Protocol):
    """A model that some of its tensors can be given anew at every run."""

    def run(self, feeds: Arrays, arrays: Arrays | None = None) -> dict[str, np.ndarray]: ...


class Runner:
    """A float32 copy of a model some of whose tensors can be given anew at every run.

    Those tensors become graph inputs, so that one session serves all runs; where onnxruntime wants them constant, a session
    is built a run.
    """

    def __init__(self, proto: ModelProto, tensors: Iterable[str] = (), watch: Sequence[str] = ()) -> None:
        self._proto = as_float32(proto)
        self._names = set(tensors)
        made = {o for n in self._proto.graph.node for o in n.output}
        have = {v.name for v in self._proto.graph.output}
        self._proto.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in watch if n in made and n not in have)
        self._values: dict[str, np.ndarray] = {}
        self._session: ort.InferenceSession | None = None
        if self._names:
            try:
                self._session = session(self._open())
            except OnnxPruneError:
                self._session = None

    def _tensors(self, proto: ModelProto) -> dict[str, TensorProto]:
        found: dict[str, TensorProto] = {}
        for graph in reversed(list(all_graphs(proto.graph))):
            found |= {t.name: t for t in graph.initializer}
            for node in graph.node:
                if node.op_type == "Constant":
                    found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        return found

    def _open(self) -> ModelProto:
        """The copy with the changeable tensors as inputs."""
        found = self._tensors(self._proto)
        proto = ModelProto(ir_version=max(self._proto.ir_version, 4), opset_import=self._proto.opset_import)
        graph = proto.graph
        graph.name = self._proto.graph.name or "graph"
        graph.input.extend(v for v in self._proto.graph.input if v.name not in self._names)
        graph.output.extend(self._proto.graph.output)
        graph.sparse_initializer.extend(self._proto.graph.sparse_initializer)
        graph.initializer.extend(t for t in self._proto.graph.initializer if t.name not in self._names)
        graph.node.extend(
            n for n in self._proto.graph.node if not (n.op_type == "Constant" and n.output[0] in self._names and n.output[0] in found)
        )
        taken_outside(graph, self._names)
        for name in sorted(self._names):
            tensor = found[name]
            self._values[name] = numpy_helper.to_array(tensor)
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        return proto

    def run(self, feeds: Arrays, arrays: Arrays | None = None) -> dict[str, np.ndarray]:
        """{output: array}; raises OnnxPruneError (exit code 4) where the model does not run on the feeds."""
        given = {k: widened(v) for k, v in feeds.items()}
        changed = {k: widened(v) for k, v in (arrays or {}).items()}
        if self._session is not None:
            try:
                return _run(self._session, given | self._values | changed)
            except OnnxPruneError:
                self._session = None  # what has to be constant for a kernel is found only now
        proto = self._proto
        if changed:
            proto = ModelProto()
            proto.CopyFrom(self._proto)
            for name, tensor in self._tensors(proto).items():
                if name in changed:
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed[name]), tensor.name))
        return _run(session(proto), given)


def taken_outside(graph: GraphProto, names: Collection[str]) -> set[str]:
    """Take tensors out of the bodies in a graph, which then read them from outside; those of the names that there were."""
    found: set[str] = set()
    for body in (body for node in graph.node for inner in subgraphs(node) for body in all_graphs(inner)):
        for i in reversed(range(len(body.initializer))):
            if body.initializer[i].name in names:
                found.add(body.initializer[i].name)
                del body.initializer[i]
        for i in reversed(range(len(body.node))):
            if body.node[i].op_type == "Constant" and body.node[i].output[0] in names:
                found.add(body.node[i].output[0])
                del body.node[i]
    return found


def _run(sess: ort.InferenceSession, feeds: Arrays) -> dict[str, np.ndarray]:
    wanted = {v.name for v in sess.get_inputs()}
    try:
        outputs = sess.run(None, {k: v for k, v in feeds.items() if k in wanted})
    except Exception as error:
        raise OnnxPruneError(f"onnxruntime does not run the model on these inputs ({first_line(error)})", 4) from error
    return {v.name: o for v, o in zip(sess.get_outputs(), outputs, strict=True)}


def distance(left: Arrays, right: Arrays) -> float:
    """The largest difference over the float values that both have, in standard deviations of the value and of each of its slices.

    Integers are not compared (a tie may fall either way); shapes that differ, and non-finite numbers in different places,
    are infinitely far.
    """
    return max((_apart(left[k], right[k]) for k in left if k in right), default=0.0)


def _apart(left: Any, right: Any) -> float:
    """Of arrays, or of sequences of arrays."""
    if isinstance(left, list) and isinstance(right, list):
        pairs = zip(left, right, strict=False)
        return max((_apart(a, b) for a, b in pairs), default=0.0) if len(left) == len(right) else float("inf")
    return _gap(np.asarray(left), np.asarray(right))


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind != "f" or not a.size:
        return 0.0
    one, other = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(one) & np.isfinite(other)
    if not finite.all():
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
            return float("inf")
        one, other = np.where(finite, one, 0.0), np.where(finite, other, 0.0)
    difference = np.abs(one - other)
    largest = float(np.abs(one).max()) + 1e-12
    spread = float(one.std())
    spread = spread if spread > 1e-4 * largest else largest
    gap = float(difference.max()) / spread
    for axis in range(1, a.ndim):
        if 1 < a.shape[axis] <= 4096 and a.size > 4 * a.shape[axis]:
            rest = tuple(i for i in range(a.ndim) if i != axis)
            scale = np.maximum(one.std(axis=rest), 0.01 * spread)
            gap = max(gap, float((difference.max(axis=rest) / scale).max()))
    return gap


class Lazy(Mapping[str, np.ndarray]):
    """Arrays that are made each time that they are asked for, as together they are more than memory holds."""

    def __init__(self, names: Iterable[str], make: Callable[[str], np.ndarray]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def some(arrays: Arrays, names: Collection[str]) -> Arrays:
    """Those of the names."""
    found = [name for name in arrays if name in names]
    return Lazy(found, arrays.__getitem__) if isinstance(arrays, Lazy) else {name: arrays[name] for name in found}


def jittered(arrays: Arrays, rng: np.random.Generator, units: float = 1.0) -> Arrays:
    """Every float moved by about one unit in its last place (or some): what rounding alone may do."""
    if isinstance(arrays, Lazy):
        many, root = arrays, int(rng.integers(2**32))

        def one(name: str) -> np.ndarray:
            own, array = np.random.default_rng([root, crc32(name.encode())]), widened(many[name])
            flat, moved = array.reshape(-1), np.empty(array.shape, array.dtype)
            for start in range(0, flat.size, STRETCH):
                part = flat[start : start + STRETCH]
                moved.reshape(-1)[start : start + STRETCH] = jittered({name: part}, own, units).get(name, part)
            return moved

        return Lazy(many, one)
    moved = {}
    for name, array in arrays.items():
        values = widened(array)
        if values.dtype == np.float32 and values.size > 64:
            signs = rng.integers(0, 2, values.shape, dtype=np.int8) * 2 - 1
            with np.errstate(over="ignore", invalid="ignore"):
                moved[name] = np.where(np.isfinite(values), values * (1 + np.float32(6e-8 * units) * signs), values).astype(np.float32)
    return moved

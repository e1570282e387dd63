"""Measure ONNX models side by side: MACs, parameters, file size, peak memory and latency."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.errors import OnnxPruneError

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, TensorProto
    from rich.table import Table

Feeds = dict[str, np.ndarray]
Run = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """What one model costs: sizes in bytes, latencies in seconds for one run of the whole batch.

    `macs` and `peak_memory_bytes` are None where they were not measured or could not be.
    """

    name: str
    macs: int | None
    parameters: int
    file_bytes: int
    peak_memory_bytes: int | None
    latency_median_s: float
    latency_low_s: float
    latency_high_s: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that the json module can write."""
        return asdict(self)


def benchmark(
    paths: Sequence[str | os.PathLike[str]],
    feeds: Mapping[str, np.ndarray] | None = None,
    *,
    batch: int | None = None,
    threads: int = 1,
    warmup: int = 3,
    min_runs: int = 5,
    max_runs: int = 1000,
    seconds: float = 2.0,
    provider: str = "CPUExecutionProvider",
    memory: bool = True,
    macs: Callable[[str, Feeds], int | None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure each model of `paths`, in their order.

    Latency: the models take turns in this process, the order reversed every round, so that a machine that slows down
    slows all of them. After a first run and `warmup` rounds each gets the same number of runs, `min_runs` to
    `max_runs`: as many as take `seconds` a model. `threads` is onnxruntime's intra-op count (0: its own default).

    Peak memory (the host's): a fresh child process loads the model and runs it once; what counts is its highest
    resident size less the same before loading, with onnxruntime imported. None if the child fails.
    Parameters: elements of floating-point initializers and Constant nodes, subgraphs included; integer (quantized)
    weights do not count. File size: the .onnx file and the external data files that it names.

    `feeds` maps input names to arrays; names that a model does not have are ignored. Without it, inputs come from a
    fixed seed: standard normal floats, integers of 0 and 1, symbolic sizes 1. `batch` is the size of each symbolic
    axis 0 and of every axis of the same symbol; given feeds are repeated or cut to it. `macs(path, feeds)` counts the
    multiply-accumulates at the feeds; `progress` gets a line before each step.

    Raises OnnxPruneError for a file that is missing or does not load or run, feeds that lack an input or do not fit
    it, a batch that the model does not take, or a provider that is not there.

    >>> import tempfile, onnx
    >>> text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
    >>> path = os.path.join(tempfile.mkdtemp(), "relu.onnx")
    >>> onnx.save(onnx.parser.parse_model(text), path)
    >>> [result] = benchmark([path], batch=8, seconds=0.01, memory=False)
    >>> result.name, result.parameters
    ('relu.onnx', 0)
    """
    if threads < 0 or warmup < 0 or not 1 <= min_runs <= max_runs or (batch is not None and batch < 1):
        raise OnnxPruneError("benchmark: needs threads >= 0, warmup >= 0, 1 <= min_runs <= max_runs and batch >= 1")
    say = progress or (lambda line: None)
    files = [os.fspath(path) for path in paths]
    names = [Path(file).name for file in files]
    sizes: list[tuple[int, int]] = []
    inputs: list[Feeds] = []
    for file in files:
        model, parameters, size = _load(file)
        sizes.append((parameters, size))
        inputs.append(_feeds_for(model, file, feeds, batch))
    counts = [macs(file, values) if macs else None for file, values in zip(files, inputs, strict=True)]
    say("measuring latency")
    runners = [_runner(file, values, threads, provider) for file, values in zip(files, inputs, strict=True)]
    times = _interleave(runners, warmup, min_runs, max_runs, seconds * len(runners))
    del runners  # the sessions' memory, before the children need theirs

    results = []
    for i, file in enumerate(files):
        if memory:
            say(f"measuring peak memory of {file}")
        peak = _peak_memory(file, inputs[i], threads, provider) if memory else None
        name = names[i] if names.count(names[i]) == 1 else file
        low, median, high = (float(q) for q in np.percentile(times[i], [10, 50, 90]))
        results.append(Measurement(name, counts[i], *sizes[i], peak, median, low, high, len(times[i])))
    return results


def table(measurements: Sequence[Measurement], batch: str = "") -> Table:
    """A column for each model; from the second on, each number is followed by its ratio to the first model's.

    batch: what a run is for, such as ` for a batch of 2`, which is said below.
    """
    from rich import box
    from rich.table import Table

    caption = f"MACs, memory and latency are{batch}" if batch else None
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    view.add_column("", no_wrap=True)
    for m in measurements:
        view.add_column(m.name, justify="right", overflow="fold")
    for label, field, unit in (
        ("MACs", "macs", ""),
        ("parameters", "parameters", ""),
        ("file size", "file_bytes", "B"),
        ("peak memory", "peak_memory_bytes", "B"),
        ("latency, median", "latency_median_s", "s"),
        ("  10th percentile", "latency_low_s", "s"),
        ("  90th percentile", "latency_high_s", "s"),
    ):
        values = [getattr(m, field) for m in measurements]
        cells = ["–" if value is None else _si(value, unit) for value in values]
        for i, value in enumerate(values[1:], 1):
            cells[i] += f" {value / values[0]:5.2f}×" if value is not None and values[0] else " " * 7
        if values.count(None) < len(values):
            view.add_row(label, *cells)
    view.add_row("runs", *(str(m.runs) + " " * (7 if i else 0) for i, m in enumerate(measurements)))
    return view


def _si(value: float, unit: str) -> str:
    """Three significant digits: 1234567 is 1.23 M."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6)):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {prefix}{unit}".rstrip()
    return f"0 {unit}".rstrip()


def _load(file: str) -> tuple[ModelProto, int, int]:
    """The model without its external data, its parameters, and the bytes of the file and its external data."""
    import onnx

    from onnxprune.cost import is_parameter

    try:
        model = onnx.load(file, format="protobuf", load_external_data=False)
        tensors = [found for body in (model.graph, *model.functions) for found in _tensors(body)]
        entries = (entry for tensor, _ in tensors for entry in tensor.external_data if entry.key == "location")
        places = {os.path.join(os.path.dirname(file), entry.value) for entry in entries}
        size = sum(os.path.getsize(place) for place in {file} | places)
    except Exception as error:  # protobuf's own error classes differ between its versions
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise OnnxPruneError(f"{file}: not a readable ONNX model ({line}); check the path and its data") from error
    parameters = sum(math.prod(t.dims) for t, constant in tensors if constant and is_parameter(t))
    return model, parameters, size


def _tensors(body: GraphProto | FunctionProto) -> Iterator[tuple[TensorProto, bool]]:
    """Every stored tensor, subgraphs included, and whether it is an initializer or a Constant node's value."""
    from onnx import TensorProto

    yield from ((tensor, True) for tensor in getattr(body, "initializer", ()))
    yield from ((sparse.values, True) for sparse in getattr(body, "sparse_initializer", ()))
    for node in body.node:
        for attribute in node.attribute:
            if attribute.name in ("value_float", "value_floats"):
                yield TensorProto(data_type=1, dims=[len(attribute.floats)] * attribute.name.endswith("s")), True
            for tensor in (attribute.t, attribute.sparse_tensor.values, *attribute.tensors):
                yield tensor, node.op_type == "Constant"
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)


def _feeds_for(model: ModelProto, file: str, feeds: Mapping[str, np.ndarray] | None, batch: int | None) -> Feeds:
    """The arrays for one model's inputs, made or taken from `feeds`, at `batch` where it is given."""
    from onnx.helper import tensor_dtype_to_np_dtype

    with_default = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in with_default]
    dims: dict[str, list[int | str]] = {
        v.name: [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in v.type.tensor_type.shape.dim] for v in inputs
    }
    leading = {shape[0] for shape in dims.values() if shape}
    if batch not in (None, *leading) and not any(isinstance(size, str) for size in leading):
        raise OnnxPruneError(f"{file}: its batch is fixed at {[*leading]}, not {batch}; export it dynamic")
    rng, result = np.random.default_rng(0), Feeds()
    for value in inputs:
        name, kind, shape, where = value.name, value.type.tensor_type, dims[value.name], f"{file}: input {value.name!r}"
        if kind.elem_type in (0, 8):  # not a tensor, or one of strings
            raise OnnxPruneError(f"{where} is not a tensor of numbers, so it cannot be fed; measure another model")
        dtype, ranked = tensor_dtype_to_np_dtype(kind.elem_type), kind.HasField("shape")
        along = [axis for axis, n in enumerate(shape) if isinstance(n, str) and (axis == 0 or n in leading - {"?"})]
        if feeds is None and ranked:
            whole = dtype.kind in "iub" or "int" in dtype.name
            sizes = [n if isinstance(n, int) else batch or 1 if axis in along else 1 for axis, n in enumerate(shape)]
            array = np.asarray(rng.integers(0, 2, sizes) if whole else rng.standard_normal(sizes)).astype(dtype)
        elif feeds is None:
            raise OnnxPruneError(f"{where} has no shape in the file; give feeds for it")
        elif name not in feeds:
            raise OnnxPruneError(f"{where} is not in the feeds ({', '.join(feeds) or 'none given'}); add it")
        else:
            array = np.asarray(feeds[name], order="C")
        fixed = [m if isinstance(n, str) else n for n, m in zip(shape, array.shape, strict=False)]
        if array.dtype != dtype or (ranked and (len(shape), *fixed) != (array.ndim, *array.shape)):
            raise OnnxPruneError(f"{where} takes {dtype} {shape}, not {array.dtype} {list(array.shape)}; mend the feed")
        for axis in along:
            if batch and array.shape[axis]:
                array = np.take(array, np.arange(batch) % array.shape[axis], axis=axis)
        result[name] = array
    return result


def _runner(file: str, feeds: Feeds, threads: int, provider: str) -> Run:
    """A function that runs the model once, in a session of its own that has run once already."""
    import onnxruntime as ort
    from onnx.helper import np_dtype_to_tensor_dtype

    available = ort.get_available_providers()
    usable = [provider] if provider in available else []
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors arrive as exceptions
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else idle threads spin and slow the next
    values = {}
    for name, array in feeds.items():
        # bfloat16 and the like are foreign to onnxruntime's numpy bridge: give it the bits
        bits = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
        kind = np_dtype_to_tensor_dtype(array.dtype)
        values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
    try:
        # onnxruntime 1.31's Pad_Fusion turns a zero Pad before MaxPool into MaxPool's own, wrong for negative values.
        session = ort.InferenceSession(file, options, providers=usable, disabled_optimizers=["Pad_Fusion"])
        session.run_with_ort_values(None, values)
    except Exception as error:  # onnxruntime's errors share no base class
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise OnnxPruneError(f"{file}: does not run ({line}); check it, or give other feeds") from error
    if provider not in session.get_providers():
        raise OnnxPruneError(f"provider {provider!r} is not there or cannot start; choose from {', '.join(available)}")
    return lambda: session.run_with_ort_values(None, values)


def _interleave(runners: Sequence[Run], warmup: int, least: int, most: int, seconds: float) -> list[list[float]]:
    """Seconds of each run, a list a runner; the order of the runners turns round after every round."""
    for run in list(runners) * warmup:
        run()
    times: list[list[float]] = [[] for _ in runners]
    order = list(range(len(runners)))
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start >= seconds:
            break
        for index in order:
            begin = time.perf_counter()
            runners[index]()
            times[index].append(time.perf_counter() - begin)
        order.reverse()
    return times


def _peak_memory(file: str, feeds: Feeds, threads: int, provider: str) -> int | None:
    # On Linux a process's ru_maxrss starts at the size of the one that started it, so a small one must start the child.
    start = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    # The module path goes in as an argument, since -c would look in the working directory first.
    code = """import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep)
import onnx.helper, onnxruntime; from onnxprune.benchmark import _child; _child()"""
    try:
        command = [sys.executable, "-c", start, code, os.pathsep.join(sys.path)]
        work = pickle.dumps((file, feeds, threads, provider))
        return int(subprocess.run(command, input=work, capture_output=True, check=True).stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _child() -> None:
    """In the child process: print the bytes that loading and one run of the model add."""
    import resource

    work = pickle.load(sys.stdin.buffer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _runner(*work)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(added * (1 if sys.platform == "darwin" else 1024))  # macOS counts bytes, Linux kibibytes

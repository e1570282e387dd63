"""Time models in onnxruntime: kernel by kernel, from its profiler, and as a whole, in turns."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto

from onnxprune import writing
from onnxprune.errors import OnnxPruneError
from onnxprune.running import Arrays, first_line

Kernels = dict[str, float]
LOW = 10  # the percentile of runs that counts: what others do on the machine only ever adds
BLOCKED = "_nchwc"  # what onnxruntime puts after a value's name to name the kernel that makes it in a blocked layout
REMEDY = "see that it runs with that --provider, or ask for another budget with --of"


class Timer(Protocol):
    """What measures: `Stopwatch`, or a model of a device in its place."""

    @property
    def device(self) -> Mapping[str, str | int]:
        """All that times depend on besides the model and its sizes."""

    def kernels(self, reference: ModelProto, models: Iterable[ModelProto]) -> list[Kernels]:
        """For each model {value: time of the kernel that makes it}, and under "" what belongs to no value of the file's.

        Times are shares of a run of the `reference`, timed beside each model, so that a machine that is busier for one is for both.
        A node whose outputs have no entry was fused into the one that reads them.
        """

    def latencies(self, models: Sequence[ModelProto]) -> list[float]:
        """Seconds of a run of each model, measured in turns."""


@dataclass(frozen=True)
class Stopwatch:
    """onnxruntime on this machine.

    feeds: what the models run on; threads: onnxruntime's intra-op count (0: its own default); seconds: to spend on a model.
    """

    feeds: Arrays = field(repr=False)
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    seconds: float = 1.0

    @property
    def device(self) -> Mapping[str, str | int]:
        return {"onnxruntime": ort.__version__, "device": device_name(), "provider": self.provider, "threads": self.threads}

    def kernels(self, reference: ModelProto, models: Iterable[ModelProto]) -> list[Kernels]:
        beside = self._run(self._session(reference, ort.SessionOptions()))
        beside()
        found = []
        for model in models:
            with tempfile.TemporaryDirectory() as folder:
                found.append(self._profiled(model, Path(folder), beside))
        return found

    def latencies(self, models: Sequence[ModelProto]) -> list[float]:
        runs = [self._run(self._session(model, ort.SessionOptions())) for model in models]
        for run in runs * 2:
            run()
        times: list[list[float]] = [[] for _ in runs]
        order = list(range(len(runs)))
        start = time.perf_counter()
        while len(times[0]) < 5 or (time.perf_counter() - start < self.seconds * len(runs) and len(times[0]) < 1000):
            for i in order:
                times[i].append(self._took(runs[i]))
            order.reverse()
        return [float(np.percentile(each, LOW)) for each in times]

    def _profiled(self, model: ModelProto, folder: Path, beside: Callable[[], object]) -> Kernels:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        model = _with_names(model)
        session = self._session(model, options)
        run, start, pace = self._run(session), time.perf_counter(), list[float]()
        run()
        while len(pace) < 4 or (time.perf_counter() - start < self.seconds and len(pace) < 200):
            pace.append(self._took(beside))
            run()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        if self.provider != "CPUExecutionProvider":  # others run on after their kernels' calls return
            return {"": min(e["dur"] for e in events if e.get("name") == "model_run") * 1e-6 / min(pace)}
        made = {o for node in model.graph.node for o in node.output if o}
        kernels = _by_value(events, onnx.load(folder / "optimized.onnx", load_external_data=False), made)
        return {value: seconds / min(pace) for value, seconds in kernels.items()}

    def _took(self, run: Callable[[], object]) -> float:
        """Seconds of a run: of the processor where it is one thread that works, as then no one else's work counts."""
        alone = self.threads == 1 and self.provider == "CPUExecutionProvider" and time.get_clock_info("thread_time").resolution < 1e-5
        clock = time.thread_time if alone else time.perf_counter
        start = clock()
        run()
        return clock() - start

    def _session(self, model: ModelProto, options: ort.SessionOptions) -> ort.InferenceSession:
        options.intra_op_num_threads, options.log_severity_level = self.threads, 4
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else idle threads spin and slow the next
        extra = {"providers": [self.provider], "disabled_optimizers": ["Pad_Fusion"]}
        try:
            if model.ByteSize() <= writing.LARGEST:
                return ort.InferenceSession(model.SerializeToString(), options, **extra)
            with tempfile.TemporaryDirectory() as folder:  # more than one message holds
                writing.write_model(model, Path(folder) / "model.onnx")
                return ort.InferenceSession(str(Path(folder) / "model.onnx"), options, **extra)
        except OnnxPruneError:
            raise
        except Exception as error:
            raise OnnxPruneError(f"onnxruntime does not load the model to time it ({first_line(error)}); {REMEDY}") from error

    def _run(self, session: ort.InferenceSession) -> Callable[[], object]:
        values = {}
        for entry in session.get_inputs():
            if entry.name in self.feeds:
                array = np.asarray(self.feeds[entry.name], order="C")
                bits = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array  # bfloat16
                values[entry.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    bits, onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                )

        def run() -> object:
            try:
                return session.run_with_ort_values(None, values)
            except Exception as error:
                raise OnnxPruneError(f"onnxruntime does not run the model to time it ({first_line(error)}); {REMEDY}") from error

        return run


def check_device(provider: str, threads: int) -> None:
    """Raises OnnxPruneError where onnxruntime has no such provider here."""
    available = ort.get_available_providers()
    if provider not in available:
        raise OnnxPruneError(f"provider '{provider}' is not there, so nothing can be timed on it; choose from {', '.join(available)}")
    if threads < 0:
        raise OnnxPruneError(f"threads is {threads}; it is a number of threads, or 0 for onnxruntime's own default")


def _with_names(model: ModelProto) -> ModelProto:
    """A copy whose main graph's nodes each have a name of their own."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for i, node in enumerate(copy.graph.node):
        node.name = f"onnxprune.main.{i}"
    return copy


def _by_value(events: Sequence[Mapping[str, object]], optimized: ModelProto, made: set[str]) -> Kernels:
    """The fastest run of each kernel of the main graph, by a value that the file has too; bodies count in the nodes that hold them."""
    ending = "_kernel_time"
    times: dict[str, list[int]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(ending):
            times.setdefault(str(event["name"]).removesuffix(ending), []).append(int(str(event["dur"])))
    found: Kernels = {}
    value_of: dict[str, str] = {}  # of what a kernel reads: the value that it makes
    for node in reversed(optimized.graph.node):
        own = next((name for name in (*node.output, node.name.removesuffix(BLOCKED)) if name in made), "")
        value = own or next((value_of[name] for name in node.output if name in value_of), "")  # a reshape or reorder for its reader
        value_of.update((name, value) for name in node.input if value)
        if node.name in times:
            found[value] = found.get(value, 0.0) + min(times[node.name]) * 1e-6
    return found


def device_name() -> str:
    """The processor, as far as the system says which it is."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
        name = " ".join(about.get(key, "").strip() for key in ("model name", "cpu family", "model")).strip() or name
    except (OSError, ValueError):
        pass
    return f"{name} x{os.cpu_count()}"

"""What a long measurement keeps so that it goes on where it was stopped, and how it knows that it is the same one."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from onnxprune import __version__
from onnxprune.errors import OnnxPruneError
from onnxprune.samples import Samples
from onnxprune.scopes import all_graphs
from onnxprune.userfunctions import is_function
from onnxprune.writing import write_text

Key = dict[str, Any]


def key_of(source: str | os.PathLike[str] | ModelProto, **options: Any) -> Key:
    """What must be the same for points to be kept: the model's bytes, the program's version, and these options."""
    return {"model": _digest(source), "version": __version__, **{k: json.loads(json.dumps(v)) for k, v in options.items()}}


def _digest(source: str | os.PathLike[str] | ModelProto) -> str:
    found = hashlib.sha256()
    if isinstance(source, ModelProto):
        found.update(source.SerializeToString(deterministic=True))
        return found.hexdigest()
    path = Path(source)
    graphs = list(all_graphs(onnx.load(str(path), load_external_data=False).graph))
    tensors = [t for graph in graphs for t in (*graph.initializer, *(a.t for node in graph.node for a in node.attribute))]
    external = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    for file in (path, *(path.parent / name for name in sorted(external))):
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                found.update(block)
    return found.hexdigest()


def digest_of(samples: Samples, source: object) -> str:
    """Of how many samples there are, and of the first of them; of a function, which may shuffle, its name."""
    if not samples.count:
        return "none"
    if callable(source) or (isinstance(source, str) and is_function(source)):
        return samples.source
    found = hashlib.sha256(str(samples.count).encode())
    first = next(samples.batches(32), {})
    for name in sorted(first):
        array = np.ascontiguousarray(first[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def read_kept(path: str | os.PathLike[str], kind: str, key: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """What was kept there of the same measurement, {} where there is no file.

    Raises OnnxPruneError where the file is something else, or of a measurement of another model or with other options.
    """
    target = Path(path)
    if not target.exists():
        return {}
    try:
        content = json.loads(target.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OnnxPruneError(f"{target}: is there, and is no {kind} that could go on ({error}); {remedy}") from error
    if not isinstance(content, dict) or content.get("kind") != kind or not isinstance(content.get("points"), list):
        raise OnnxPruneError(f"{target}: is there, and is no {kind} that could go on; {remedy}")
    before = content.get("key") or {}
    for name, value in key.items():
        if before.get(name) != value:
            said = "" if name in ("model", "calibration", "eval") else f" ({before.get(name)!r} there, {value!r} now)"
            raise OnnxPruneError(f"{target}: was measured with another {name}{said}; {remedy}")
    return content


def keep(content: Mapping[str, Any], path: str | os.PathLike[str] | None) -> None:
    """Write it, if there is somewhere to."""
    if path is not None:
        write_text(json.dumps(content, indent=1), path)


def counted(total: int, done: int, what: str, progress: Callable[[str], None] | None) -> Callable[[], None]:
    """To be called when one more is done: says how many are, and how long the rest may take.  `done` were before."""
    start, new = time.monotonic(), 0

    def tell(step: int = 1) -> None:
        nonlocal new
        new += step
        left = (time.monotonic() - start) / max(1, new) * (total - done - new)
        when = f", about {_duration(left)} left" if new and done + new < total else ""
        if progress:
            progress(f"{done + new} of {total} {what}{when}")

    tell(0)
    return tell


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

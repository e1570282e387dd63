"""Weights that stand in files beside the model: found and checked when it is read, and read when they are needed.

Up to a limit they are all read at once, which is simplest; beyond it those of the main graph stay where they are, and one tensor
at a time (or some of its rows) is in memory.  Plain reads, no memory maps: pages of a map count as the process's own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from onnxprune.errors import OnnxPruneError
from onnxprune.scopes import all_graphs, subgraphs

IN_MEMORY = 2**29  # bytes of weights that are read at once, unless said otherwise: all that is done to them takes ten times as much
AT_ONCE = 2**31 - 1  # the same where something takes all of them at once
SMALL = 1 << 16  # bytes up to which a tensor is always read: numbers that say shapes, and vectors
CHUNK = 1 << 25  # bytes that are sliced at a time
Masks = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are, and its type."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def array(self) -> np.ndarray:
        """All of it."""
        return self._read(0, math.prod(self.shape)).view(self.dtype).reshape(self.shape)

    def rows(self, masks: Masks) -> Iterator[np.ndarray]:
        """Its bytes a few rows at a time, without what the masks {axis: (size,) bool} leave out."""
        length = math.prod(self.shape[1:])
        step = max(1, CHUNK // max(1, length * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            count = min(step, self.shape[0] - start)
            first = masks[0][start : start + count] if 0 in masks else np.ones(count, bool)
            if not first.any():
                continue
            part = self._read(start * length, count * length).reshape(count, *self.shape[1:])
            for axis, mask in {**masks, 0: first}.items():
                part = part if mask.all() else np.compress(mask, part, axis=axis)
            yield part

    def _read(self, first: int, count: int) -> np.ndarray:
        raw = np.dtype((np.void, self.dtype.itemsize))
        try:
            found = np.fromfile(self.path, raw, count, offset=self.offset + first * raw.itemsize)
        except OSError as error:
            raise OnnxPruneError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        if found.size != count:
            raise OnnxPruneError(f"{self.path}: became shorter while it was read; leave it alone and try again")
        return found


@dataclass(frozen=True)
class External:
    """What of a model stands in other files.

    files: all of them; size: bytes of its tensors there; places: the tensors that were left there, by name; limit: bytes of weights
    to hold at once.
    """

    files: tuple[Path, ...] = ()
    size: int = 0
    places: Mapping[str, Place] = field(default_factory=dict)
    limit: int = AT_ONCE

    def need_memory(self, name: str, what: str) -> None:
        """Raises OnnxPruneError where weights were left on disk, for what takes them all at once."""
        if self.places:
            raise OnnxPruneError(
                f"{name}: its {gigabytes(self.size)} of weights are read one at a time, which {what} cannot do; leave that out, or let "
                f"them all be read with --memory {math.ceil(self.size / 1e9)}GB, on a machine that has several times that"
            )


def attach(proto: ModelProto, folder: Path, name: str, limit: int = AT_ONCE) -> External:
    """Read the external data of a model (in place), or leave large tensors of the main graph where they are, if all are over the limit.

    Raises OnnxPruneError where a file is missing, too short or outside of the model's folder.
    """
    stored = list(_stored(proto))
    outside = [t for t in stored if t.data_location == TensorProto.EXTERNAL]
    if not outside:
        return External(limit=limit)
    found = [(tensor, *_located(tensor, folder, name)) for tensor in outside]
    size, times = sum(length for *_, length in found), Counter(t.name for t in stored)
    if size <= limit and size > (free := available()):
        raise OnnxPruneError(
            f"{name}: its weights are {gigabytes(size)}, and {gigabytes(free)} of memory are free; have them read one at a time by a "
            f"smaller --memory, such as {max(1, int(free / 4e6))}MB"
        )
    main = {t.name for t in proto.graph.initializer} if size > limit else set()
    places = {}
    for tensor, path, offset, length in found:
        dtype = _dtype(tensor)
        if tensor.name in main and length > SMALL and dtype is not None and times[tensor.name] == 1:
            places[tensor.name] = Place(path, offset, tuple(tensor.dims), dtype)
            continue
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length)
        except OSError as error:
            raise OnnxPruneError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return External(tuple(dict.fromkeys(path for _, path, *_ in found)), size, places, limit)


def _stored(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores, in bodies and functions too."""
    for graph in all_graphs(proto.graph):
        yield from graph.initializer
    nodes = [node for graph in all_graphs(proto.graph) for node in graph.node]
    for inner in (
        inner for function in proto.functions for node in function.node for body in subgraphs(node) for inner in all_graphs(body)
    ):
        yield from inner.initializer
        nodes.extend(inner.node)
    for attribute in (a for node in (*nodes, *(n for f in proto.functions for n in f.node)) for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def available() -> int:
    """Bytes of memory that a process may still take, as far as Linux says (of the machine, and of the control group)."""
    found = [2**63]
    for path, key in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            line = next(line for line in Path(path).read_text(encoding="ascii").splitlines() if line.startswith(key))
            found.append(int(line.split()[1]) * 1024 if key else int(line))
        except (OSError, StopIteration, ValueError):  # another system, or no limit
            continue
    return min(found)


def _dtype(tensor: TensorProto) -> np.dtype | None:
    """The type of its elements; None where they are packed, or no numbers."""
    if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING) or tensor.data_type > TensorProto.BFLOAT16:
        return None
    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _located(tensor: TensorProto, folder: Path, name: str) -> tuple[Path, int, int]:
    """The file, offset and length (bytes) of a tensor's data, checked."""
    entries, where = {e.key: e.value for e in tensor.external_data}, f"{name}: the data of tensor '{tensor.name}'"
    location = entries.get("location", "")
    path = folder / location
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise OnnxPruneError(
            f"{where} is in '{location}', a link to outside of the model's folder, which is not followed; copy the file there"
        )
    if not location or Path(location).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise OnnxPruneError(f"{where} is said to be in '{location}', not in the model's own folder, and is not read; export it again")
    if not path.is_file():
        raise OnnxPruneError(f"{where} cannot be read: its external data file '{path}' is missing; put it beside the model")
    available = path.stat().st_size
    try:
        offset = int(entries.get("offset") or 0)
        available -= offset
        length = int(entries.get("length") or available)
    except ValueError as error:
        raise OnnxPruneError(f"{where} has an offset or length that is no number; export it again") from error
    dtype = _dtype(tensor)
    needed = math.prod(tensor.dims) * dtype.itemsize if dtype is not None else length
    if offset < 0 or length < 0 or needed > available or length > available:
        raise OnnxPruneError(
            f"{where} needs {max(needed, length)} bytes from byte {offset} on, and '{path}' has {max(available, 0)} there; "
            "it is cut short: copy or export it again"
        )
    if "length" in entries and length != needed:
        raise OnnxPruneError(f"{where} is {length} bytes, its shape {list(tensor.dims)} takes {needed}; export the model again")
    return path, offset, needed


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def kept(shape: Sequence[int], masks: Masks) -> tuple[int, ...]:
    """The shape that the masks leave."""
    return tuple(int(masks[i].sum()) if i in masks else size for i, size in enumerate(shape))

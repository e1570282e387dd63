"""Weights written to files of their own, one tensor at a time: where each goes, and the model that says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxprune.assembly import copy_field
from onnxprune.errors import OnnxPruneError
from onnxprune.external import gigabytes

SMALL = 1024  # bytes below which a tensor stays in the model's own file
ALIGNED = 4096  # bytes: where a tensor may begin, so that runtimes can map it
EVERY = 0.2  # seconds between two lines of progress
Pieces = Callable[[str], Iterable[np.ndarray]]  # the values of a tensor that are not in the model, in parts of whole rows
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: the number of the file, and the bytes in it."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The data files (names, in order), and the place of each tensor of the main graph that goes to one of them."""

    files: tuple[str, ...]
    slots: Mapping[str, Slot]

    @property
    def size(self) -> int:
        return sum(slot.length for slot in self.slots.values())


def lay_out(proto: ModelProto, name: str, shard: int | None = None) -> Layout:
    """Tensors in the model's order: in NAME.data, or in files of at most `shard` bytes each but for larger tensors."""
    slots: dict[str, Slot] = {}
    file = end = 0
    for tensor in proto.graph.initializer:
        length = length_of(tensor)
        if length is None or (length < SMALL and tensor.data_location != TensorProto.EXTERNAL):
            continue
        offset = -(-end // ALIGNED) * ALIGNED
        if shard is not None and end and offset + length > shard:
            file, offset = file + 1, 0
        slots[tensor.name] = Slot(file, offset, length)
        end = offset + length
    many = file + 1 if slots else 0
    files = [f"{name}.data"] if many == 1 else [f"{name}-{k + 1:05}-of-{many:05}.data" for k in range(many)]
    return Layout(tuple(files), slots)


def length_of(tensor: TensorProto) -> int | None:
    """Bytes of its values; None for types that stay inside."""
    if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING) or tensor.data_type > TensorProto.BFLOAT16:
        return None
    elements: int = math.prod(tensor.dims)
    return elements * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def skeleton(proto: ModelProto, layout: Layout) -> ModelProto:
    """The model without what goes to other files, and where that is."""
    out = ModelProto()
    for key, value in proto.ListFields():
        if key.name != "graph":
            copy_field(out, key.name, value)
    for key, value in proto.graph.ListFields():
        if key.name != "initializer":
            copy_field(out.graph, key.name, value)
    for tensor in proto.graph.initializer:
        slot = layout.slots.get(tensor.name)
        if slot is None:
            out.graph.initializer.add().CopyFrom(tensor)
            continue
        header = out.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, doc_string=tensor.doc_string)
        header.dims.extend(tensor.dims)
        header.data_location = TensorProto.EXTERNAL
        for entry, text in (("location", layout.files[slot.file]), ("offset", slot.offset), ("length", slot.length)):
            header.external_data.add(key=entry, value=str(text))
    return out


class Meter:
    """Says how many bytes are written, how fast, and how long the rest takes: every now and then, and when all are."""

    def __init__(self, total: int, say: Progress | None) -> None:
        self._total, self._say, self._done = total, say, 0
        self._begin = self._last = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._say is None or (now - self._last < EVERY and self._done < self._total):
            return
        self._last = now
        rate = self._done / max(now - self._begin, 1e-3)
        left = (self._total - self._done) / max(rate, 1.0)
        clock = f"{left // 60:.0f} min {left % 60:.0f} s" if left >= 60 else f"{left:.0f} s"
        self._say(f"writing weights: {gigabytes(self._done)} of {gigabytes(self._total)}, {gigabytes(rate)}/s, {clock} left")


def write_data(proto: ModelProto, layout: Layout, file: int, path: str, pieces: Pieces | None, meter: Meter) -> None:
    """One data file.  Raises OnnxPruneError where a tensor's values are nowhere, or other than its shape says."""
    with open(path, "wb") as out:
        for tensor in proto.graph.initializer:
            slot = layout.slots.get(tensor.name)
            if slot is None or slot.file != file:
                continue
            out.write(bytes(slot.offset - out.tell()))
            for part in _values(tensor, pieces):
                out.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                meter.add(part.nbytes)
            if out.tell() != slot.offset + slot.length:
                found = out.tell() - slot.offset
                raise OnnxPruneError(f"tensor '{tensor.name}' has {found} bytes and its shape {list(tensor.dims)} takes {slot.length}", 4)


def _values(tensor: TensorProto, pieces: Pieces | None) -> Iterable[np.ndarray]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return [numpy_helper.to_array(tensor)]
    if pieces is None:
        raise OnnxPruneError(f"the values of tensor '{tensor.name}' stand in another file; write the model with `Result.save`")
    return pieces(tensor.name)

"""Read a framework's checkpoint into {parameter name: array}, in the order of the file, without the framework where that is possible."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import OnnxPruneError

Arrays = dict[str, np.ndarray]
# https://github.com/huggingface/safetensors, "Format"; names with "float" are of ml_dtypes
_SAFE = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_HEADER = 100_000_000  # bytes that a safetensors header may have, by its specification
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params", "ema")


def read_checkpoint(path: str | os.PathLike[str]) -> Arrays:
    """The arrays of a checkpoint by the names of its parameters.

    .npz and .safetensors need nothing; .pt, .pth, .ckpt and .bin need torch, .h5, .hdf5 and .keras need h5py.
    Raises OnnxPruneError where the file cannot be read, or what reads it is not installed.
    """
    file = Path(path)
    reader = next((read for suffixes, read in _READERS.items() if file.name.lower().endswith(suffixes)), None)
    if reader is None:
        known = ", ".join(suffix for suffixes in _READERS for suffix in suffixes)
        raise OnnxPruneError(f"{path}: a checkpoint is one of {known}; save it as .npz or .safetensors")
    if not file.is_file():
        raise OnnxPruneError(f"{path}: {'is a folder' if file.is_dir() else 'no such file'}; give the file of the checkpoint")
    if not os.access(file, os.R_OK):
        raise OnnxPruneError(f"{path}: may not be read; change its permissions")
    arrays = reader(file)
    if not arrays:
        raise OnnxPruneError(f"{path}: holds no arrays; save the model's state dict")
    return arrays


def _npz(file: Path) -> Arrays:
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise OnnxPruneError(f"{file}: not an .npz of arrays; write it with numpy.savez") from error


def _safetensors(file: Path) -> Arrays:
    """Eight bytes with the length of a JSON header, that header, and the data that it speaks of."""
    broken = OnnxPruneError(f"{file}: not a safetensors file, or cut short; save it again")
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_HEADER, file.stat().st_size - 8):
            raise broken
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise broken from error
    if not isinstance(header, dict):
        raise broken
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if file.stat().st_size > 8 + length else np.empty(0, np.uint8)
    arrays: Arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = (int(n) for n in entry["data_offsets"])
            kind, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
            if kind not in _SAFE:
                raise OnnxPruneError(f"{file}: '{name}' is of the type {kind}, which is not known; save it as float32")
            dtype = _dtype(_SAFE[kind])
            if not 0 <= first <= last <= len(data) or any(n < 0 for n in shape):
                raise broken
            arrays[name] = data[first:last].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise broken from error
    return dict(sorted(arrays.items(), key=lambda one: header[one[0]]["data_offsets"][0]))


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(import_module("ml_dtypes"), name) if "float" in name else name)


def _torch(file: Path) -> Arrays:
    try:
        torch = import_module("torch")
    except ImportError as error:
        raise OnnxPruneError(f"{file}: torch is needed to read it; install torch, or save it as .safetensors or .npz") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: zip, pickle, what weights_only refuses
        raise OnnxPruneError(f"{file}: torch cannot read it as weights only; save it with torch.save(model.state_dict(), …)") from error
    state = _state(content, torch.is_tensor)
    if state is None:
        raise OnnxPruneError(f"{file}: holds no state dict; save it with torch.save(model.state_dict(), …)")
    return {str(name): _array(torch, value) for name, value in state.items() if torch.is_tensor(value)}


def _state(content: object, tensor: Callable[[object], bool]) -> Mapping[Any, Any] | None:
    """The state dict in what was saved: itself, or under one of the names that training scripts give it."""
    if not isinstance(content, Mapping):
        return None
    if any(tensor(value) for value in content.values()) and not any(isinstance(content.get(key), Mapping) for key in _NESTED):
        return content
    return next((state for key in _NESTED if (state := _state(content.get(key), tensor)) is not None), None)


def _array(torch: Any, value: Any) -> np.ndarray:
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.dtype.is_floating_point and value.dtype not in (torch.float64, torch.float32, torch.float16):
        value = value.float()  # numpy has no bfloat16
    return np.asarray(value.numpy())


def _keras(file: Path) -> Arrays:
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise OnnxPruneError(f"{file}: h5py is needed to read it; install h5py, or save the weights as .npz") from error
    source: Any = file
    try:
        if file.suffix.lower() == ".keras":
            with zipfile.ZipFile(file) as archive:
                source = io.BytesIO(archive.read("model.weights.h5"))
        arrays: Arrays = {}

        def take(name: str, entry: Any) -> None:
            if isinstance(entry, h5py.Dataset) and entry.dtype.kind in "fiub":
                arrays[name] = np.asarray(entry[()])

        with h5py.File(source, "r") as content:
            content.visititems(take)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise OnnxPruneError(f"{file}: not a file of Keras weights, or cut short; write it with model.save_weights") from error
    return {name: array for name, array in arrays.items() if not name.startswith("optimizer/")}


_READERS: dict[tuple[str, ...], Callable[[Path], Arrays]] = {
    (".npz",): _npz,
    (".safetensors",): _safetensors,
    (".pt", ".pth", ".ckpt", ".bin"): _torch,
    (".h5", ".hdf5", ".keras"): _keras,
}

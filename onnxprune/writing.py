"""Write files whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import ModelProto

from onnxprune.errors import OnnxPruneError

LARGEST = 2**31 - 1  # bytes that one protobuf message may have
SMALL = 1024  # bytes below which a tensor stays in the model's own file


def check_target(path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Path:
    """Raises OnnxPruneError where a file could not be written there, before any work is done for it."""
    target = Path(path)
    if str(path) == "-":
        raise OnnxPruneError("'-': this is written to a file, not to standard output; give its name")
    if target.is_dir():
        raise OnnxPruneError(f"{target}: is a folder; give the name of the file to write")
    if not target.parent.is_dir():
        raise OnnxPruneError(f"{target}: the folder '{target.parent}' does not exist; make it first")
    if not os.access(target.parent, os.W_OK):
        raise OnnxPruneError(f"{target}: the folder '{target.parent}' may not be written to; choose another")
    if target.exists() and not target.is_file():
        raise OnnxPruneError(f"{target}: is no ordinary file, and would be replaced; give another name")
    if source is not None and target.exists() and Path(source).exists() and target.samefile(source):
        raise OnnxPruneError(f"{target}: is the input itself, which is never changed; give another name with -o")
    return target


def check_apart(*paths: str | os.PathLike[str] | None) -> None:
    """Raises OnnxPruneError where two of the files are one."""
    named = [Path(p).resolve() for p in paths if p and str(p) != "-"]
    for i, path in enumerate(named):
        if path in named[:i]:
            raise OnnxPruneError(f"{path.name}: is named twice; give each input and output a file of its own")


def write_model(proto: ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model; over 2 GiB its weights go to PATH.data beside it.  Raises OnnxPruneError where the disk does not take it."""
    target = Path(path)
    if proto.ByteSize() <= LARGEST:
        _replace({target: lambda temporary: onnx.save(proto, temporary)})
        return
    copy = ModelProto()
    copy.CopyFrom(proto)
    data = target.with_name(target.name + ".data")

    def weights(temporary: str) -> None:
        onnx.external_data_helper.convert_model_to_external_data(copy, location=Path(temporary).name, size_threshold=SMALL)
        onnx.external_data_helper.write_external_data_tensors(copy, str(target.parent))
        for tensor in copy.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name

    def graph(temporary: str) -> None:
        Path(temporary).write_bytes(copy.SerializeToString())

    _replace({data: weights, target: graph})


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a UTF-8 file."""
    _replace({Path(path): lambda temporary: Path(temporary).write_text(text, encoding="utf-8")})


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write a binary file."""
    _replace({Path(path): lambda temporary: Path(temporary).write_bytes(content)})


def _replace(jobs: dict[Path, Callable[[str], object]]) -> None:
    temporaries: dict[Path, str] = {}
    try:
        for target, job in jobs.items():
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            os.close(handle)
            temporaries[target] = name
            job(name)
            _sync(name)
        for target, name in temporaries.items():
            os.chmod(name, _mode(target))
            os.replace(name, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space or write elsewhere" if full else f"cannot be written ({error.strerror})"
        raise OnnxPruneError(f"{next(iter(jobs))}: {why}") from error
    finally:
        for name in temporaries.values():
            if os.path.exists(name):
                os.remove(name)


def _sync(name: str) -> None:
    with open(name, "rb") as file:
        os.fsync(file.fileno())


def _mode(target: Path) -> int:
    """The mode of the file that is replaced, or what a new file would get."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask

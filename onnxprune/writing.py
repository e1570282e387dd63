"""Write files whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto

from onnxprune.errors import OnnxPruneError
from onnxprune.external import gigabytes
from onnxprune.images import SUFFIXES
from onnxprune.streaming import Meter, Pieces, Progress, lay_out, length_of, skeleton, write_data

LARGEST = 2**31 - 1  # bytes that one protobuf message may have
TWICE = "is named twice; give each input and output a file of its own"
PAGES = (".html", ".htm")
SAMPLES = {".npz", ".npy", *SUFFIXES}


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


def check_page(path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Path:
    """As `check_target`, for a report: raises OnnxPruneError for a name of another kind of file too."""
    target = check_target(path, source)
    if target.suffix.lower() not in PAGES:
        raise OnnxPruneError(f"{target}: a report is an HTML page; give a name that ends in .html (a browser prints it as PDF)")
    return target


def check_apart(*paths: str | os.PathLike[str] | None) -> None:
    """Raises OnnxPruneError where two of the files are one."""
    named = [Path(p).resolve() for p in paths if p and str(p) != "-"]
    for i, path in enumerate(named):
        if path in named[:i]:
            raise OnnxPruneError(f"{path.name}: {TWICE}")


def check_samples_stay(samples: Iterable[str | os.PathLike[str] | None], *outputs: str | os.PathLike[str] | None) -> None:
    """Raises OnnxPruneError where an output would replace samples: a file of them, or one in a folder that is given."""
    for source in (Path(given).resolve() for given in samples if given is not None and Path(given).exists()):
        for path in (Path(output).resolve() for output in outputs if output and str(output) != "-"):
            if path == source:
                raise OnnxPruneError(f"{path.name}: {TWICE}")
            if path.is_file() and path.suffix.lower() in SAMPLES and path.is_relative_to(source):
                raise OnnxPruneError(f"{path.name}: holds samples, which are never changed; give the output a name of its own")


def write_model(
    proto: ModelProto,
    path: str | os.PathLike[str],
    *,
    pieces: Pieces | None = None,
    external: bool = False,
    shard_size: int | None = None,
    inputs: Iterable[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write a model; over 2 GiB, or where `external` says so, its weights go to PATH.data beside it.

    pieces: values that are not in the model; shard_size: bytes of each data file at most (then there are several); inputs: files
    that are not to be replaced.  Raises OnnxPruneError where the disk does not take it.
    """
    target = Path(path)
    missing = any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer)
    if fits(proto) and not (external or shard_size or missing):
        _replace({target: lambda temporary: onnx.save(proto, temporary)})
        return
    layout = lay_out(proto, target.name, shard_size)
    files = [target.with_name(name) for name in layout.files]
    check_free(files, inputs)
    _check_space(target, layout.size)
    meter = Meter(layout.size, progress)
    try:
        graph = skeleton(proto, layout).SerializeToString()
    except EncodeError as error:
        message = (
            f"{target}: holds over 2 GiB outside of its main graph's initializers, more than one file takes; export it with less there"
        )
        raise OnnxPruneError(message) from error

    def data(number: int) -> Callable[[str], object]:
        return lambda temporary: write_data(proto, layout, number, temporary, pieces, meter)

    jobs = {file: data(number) for number, file in enumerate(files)}
    _replace({**jobs, target: lambda temporary: Path(temporary).write_bytes(graph)})


def fits(proto: ModelProto) -> bool:
    """Whether a model is small enough for one message; protobuf does not say how large one is that is not."""
    return packed(proto) is not None


def packed(proto: ModelProto) -> bytes | None:
    """A model as one message, None where it is too large for one."""
    inside = (t for t in proto.graph.initializer if t.data_location != TensorProto.EXTERNAL)
    if sum(length_of(t) or 0 for t in inside if t.HasField("raw_data")) > LARGEST:
        return None
    try:
        message = proto.SerializeToString()
    except EncodeError:
        return None
    return message if len(message) <= LARGEST else None


def check_free(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises OnnxPruneError where a file to write is one of the inputs', or no ordinary file."""
    read = list(inputs)
    for target in targets:
        if target.exists() and not target.is_file():
            raise OnnxPruneError(f"{target}: is no ordinary file, and would be replaced; give another name with -o")
        if any(target.exists() and file.exists() and target.samefile(file) for file in read):
            raise OnnxPruneError(f"{target}: holds weights of the input, which is never changed; give another name with -o")


def _check_space(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OnnxPruneError(
            f"{target}: its weights take {gigabytes(size)}, the disk has {gigabytes(free)} free; free some space or write elsewhere"
        )


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a UTF-8 file."""
    _replace({Path(path): lambda temporary: Path(temporary).write_text(text, encoding="utf-8")})


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write a binary file."""
    _replace({Path(path): lambda temporary: Path(temporary).write_bytes(content)})


def _replace(jobs: dict[Path, Callable[[str], object]]) -> None:
    """All of the files or none: what stood there before comes back where not all can take their places."""
    temporaries: dict[Path, str] = {}
    before: dict[Path, str | None] = {}
    try:
        for target, job in jobs.items():
            name = str(target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp")
            temporaries[target] = name  # known before it is there, so that no interruption leaves it behind
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            job(name)
            _sync(name)
        for target, name in temporaries.items():
            os.chmod(name, _mode(target))
        for target, name in temporaries.items():
            before[target] = None
            if len(temporaries) > 1 and target.exists():
                before[target] = f"{name}.before"
                os.replace(target, f"{name}.before")
            os.replace(name, target)
    except BaseException as error:
        for target, old in before.items() if len(jobs) > 1 else ():
            if old is not None and os.path.exists(old):
                os.replace(old, target)
            elif old is None and not os.path.exists(temporaries[target]):
                target.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space or write elsewhere" if full else f"cannot be written ({error.strerror})"
        raise OnnxPruneError(f"{next(iter(jobs))}: {why}") from error
    finally:
        for name in (*temporaries.values(), *(old for old in before.values() if old is not None)):
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

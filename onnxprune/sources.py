"""Where samples stand: files and folders of arrays and of images, functions of the user's, each read as what the model takes."""

from __future__ import annotations

import tempfile
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import OnnxPruneError, OnnxPruneWarning
from onnxprune.images import SUFFIXES, Frame, Preprocess, check_channels, check_pictures, frame, read_image, scaled, turn, turned
from onnxprune.inputs import Input, Inputs, Layout, Shape, fitted
from onnxprune.noise import Noise
from onnxprune.samples import Arrays, Feeds, Piece, Source
from onnxprune.userfunctions import ENDS, said

MOST = 65536  # samples of a function, which may not end
_WRITERS = {".npz": "savez", ".npy": "save"}


@dataclass(frozen=True)
class Reader:
    """The user's arrays as what the model takes; warned: the inputs of which something was said already."""

    inputs: Inputs
    preprocess: Preprocess | None
    warned: set[str] = field(default_factory=set, compare=False)

    def views(self) -> dict[str, Frame]:
        """The inputs that the preprocess is for."""
        if self.preprocess is None:
            return {}
        found = ((i.name, frame(i, self.preprocess)) for i in self.inputs.all if i.real)
        return {name: view for name, view in found if view is not None}

    def check_preprocess(self, shapes: Mapping[str, Shape], where: str) -> None:
        if self.preprocess is None:
            return
        views = self.views()
        if not views:
            raise OnnxPruneError(f"{where}: --preprocess is for inputs that hold images; the model takes {self.inputs}")
        for view in views.values():
            check_channels(view, self.preprocess, where)
        size = self.preprocess.size
        for name in views.keys() & shapes.keys() if size else ():
            found = shapes[name][-2:] if views[name].first else shapes[name][-3:-1]
            if found != size:
                raise OnnxPruneError(
                    f"{where}: '{name}' has pictures of {list(found)}, not of the size in --preprocess; arrays stay as they are"
                )

    def layout(self, shapes: Mapping[str, Shape], where: str) -> Layout:
        """How arrays of these shapes make samples; raises OnnxPruneError where they do not fit."""
        held = self.held(shapes)
        self.check_preprocess(held, where)
        return self.inputs.layout(held, where)

    def held(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes of these arrays once the preprocess has turned them."""
        views = self.views()
        return {n: turned(s, views[n]) if n in views else s for n, s in shapes.items()}

    def piece(self, arrays: Arrays, where: str) -> Piece:
        """The arrays in the model's types, with the preprocess; raises OnnxPruneError where they do not fit."""
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        layout = self.layout({name: array.shape for name, array in arrays.items()}, where)
        views, found = self.views(), {}
        for entry in self.inputs.all:
            if entry.name not in arrays:
                continue
            array = arrays[entry.name]
            if entry.name in views and self.preprocess is not None:
                if array.dtype.kind not in "iu":
                    raise OnnxPruneError(
                        f"{where}: '{entry.name}' is {array.dtype}, and --preprocess is for pixels, integers 0 to 255;"
                        " give those, or leave it out where the numbers are the model's already"
                    )
                pixels = fitted(replace(entry, dtype=np.dtype(np.float32)), array, where)
                array = scaled(turn(pixels, views[entry.name]), views[entry.name], self.preprocess)
            elif entry.name not in self.warned and _like_pixels(entry, array):
                self.warned.add(entry.name)
                advice = "--preprocess (imagenet, tf, unit; raw says that they are right)" if frame(entry) else "its own floats"
                warnings.warn(
                    f"{where}: '{entry.name}' holds {array.dtype} up to {array.max()}, like pixels, and the model takes {entry}: they are "
                    f"fed as they are; where it takes other numbers give {advice}",
                    OnnxPruneWarning,
                    stacklevel=2,
                )
            found[entry.name] = fitted(entry, array, where)
        extras = {name: array for name, array in arrays.items() if name not in found}
        return Piece(found, extras, layout, where)


def _like_pixels(entry: Input, array: np.ndarray) -> bool:
    """Whether integers for a float input may be pixels: of 8 bits, or so large for an input that holds images."""
    if not entry.real or array.dtype.kind not in "iu" or not array.size:
        return False
    least, most = int(array.min()), int(array.max())
    return (array.dtype == np.uint8 and most > 1) or (least >= 0 and 127 < most <= 255 and frame(entry) is not None)


def checked(path: Path) -> Path:
    if not path.is_file():
        raise OnnxPruneError(f"{path}: no such file; give an .npz, a folder, module:function, noise or none")
    if path.suffix.lower() in SUFFIXES:
        raise OnnxPruneError(f"{path}: is one image; give the folder that it is in")
    return path


def read_file(path: Path, reader: Reader) -> Feeds:
    """The arrays of a file; what cannot be read is left out where it is no input's."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {_only(path, reader.inputs): content}
        found = {}
        with content:
            for name in content.files:
                try:
                    found[name] = content[name]
                except ValueError:  # Python objects
                    if any(name == i.name for i in reader.inputs.all):
                        raise
        return found
    except OnnxPruneError:
        raise
    except Exception as error:  # numpy and zipfile raise of every kind on bad files
        raise OnnxPruneError(f"{path}: {_unreadable(path)}") from error


def shapes_in(path: Path, inputs: Inputs) -> dict[str, Shape]:
    """The shapes of a file's arrays, from their headers."""
    try:
        if not zipfile.is_zipfile(path):
            return {_only(path, inputs): np.load(path, mmap_mode="r", allow_pickle=False).shape}
        found = {}
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    found[entry.removesuffix(".npy")] = read(file)[0]
        return found
    except OnnxPruneError:
        raise
    except Exception as error:
        raise OnnxPruneError(f"{path}: {_unreadable(path)}") from error


def _unreadable(path: Path) -> str:
    return f"not an .npz or .npy of numbers, or cut short; write it with numpy.{_WRITERS.get(path.suffix.lower(), 'savez')}"


def _only(path: Path, inputs: Inputs) -> str:
    """The one input that an array without a name is for."""
    if len(inputs.needed) != 1:
        raise OnnxPruneError(f"{path}: is one array, and the model takes {inputs}; write an .npz with these names")
    return inputs.needed[0].name


# --- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces end to end, in memory or opened one at a time; ends: how many samples there are up to the end of each."""

    ends: Sequence[int]
    open: Callable[[int], Piece]
    last: dict[int, Piece] = field(default_factory=dict)  # the one that was opened last

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def find(self, number: int) -> tuple[Piece, int]:
        place = bisect_right(self.ends, number)
        piece = self.last.get(place)
        if piece is None:
            piece = self.open(place)
            self.last.clear()
            self.last[place] = piece
        return piece, number - (self.ends[place - 1] if place else 0)


def held(pieces: Sequence[Piece]) -> Pieces:
    return Pieces(list(accumulate(p.layout.count for p in pieces)), pieces.__getitem__)


@dataclass(frozen=True)
class Files:
    """Opens the files of a folder; folder: a temporary one lives as long as this; name: of the function whose feeds they hold."""

    paths: Sequence[Path]
    reader: Reader
    folder: Any = None
    name: str = ""

    def __call__(self, place: int) -> Piece:
        path = self.paths[place]
        return self.reader.piece(read_file(path, self.reader), f"{self.name}, feed {place}" if self.name else str(path))


@dataclass(frozen=True)
class Pictures:
    """Opens the pictures of a folder."""

    paths: Sequence[Path]
    entry: Input
    view: Frame
    preprocess: Preprocess

    def __call__(self, place: int) -> Piece:
        path = self.paths[place]
        values = read_image(path, self.entry, self.view, self.preprocess)
        return Piece({self.entry.name: fitted(self.entry, values, str(path))}, {}, Layout({self.entry.name: 0}, 1), str(path))


@dataclass(frozen=True)
class Made:
    """Noise; count: of its samples."""

    noise: Noise
    count: int

    def __len__(self) -> int:
        return self.count

    def find(self, number: int) -> tuple[Piece, int]:
        feeds = self.noise.feed(number)
        layout = self.noise.inputs.layout({name: array.shape for name, array in feeds.items()}, "noise")
        return Piece(feeds, {}, layout, "noise"), 0


def listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of arrays and those of images in a folder: one of the two."""
    visible = sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    arrays = [p for p in visible if p.suffix.lower() in _WRITERS]
    images = [p for p in visible if p.suffix.lower() in SUFFIXES]
    if arrays and images:
        raise OnnxPruneError(f"{folder}: holds both arrays ({arrays[0].name}) and images ({images[0].name}); keep them in two folders")
    if not arrays and not images:
        raise OnnxPruneError(f"{folder}: holds no .npz, no .npy and no images")
    return arrays, images


def folder_of(folder: Path, reader: Reader) -> Source:
    arrays, images = listed(folder)
    if images:
        return Pieces(range(1, len(images) + 1), Pictures(images, *check_pictures(folder, reader.inputs, reader.preprocess)))
    counts = [reader.layout(shapes_in(path, reader.inputs), str(path)).count for path in arrays]
    return Pieces(list(accumulate(counts)), Files(arrays, reader))


def kept(function: Callable[[], Any], name: str, reader: Reader, limit: int | None) -> Source:
    """What a function yields, kept in a temporary folder: called again it might yield other samples, and they need not fit in memory."""
    folder = tempfile.TemporaryDirectory(prefix="onnxprune-")
    paths: list[Path] = []
    ends = [0]
    plain = replace(reader, preprocess=None)
    try:
        for feeds in yielded(function, name):
            where = f"{name}, feed {len(paths)}"
            if not isinstance(feeds, Mapping):
                raise OnnxPruneError(f"{where}: is a {type(feeds).__name__}; it must be a mapping of input names to arrays")
            piece = reader.piece(_arrays(feeds, where), where)
            paths.append(Path(folder.name) / f"{len(paths)}.npz")
            _write(paths[-1], {**{n: a for n, a in piece.extras.items() if a.dtype != object}, **piece.arrays})
            ends.append(ends[-1] + piece.layout.count)
            if ends[-1] >= (limit or MOST + 1):
                break
    except OSError as error:
        raise OnnxPruneError(f"{name}: its samples do not fit on the disk ({error.strerror}); take fewer") from error
    if limit is None and ends[-1] > MOST:
        raise OnnxPruneError(f"{name}: yields more than {MOST} samples; let it end, or limit them (--samples, for calibration)")
    found = Pieces(ends[1:], Files(paths, plain, folder, name))
    return found if limit is None else First(found, min(limit, ends[-1]))


@dataclass(frozen=True)
class First:
    """The first samples of a source."""

    source: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def find(self, number: int) -> tuple[Piece, int]:
        return self.source.find(number)


def yielded(function: Callable[[], Any], name: str) -> Any:
    """What a function of the user's yields, its exceptions in one line."""
    try:
        found = function()
        feeds = iter([found] if isinstance(found, Mapping) else found)
    except ENDS as error:
        raise OnnxPruneError(f"{name}: cannot be called for samples ({said(error)}); it takes no argument and yields feeds") from error
    while True:
        try:
            feed = next(feeds)
        except StopIteration:
            return
        except ENDS as error:
            raise OnnxPruneError(f"{name}: fails ({said(error)})") from error
        yield feed


def _write(path: Path, arrays: Arrays) -> None:
    """An .npz; savez does not take every name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                plain = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16
                np.lib.format.write_array(file, np.asarray(plain), allow_pickle=False)


def _arrays(feeds: Mapping[Any, Any], where: str) -> Feeds:
    try:
        return {str(name): np.asarray(array) for name, array in feeds.items()}
    except Exception as error:
        raise OnnxPruneError(f"{where}: holds what is no array ({said(error)})") from error

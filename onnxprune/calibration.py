"""Read samples for a model, from wherever the user has them.

Names and shapes are checked before any work is done; the numbers of folders are read when they are needed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.errors import OnnxPruneError, OnnxPruneWarning
from onnxprune.images import check_pictures, read_preprocess
from onnxprune.importer import Model
from onnxprune.inputs import Inputs, Shape, inputs_of
from onnxprune.noise import Noise
from onnxprune.samples import Arrays, Piece, Samples, Source, spread
from onnxprune.sources import Made, Pictures, Reader, checked, folder_of, held, kept, listed, read_file, shapes_in, yielded
from onnxprune.userfunctions import is_function, user_function

__all__ = ["Samples", "read_calibration"]

BATCH = 2  # samples at which a model's sizes are taken where it takes any number


def read_calibration(
    source: str | os.PathLike[str] | Arrays | Callable[[], Any],
    model: Model,
    *,
    preprocess: str | Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Samples:
    """Samples for a model.

    source: an .npz, or a mapping {input: array}; a folder of .npz and .npy, each of them some samples or one; a folder of images,
    which needs a `preprocess` (see `images.read_preprocess`) unless the model takes integers; `module:function`, or a function,
    that yields such mappings; `none`; or `noise` (256 samples of the program's own, 1024 of
    small inputs).  Names that are no inputs are left alone.
    A preprocess is for pixels: of images, of noise, and of integer arrays for float inputs that hold images.
    limit: the most samples, spread over the source (of a function: the first); deterministic for a seed.

    Raises OnnxPruneError where the source is missing, empty, or does not fit the model: at once for names and shapes, for files that
    cannot be read and for numbers when they are drawn.
    """
    if limit is not None and limit < 1:
        raise OnnxPruneError(f"the number of samples is {limit}; it is 1 at least")
    prepared = read_preprocess(preprocess)
    if source == "none":
        return Samples(0, "none", None, held([]), np.zeros(0, np.int64))
    reader = Reader(inputs_of(model.proto), prepared)
    found: Source
    if isinstance(source, Mapping):
        name, found = "the samples", held([_whole(reader, source, "the samples")])
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        found = _named(name, model, reader, limit, seed)
    else:
        name = getattr(source, "__name__", "the function")
        found = kept(source, name, reader, limit)
    if not len(found):
        raise OnnxPruneError(f"{name}: has no samples")
    chosen = spread(len(found), len(found) if limit is None else limit, seed)
    at_once = reader.inputs.batch
    if at_once is not None and 0 < len(chosen) < at_once and found.find(0)[0].layout.axes:
        raise OnnxPruneError(f"{name}: has {len(chosen)} samples, and the model takes {at_once} at once; give that many")
    return Samples(len(chosen), name, at_once, found, chosen)


def first_sizes(
    source: str | os.PathLike[str] | Arrays | Callable[[], Any],
    proto: ModelProto,
    preprocess: str | Mapping[str, Any] | None = None,
) -> dict[str, Shape]:
    """{input: shape} of the first sample of a source, or of BATCH such where the model takes any number; {} of noise and none.

    Raises OnnxPruneError where the source is missing, empty, or does not fit the model.
    """
    if source in ("noise", "none"):
        return {}
    reader = Reader(inputs_of(proto), read_preprocess(preprocess))
    where, arrays = os.fspath(source) if isinstance(source, str | os.PathLike) else "the samples", source
    if isinstance(arrays, str | os.PathLike) and is_function(where):
        arrays = user_function(where)
    if isinstance(arrays, str | os.PathLike):
        shapes = _first_shapes(Path(arrays), reader)
    else:
        feed = arrays if isinstance(arrays, Mapping) else next(yielded(arrays, where), None)
        if not isinstance(feed, Mapping):  # what is wrong is said when the samples are read
            return {}
        try:
            shapes = {str(name): np.shape(array) for name, array in feed.items()}
        except ValueError:  # rows of several lengths
            return {}
    shapes = reader.held(shapes)
    layout = reader.inputs.layout(shapes, where)
    sizes = {entry.name: shapes[entry.name] for entry in reader.inputs.all if entry.name in shapes}
    for name, axis in layout.axes.items():
        rest = shapes[name][axis if layout.bare else axis + 1 :]
        sizes[name] = (*shapes[name][:axis], reader.inputs.batch or BATCH, *rest)
    return sizes


def _first_shapes(path: Path, reader: Reader) -> dict[str, Shape]:
    """Of the arrays, before any preprocess, of a file or of the first file in a folder."""
    if not path.is_dir():
        return shapes_in(checked(path), reader.inputs)
    arrays, images = listed(path)
    if arrays:
        return shapes_in(arrays[0], reader.inputs)
    first = Pictures(images, *check_pictures(path, reader.inputs, reader.preprocess))(0)
    return {name: array.shape for name, array in first.arrays.items()}


def _named(name: str, model: Model, reader: Reader, limit: int | None, seed: int) -> Source:
    path = Path(name)
    if name == "noise":
        reader.check_preprocess(model.input_shapes, "noise")
        noise = Noise(model, reader.inputs, reader.preprocess, seed)
        return Made(noise, limit or noise.count)
    if is_function(name):
        return kept(user_function(name), name, reader, limit)
    if not name:
        raise OnnxPruneError("the samples have an empty name; give an .npz, a folder, module:function, noise or none")
    if path.is_dir():
        return folder_of(path, reader)
    return held([_whole(reader, read_file(checked(path), reader), name)])


def _whole(reader: Reader, arrays: Arrays, where: str) -> Piece:
    """A source that is one piece; a warning where it is one sample without an axis of samples."""
    piece = reader.piece(arrays, where)
    if piece.layout.bare:
        name, axis = next(iter(piece.layout.axes.items()))
        shape = list(piece.arrays[name].shape)
        taken = [*shape[:axis], 1, *shape[axis:]]
        warnings.warn(
            f"{where}: '{name}' {shape} lacks the axis that counts samples: taken as one sample, {taken}; stack several along it",
            OnnxPruneWarning,
            stacklevel=3,
        )
    return piece


def samples_of(arrays: Arrays, inputs: Inputs, where: str) -> Samples:
    """Samples from arrays in memory; raises OnnxPruneError, with `where` they are, if they do not fit."""
    piece = _whole(Reader(inputs, None), arrays, where)
    return Samples(piece.layout.count, where, inputs.batch, held([piece]), np.arange(piece.layout.count))

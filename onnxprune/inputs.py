"""What a model's inputs take: their types and sizes, and along which axis arrays for them count samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from onnxprune.errors import OnnxPruneError

Dims = tuple[int | str, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """dims: declared sizes, a symbol ("" without a name) where the file leaves one open; None where it says nothing.

    optional: the file holds a default for it.
    """

    name: str
    dtype: np.dtype
    dims: Dims | None
    optional: bool

    def __str__(self) -> str:
        sizes = "" if self.dims is None else f" [{', '.join(str(d) or '?' for d in self.dims)}]"
        return f"{self.dtype}{sizes}"

    @property
    def whole(self) -> bool:
        """Whether every wanted size is a number."""
        return self.dims is not None and all(isinstance(d, int) for d in self.dims)

    @property
    def real(self) -> bool:
        """Whether it takes floating-point numbers (bfloat16, foreign to numpy, is of its kind V)."""
        return self.dtype.kind in "fV"


@dataclass(frozen=True)
class Layout:
    """How arrays for the inputs make samples.

    axes: the axis that counts samples, for each input that has one; {} where the arrays are one sample and are fed as they are.
    bare: the arrays are one sample each and lack that axis.
    """

    axes: Mapping[str, int]
    count: int
    bare: bool = False


@dataclass(frozen=True)
class Inputs:
    """A model's inputs; axes: which axis of each counts samples; batch: how many samples the model takes at once, None for any number."""

    all: tuple[Input, ...]
    axes: Mapping[str, int]
    batch: int | None

    @property
    def needed(self) -> list[Input]:
        return [i for i in self.all if not i.optional]

    def __str__(self) -> str:
        return ", ".join(f"'{i.name}' {i}" for i in self.needed)

    def layout(self, shapes: Mapping[str, Shape], where: str) -> Layout:
        """How arrays of these shapes make samples; raises OnnxPruneError, with `where` they are, if they do not fit."""
        missing = [i.name for i in self.needed if i.name not in shapes]
        if missing:
            found = ", ".join(f"'{name}'" for name in shapes) or "no arrays"
            raise OnnxPruneError(f"{where}: has no '{missing[0]}', only {found}; the model takes {self}")
        given = [i for i in self.all if i.name in shapes]
        counted = [i for i in given if i.name in self.axes and i.dims is not None]
        bare = bool(counted) and all(len(shapes[i.name]) == len(i.dims or ()) - 1 for i in counted)
        for entry in given:
            self._check(entry, shapes[entry.name], bare, where)
        if bare:
            return Layout({i.name: self.axes[i.name] for i in given if i.name in self.axes}, 1, True)
        axes = {i.name: self.axes[i.name] for i in given if i.name in self.axes and len(shapes[i.name]) > self.axes[i.name]}
        counts = {name: shapes[name][axis] for name, axis in axes.items()}
        if 0 in counts.values():
            raise OnnxPruneError(f"{where}: '{next(n for n, c in counts.items() if not c)}' has no samples")
        if len(set(counts.values())) > 1:  # what is just as the model declares it goes along with every batch
            fixed = {i.name for i in given if i.whole and i.dims == shapes[i.name]}
            counts = {name: count for name, count in counts.items() if name not in fixed}
        symbols = {name: (next(i for i in given if i.name == name).dims or ("",))[axes[name]] for name in counts}
        for one, other in ((a, b) for a in counts for b in counts if counts[a] != counts[b]):
            if symbols[one] == symbols[other] or isinstance(symbols[one], int):
                raise OnnxPruneError(
                    f"{where}: '{one}' has {counts[one]} samples and '{other}' has {counts[other]}; all inputs need as many"
                )
            return Layout({}, 1)  # a graph's nodes and its edges, say
        tied = all(i.whole for i in given if i.name not in counts)
        if not counts or not tied:  # an input that changes from feed to feed cannot be shared by parts of this one
            return Layout({}, 1)
        return Layout({name: axes[name] for name in counts}, next(iter(counts.values())))

    def _check(self, entry: Input, shape: Shape, bare: bool, where: str) -> None:
        if entry.dims is None:
            return
        axis = self.axes.get(entry.name)
        dims = entry.dims if not bare or axis is None else entry.dims[:axis] + entry.dims[axis + 1 :]
        free = None if bare else axis
        fits = len(dims) == len(shape) and all(
            d == s or isinstance(d, str) or (i == free and s) for i, (d, s) in enumerate(zip(dims, shape, strict=True))
        )
        if not fits:
            raise OnnxPruneError(f"{where}: '{entry.name}' has the shape {list(shape)}; the model takes {entry}")


def inputs_of(proto: ModelProto) -> Inputs:
    """The inputs of a model; raises OnnxPruneError where one takes no numbers.

    Samples are counted by the first open axis 0 among the inputs, and by the axis of that symbol in the others (the middle one of
    a recurrent state); where no axis 0 is open, by axis 0 of the first input and of those with the same size.  Where no output has
    that many rows, or a multiple, the model takes one sample as it is (an image without an axis of batches).
    """
    defaults = {t.name for t in proto.graph.initializer}
    entries = tuple(_input(value, value.name in defaults) for value in proto.graph.input)
    ranked = [e for e in entries if e.dims and not e.optional]
    open_first = [e for e in entries if e.dims is None or (e.dims and isinstance(e.dims[0], str))]
    axes: dict[str, int] = {}
    if open_first:
        symbol = (open_first[0].dims or ("",))[0]
        for entry in entries:
            if entry in open_first:
                axes[entry.name] = 0
            elif symbol and symbol in (entry.dims or ()):
                axes[entry.name] = (entry.dims or ()).index(symbol)
        return Inputs(entries, axes, None)
    size = ranked[0].dims[0] if ranked and ranked[0].dims else None
    axes = {e.name: 0 for e in entries if e.dims and e.dims[0] == size}
    if isinstance(size, int) and size > 1 and _rows(proto) and all(rows % size for rows in _rows(proto)):
        return Inputs(entries, {}, None)
    return Inputs(entries, axes, size if isinstance(size, int) else None)


def _rows(proto: ModelProto) -> list[int]:
    """The sizes of the outputs along axis 0, 1 of those without axes; none where the file leaves one open."""
    found = []
    for value in proto.graph.output:
        kind = value.type.tensor_type
        dims = kind.shape.dim
        if not kind.HasField("shape") or (dims and dims[0].dim_value < 1):
            return []
        found.append(dims[0].dim_value if dims else 1)
    return found


def _input(value: ValueInfoProto, optional: bool) -> Input:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type in (0, 8, 14, 15):
        raise OnnxPruneError(f"the input '{value.name}' takes no tensor of numbers, so no samples can be given for it")
    dims = tuple(d.dim_value if d.dim_value > 0 else d.dim_param for d in kind.shape.dim) if kind.HasField("shape") else None
    return Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), dims, optional)


def fitted(entry: Input, array: np.ndarray, where: str) -> np.ndarray:
    """The array in the input's type, where that keeps every number: any floats as floats (rounded), integers as anything that holds them.

    Raises OnnxPruneError for other types, for numbers out of range and for NaN and infinity.
    """
    what = f"{where}: '{entry.name}'"
    if array.dtype.kind not in "biuf" and array.dtype != entry.dtype:
        raise OnnxPruneError(f"{what} holds {array.dtype}, no numbers; the model takes {entry}")
    if array.dtype.kind == "f" and not entry.real:
        raise OnnxPruneError(f"{what} is {array.dtype}; the model takes {entry}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise OnnxPruneError(f"{what} holds NaN or infinity; leave such samples out")
    if array.dtype == entry.dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(array, entry.dtype)
        kept = np.isfinite(cast).all() if array.dtype.kind == "f" else np.array_equal(cast.astype(array.dtype), array)
        if kept and array.dtype.kind in "iu" and cast.dtype.kind in "iu":  # of one width, there and back wraps round twice
            kept = np.array_equal(cast < 0, array < 0)
    if not kept:
        raise OnnxPruneError(f"{what} holds numbers that {entry.dtype} does not; the model takes {entry}")
    return cast

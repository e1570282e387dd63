"""Sizes that a file leaves open besides the batch: as given, else those of the first sample, else assumed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx import ModelProto, ValueInfoProto

from onnxprune.calibration import first_sizes
from onnxprune.errors import OnnxPruneError, OnnxPruneWarning
from onnxprune.importer import Model, Shape
from onnxprune.running import Arrays
from onnxprune.shapes import completed, left_open
from onnxprune.wording import open_in_words, shape_flag

Source = str | os.PathLike[str] | Arrays | Callable[[], Any]


def sized(
    proto: ModelProto,
    feeds: Arrays | None,
    given: Mapping[str, Shape] | None,
    sources: Sequence[Source | None],
    preprocess: str | Mapping[str, Any] | None = None,
) -> dict[str, Shape]:
    """The input shapes given, and where they and the feeds leave sizes open those of the first sample of the first source that has one.

    Later samples may have other sizes.  Raises OnnxPruneError where that source does not fit the model.
    """
    inputs, shapes = _inputs(proto), dict(given or {})
    for source in sources:
        if feeds is not None or not left_open(inputs, shapes):
            break
        if source is not None:
            shapes = completed(inputs, shapes, first_sizes(source, proto, preprocess))
    return shapes


def guessed(proto: ModelProto, feeds: Arrays | None, given: Mapping[str, Shape]) -> list[str]:
    """The inputs with sizes besides the batch that nothing says, so that they are only guessed."""
    return [] if feeds is not None else [value.name for value in left_open(_inputs(proto), given)]


def tell_guessed(model: Model, names: Sequence[str], source: object) -> None:
    """A warning where made-up samples have guessed sizes: what is chosen and fitted on them is for these sizes."""
    if source == "noise" and names:
        warnings.warn(
            f"the samples that 'noise' makes have a guessed size, {open_in_words(model, names)}, and all is chosen and fitted on them; "
            f"give the size in use, with {shape_flag(model, names)}",
            OnnxPruneWarning,
            stacklevel=3,
        )


def check_sized(proto: ModelProto, name: str, feeds: Arrays | None, given: Mapping[str, Shape]) -> None:
    """Raises OnnxPruneError where sizes besides the batch would only be assumed, which no latency can follow from."""
    assumed = guessed(proto, feeds, given)
    if assumed:
        dims = next(v for v in _inputs(proto) if v.name == assumed[0]).type.tensor_type.shape.dim
        sizes = ", ".join(str(d.dim_value or d.dim_param or "?") for d in dims)
        raise OnnxPruneError(
            f"{name}: the latency depends on the sizes of input '{assumed[0]}' [{sizes}], which the file leaves open; say them with "
            "--input-shape, --feeds or samples (--calibration)"
        )


def _inputs(proto: ModelProto) -> list[ValueInfoProto]:
    defaults = {t.name for t in proto.graph.initializer}
    return [v for v in proto.graph.input if v.name not in defaults]

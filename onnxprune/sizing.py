"""Sizes that a file leaves open besides the batch: as given, else those of the first sample, else assumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx import ModelProto, ValueInfoProto

from onnxprune.calibration import first_sizes
from onnxprune.errors import OnnxPruneError
from onnxprune.importer import Shape
from onnxprune.running import Arrays
from onnxprune.shapes import completed, left_open

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


def check_sized(proto: ModelProto, name: str, feeds: Arrays | None, given: Mapping[str, Shape]) -> None:
    """Raises OnnxPruneError where sizes besides the batch would only be assumed, which no latency can follow from."""
    assumed = [] if feeds is not None else left_open(_inputs(proto), given)
    if assumed:
        dims = assumed[0].type.tensor_type.shape.dim
        sizes = ", ".join(str(d.dim_value or d.dim_param or "?") for d in dims)
        raise OnnxPruneError(
            f"{name}: the latency depends on the sizes of input '{assumed[0].name}' [{sizes}], which the file leaves open; say them with "
            "--input-shape, --feeds or samples (--calibration)"
        )


def _inputs(proto: ModelProto) -> list[ValueInfoProto]:
    defaults = {t.name for t in proto.graph.initializer}
    return [v for v in proto.graph.input if v.name not in defaults]

"""The program's own terms in words for people who never read its code: why an axis is fixed, which sizes and batch figures are for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from onnxprune.errors import OnnxPruneError
from onnxprune.importer import Model
from onnxprune.inputs import inputs_of

_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"graph (input|output) '(.*)'", r"belongs to the model's \1 '\2', which keeps its size"),
        (r"kernel axis", "kernel size of a convolution"),
        (r"spatial axis", "height, width or length, not channels"),
        (r"no rule for operator (.*)", r"onnxprune has no rule for the operator \1"),
        (r"indexed by (.*)", r"looked up by number (\1)"),
        (r"its shape is unknown", "its shape is not known before the model runs"),
        (r"(a single unit|an axis of size 1|all of an axis)", "a single unit, which has to stay"),
        (r"no tensor of the file carries it", "no weight in the file has it"),
        (
            r"not provable: rounding alone changes the outputs by (\S+) standard deviations(.*)",
            r"cannot be proven: this model's outputs change by \1 standard deviations where its weights are only rounded otherwise\2",
        ),
        (
            r"the permutation test fails \(outputs change by (\S+) standard deviations\)(.*)",
            r"failed the test: with its units in another order the outputs change by \1 standard deviations\2",
        ),
        (
            r"cutting it is not the same as zeros in it \(outputs differ by (\S+) standard deviations\)",
            r"failed the test: leaving it out is not the same as zeros in it (outputs differ by \1 standard deviations)",
        ),
        (r"removing its units would fail the proof: (.*)", r"failed the test when its units were removed: \1"),
    )
)


def in_words(reason: str) -> str:
    """Why something is fixed or left whole, in plain words; reasons that are plain already as they are."""
    for pattern, words in _REASONS:
        if found := pattern.fullmatch(reason):
            return found.expand(words)
    return reason


def sizes_in_words(shapes: Mapping[str, Sequence[int]]) -> str:
    """`image 2×3×32×32, sr one number`."""
    return ", ".join(f"{name} {'×'.join(map(str, shape)) or 'one number'}" for name, shape in shapes.items())


def batch_of(model: Model) -> int | None:
    """How many samples the sizes that a model is run at hold; None where no axis counts samples."""
    try:
        axes = inputs_of(model.proto).axes
    except OnnxPruneError:  # an input that takes no numbers
        return None
    sizes = [model.input_shapes[name][axis] for name, axis in axes.items() if len(model.input_shapes.get(name, ())) > axis]
    return sizes[0] if sizes and len(set(sizes)) == 1 else None


def batch_in_words(batch: int | None) -> str:
    """` for a batch of 2`; "" for one sample, and where nothing counts samples."""
    return f" for a batch of {batch}" if batch is not None and batch != 1 else ""


def open_in_words(model: Model, names: Sequence[str] | None = None) -> str:
    """Inputs with sizes that the file leaves open besides the batch, at those used: `image 2×3×32×32 (h, w open in the file)`.

    names: only these inputs, which are then listed whether that can be seen in the file or not.
    """
    batch = {dim.dim_param for value in model.proto.graph.input for dim in list(value.type.tensor_type.shape.dim)[:1] if dim.dim_param}
    found = []
    for value in model.proto.graph.input:
        dims = list(value.type.tensor_type.shape.dim)
        free = [d.dim_param or "a size" for d in dims[1:] if not d.HasField("dim_value") and d.dim_param not in batch]
        if value.name not in model.input_shapes or not (free if names is None else value.name in names):
            continue
        which = f"{', '.join(dict.fromkeys(free))} open in the file" if free else "shape not in the file"
        found.append(f"{sizes_in_words({value.name: model.input_shapes[value.name]})} ({which})")
    return ", ".join(found)


def shape_flag(model: Model, names: Sequence[str]) -> str:
    """How to say the sizes of inputs: `--input-shape input=1,SIZE`, with a word in place of every open size."""
    flags = []
    for value in model.proto.graph.input:
        if value.name in names:
            dims = value.type.tensor_type.shape.dim
            sizes = ",".join("1" if i == 0 else str(d.dim_value) if d.dim_value else "SIZE" for i, d in enumerate(dims))
            flags.append(f"--input-shape {value.name}={sizes or '1,SIZE'}")
    return " ".join(flags)

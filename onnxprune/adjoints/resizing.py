"""Resize and Upsample: along each axis a product with a matrix, which the operator itself makes of unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import helper, numpy_helper

from onnxprune.errors import OnnxPruneError
from onnxprune.gradients import IR, NoRuleError, Site, Value, adjoint
from onnxprune.running import session

LARGEST = 1 << 22  # numbers of a matrix
ALONE = ("axes", "scales", "keep_aspect_ratio_policy")  # what an axis alone has no use for
WHOLE = (  # where nearest neighbours at a whole factor are blocks
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
)


@adjoint("Resize", "Upsample")
def resize(site: Site) -> Sequence[Value | None]:
    """Of nearest neighbours at a whole factor the sum of each block, else each axis through its matrix, the other way."""
    shape, out = site.shape(), site.out
    scales = _scales(site)
    where = ("asymmetric", "floor") if _old(site) else (_placed(site), site.text("nearest_mode", "round_prefer_floor"))
    even = all(n and o % n == 0 for n, o in zip(shape, out, strict=True)) and all(scale % 1 == 0 for scale in scales.values())
    if site.text("mode", "nearest") == "nearest" and where in WHOLE and even:
        apart = [n for o, n in zip(out, shape, strict=True) for n in (n, o // n)]
        return (site.g.reshape(apart).sum(list(range(1, 2 * len(shape), 2)), keepdims=False),)
    if _placed(site) == "tf_crop_and_resize" or site.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoRuleError
    back, last = site.g, len(shape) - 1
    for axis, (n, o) in enumerate(zip(shape, out, strict=True)):
        if n == o and scales.get(axis, 1.0) == 1.0:
            continue
        order = [*range(axis), *([last, *range(axis + 1, last)] if axis < last else []), axis]
        matrix = site.tape.constant(_matrix(site, n, o, scales.get(axis)))
        back = (back.transpose(order) @ matrix).transpose(order)
    return (back,)


def _old(site: Site) -> bool:
    """Scales are the second input, or an attribute."""
    return site.node.op_type == "Upsample" or site.opset < 11


def _placed(site: Site) -> str:
    return site.text("coordinate_transformation_mode", "half_pixel")


def _scales(site: Site) -> dict[int, float]:
    """What is given of them, by axis: sizes may be rounded."""
    position = 1 if _old(site) else 2
    given = site.array(position) if site.has(position) else np.asarray(site.get("scales", []))
    rank = len(site.shape())
    axes = [int(axis) % rank for axis in site.get("axes") or range(rank)]
    return dict(zip(axes, (float(scale) for scale in given.ravel()), strict=bool(given.size)))


def _matrix(site: Site, n: int, o: int, scale: float | None) -> np.ndarray:
    """What the operator makes of unit vectors along one axis, (o, n); scale: None where the size is given."""
    if not 0 < n * o <= LARGEST:
        raise NoRuleError
    kept = {name: value for name, value in site.attributes.items() if name not in ALONE}
    tensors: dict[str, np.ndarray] = {"x": np.eye(n, dtype=np.float32).reshape(1, n, 1, n)}
    tensors |= {"sizes": np.array([1, n, 1, o])} if scale is None else {"scales": np.array([1, 1, 1, scale], np.float32)}
    inputs = ["x", *([] if _old(site) else [""]), *(["", "sizes"] if scale is None else ["scales"])]
    if site.node.op_type == "Upsample" and site.opset < 9:
        inputs, kept = ["x"], kept | {"scales": [1.0, 1.0, 1.0, scale]}
    if site.opset == 11 and not _old(site):  # where neither may be left out
        tensors |= {"none": np.zeros(0, np.float32)}
        inputs = [inputs[0], *(name or "none" for name in inputs[1:])]
    node = helper.make_node(site.node.op_type, inputs, ["y"], **kept)
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name in inputs]
    graph = helper.make_graph([node], "one axis", [], [helper.make_empty_tensor_value_info("y")], stored)
    try:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", site.opset)], ir_version=IR)
        found = np.asarray(session(model).run(None, {})[0])
    except OnnxPruneError as error:
        raise NoRuleError from error
    if found.shape != (1, n, 1, o):
        raise NoRuleError
    return np.asarray(found.reshape(n, o).T)

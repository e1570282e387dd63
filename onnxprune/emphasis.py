"""How much each row of a layer counts in least squares, where a norm reads what the layer makes.

A norm divides each position by its own deviation over the channels, so an error there counts by as much less.  Transformers have
positions that are a hundred times larger than the others (massive activations, Sun et al. 2024, arXiv:2402.17762): unweighted,
they alone would be what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto

from onnxprune.folding import attributes
from onnxprune.importer import Model

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
PLAIN = ("Add", "Cast", "Div", "Identity", "Mul", "Pow", "ReduceMean", "Sub")  # what norms in parts and residual streams are made of
DEEPEST = 3


def emphasis(wanted: np.ndarray, channels: tuple[int, ...] = (0, 2)) -> np.ndarray:
    """Weights, 1 on average, of the positions of what a norm over the axes `channels` reads: one over their variance.

    float32, shaped as `wanted` (by default rows, (groups, n, out)) but 1 along the channels.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        variance = np.var(wanted, axis=channels, keepdims=True, dtype=np.float64)
        floor = max(1e-3 * float(np.median(variance)), 1e-30) if variance.size else 1.0
        weights = 1 / np.maximum(np.nan_to_num(variance, nan=np.inf), floor if np.isfinite(floor) else 1e-30)
    return np.asarray(weights * (weights.size / max(float(weights.sum()), 1e-30)), np.float32)


def normed(model: Model, readers: Mapping[str, Sequence[int]], value: str, axis: int) -> bool:
    """Whether a norm over an axis reads a value, and else but norms only residual Adds do; readers: the nodes that read each value."""
    nodes = [model.main[index] for index in readers.get(value, ())]
    if value in model.outputs or not all(node.op_type in (*NORMS, *PLAIN) for node in nodes):
        return False
    return any(_norms(model, readers, node, value, axis) for node in nodes)


def _norms(model: Model, readers: Mapping[str, Sequence[int]], node: NodeProto, value: str, axis: int, depth: int = 0) -> bool:
    """Whether a node is a norm, or leads to the mean over the axis that one starts with."""
    rank = len(model.shapes.get(value, ()))
    if node.op_type in NORMS:
        return node.input[0] == value and attributes(node).get("axis", -1) in (axis, axis - rank) and axis == rank - 1
    if node.op_type == "ReduceMean":
        return _axes(model, node, rank) == [axis] and bool(attributes(node).get("keepdims", 1))
    squares = node.op_type == "Mul" and set(node.input) == {value}
    if depth == DEEPEST or not (squares or node.op_type in ("Cast", "Identity", "Pow")):
        return False
    made = node.output[0]
    return any(_norms(model, readers, model.main[index], made, axis, depth + 1) for index in readers.get(made, ()))


def _axes(model: Model, node: NodeProto, rank: int) -> list[int]:
    given = attributes(node).get("axes")
    if given is None and len(node.input) > 1 and node.input[1] in model.tensors:
        given = model.array(node.input[1]).ravel().tolist()
    return sorted(int(axis) % rank for axis in given) if given else []

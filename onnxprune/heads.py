"""Which units are attention heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from onnxprune import layouts
from onnxprune.folding import attributes
from onnxprune.importer import Model
from onnxprune.layouts import Dim, find
from onnxprune.relations import Axis

_FUSED = {"Attention", "GroupQueryAttention", "MultiHeadAttention"}


def head_leaves(model: Model, dims: Mapping[Axis, Dim]) -> set[Dim]:
    """The leaves that are heads: outer factors of a product, over which a product of two activations is a batch.

    Queries times keys sum over the head size, one head at a time, so the axis of heads is a batch axis of that MatMul (an index
    of both operands and of the result of that Einsum), and elsewhere heads × head size make up the hidden axis.
    """
    batches: set[Dim] = set()
    constant = set(model.tensors)
    for node in model.nodes:
        if node.input and all(name in constant or not name for name in node.input):
            constant.update(node.output)
        elif node.op_type in _FUSED and node.input[0] in model.shapes:
            batches |= _outer(dims, [node.input[0], *node.output[:1]])
        elif node.op_type in ("MatMul", "Einsum") and not constant.intersection(node.input):
            for axis in _batch_axes(model, list(node.input), node.op_type, str(attributes(node).get("equation", ""))):
                if axis in dims:
                    batches |= layouts.leaves(layouts.resolve(dims[axis]))
    if not batches:
        return set()
    outer: set[Dim] = set()
    for dim in {find(d) for d in dims.values()}:
        for segment in layouts.resolve(dim):
            outer |= layouts.leaves([segment[:-1]]) if len(segment) > 1 else set()
    return batches & outer


def _outer(dims: Mapping[Axis, Dim], names: Iterable[str]) -> set[Dim]:
    """The outer factors of the last axes of 3-D values (batch, sequence, hidden), the second axes of 4-D ones."""
    found: set[Dim] = set()
    for name in names:
        rank = 1 + max((i for v, i in dims if v == name), default=-1)
        axis = dims.get((name, 1 if rank == 4 else rank - 1))
        if axis is not None:
            for segment in layouts.resolve(axis):
                found |= layouts.leaves([segment if rank == 4 else segment[:-1]])
    return found


def _batch_axes(model: Model, inputs: list[str], op: str, equation: str) -> Iterator[Axis]:
    """The axes of the first operand that the second and the result have too."""
    if op == "MatMul":
        yield from ((inputs[0], i) for i in range(len(model.shapes.get(inputs[0], ())) - 2))
        return
    terms, _, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if len(operands) == 2 and "." not in equation:
        shared = set(operands[0]) & set(operands[1]) & set(result)
        yield from ((inputs[0], i) for i, letter in enumerate(operands[0]) if letter in shared)

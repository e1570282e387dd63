"""Products of two activations that sum over a group's units, such as queries by keys over the dimensions of a head.

L·R is the sum over the units u of the outer products L_u R_uᵀ, so it reads units as a layer does whose weights are all ones: its
features are these terms, with the inner products ⟨L_u R_uᵀ, L_v R_vᵀ⟩ = (LᵀL)_uv (R Rᵀ)_uv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from onnxprune import layouts
from onnxprune.folding import attributes
from onnxprune.grouping import Group, Grouping
from onnxprune.importer import Model
from onnxprune.padding import kept_places
from onnxprune.running import Arrays


@dataclass(frozen=True)
class Product:
    """A MatMul left (…, n, d) · right (…, d, m) of the main graph, or an Einsum that is one with its axes in another order.

    node: its position; order: of the axes of either side in the file, to have them as above; logits: only a Softmax over m
    reads it, behind a scale and a mask, so that what is added to a whole row of its result changes nothing.
    """

    node: int
    left: str
    right: str
    order: tuple[tuple[int, ...], tuple[int, ...]]
    logits: bool

    @property
    def axis(self) -> int:
        """The axis of the left side that is summed over."""
        return self.order[0][-1]

    def turned(self, values: Mapping[str, np.ndarray], left: str, right: str) -> tuple[np.ndarray, np.ndarray]:
        """Both sides out of a model's values, as (…, n, d) and (…, d, m)."""
        return values[left].transpose(self.order[0]), values[right].transpose(self.order[1])

    def sides(self, left: np.ndarray, right: np.ndarray, feeds: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Values as (positions, n, d) and (positions, m, d): zero where a mask turns a place off, logits less their rows' means."""
        lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        one = np.broadcast_to(left, (*lead, *left.shape[-2:]))
        other = np.broadcast_to(np.swapaxes(right, -1, -2), (*lead, right.shape[-1], right.shape[-2]))
        rows, columns = (_live(feeds, lead, side.shape[-2]) for side in (one, other))
        if self.logits:
            count = other.shape[-2] if columns is None else np.maximum(columns.sum(axis=-2, keepdims=True), 1)
            other = other - (other if columns is None else other * columns).sum(axis=-2, keepdims=True) / count
        one = one if rows is None else one * rows
        other = other if columns is None else other * columns
        many = math.prod(lead)
        return one.reshape(many, *one.shape[-2:]), other.reshape(many, *other.shape[-2:])


def products(model: Model) -> list[Product]:
    """The products of two activations of the main graph, in its order."""
    found = []
    for index, node in enumerate(model.main):
        if node.op_type not in ("Einsum", "MatMul") or node.domain not in ("", "ai.onnx") or len(node.input) != 2:
            continue
        left, right = node.input
        ranks = [len(model.shapes.get(name, ())) for name in (left, right)]
        order = _order(str(attributes(node).get("equation", "")), ranks[0], ranks[1])
        if order is not None and left not in model.tensors and right not in model.tensors and left != right and min(ranks) > 2:
            found.append(Product(index, left, right, order[:2], order[2] and _is_logits(model, node.output[0])))
    return found


def _order(equation: str, left: int, right: int) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
    """The order of the axes of both sides (of a MatMul as they are), and whether m comes last; None where it is no such product."""
    if not equation:
        return tuple(range(left)), tuple(range(right)), True
    terms, arrow, result = equation.replace(" ", "").partition("->")
    one, comma, other = terms.partition(",")
    batch = [letter for letter in result if letter in one and letter in other]
    sides = [[letter for letter in one if letter not in other], [letter for letter in other if letter not in one]]
    inner = [letter for letter in one if letter in other and letter not in result]
    plain = arrow and comma and "." not in equation and len(set(one)) == len(one) == left and len(set(other)) == len(other) == right
    if not plain or [len(part) for part in (*sides, inner)] != [1, 1, 1] or not set(sides[0] + sides[1]) <= set(result):
        return None
    orders = [tuple(term.index(c) for c in (*batch, *ends)) for term, ends in ((one, sides[0] + inner), (other, inner + sides[1]))]
    return orders[0], orders[1], result[-1] == sides[1][0]


def summed(grouping: Grouping, product: Product, group: Group) -> np.ndarray | None:
    """(units, places) of each unit on the axis that a product sums over; None where it sums over none of them."""
    places = layouts.positions(grouping.layout((product.left, product.axis)))
    if not group.leaves or any(leaf not in places for leaf in group.leaves):
        return None
    found = [places[leaf] for leaf in group.leaves]
    return np.concatenate(found) if len({f.shape[1] for f in found}) == 1 else None


@dataclass
class Terms:
    """Sums over samples: gram (heads, d, d), the inner products of the terms; power: the product's squares; count: samples."""

    product: Product
    readers: dict[int, np.ndarray]
    gram: np.ndarray | None = field(default=None)
    count: int = 0

    def add(self, left: np.ndarray, right: np.ndarray, feeds: Arrays) -> None:
        """The heads are the last leading axis where there are several."""
        one, other = (np.asarray(side, np.float32) for side in self.product.sides(left, right, feeds))
        lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        heads = lead[-1] if len(lead) > 1 else 1
        inner = (one.transpose(0, 2, 1) @ one) * (other.transpose(0, 2, 1) @ other)
        inner = np.where(np.isfinite(inner).all(axis=(1, 2), keepdims=True), inner, np.float32(0))  # a sample that gives no numbers
        summed = inner.reshape(-1, heads, *inner.shape[-2:]).sum(axis=0, dtype=np.float64)
        if self.gram is not None and self.gram.shape != summed.shape:  # heads that differ from batch to batch are no heads
            self.gram, summed = self.gram.sum(axis=0, keepdims=True), summed.sum(axis=0, keepdims=True)
        self.gram = summed if self.gram is None else self.gram + summed
        self.count += len(inner) // heads


def gathered(grouping: Grouping) -> list[Terms]:
    """Empty sums for every product that sums over a group's units."""
    found = []
    for product in products(grouping.model):
        units = {g.id: f for g in grouping.groups if g.branch is None and (f := summed(grouping, product, g)) is not None}
        if units:
            found.append(Terms(product, units))
    return found


def _live(feeds: Arrays, lead: tuple[int, ...], length: int) -> np.ndarray | None:
    """(batch, 1 …, length, 1) bool of the places that a mask among the feeds leaves on."""
    kept = kept_places(feeds, lambda shape: shape == (lead[0], length))
    return None if kept is None else kept.reshape(lead[0], *[1] * (len(lead) - 1), length, 1)


def _is_logits(model: Model, value: str) -> bool:
    """Whether a Softmax over the last axis is all that reads a value, behind scales and masks."""
    rank = len(model.shapes.get(value, ()))
    for _ in range(8):
        readers = [node for node in model.nodes if value in node.input]
        if len(readers) != 1 or value in model.outputs:
            return False
        node = readers[0]
        if node.op_type == "Softmax":
            return bool(attributes(node).get("axis", -1 if model.opsets.get("ai.onnx", 1) >= 13 else 1) in (-1, rank - 1))
        if not (node.op_type in ("Add", "Sub", "Cast", "Identity") or _scales(model, node, value)):
            return False
        value = node.output[0]
    return False


def _scales(model: Model, node: NodeProto, value: str) -> bool:
    """Whether a node multiplies a value by a single number, or divides it."""
    if node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and node.input[0] != value):
        return False
    other = node.input[1 - list(node.input).index(value)]
    return other in model.shapes and math.prod(model.shapes[other]) == 1 and other != value

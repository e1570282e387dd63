"""Linear bottlenecks: layers A and B with nothing but linear maps along other axes in between, and queries and keys.

Of a group every place has to be in a block, once: then a matrix for each block may go into one side of it and its inverse into
the other (`turning`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import networkx as nx
import numpy as np

from onnxprune.carriers import MOVES, Carrier, carrier
from onnxprune.evidence import Evidence, features
from onnxprune.grouping import Group, Grouping
from onnxprune.importer import Model
from onnxprune.linear import Geometry, Linear, makes_along
from onnxprune.products import Product
from onnxprune.running import Arrays
from onnxprune.scopes import captured
from onnxprune.trunks import Channels

LINEAR = (*MOVES, "AveragePool", "Cast", "Concat", "Div", "Dropout", "Einsum", "GlobalAveragePool", "MatMul", "Mul")
FLOOR = 1e-6  # of the largest: smaller second moments count as that much


class Side(NamedTuple):
    """Places of a tensor, one a unit, along an axis."""

    tensor: str
    axis: int
    places: np.ndarray


@dataclass(frozen=True)
class Block:
    """One head: what is multiplied by R, what by R^-ᵀ, and the second moments of both (units, units)."""

    left: tuple[Side, ...]
    right: tuple[Side, ...]
    moments: tuple[np.ndarray, np.ndarray]

    @cached_property
    def rotation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """R, R^-ᵀ and the singular values, falling."""
        (root, inverse), (other, _) = (_roots(moment) for moment in self.moments)
        left, values, _ = np.linalg.svd(root @ other)
        values = np.maximum(values, FLOOR * max(float(values[0]), 1e-30))
        return inverse @ left * np.sqrt(values), root @ left / np.sqrt(values), values


def _roots(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root of a second moment and its inverse."""
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    roots = np.sqrt(np.maximum(values, FLOOR * max(float(values[-1]), 1e-30)))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def bottleneck(
    grouping: Grouping,
    evidence: Evidence,
    group: Group,
    layers: Mapping[str, Linear],
    mine: Sequence[Product],
    carrying: Channels,
    feeds: Arrays,
) -> list[Block] | None:
    """The blocks of a group, None where it is no linear bottleneck.

    layers: the model's, by their weights; mine: the products of two activations that sum over the group; carrying: the values that
    have its units; feeds: to probe with.
    """
    model = grouping.model
    summing = _of_product(grouping, evidence, group, mine[0], feeds) if len(mine) == 1 else []
    if len(mine) > 1 or summing is None:
        return None
    between = _of_layers(model, evidence, layers, group, carrying, summing, {product.node for product in mine})
    if between is None:
        return None
    blocks = [*summing, *between]
    ranks = {m.tensor: len(model.tensors[m.tensor].dims) for m in group.members}
    sides = [side for block in blocks for side in (*block.left, *block.right)]
    if not all(side.tensor in ranks and _reads(model, side.tensor) == 1 for side in sides):
        return None
    covered = Counter((side.tensor, side.axis % ranks[side.tensor], int(place)) for side in sides for place in side.places)
    places = Counter((m.tensor, m.axis, int(place)) for m in group.members for place in m.indices.ravel())
    finite = all(np.isfinite(moment).all() for block in blocks for moment in block.moments)
    return blocks if finite and covered == places and max(covered.values()) == 1 else None


def _reads(model: Model, tensor: str) -> int:
    return sum(list(node.input).count(tensor) + (tensor in captured(node)) for node in model.nodes) + (tensor in model.outputs)


def _of_layers(
    model: Model,
    evidence: Evidence,
    layers: Mapping[str, Linear],
    group: Group,
    carrying: Channels,
    summing: Collection[Block],
    ends: Collection[int],
) -> list[Block] | None:
    """The blocks of what one layer makes and others read behind linear maps, besides those of a product."""
    taken = {(side.tensor, int(place)) for block in summing for side in (*block.left, *block.right) for place in side.places}
    inner = set(ends)  # the products that sum over the group, then the layers
    makers: list[tuple[Linear, Geometry, np.ndarray]] = []
    readers: list[tuple[Linear, int, np.ndarray, np.ndarray]] = []
    for member in group.members:
        layer = layers.get(member.tensor)
        if layer is None:
            continue
        weight = model.array(layer.weight)
        shape = layer.geometry(model.main[layer.node], weight.ndim)
        read = features(layer, shape, weight, group)
        if shape.group > 1:
            return None
        inner |= {layer.node, layer.add}
        if read is not None and member.axis != makes_along(shape):
            readers.append((layer, member.axis, member.indices, read))
        elif read is None and member.axis == makes_along(shape):
            free = [column for column in member.indices.T if (layer.weight, int(column[0])) not in taken]
            makers += [(layer, shape, np.stack(free))] if free else []
        else:
            return None
    if not makers and not readers:
        return []
    if len(makers) != 1 or not readers or not _linear(model, carrying, inner):
        return None
    maker, shape, heads = makers[0]
    blocks = []
    for block, left in enumerate(heads):
        right, sigma, gamma = [], np.zeros((group.units, group.units)), np.zeros((group.units, group.units))
        for layer, axis, indices, read in readers:
            reading = evidence.layers.get(layer.weight)
            if reading is None or indices.shape[1] % len(heads) or read.shape[1] % indices.shape[1]:
                return None
            many = indices.shape[1] // len(heads)
            kernel = read.reshape(group.units, indices.shape[1], -1)
            for place in range(block * many, (block + 1) * many):
                right.append(Side(layer.weight, axis, indices[:, place]))
                for at in kernel[:, place].T:
                    sigma += reading.moment[0][np.ix_(at, at)]
                    columns = reading.matrix[0][:, at]
                    gamma += columns.T @ columns
        blocks.append(Block(_sides(maker, shape, left), tuple(right), (sigma, gamma)))
    return blocks


def _of_product(grouping: Grouping, evidence: Evidence, group: Group, product: Product, feeds: Arrays) -> list[Block] | None:
    """The blocks of what a product of two activations sums over."""
    model = grouping.model
    sides = [carrier(model, model.proto, value, feeds) for value in (product.left, product.right)]
    if sides[0] is None or sides[1] is None:
        return None
    both = (sides[0], sides[1])
    pairs = _pairs(product, both)
    if pairs is None:
        return None
    seconds = [_made(model, evidence, one.seat.layer, centred=bool(i) and product.logits) for i, one in enumerate(both)]
    if seconds[0] is None or seconds[1] is None:
        return None
    units = _units(group, both[0])
    if units is None:
        return None
    blocks = []
    for lefts, rights in pairs:
        numbers = units[list(lefts[0])]
        if sorted(numbers) != list(range(group.units)) or any((units[list(columns)] != numbers).any() for columns in lefts):
            return None
        order = np.argsort(numbers)
        ends: list[tuple[Side, ...]] = []
        moments = []
        for one, heads, second in zip(both, (lefts, rights), seconds, strict=True):
            found = [np.array(columns)[order] for columns in heads]
            ends.append(tuple(side for columns in found for side in _sides(one.seat.layer, one.seat.shape, columns)))
            moments.append(np.sum([second[np.ix_(columns, columns)] for columns in found if second is not None], axis=0))
        blocks.append(Block(ends[0], ends[1], (moments[0], moments[1])))
    return blocks


Heads = list[tuple[int, ...]]  # the columns of each


def _pairs(product: Product, sides: tuple[Carrier, Carrier]) -> list[tuple[Heads, Heads]] | None:
    """The heads of the left side that meet the same heads of the right side, by their columns in their layers."""
    left = sides[0].columns.transpose(product.order[0])
    right = np.swapaxes(sides[1].columns.transpose(product.order[1]), -1, -2)
    if (left != left[..., :1, :]).any() or (right != right[..., :1, :]).any():
        return None
    one, other = left[..., 0, :], right[..., 0, :]
    lead = np.broadcast_shapes(one.shape[:-1], other.shape[:-1])
    width = one.shape[-1]
    rows = np.concatenate([np.broadcast_to(array, (*lead, width)).reshape(-1, width) for array in (one, other)], axis=1)
    graph = nx.Graph()
    for row in np.unique(rows, axis=0):
        graph.add_edge((0, *row[:width].tolist()), (1, *row[width:].tolist()))
    parts = [sorted(part) for part in nx.connected_components(graph)]
    return [([head[1:] for head in part if head[0] == 0], [head[1:] for head in part if head[0] == 1]) for part in sorted(parts)]


def _units(group: Group, side: Carrier) -> np.ndarray | None:
    """(columns,) the unit that each output of a layer is, -1 for none."""
    axis = makes_along(side.seat.shape)
    for member in group.members:
        if member.tensor == side.seat.weight and member.axis == axis:
            found = np.full(int(max(member.indices.max(), side.columns.max())) + 1, -1)
            found[member.indices] = np.arange(group.units)[:, None]
            return found
    return None


def _made(model: Model, evidence: Evidence, layer: Linear, centred: bool) -> np.ndarray | None:
    """(columns, columns) second moment of what a layer makes; centred: without its mean, which a Softmax does not see of keys."""
    reading = evidence.layers.get(layer.weight)
    if reading is None or len(reading.matrix) != 1:
        return None
    matrix = reading.matrix[0]
    second = matrix @ reading.covariance[0] @ matrix.T
    if not centred:
        mean = matrix @ reading.mean[0] + (layer.beta * model.array(layer.bias).astype(np.float64).ravel() if layer.bias else 0.0)
        second = second + np.outer(mean, mean)
    return np.asarray(second)


# tensors


def _sides(layer: Linear, shape: Geometry, columns: np.ndarray) -> tuple[Side, ...]:
    """The places in a layer's weight and bias that make some of its outputs."""
    weight = Side(layer.weight, makes_along(shape), columns)
    return (weight, Side(layer.bias, -1, columns)) if layer.bias else (weight,)


def _linear(model: Model, carrying: Channels, ends: Collection[int]) -> bool:
    """Whether all that has a group's units, but for the layers at the `ends` and the Adds of their biases, may be linear in them."""
    for index, node in enumerate(model.main):
        inside = [name for name in node.input if name in carrying and name not in model.tensors]
        if index in ends or not (inside or carrying.keys() & set(captured(node)) or carrying.keys() & set(node.output)):
            continue
        if node.op_type not in (*LINEAR, "Shape") or captured(node) or (len(inside) > 1 and node.op_type != "Concat"):
            return False
    return not carrying.keys() & set(model.outputs)

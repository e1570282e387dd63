"""The vocabulary of the op rules: axes, the relations between them, and what must be mended when an axis shrinks.

A rule is a plain function that is given a `Site` (one node with its shapes) and says how the axes of the node's inputs and
outputs relate.  Axes of size above 1 that a rule does not mention are fixed: no rule can leave one free by forgetting it.
A rule that leaves out an axis of an output does not know what its node does: then all axes of the node are fixed.

    @rule("MyScale")                       # a custom operator: y[n, c, …] = x[n, c, …] * scale[c]
    def my_scale(site):
        site.same_all(site.x[0], site.y[0])
        site.same(site.x[0][1], site.x[1][0])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxprune.folding import Folded, attributes

Axis = tuple[str, int]
MOST_PIECES = 1024  # runs of consecutive indices in a constant Gather; beyond it the axes are fixed


@dataclass(frozen=True)
class Same:
    """Index i of a is index i of b."""

    a: Axis
    b: Axis


@dataclass(frozen=True)
class Concat:
    """The whole is the parts end to end."""

    whole: Axis
    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class Product:
    """The row-major product of the left axes is that of the right ones (a split or a merge)."""

    left: tuple[Axis, ...]
    right: tuple[Axis, ...]


@dataclass(frozen=True)
class Fixed:
    """The axis may not change."""

    axis: Axis
    reason: str


@dataclass(frozen=True)
class Statistics:
    """Pruning the axis changes a mean, maximum, variance or softmax that others read."""

    axis: Axis


Relation = Same | Concat | Product | Fixed | Statistics


@dataclass(frozen=True)
class Mend:
    """A number in a node that says the size of axes.

    where: an input's position or an attribute's name; amounts: {flat element: axes whose sizes it adds up}.  With `take`,
    the input holds indices into the axis take[0] that make the axes take[1:].  An element in `when` is mended
    wherever that axis changes (a bound counted from the end), others where their amount changes.  With `keep`, the missing
    attribute or input gets that value where the axis when[0] changes: a default that would follow the size; numbers only where
    one of the axes in `when` becomes 1.
    """

    node: int
    where: int | str
    amounts: Mapping[int, tuple[Axis, ...]] = field(default_factory=dict)
    when: Mapping[int, Axis] = field(default_factory=dict)
    take: tuple[Axis, ...] | None = None
    keep: float | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reorder:
    """The last node of a chain that only reorders an axis: it becomes Gather(source, order) where units of the axis go."""

    node: int
    source: Axis
    result: Axis
    order: np.ndarray


class Site:
    """One node as its rule sees it.

    x, y: the axes of every input and output, [] where one is missing or its rank unknown.
    """

    def __init__(
        self,
        index: int,
        node: NodeProto,
        opset: int,
        shapes: Mapping[str, tuple[int, ...]],
        folded: Mapping[str, Folded],
        outside: Sequence[str] = (),
    ) -> None:
        self.index, self.node, self.opset = index, node, opset
        self.shapes, self.folded = shapes, folded
        self.attributes: dict[str, Any] = attributes(node)
        self.x = [self.axes(name) for name in node.input]
        self.y = [self.axes(name) for name in node.output]
        self.outside = [axis for name in outside for axis in self.axes(name)]
        self.relations: list[Relation] = []
        self.mends: list[Mend | Reorder] = []
        self.sizes: dict[str, int] = {}

    # what the node is

    def axes(self, name: str) -> list[Axis]:
        return [(name, i) for i in range(len(self.shapes.get(name, ())))] if name else []

    def size(self, axis: Axis) -> int:
        return self.sizes[axis[0]] if axis[0] in self.sizes else self.shapes[axis[0]][axis[1]]

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self.attributes.get(name, default)

    def has(self, position: int) -> bool:
        return position < len(self.node.input) and self.node.input[position] != ""

    def number(self, position: int) -> np.ndarray | None:
        """An input's value where it is known before the model runs."""
        found = self.folded.get(self.node.input[position]) if self.has(position) else None
        return None if found is None else found.number

    def changing(self, position: int) -> np.ndarray:
        """Which elements of an input are other numbers for other input sizes, flat; empty where it is no number at all."""
        found = self.folded.get(self.node.input[position]) if self.has(position) else None
        return np.zeros(0, bool) if found is None else np.ravel(found.dynamic)

    def numbers(self, attribute: str, position: int) -> list[int] | None:
        """Integers given as an attribute in old opsets and as an input in newer ones."""
        if attribute in self.attributes:
            return [int(i) for i in self.attributes[attribute]]
        number = self.number(position)
        return None if number is None else [int(i) for i in np.ravel(number)]

    # what the rule says

    def new(self, size: int) -> Axis:
        """An axis that no value has: a factor or a part that only the rule knows."""
        name = f"{self.index}:{len(self.sizes)}"
        self.sizes[name] = size
        return (name, 0)

    def same(self, a: Axis, b: Axis) -> None:
        if self.size(a) != self.size(b):
            self.fixed([a, b], f"{self.node.op_type} joins axes of {self.size(a)} and {self.size(b)}")
        else:
            self.relations.append(Same(a, b))

    def same_all(self, a: Sequence[Axis], b: Sequence[Axis]) -> None:
        """Axis by axis, as far as both go; pairs of different sizes (broadcasting) are not related."""
        for one, other in zip(a, b, strict=False):
            if self.size(one) == self.size(other):
                self.relations.append(Same(one, other))

    def concat(self, whole: Axis, parts: Sequence[Axis]) -> None:
        parts = [p for p in parts if self.size(p)]
        if len(parts) == 1:
            self.same(whole, parts[0])
        else:
            self.relations.append(Concat(whole, tuple(parts)))

    def take(self, whole: Axis, part: Axis, indices: np.ndarray) -> None:
        """Index i of the part is index indices[i] of the whole."""
        size, name = self.size(whole), self.node.op_type
        picked = indices.astype(np.int64) % size
        if len(set(picked.tolist())) != len(picked):
            self.fixed([whole, part], f"{name} picks an index twice")
            return
        cuts = {0, size, *(int(i) for i in picked[:1]), *(int(i) + 1 for i in picked[-1:])}
        for i, j in itertools.pairwise(picked.tolist()):
            cuts |= {j, i + 1} if j != i + 1 else set()
        bounds = sorted(cuts)
        if len(bounds) > MOST_PIECES or not len(picked):
            self.fixed([whole, part], f"{name} of too many pieces")
            return
        pieces = {a: self.new(b - a) for a, b in itertools.pairwise(bounds)}
        self.concat(whole, list(pieces.values()))
        self.concat(part, [pieces[int(i)] for i in picked if int(i) in pieces])

    def product(self, left: Sequence[Axis], right: Sequence[Axis]) -> None:
        self.relations.append(Product(tuple(left), tuple(right)))

    def fixed(self, axes: Sequence[Axis], reason: str) -> None:
        self.relations.extend(Fixed(axis, reason) for axis in axes)

    def statistics(self, axes: Sequence[Axis]) -> None:
        self.relations.extend(Statistics(axis) for axis in axes)

    def mend(self, where: int | str, amounts: Mapping[int, Sequence[Axis]], when: Mapping[int, Axis] | None = None) -> None:
        self.mends.append(Mend(self.index, where, {k: tuple(v) for k, v in amounts.items()}, when or {}))

    def keep(self, attribute: str, value: float, axis: Axis) -> None:
        """A default that would follow the axis's size keeps its value."""
        self.mends.append(Mend(self.index, attribute, when={0: axis}, keep=value))

    def mentioned(self) -> set[Axis]:
        found: set[Axis] = set()
        for relation in self.relations:
            if isinstance(relation, Same):
                found |= {relation.a, relation.b}
            elif isinstance(relation, Concat):
                found |= {relation.whole, *relation.parts}
            elif isinstance(relation, Product):
                found |= {*relation.left, *relation.right}
            else:
                found.add(relation.axis)
        return found


Rule = Callable[[Site], None]
_RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register the rule of one or more operators ("Op", or "domain:Op" outside of ONNX's own domain)."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def rule_of(node: NodeProto) -> Rule | None:
    domain = node.domain if node.domain not in ("", "ai.onnx") else ""
    return _RULES.get(f"{domain}:{node.op_type}" if domain else node.op_type)

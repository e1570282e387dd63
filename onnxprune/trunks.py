"""Which groups are the channels of a residual stream that may be turned: y = xR instead of x, with nothing else changed.

A stream is turned by turning what writes to it and what reads it.  That is exact wherever all that happens in between treats
the channels alike: sums, moves along other axes, and norms, whose root mean square no rotation changes.  A walk over the graph
says for every value of the group how it depends on the stream; the first operator that does not fit ends it with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from onnx import NodeProto

from onnxprune import layouts
from onnxprune.folding import attributes
from onnxprune.grouping import Group, Grouping
from onnxprune.layouts import Dim, find
from onnxprune.liveness import Liveness
from onnxprune.rewiring import Use
from onnxprune.scopes import captured


class NotRotatableError(Exception):
    """Why a group cannot be turned."""


class Place(NamedTuple):
    """An axis of the tensor that a node reads."""

    use: Use
    axis: int


@dataclass(frozen=True)
class Stream:
    """A value of the group: z · scale + shift along its channels, where z turns with the stream.

    axis: where the channels are.  norm: the norm that made z.  writers: the places of all that was added up to it, if nothing
    else reads it, so that a scale may go into them.  square: it is z² instead, good for a mean over the channels only.
    """

    axis: int
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    norm: int | None = None
    writers: tuple[Place, ...] | None = None
    square: bool = False

    @property
    def plain(self) -> bool:
        return self.scale is None and self.shift is None and self.norm is None and not self.square


@dataclass
class Norm:
    """One division by a mean of squares over the channels.

    epsilon: the node whose attribute it is, or the use of the constant; gains: (use, offset) of the constants that scale what
    was divided (a gain is the constant plus the offset), else the places that read it.
    """

    epsilon: str | Use | None = None
    gains: list[tuple[Use, float]] = field(default_factory=list)
    readers: list[Place] = field(default_factory=list)


@dataclass(frozen=True)
class Signal:
    """A value from which the stream's principal components are taken: (value − shift) / scale, channels at `axis`.

    normed: a norm reads it.
    """

    value: str
    axis: int
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    normed: bool = True


@dataclass(frozen=True)
class Shift:
    """A constant that reaches a layer with its input, and goes into the layer's bias instead.

    weight, perm: the constant that is its weight, and how it is transposed on the way; axis: the one (after that) that is
    summed over; factor: of the bias; bias: where it is, or is to be.
    """

    weight: Use
    perm: tuple[int, ...] | None
    axis: int
    vector: np.ndarray
    factor: float
    bias: Use
    operator: str


@dataclass
class Trunk:
    """What has to change for a group to turn.

    places: along which the stream is written or read (a BIAS only where the layer gets one); scales: {place: what the channels
    are multiplied by first}; fills: {use: the number in place of a norm's scale or shift}; bases: {use: what is there before it
    turns}; centred: the rotation has to keep the direction of all ones.
    """

    group: Group
    places: dict[Place, None] = field(default_factory=dict)
    scales: dict[Place, np.ndarray] = field(default_factory=dict)
    fills: dict[Use, float] = field(default_factory=dict)
    bases: dict[Use, np.ndarray] = field(default_factory=dict)
    shifts: list[Shift] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    signals: dict[str, Signal] = field(default_factory=dict)
    centred: bool = False


Rule = Callable[["Walk", NodeProto], None]
Channels = Mapping[str, tuple[int, ...]]  # {value: its axes that are a group's channels}


def channels(grouping: Grouping) -> dict[Dim, Channels]:
    """{leaf: the values that have it, and where}; an axis of -1 is one of which the leaf is a part only."""
    found: dict[Dim, dict[str, tuple[int, ...]]] = {}
    known: dict[Dim, tuple[set[Dim], bool]] = {}
    for (name, axis), dim in grouping.dims.items():
        root = find(dim)
        if root not in known:
            layout = layouts.resolve(root)
            known[root] = layouts.leaves(layout), layout == [[root]]
        parts, whole = known[root]
        for leaf in parts if name in grouping.model.shapes else ():
            places = found.setdefault(leaf, {})
            places[name] = (*places.get(name, ()), axis if whole else -1)
    return {leaf: dict(places) for leaf, places in found.items()}


def trunk(grouping: Grouping, group: Group, where: Channels, rules: Mapping[str, Rule]) -> Trunk:
    """What turns a group; raises NotRotatableError with the reason where something cannot be turned with it."""
    if group.branch is not None or len(group.leaves) != 1:
        raise NotRotatableError("its channels are not one stream")
    parts = [name for name, axes in where.items() if -1 in axes]
    if parts:
        raise NotRotatableError(f"its channels are split, joined or repeated at '{parts[0]}'")
    walk = Walk(grouping, group, where)
    model = grouping.model
    main = {id(node) for node in model.main}
    for node in model.nodes:
        names = [name for name in (*node.input, *captured(node), *node.output) if name]
        if not any(walk.carries(name) for name in names):
            walk.follow(node)
            continue
        if id(node) not in main or captured(node):
            raise NotRotatableError(f"{said(node)} carries it into a subgraph")
        if node.op_type in ("Constant", "Shape", "Size"):
            continue
        if walk.constant(node):
            walk.constants.update(node.output)
            continue
        rule = rules.get(operator(node))
        if rule is None:
            raise NotRotatableError(f"{said(node)} treats its channels one by one")
        rule(walk, node)
        for name in node.output:
            if name and walk.carries(name) and name not in walk.streams:
                raise NotRotatableError(f"{said(node)} is not linear in its channels")
    for name in model.outputs:
        if walk.carries(name):
            raise NotRotatableError(f"the model's output '{name}' is it")
    return walk.finish()


def said(node: NodeProto) -> str:
    return f"'{node.name or node.output[0]}' ({node.op_type})"


def operator(node: NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"


def alike(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


MOVES = {"Identity", "Cast", "Dropout", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Slice", "Tile", "Split"}


class Walk:
    """What is known of the group's values so far; the op rules ask and tell."""

    def __init__(self, grouping: Grouping, group: Group, where: Channels) -> None:
        self.model, self.where, self.width = grouping.model, where, group.units
        self.live = Liveness(self.model)
        self.constants = set(self.model.tensors) - self.live.defaults
        self.streams: dict[str, Stream] = {}
        self.lengths: set[str] = set()  # constants of the group times a number that data makes
        self.norm_of: dict[str, int] = {}  # values without channels that a norm computes
        self.found = Trunk(group)
        self._read: dict[Place, np.ndarray | None] = {}

    # where the channels are

    def carries(self, name: str) -> tuple[int, ...]:
        """The axes of a value that are the group's channels."""
        return self.where.get(name, ())

    def axis(self, name: str) -> int:
        axes = self.carries(name)
        if len(axes) != 1:
            raise NotRotatableError(f"'{name}' has {len(axes)} axes of its channels")
        return axes[0]

    # constants on their way to where they are used

    def constant(self, node: NodeProto) -> bool:
        """Whether the node only moves constants of the group, or multiplies one by what has no channels."""
        op, inside = operator(node), [name for name in node.input if name and self.carries(name)]
        if not inside or any(name not in self.constants for name in inside):
            return False
        others = [name for name in node.input if name and name not in inside]
        if op in MOVES or op == "Concat":
            self.lengths.update(node.output if self.lengths.intersection(inside) else ())
            return True
        if op == "Mul" and len(inside) == 1:
            self.follow(node)
            if others[0] not in self.constants or inside[0] in self.lengths:
                self.lengths.update(node.output)
            return True
        number = self.model.folded.get(others[0]) if others else None
        return op == "Add" and number is not None and number.number.size == 1

    def roots(self, name: str, use: Use, axis: int) -> list[Place]:
        """The places in the file's tensors that are a constant's axis."""
        if name in self.model.tensors:
            return [Place(use, axis)]
        node = self.live.makers[name]
        if node.op_type == "Add":
            raise NotRotatableError(f"{said(node)} shifts a constant that it is read from")
        found = []
        for position, source in enumerate(node.input):
            if source and self.carries(source):
                before = list(attributes(node)["perm"])[axis] if "perm" in attributes(node) else self.axis(source)
                if node.op_type == "Transpose" and "perm" not in attributes(node):
                    before = len(self.model.shapes[source]) - 1 - axis
                found += self.roots(source, Use(node.output[0], position), before)
        return found

    def vector(self, name: str, use: Use, number: float) -> tuple[np.ndarray, Use, float]:
        """A constant with one number a channel, where it is and what is added to it; it becomes `number` everywhere."""
        offset = 0.0
        while name not in self.model.tensors:
            node = self.live.makers[name]
            inside = [i for i, source in enumerate(node.input) if source and self.carries(source)]
            if len(inside) != 1:
                raise NotRotatableError(f"'{name}' scales its channels and is computed from several constants")
            if node.op_type == "Mul" and node.input[1 - inside[0]] in self.model.folded:
                raise NotRotatableError(f"'{name}' scales its channels and is itself scaled")
            if node.op_type == "Add":
                offset += float(self.model.folded[node.input[1 - inside[0]]].number.ravel()[0])
            name, use = node.input[inside[0]], Use(node.output[0], inside[0])
        array = np.asarray(self.model.array(self.model.copies.get(name, name)), np.float64)
        if array.size != self.width:
            raise NotRotatableError(f"'{name}' scales or shifts its channels and is no vector")
        if use in self.found.fills and self.found.fills[use] != number - offset:
            raise NotRotatableError(f"'{name}' both scales and shifts its channels")
        self.found.fills[use] = number - offset
        return array.ravel() + offset, use, offset

    # what the rules tell

    def stream(self, name: str, node: NodeProto) -> Stream:
        """What is known of an input of the node; a constant that gets here is added to the stream."""
        if name in self.streams:
            known = self.streams[name]
            return known if self.live.reads[name] == 1 else replace(known, writers=None)
        if name in self.lengths:  # the number in every channel turns, as the rotation keeps that direction; the constant is its scale
            self.found.centred = True
            scale = self.vector(name, Use(node.output[0], list(node.input).index(name)), 1.0)[0]
            return Stream(self.axis(name), scale=scale, norm=self.norm_of.get(name))
        if name not in self.constants:
            raise NotRotatableError(f"{said(node)} reads '{name}', which is not written by linear layers")
        places = self.roots(name, Use(node.output[0], list(node.input).index(name)), self.axis(name))
        self.write(places)
        return Stream(self.axis(name), writers=tuple(places))

    def write(self, places: Sequence[Place]) -> None:
        self.found.places.update(dict.fromkeys(places))

    def read(self, places: Sequence[Place], stream: Stream) -> None:
        """A layer reads the stream along these places of its weight."""
        for place in places:
            before = self._read.setdefault(place, stream.scale)
            if not alike(before, stream.scale):
                raise NotRotatableError(f"one weight ('{place.use.node}') reads it after norms with different scales")
            if stream.scale is not None:
                self.found.scales[place] = stream.scale
            self.found.places[place] = None
        if stream.norm is not None:
            self.found.norms[stream.norm].readers += places

    def scale_writers(self, places: Sequence[Place], vector: np.ndarray) -> None:
        """A scale a channel, folded into what was added up."""
        for place in places:
            self.found.scales[place] = self.found.scales.get(place, np.ones(self.width)) * vector

    def signal(self, name: str, stream: Stream, normed: bool = True) -> None:
        self.found.signals.setdefault(name, Signal(name, stream.axis, stream.scale, stream.shift, normed))

    def norm(self, epsilon: str | Use | None = None) -> int:
        self.found.norms.append(Norm(epsilon))
        return len(self.found.norms) - 1

    def follow(self, node: NodeProto) -> None:
        """What is computed from a norm's statistics alone belongs to the norm."""
        norms = {self.norm_of[name] for name in node.input if name in self.norm_of}
        if len(norms) == 1:
            norm = norms.pop()
            self.norm_of.update(dict.fromkeys(node.output, norm))
            number = [i for i, name in enumerate(node.input) if name in self.model.tensors]
            if node.op_type == "Add" and number and self.found.norms[norm].epsilon is None:
                self.found.norms[norm].epsilon = Use(node.output[0], number[0])

    def finish(self) -> Trunk:
        found = self.found
        if not found.norms and not found.signals:
            raise NotRotatableError("no layer reads it")
        for use in found.fills:
            if any(place.use == use for place in found.places):
                raise NotRotatableError(f"the constant at '{use.node}' is both its scale and added to it")
        return found

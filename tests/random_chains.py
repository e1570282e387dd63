"""Random chains of operators that only move elements, between layers: reshapes, transposes, splits, gathers, strided slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto
from outside import Weight, build

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]
LARGEST = 3000  # elements


@dataclass
class Chain:
    """The text of the nodes so far, their constants, and the value at the end with its shape."""

    draw: Draw
    shape: Shape
    last: str = "x"
    text: list[str] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def axis(self, least: int = 2) -> int:
        """An axis behind the batch, the longest half of the time."""
        wide = [i for i in range(1, len(self.shape)) if self.shape[i] >= least]
        return self.pick(wide + [max(wide, key=lambda i: self.shape[i])] * len(wide)) if wide else 0

    def constant(self, value: Weight) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = value
        return name

    def weight(self, *shape: int) -> str:
        drawn = np.random.default_rng(len(self.weights)).uniform(0.3, 1, shape) * (-1) ** np.arange(shape[0]).reshape(
            -1, *[1] * (len(shape) - 1)
        )
        return self.constant((drawn / np.sqrt(shape[0])).astype(np.float32))

    def add(self, operator: str, *inputs: str, attributes: str = "", outputs: int = 1) -> list[str]:
        names = [f"v{len(self.text)}_{i}" for i in range(outputs)]
        self.text.append(f"{', '.join(names)} = {operator} {f'<{attributes}>' if attributes else ''} ({', '.join(inputs)})")
        return names

    def to(self, shape: Sequence[int], operator: str, *inputs: str, attributes: str = "") -> None:
        (self.last,) = self.add(operator, *inputs, attributes=attributes)
        self.shape = tuple(shape)

    def reshape(self, *shape: int, free: bool = False) -> None:
        """free: one size may be written as -1, or as 0 where it stays."""
        target = list(shape)
        if free and self.draw(st.booleans()):
            target[self.pick(range(len(shape)))] = -1
        zeros = [
            0 if s == t and i < len(self.shape) and self.shape[i] == s and i == 0 else t
            for i, (s, t) in enumerate(zip(shape, target, strict=True))
        ]
        self.to(shape, "Reshape", self.last, self.constant(zeros))

    def transpose(self, perm: Sequence[int]) -> None:
        self.to([self.shape[i] for i in perm], "Transpose", self.last, attributes=f"perm={list(perm)}")

    def layer(self, width: int) -> None:
        self.to([*self.shape[:-1], width], "MatMul", self.last, self.weight(self.shape[-1], width))


def divisors(number: int) -> list[int]:
    return [d for d in range(2, number) if number % d == 0]


# links of a chain


def split_axis(c: Chain) -> None:
    """An axis becomes two or three."""
    axis = c.axis(4)
    if len(c.shape) > 5 or not (cuts := divisors(c.shape[axis])):
        return
    outer = c.pick(cuts)
    c.reshape(*c.shape[:axis], outer, c.shape[axis] // outer, *c.shape[axis + 1 :], free=True)


def merge_axes(c: Chain) -> None:
    if len(c.shape) < 4:
        return
    axis = c.pick(range(1, len(c.shape) - 1))
    c.reshape(*c.shape[:axis], c.shape[axis] * c.shape[axis + 1], *c.shape[axis + 2 :], free=True)


def regroup(c: Chain) -> None:
    """Two neighbours are cut elsewhere."""
    if len(c.shape) < 3:
        return
    axis = c.pick(range(1, len(c.shape) - 1))
    many = c.shape[axis] * c.shape[axis + 1]
    if cuts := divisors(many):
        outer = c.pick(cuts)
        c.reshape(*c.shape[:axis], outer, many // outer, *c.shape[axis + 2 :], free=True)


def turn(c: Chain) -> None:
    c.transpose([0, *c.draw(st.permutations(range(1, len(c.shape))))])


def shuffle(c: Chain) -> None:
    """Reshape, transpose, reshape back."""
    axis = c.axis(4)
    if not (cuts := divisors(c.shape[axis])):
        return
    shape, outer, rank = c.shape, c.pick(cuts), len(c.shape) + 1
    c.reshape(*shape[:axis], outer, shape[axis] // outer, *shape[axis + 1 :])
    c.transpose([*range(axis), axis + 1, axis, *range(axis + 2, rank)])
    c.reshape(*shape, free=True)


def windows(c: Chain) -> None:
    """Two axes into windows that join the batch or the first axis, or two halves into the last axis (patch merging by reshapes)."""
    if len(c.shape) != 4 or c.shape[1] % 2 or c.shape[2] % 2:
        return
    n, h, w, d = c.shape
    c.reshape(n, h // 2, 2, w // 2, 2, d)
    if c.draw(st.booleans()):
        c.transpose([0, 1, 3, 2, 4, 5])
        c.reshape(n, h * w // 4, 4, d)
    else:
        c.transpose([0, 1, 3, *c.pick(([2, 4, 5], [4, 2, 5], [5, 2, 4]))])
        c.reshape(n, h // 2, w // 2, 4 * d)


def split_concat(c: Chain) -> None:
    """Cut, some parts activated, joined in another order or added."""
    axis = c.axis()
    size = c.shape[axis]
    if size < 2:
        return
    cuts = sorted(c.draw(st.lists(st.integers(1, size - 1), min_size=1, max_size=2, unique=True)))
    if c.draw(st.booleans()) and size % 2 == 0:
        cuts = [size // 2]
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    parts = c.add("Split", c.last, c.constant(sizes), attributes=f"axis={axis}", outputs=len(sizes))
    if len(set(sizes)) == 1 and c.draw(st.booleans()):
        c.to([*c.shape[:axis], sizes[0], *c.shape[axis + 1 :]], c.pick(("Sum", "Max")), *parts)
        return
    parts = [c.add(c.pick(("Relu", "Sigmoid", "Identity")), p)[0] for p in parts]
    c.to(c.shape, "Concat", *c.draw(st.permutations(parts)), attributes=f"axis={axis}")


def gather(c: Chain) -> None:
    """A permutation, some of the indices in any order, or some twice."""
    axis = c.axis()
    size = c.shape[axis]
    order = c.draw(st.permutations(range(size)))
    kind = c.pick(("all", "some", "twice", "run"))
    picked = {
        "all": order,
        "some": order[: max(2, size - 2)],
        "twice": [*order, order[0]],
        "run": [*range(size // 2, size), *range(size // 2)],
    }[kind]
    c.to([*c.shape[:axis], len(picked), *c.shape[axis + 1 :]], "Gather", c.last, c.constant(list(picked)), attributes=f"axis={axis}")


def strided(c: Chain) -> None:
    """Every second index, and the others after them or on another axis."""
    axis = c.axis(4)
    step = c.pick((2, 2, 3))
    if c.shape[axis] % step or len(c.shape) < 3:
        return
    parts = []
    for start in range(step):
        bounds = [c.constant([n]) for n in (start, 2**31, axis, step)]
        parts += c.add("Slice", c.last, *bounds)
    shape = list(c.shape)
    shape[axis] //= step
    other = c.pick([axis, len(shape) - 1])
    shape[other] *= step
    c.to(shape, "Concat", *parts, attributes=f"axis={other}")


def cut(c: Chain) -> None:
    axis = c.axis(4)
    size = c.shape[axis]
    if size < 4:
        return
    start = c.draw(st.integers(0, size // 2 - 1))
    end = c.draw(st.integers(start + 2, size))
    bounds = [c.constant([n]) for n in (c.pick((start, start - size)), end if end < size else 2**31, c.pick((axis, axis - len(c.shape))))]
    c.to([*c.shape[:axis], end - start, *c.shape[axis + 1 :]], "Slice", c.last, *bounds)


def pad(c: Chain) -> None:
    axis = c.axis()
    low, high = c.pick(((0, 1), (2, 0), (1, 2)))
    pads = [0] * (2 * len(c.shape))
    pads[axis], pads[axis + len(c.shape)] = low, high
    c.to([*c.shape[:axis], c.shape[axis] + low + high, *c.shape[axis + 1 :]], "Pad", c.last, c.constant(pads))


def scale(c: Chain) -> None:
    """A constant along one or two axes."""
    keep = {c.axis(), c.pick(range(1, len(c.shape)))}
    c.to(c.shape, c.pick(("Mul", "Add")), c.last, c.weight(*(s if i in keep else 1 for i, s in enumerate(c.shape))))


def pixels(c: Chain) -> None:
    """Channels to pixels, or back."""
    if len(c.shape) != 4:
        return
    n, d, h, w = c.shape
    if d % 4 == 0 and d > 4:
        mode = c.pick(("DCR", "CRD"))
        c.to((n, d // 4, 2 * h, 2 * w), "DepthToSpace", c.last, attributes=f'blocksize=2, mode="{mode}"')
    elif h % 2 == w % 2 == 0:
        c.to((n, 4 * d, h // 2, w // 2), "SpaceToDepth", c.last, attributes="blocksize=2")


def summed(c: Chain) -> None:
    if len(c.shape) < 4:
        return
    axis = c.axis()
    if axis:
        c.to([*c.shape[:axis], *c.shape[axis + 1 :]], "ReduceSum", c.last, c.constant([axis]), attributes="keepdims=0")


def repeated(c: Chain) -> None:
    axis = c.axis()
    times = [1] * len(c.shape)
    times[axis] = 2
    c.to([s * t for s, t in zip(c.shape, times, strict=True)], "Tile", c.last, c.constant(times))


def doubled(c: Chain) -> None:
    """The value and what became of it meet again."""
    before, shape = c.last, c.shape
    shuffle(c)
    if c.shape == shape and c.last != before:
        c.to(shape, c.pick(("Add", "Mul")), before, c.last)


def between(c: Chain) -> None:
    c.layer(c.pick((4, 6, 8, 12)))


LINKS: tuple[Callable[[Chain], None], ...] = (
    *(split_axis, split_axis, merge_axes, merge_axes, regroup, turn, turn, turn, shuffle, windows, split_concat, split_concat),
    *(gather, gather, strided, strided, cut, pad, scale, pixels, summed, repeated, doubled, between),
)


@st.composite
def chains(draw: Draw) -> ModelProto:
    """x -> layer -> 2 to 8 links -> a layer over the last axis, or over every axis but the batch."""
    rank = draw(st.sampled_from((3, 4, 4)))
    c = Chain(draw, (2, *(draw(st.sampled_from((2, 4, 6))) for _ in range(rank - 2)), 3))
    start = c.shape
    c.layer(draw(st.sampled_from((6, 8, 12, 16, 24))))
    for _ in range(draw(st.integers(2, 8))):
        if np.prod(c.shape) <= LARGEST:
            c.pick(LINKS)(c)
    for _ in range(draw(st.sampled_from((1, len(c.shape) - 1, len(c.shape) - 1)))):
        if len(c.shape) > 2:
            c.transpose([0, len(c.shape) - 1, *range(1, len(c.shape) - 1)])
        c.layer(3)
    sizes = [",".join(map(str, s)) for s in (start, c.shape)]
    text = " ".join([*c.text, f"y = Identity ({c.last})"])
    return build(f"float[{sizes[0]}] x", text, f"float[{sizes[1]}] y", c.weights, 17)

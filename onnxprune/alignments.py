"""How a parameter of a checkpoint lies in a tensor of the model: its axes in another order, merged, split, or scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

SAMPLE = 64  # elements that are looked at before all are
CLOSE = 1e-6  # relative to an element: exporters copy values, some by way of another float type
FOLDED = 1e-4  # relative to the largest of a channel: what folding a norm rounds
SUBNORMAL = 2.0**-24  # the step of float16 near zero
TINY = 1e-30  # channels that weight decay brought to zero keep no digits
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A place of a parameter: it is `tensor.reshape(view).transpose(order)`, reshaped to its own shape.

    With `axis`, it is instead a vector that was folded away: one number for each index of that axis of the tensor.
    """

    tensor: str
    view: Shape = ()
    order: Shape = ()
    axis: int | None = None


def orders(parameter: Shape, tensor: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Every (view, order) in which the tensor may hold the parameter, sizes of 1 left out; the same order of axes first."""
    own, other = (tuple(n for n in shape if n > 1) for shape in (parameter, tensor))
    seen: set[tuple[Shape, Shape]] = set()
    for order in permutations(range(len(other))):
        if _nests(tuple(other[i] for i in order), own):
            seen.add((other, order))
            yield other, order
    for order in permutations(range(len(own))):
        view = tuple(own[i] for i in order)
        found = (view, tuple(int(i) for i in np.argsort(order)))
        if found not in seen and _nests(view, other):
            yield found


def _nests(fine: Shape, coarse: Shape) -> bool:
    """Whether merging neighbours of one shape gives the other."""
    position = 0
    for size in coarse:
        product = 1
        while product < size and position < len(fine):
            product *= fine[position]
            position += 1
        if product != size:
            return False
    return position == len(fine)


def fitting(name: str, parameter: np.ndarray, tensor: np.ndarray) -> list[Link]:
    """The links under which the tensor has the parameter's values, up to the precision of their types."""
    if parameter.size != tensor.size or not parameter.size:
        return []
    flat = np.unique(np.linspace(0, parameter.size - 1, min(SAMPLE, parameter.size)).astype(np.int64))
    few = parameter[np.unravel_index(flat, parameter.shape)]
    found = []
    for view, order in orders(parameter.shape, tensor.shape):
        turned = tensor.reshape(view).transpose(order)
        if _close(few, turned[np.unravel_index(flat, turned.shape)]) and _close(parameter, turned.reshape(parameter.shape)):
            found.append(Link(name, view, order))
    return found


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype.kind in "iub" and other.dtype.kind in "iub":
        return bool(np.array_equal(one, other))
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b) - SUBNORMAL * (_unit(one) != _unit(other))
        close = apart <= max(CLOSE, _unit(one), _unit(other)) * np.maximum(np.abs(a), np.abs(b))
    return bool(np.all(close | (a == b)))


def _unit(array: np.ndarray) -> float:
    """What rounding to a narrow float type changes, relative; 0 for wider ones."""
    return {1: 2.0**-3, 2: 2.0**-8 if array.dtype.kind != "f" else 2.0**-11}.get(array.dtype.itemsize, 0.0)


def laid(parameter: np.ndarray, link: Link, shape: Shape) -> np.ndarray:
    """The parameter as it lies in the tensor."""
    turned = tuple(link.view[i] for i in link.order)
    found: np.ndarray = parameter.reshape(turned).transpose([int(i) for i in np.argsort(link.order)]).reshape(shape)
    return found


def scaled(name: str, parameter: np.ndarray, tensor: np.ndarray) -> list[tuple[Link, int, np.ndarray]]:
    """(link, axis, scale) where the tensor is the parameter times one number for each index of one of its axes.

    scale: (size of the axis,), NaN where it does not show.  An axis counts where its slices have two
    elements or more, and most are not zero.
    """
    found = []
    for view, order in orders(parameter.shape, tensor.shape):
        link = Link(name, view, order)
        own = laid(parameter, link, tensor.shape)
        for axis in (i for i, size in enumerate(tensor.shape) if 1 < size <= tensor.size // 2):
            left, right = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (own, tensor))
            probe = len(left) // 2
            if _scale(left[probe : probe + 1], right[probe : probe + 1]) is None:
                continue
            scale = _scale(left, right)
            if scale is not None and np.count_nonzero(np.nan_to_num(scale)) * 2 >= len(scale):
                found.append((link, axis, scale))
    return found


def _scale(left: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """(n,) numbers that make the rows of `left` those of `right`, NaN where a row is too small to say; None where there are none."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    size = np.abs(b).max(axis=1)
    power = (a * a).sum(axis=1)
    scale = np.divide((a * b).sum(axis=1), power, out=np.zeros(len(a)), where=power > 0)
    off = np.abs(a * scale[:, None] - b).max(axis=1)
    if np.any(off > max(FOLDED, 2 * _unit(right)) * size + TINY):
        return None
    return np.where((power > 0) & ((size == 0) | (size > TINY)), scale, np.nan)


def kept(link: Link, shape: Shape, tensor: Shape, masks: Sequence[np.ndarray | None]) -> tuple[np.ndarray | None, ...] | None:
    """Which indices of each of the parameter's axes stay, (size,) bool or None for all, by the masks of the tensor's axes.

    None where what stays of the parameter is not whole rows of it.
    """
    if link.axis is not None:
        return (masks[link.axis],)
    if all(mask is None for mask in masks):
        return (None,) * len(shape)
    return whole(elements(link, shape, tensor, masks))


def elements(link: Link, shape: Shape, tensor: Shape, masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Which elements of the parameter stay, bool of its shape."""
    alive = np.ones(tensor, bool)
    for axis, mask in enumerate(masks):
        if mask is not None:
            alive &= mask.reshape([-1 if i == axis else 1 for i in range(len(tensor))])
    found: np.ndarray = alive.reshape(link.view).transpose(link.order).reshape(shape)
    return found


def whole(alive: np.ndarray) -> tuple[np.ndarray | None, ...] | None:
    """The masks of the axes that leave just these elements; None where there are none."""
    masks: list[np.ndarray | None] = []
    every = np.ones(alive.shape, bool)
    for axis in range(alive.ndim):
        mask: np.ndarray = np.asarray(alive.any(axis=tuple(i for i in range(alive.ndim) if i != axis)))
        every &= mask.reshape([-1 if i == axis else 1 for i in range(alive.ndim)])
        masks.append(None if mask.all() else mask)
    return tuple(masks) if np.array_equal(every, alive) else None

"""Operators that only put numbers elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from onnxprune.gradients import NoRuleError, Site, Value, adjoint


@adjoint("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(site: Site) -> Sequence[Value | None]:
    return (site.g.reshape(site.shape()),)


@adjoint("Transpose")
def transpose(site: Site) -> Sequence[Value | None]:
    order = site.get("perm") or list(range(len(site.out)))[::-1]
    return (site.g.transpose([int(i) for i in np.argsort(order)]),)


@adjoint("Concat")
def concat(site: Site) -> Sequence[Value | None]:
    axis = site.get("axis", 1) % len(site.out)
    ends = np.cumsum([0, *(site.shape(i)[axis] for i in range(len(site.node.input)))]).tolist()
    return tuple(site.g.part(axis, start, end) for start, end in pairwise(ends))


@adjoint("Split")
def split(site: Site) -> Sequence[Value | None]:
    axis = site.get("axis", 0) % len(site.shape())
    parts = []
    for name, g in zip(site.node.output, site.gs, strict=True):
        if name not in site.shapes:
            raise NoRuleError
        parts.append(g if g is not None else site.tape.constant(np.zeros(site.shapes[name])))
    return (parts[0] if len(parts) == 1 else site.tape.op("Concat", *parts, axis=axis),)


@adjoint("Slice")
def slices(site: Site) -> Sequence[Value | None]:
    shape = site.shape()
    if site.opset < 10:
        starts, ends = site.get("starts"), site.get("ends")
        axes, steps = site.get("axes") or range(len(starts)), [1] * len(starts)
    else:
        starts, ends = (site.array(i).ravel().tolist() for i in (1, 2))
        axes = site.array(3).ravel().tolist() if site.has(3) else range(len(starts))
        steps = site.array(4).ravel().tolist() if site.has(4) else [1] * len(starts)
    back = site.g
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        n = shape[axis % len(shape)]
        end = None if step < 0 and end < -n else int(end)  # a slice to before the first
        back = _put(back, axis % len(shape), np.arange(n)[int(start) : end : int(step)], n)
    return (back,)


@adjoint("Gather")
def gather(site: Site) -> Sequence[Value | None]:
    shape = site.shape()
    axis, indices = site.get("axis", 0) % len(shape), site.array(1)
    flat = site.g.reshape([*shape[:axis], indices.size, *shape[axis + 1 :]])
    return (_put(flat, axis, indices.ravel() % shape[axis], shape[axis]),)


def _put(value: Value, axis: int, places: np.ndarray, size: int) -> Value:
    """What stands along an axis at these places of one that is larger, zeros elsewhere; each place at most once."""
    if np.array_equal(places, np.arange(size)):
        return value
    if len(np.unique(places)) < len(places):
        raise NoRuleError
    where = np.full(size, len(places))
    where[places] = np.arange(len(places))
    last = value.tape.op("Gather", value, value.tape.integers([0]), axis=axis) * 0.0
    longer = value.tape.op("Concat", value, last, axis=axis)
    return value.tape.op("Gather", longer, value.tape.integers(where.tolist()), axis=axis)


@adjoint("Pad")
def pad(site: Site) -> Sequence[Value | None]:
    """Of constants."""
    if site.get("mode", b"constant") not in (b"constant", "constant"):
        raise NoRuleError
    shape = site.shape()
    pads = site.get("pads") if site.opset < 11 else site.array(1).ravel().tolist()
    axes = [a % len(shape) for a in site.array(3).ravel().tolist()] if site.has(3) else list(range(len(shape)))
    if min(pads) < 0:
        raise NoRuleError
    back = site.g
    for axis, before in zip(axes, pads, strict=False):
        back = back.part(axis, before, before + shape[axis])
    return (back,)


@adjoint("Expand")
def expand(site: Site) -> Sequence[Value | None]:
    return (site.fit(0, site.g),)


@adjoint("Tile")
def tile(site: Site) -> Sequence[Value | None]:
    shape, repeats = site.shape(), site.array(1).ravel().tolist()
    apart = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    return (site.g.reshape(apart).sum(list(range(0, 2 * len(shape), 2)), keepdims=False).reshape(shape),)


@adjoint("DepthToSpace", "SpaceToDepth")
def depth(site: Site) -> Sequence[Value | None]:
    """Blocks become channels again: (n, b, b, c, h, w), or (n, c, b, b, h, w) for CRD, with the places at (h, b) and (w, b)."""
    block = int(site.get("blocksize"))
    deep, flat = (site.shape(), site.out) if site.node.op_type == "DepthToSpace" else (site.out, site.shape())
    n, channels, h, w = flat[0], flat[1], deep[2], deep[3]
    inner = site.get("mode", b"DCR") in (b"CRD", "CRD")
    if site.node.op_type == "DepthToSpace":
        apart = site.g.reshape([n, channels, h, block, w, block])
        return (apart.transpose([0, 1, 3, 5, 2, 4] if inner else [0, 3, 5, 1, 2, 4]).reshape(deep),)
    apart = site.g.reshape([n, block, block, channels, h, w])
    return (apart.transpose([0, 3, 4, 1, 5, 2]).reshape(flat),)

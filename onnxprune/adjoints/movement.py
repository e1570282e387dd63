"""Operators that only put numbers elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from onnxprune.gradients import NoRuleError, Site, Value, adjoint

TIMES = 8  # that a place may come, of those that are known


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
    shape, many = site.shape(), math.prod(site.shape(1))
    axis = site.get("axis", 0) % len(shape)
    flat = [*shape[:axis], many, *shape[axis + 1 :]]
    back = site.g.reshape(flat)
    if site.node.input[1] in site.arrays:
        return (_put(back, axis, site.array(1).ravel() % shape[axis], shape[axis]),)
    places = site.x[1].reshape([many if i == axis else 1 for i in range(len(shape))])
    return (_added(site, shape, site.tape.op("Expand", places, site.tape.integers(flat)), back, axis),)


@adjoint("GatherElements")
def gather_elements(site: Site) -> Sequence[Value | None]:
    return (_added(site, site.shape(), site.x[1], site.g, site.get("axis", 0)),)


@adjoint("GatherND")
def gather_nd(site: Site) -> Sequence[Value | None]:
    """Rows of all leading axes as one, by their place along it."""
    shape, indices = site.shape(), site.shape(1)
    if site.get("batch_dims", 0):
        raise NoRuleError
    lead, row = shape[: indices[-1]], math.prod(shape[indices[-1] :])
    each = site.tape.op("Mod", site.x[1], site.tape.integers(lead))  # what is less than 0 counts from the end
    steps = site.tape.integers(math.prod(lead[i + 1 :]) for i in range(len(lead)))
    flat = [math.prod(indices[:-1]), row]
    places = (each * steps).sum([len(indices) - 1], keepdims=False).reshape([-1, 1])
    places = site.tape.op("Expand", places, site.tape.integers(flat))
    return (_added(site, (math.prod(lead), row), places, site.g.reshape(flat), 0).reshape(shape),)


@adjoint("TopK")
def top_k(site: Site) -> Sequence[Value | None]:
    if len(site.node.output) < 2 or not site.node.output[1]:
        raise NoRuleError
    return (_added(site, site.shape(), site.y[1], site.g, site.get("axis", -1)),)


@adjoint("ScatterND", "ScatterElements")
def scatter(site: Site) -> Sequence[Value | None]:
    """What is put somewhere, in the place of what was there (where a place comes twice the result is not defined) or added to it."""
    kind, how = site.node.op_type, site.text("reduction", "none")
    if how not in ("none", "add"):
        raise NoRuleError
    where = {"axis": site.get("axis", 0)} if kind == "ScatterElements" else {}
    found = site.tape.op("GatherElements" if where else "GatherND", site.g, site.x[1], **where)
    if how == "add":
        return site.g, None, found
    nothing = site.tape.op("ConstantOfShape", site.tape.integers(site.shape(2)))
    return site.tape.op(kind, site.g, site.x[1], nothing, **where), None, found


def _added(site: Site, shape: Sequence[int], places: Value, value: Value, axis: int) -> Value:
    """Zeros, and at these places along an axis the sum of what comes there."""
    zeros = site.tape.op("ConstantOfShape", site.tape.integers(shape))
    return site.tape.op("ScatterElements", zeros, places, value, axis=axis, reduction="add")


def _put(value: Value, axis: int, places: np.ndarray, size: int) -> Value:
    """What stands along an axis at these places of one of that size, the sum where several do, zeros elsewhere."""
    if np.array_equal(places, np.arange(size)):
        return value
    last = value.tape.op("Gather", value, value.tape.integers([0]), axis=axis) * 0.0
    longer = value.tape.op("Concat", value, last, axis=axis)
    found: list[Value] = []
    left = np.arange(len(places))
    while len(left) or not found:
        if len(found) == TIMES:
            raise NoRuleError
        _, first = np.unique(places[left], return_index=True)
        where = np.full(size, len(places))
        where[places[left[first]]] = left[first]
        found.append(value.tape.op("Gather", longer, value.tape.integers(where.tolist()), axis=axis))
        left = np.delete(left, first)
    return found[0] if len(found) == 1 else value.tape.op("Sum", *found)


@adjoint("CumSum")
def cumsum(site: Site) -> Sequence[Value | None]:
    given = {"exclusive": site.get("exclusive", 0), "reverse": 1 - site.get("reverse", 0)}
    return (site.tape.op("CumSum", site.g, site.tape.constant(site.array(1).reshape(()), np.int64), **given),)


@adjoint("Pad")
def pad(site: Site) -> Sequence[Value | None]:
    """Where each number comes from along an axis, numpy says as well."""
    mode, shape = site.text("mode", "constant"), site.shape()
    pads = site.get("pads") if site.opset < 11 else site.array(1).ravel().tolist()
    axes = [a % len(shape) for a in site.array(3).ravel().tolist()] if site.has(3) else list(range(len(shape)))
    if min(pads) < 0 or mode not in ("constant", "reflect", "edge", "wrap"):
        raise NoRuleError
    back = site.g
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        n = shape[axis]
        if mode == "constant":
            back = back.part(axis, before, before + n)
        elif max(before, after) >= n:
            raise NoRuleError
        else:
            back = _put(back, axis, np.pad(np.arange(n), (before, after), mode=mode), n)  # type: ignore[call-overload]
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

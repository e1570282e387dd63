"""Operators that join, cut, pick and pad along an axis."""

from __future__ import annotations

import numpy as np

from onnxprune.relations import Axis, Mend, Site, rule


def others(site: Site, x: list[Axis], y: list[Axis], touched: set[int]) -> None:
    keep = [i for i in range(len(x)) if i not in touched]
    site.same_all([x[i] for i in keep], [y[i] for i in keep])


@rule("Concat")
def concat(site: Site) -> None:
    y = site.y[0]
    axis = site.get("axis", 1) % len(y)
    for x in site.x:
        others(site, x, y, {axis})
    site.concat(y[axis], [x[axis] for x in site.x])


@rule("Split")
def split(site: Site) -> None:
    x = site.x[0]
    axis = site.get("axis", 0) % len(x)
    for y in site.y:
        if y:
            others(site, x, y, {axis})
    if not all(site.y) or site.changing(1).any():
        site.fixed([x[axis]], "Split into unused parts, or of sizes given at run time")
        return
    parts = [y[axis] for y in site.y]
    site.concat(x[axis], parts)
    site.mend("split" if site.opset < 13 else 1, {i: [part] for i, part in enumerate(parts)})


@rule("Slice")
def slice_(site: Site) -> None:
    x, y = site.x[0], site.y[0]
    starts, ends = site.numbers("starts", 1), site.numbers("ends", 2)
    axes, steps = site.numbers("axes", 3), site.numbers("steps", 4)
    if starts is None or ends is None or (site.has(3) and axes is None) or (site.has(4) and steps is None):
        site.fixed([*x, *y], "Slice with bounds that depend on data")
        return
    axes = [a % len(x) for a in axes] if axes else list(range(len(starts)))
    steps = steps or [1] * len(starts)
    others(site, x, y, set(axes))
    old = "starts" in site.attributes
    first: dict[int, list[Axis]] = {}
    last: dict[int, list[Axis]] = {}
    when = {k: x[axis] for k, axis in enumerate(axes)}
    changing = [site.changing(position) for position in range(1, 5)]
    for k, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        if any(k < len(flags) and flags[k] for flags in changing):
            site.fixed([x[axis], y[axis]], "Slice with bounds given at run time")
            continue
        size, out = site.size(x[axis]), site.size(y[axis])
        begin = range(size)[slice(starts[k], ends[k], step)]
        if len(begin) != out or not out:
            site.fixed([x[axis], y[axis]], "Slice of sizes that do not agree")
        elif step == 1 and out == size:
            site.same(x[axis], y[axis])
        elif step == 1:
            before, after = site.new(begin[0]), site.new(size - begin[0] - out)
            site.concat(x[axis], [before, y[axis], after])
            first[k], last[k] = [before], [before, y[axis]]
        elif step > 1 and size % step == 0 and begin[0] < step and out == size // step:
            phase = site.new(step)
            site.fixed([phase], "step of Slice")
            site.product([x[axis]], [y[axis], phase])
            last[k] = [x[axis]]
        else:
            site.fixed([x[axis], y[axis]], f"Slice with step {step}")
    site.mend("starts" if old else 1, first, when)
    site.mend("ends" if old else 2, last, when)


@rule("Gather")
def gather(site: Site) -> None:
    """y = x[:axis] + indices' axes + x[axis+1:]; constant indices along one axis take pieces of it."""
    x, indices, y = site.x[0], site.x[1], site.y[0]
    axis = site.get("axis", 0) % len(x)
    after = axis + len(indices)
    site.same_all(x[:axis], y[:axis])
    site.same_all(x[axis + 1 :], y[after:])
    site.same_all(indices, y[axis:after])
    number = site.number(1) if not site.changing(1).any() else None
    if number is not None and len(indices) > 1 and np.array_equal(np.ravel(number), np.arange(site.size(x[axis]))):
        site.relations = [r for r in site.relations if not (hasattr(r, "a") and r.a in indices)]
        site.fixed(indices, "indices of Gather")
        site.product([x[axis]], y[axis:after])  # a reshape, as strided views are exported
        site.mends.append(Mend(site.index, 1, take=(x[axis], *y[axis:after])))
        return
    if number is None or len(indices) != 1 or site.size(x[axis]) == 1:
        site.fixed([x[axis]], "indexed by Gather")
        return
    site.relations = [r for r in site.relations if not (hasattr(r, "a") and r.a == indices[0])]
    site.fixed(indices, "indices of Gather")
    site.take(x[axis], y[axis], number)
    site.mends.append(Mend(site.index, 1, take=(x[axis], y[axis])))


@rule("GatherND")
def gather_nd(site: Site) -> None:
    """y = places of the indices (…, k) × the axes of x after the k indexed ones; batch axes come first."""
    x, indices, y, batch = site.x[0], site.x[1], site.y[0], site.get("batch_dims", 0)
    k = site.size(indices[-1])
    site.same_all(x[:batch], y[:batch])
    site.same_all(indices[:-1], y)
    site.fixed([indices[-1], *x[batch : batch + k]], "indexed by GatherND")
    site.same_all(x[batch + k :], y[len(indices) - 1 :])


@rule("ScatterND")
def scatter_nd(site: Site) -> None:
    """y = x with updates (places × the axes after the k indexed ones) at the indices (places, k)."""
    x, indices, updates, y = site.x[0], site.x[1], site.x[2], site.y[0]
    k = site.size(indices[-1])
    site.same_all(x, y)
    site.same_all(x[k:], updates[len(indices) - 1 :])
    number = site.number(1) if not site.changing(1).any() else None
    if number is not None and k == 1 and len(indices) == 2 and number.size:
        start, many = int(number.ravel()[0]), number.size
        whole = number.min() >= 0 and np.array_equal(number.ravel(), np.arange(start, start + many))
        if whole and site.get("reduction", "none") == "none":  # a run of an axis is replaced
            before, after = site.new(start), site.new(site.size(x[0]) - start - many)
            site.concat(x[0], [before, updates[0], after])
            site.fixed(indices, "indices of ScatterND")
            site.mends.append(Mend(site.index, 1, take=(x[0], updates[0])))
            return
    site.fixed([*x[:k], *indices, *updates[: len(indices) - 1]], "indexed by ScatterND")


@rule("Pad")
def pad(site: Site) -> None:
    """The padding on either side is a part of its own."""
    x, y = site.x[0], site.y[0]
    pads = site.numbers("pads" if "pads" in site.attributes else "paddings", 1)
    axes = site.number(3) if site.has(3) else None
    if pads is None or (site.has(3) and axes is None):
        site.fixed([*x, *y], "Pad by amounts that depend on data")
        return
    padded = [int(a) % len(x) for a in axes] if axes is not None else list(range(len(x)))
    others(site, x, y, set(padded))
    amounts: dict[int, list[Axis]] = {}
    changing = site.changing(1)
    for k, i in enumerate(padded):
        low, high = pads[k], pads[k + len(padded)]
        if changing.size and (changing[k] or changing[k + len(padded)]):
            site.fixed([x[i], y[i]], "padded by amounts given at run time")
        elif low == high == 0:
            site.same(x[i], y[i])
        elif site.get("mode", "constant") != "constant" or low < 0 or high < 0 or (i >= 2 and len(x) > 3):
            site.fixed([x[i], y[i]], "padded or cropped axis")
        else:
            before, after = site.new(low), site.new(high)
            site.concat(y[i], [before, x[i], after])
            amounts |= {k: [before], k + len(padded): [after]}
    site.mend(1 if "pads" not in site.attributes else "pads", amounts)

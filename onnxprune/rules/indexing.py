"""Operators that pick, place or order elements along one axis and leave the others alone."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.relations import Axis, Site, rule


def besides(site: Site, axis: int, *several: Sequence[Axis]) -> None:
    """The other axes of tensors of one rank are the same."""
    first = several[0]
    for axes in several[1:]:
        for i, (a, b) in enumerate(zip(first, axes, strict=True)):
            if i != axis % len(first):
                site.same(a, b)


def leading(site: Site, axis: int, whole: Sequence[Axis], part: Sequence[Axis]) -> None:
    """Beside the axis, the part holds the first indices of the whole (most often all of them)."""
    for i, (a, b) in enumerate(zip(whole, part, strict=True)):
        if i != axis % len(whole):
            site.concat(a, [b, site.new(site.size(a) - site.size(b))])


@rule("GatherElements")
def gather_elements(site: Site) -> None:
    """y[i][j] = x[index[i][j]][j] for axis 0: y has the shape of the indices."""
    x, indices, y = site.x[0], site.x[1], site.y[0]
    axis = site.get("axis", 0)
    leading(site, axis, x, indices)
    site.same_all(indices, y)
    site.fixed([x[axis]], "indexed by GatherElements")


@rule("ScatterElements", "Scatter")
def scatter_elements(site: Site) -> None:
    """y = x, but y[index[i][j]][j] = updates[i][j] for axis 0; where an index comes twice, the order of the updates may count."""
    x, indices, updates, y = site.x[0], site.x[1], site.x[2], site.y[0]
    axis = site.get("axis", 0)
    site.same_all(x, y)
    leading(site, axis, x, indices)
    site.same_all(indices, updates)
    site.fixed([x[axis], indices[axis]], "indexed by ScatterElements")


@rule("TensorScatter")
def tensor_scatter(site: Site) -> None:
    """A run of `axis` is replaced by the update, for each of the batch at a place of its own."""
    cache, update, y = site.x[0], site.x[1], site.y[0]
    axis = site.get("axis", -2)
    site.same_all(cache, y)
    besides(site, axis, cache, update)
    if site.has(2):
        site.same_all(site.x[2], cache[:1])
    site.fixed([cache[axis], update[axis]], "written at places given at run time")


@rule("Compress")
def compress(site: Site) -> None:
    """Data says which places along the axis stay."""
    x, y = site.x[0], site.y[0]
    if "axis" not in site.attributes:
        site.fixed([*x, *y, *site.x[1]], "Compress picks among all elements")
        return
    axis = site.get("axis")
    besides(site, axis, x, y)
    site.fixed([x[axis], y[axis], *site.x[1]], "picked by Compress")


@rule("OneHot")
def one_hot(site: Site) -> None:
    """A new axis of the classes."""
    x, y = site.x[0], site.y[0]
    axis = site.get("axis", -1) % len(y)
    site.same_all(x, y[:axis] + y[axis + 1 :])
    site.fixed([y[axis], *site.x[2]], "classes of OneHot")


@rule("ReverseSequence")
def reverse_sequence(site: Site) -> None:
    """The first lengths[n] places in time are reversed, for each of the batch."""
    x = site.x[0]
    site.same_all(x, site.y[0])
    site.same_all(site.x[1], [x[site.get("batch_axis", 1)]])
    site.fixed([x[site.get("time_axis", 0)]], "reversed by ReverseSequence")


@rule("Trilu", "com.microsoft:Trilu")
def triangle(site: Site) -> None:
    """The triangle of a matrix; leading axes pass."""
    x = site.x[0]
    site.same_all(x, site.y[0])
    site.fixed(x[-2:], "Trilu compares places")

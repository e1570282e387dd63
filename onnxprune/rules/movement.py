"""Operators that only move elements: reshapes, transposes, blocks to space, resizing, and what makes or reads shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxprune.relations import Axis, Mend, Site, rule


def blocks(site: Site, left: Sequence[Axis], right: Sequence[Axis]) -> Iterator[tuple[list[Axis], list[Axis]]]:
    """Cut two row-major shapes of equal size into the shortest runs of axes with equal products."""
    a, b = [x for x in left if site.size(x) != 1], [x for x in right if site.size(x) != 1]
    while a and b:
        one, two = [a.pop(0)], [b.pop(0)]
        m, n = site.size(one[0]), site.size(two[0])
        while m != n:
            if m < n and a:
                one.append(a.pop(0))
                m *= site.size(one[-1])
            elif n < m and b:
                two.append(b.pop(0))
                n *= site.size(two[-1])
            else:
                break
        yield one, two
    if a or b:
        yield a, b


def regroup(site: Site, left: Sequence[Axis], right: Sequence[Axis]) -> None:
    """The elements of left, in row-major order, are those of right."""
    if any(site.size(axis) == 0 for axis in (*left, *right)):
        site.fixed([*left, *right], "an empty tensor")
        return
    for one, two in blocks(site, left, right):
        if len(one) == len(two) == 1:
            site.same(one[0], two[0])
        elif one and two:
            site.product(one, two)
        else:
            site.fixed([*one, *two], f"{site.node.op_type} of sizes that do not agree")


@rule("Reshape")
def reshape(site: Site) -> None:
    regroup(site, site.x[0], site.y[0])
    target = site.numbers("shape", 1)
    if target is None:
        site.fixed([*site.x[0], *site.y[0]], "Reshape to a shape that depends on data")
        return
    amounts = {i: [axis] for i, (size, axis) in enumerate(zip(target, site.y[0], strict=False)) if size != -1}
    site.mend("shape" if "shape" in site.attributes else 1, amounts)


@rule("Flatten")
def flatten(site: Site) -> None:
    x, y = site.x[0], site.y[0]
    axis = site.get("axis", 1)
    axis = axis + len(x) if axis < 0 else axis
    regroup(site, x[:axis], y[:1])
    regroup(site, x[axis:], y[1:])


@rule("Squeeze", "Unsqueeze")
def squeeze(site: Site) -> None:
    """Axes of size 1 come and go; the others keep their order.  Squeeze without axes takes those that are 1 now, and no others."""
    x = site.x[0]
    regroup(site, x, site.y[0])
    if site.node.op_type == "Squeeze" and not site.has(1) and "axes" not in site.attributes:
        ones = tuple(i for i, axis in enumerate(x) if site.size(axis) == 1)
        when = {i: axis for i, axis in enumerate(x) if i not in ones}
        site.mends.append(Mend(site.index, "axes" if site.opset < 13 else 1, when=when, keep=ones))


@rule("Transpose")
def transpose(site: Site) -> None:
    x, y = site.x[0], site.y[0]
    site.same_all([x[i] for i in site.get("perm", range(len(x))[::-1])], y)


@rule("DepthToSpace")
def depth_to_space(site: Site) -> None:
    """(N, b·b·C, H, W) (CRD: C·b·b) -> (N, C, H·b, W·b)."""
    (n, c, h, w), y, b = site.x[0], site.y[0], site.get("blocksize")
    tall, wide = site.new(b), site.new(b)
    channels = [y[1], tall, wide] if site.get("mode", "DCR") == "CRD" else [tall, wide, y[1]]
    site.product([c], channels)
    site.same(n, y[0])
    site.fixed([tall, wide, h, w, y[2], y[3]], "spatial axis")


@rule("SpaceToDepth")
def space_to_depth(site: Site) -> None:
    """(N, C, H·b, W·b) -> (N, b·b·C, H, W)."""
    x, y, b = site.x[0], site.y[0], site.get("blocksize")
    tall, wide = site.new(b), site.new(b)
    site.product([y[1]], [tall, wide, x[1]])
    site.same(x[0], y[0])
    site.fixed([tall, wide, *x[2:], *y[2:]], "spatial axis")


@rule("Resize", "Upsample")
def resize(site: Site) -> None:
    """Axes that keep their size pass (a scale of 1), the others are interpolated."""
    x, y = site.x[0], site.y[0]
    shifts = site.get("coordinate_transformation_mode") in ("tf_crop_and_resize", "tf_half_pixel_for_nn")
    passing = {i for i in range(len(x)) if site.size(x[i]) == site.size(y[i]) and (i < 2 or not shifts)}
    site.same_all([x[i] for i in passing], [y[i] for i in passing])
    site.fixed([a for axes in (x, y) for i, a in enumerate(axes) if i not in passing], "spatial axis")
    if site.has(3):
        axes = site.get("axes") or range(len(y))
        site.mend(3, {k: [y[a]] for k, a in enumerate(axes)})


@rule("GridSample")
def grid_sample(site: Site) -> None:
    site.same_all(site.x[0][:2], site.y[0][:2])
    site.fixed([*site.x[0][2:], *site.x[1], *site.y[0][2:]], "spatial axis")


@rule("Shape", "Size")
def shape(site: Site) -> None:
    """What becomes of the numbers is followed by folding; the sizes themselves may change."""
    site.product(site.x[0], site.x[0]) if site.x[0] else None
    site.fixed([a for axes in site.y for a in axes], "a list of sizes")


@rule("ConstantOfShape")
def constant_of_shape(site: Site) -> None:
    """The same value everywhere: any index may go."""
    y = site.y[0]
    site.product(y, y) if y else None
    site.mend(0, {i: [axis] for i, axis in enumerate(y)})


@rule("Expand")
def expand(site: Site) -> None:
    """An axis of size 1 is repeated; the copies are alike, so any may go."""
    x, y = site.x[0], site.y[0]
    site.same_all(x[::-1], y[::-1])
    fresh = y[: len(y) - len(x)] + [b for a, b in zip(x[::-1], y[::-1], strict=False) if site.size(a) != site.size(b)]
    for axis in fresh:
        site.product([axis], [axis])
    target = site.number(1)
    if target is None:
        site.fixed([*x, *y], "Expand to a shape that depends on data")
        return
    aligned = y[len(y) - len(target) :]
    site.mend(1, {i: [a] for i, (a, size) in enumerate(zip(aligned, target, strict=True)) if size != 1})
    if site.folded[site.node.input[1]].dynamic.any():
        dynamic = site.folded[site.node.input[1]].dynamic
        site.fixed([a for a, flag in zip(aligned, dynamic, strict=True) if flag and a in fresh], "a size given at run time")


@rule("Tile")
def tile(site: Site) -> None:
    """y is x repeated end to end: repeats × x, outermost first."""
    x, y, repeats = site.x[0], site.y[0], site.number(1)
    if repeats is None:
        site.fixed([*x, *y], "Tile with repeats that depend on data")
        return
    mends = {}
    changing = site.changing(1)
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if changing[i]:
            site.fixed([a, b], "repeats given at run time")
        elif site.size(a) == site.size(b):
            site.same_all([a], [b])
        elif site.size(a) == 1:
            site.product([b], [b])
            mends[i] = [b]
        else:
            copies = site.new(site.size(b) // site.size(a))
            site.fixed([copies], "repeats of Tile")
            site.product([b], [copies, a])
    site.mend(1, mends)

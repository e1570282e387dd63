"""Layers with weights: convolutions, matrix products, Einsum."""

from __future__ import annotations

import string
from collections.abc import Sequence

from onnxprune.relations import Axis, Site, rule


def grouped(site: Site, whole: Axis, groups: Axis, inner: Axis) -> None:
    """whole = groups × inner, outermost first."""
    if site.size(groups) == 1:
        site.same(whole, inner)
    elif site.size(inner) == 1:
        site.same(whole, groups)
    else:
        site.product([whole], [groups, inner])


def windows(site: Site, image: Sequence[Axis], result: Sequence[Axis], kernel: Sequence[int]) -> None:
    """Batch axes pass, and spatial axes that a window of one place goes over place by place."""
    site.same_all(image[:1], result[:1])
    count = len(image) - 2
    strides, pads = site.get("strides") or [1] * count, site.get("pads") or [0] * 2 * count
    for i, (x, y) in enumerate(zip(image[2:], result[2:], strict=True)):
        alone = i < len(kernel) and kernel[i] == strides[i] == 1 and not pads[i] and not pads[i + count]
        if alone and site.size(x) == site.size(y):
            site.same(x, y)
        else:
            site.fixed([x, y], "spatial axis")


def convolution(site: Site, x: Sequence[Axis], w: Sequence[Axis], y: Sequence[Axis], bias: Sequence[Axis]) -> None:
    """x (N, groups·i, …), w (groups·o, i, kernel…), bias (groups·o) -> y (N, groups·o, …)."""
    groups = site.new(site.get("group", 1))
    outputs = site.new(site.size(w[0]) // site.size(groups))
    grouped(site, x[1], groups, w[1])
    grouped(site, w[0], groups, outputs)
    site.same_all([w[0], *bias], [y[1], y[1]])
    windows(site, x, y, [site.size(axis) for axis in w[2:]])
    site.fixed(w[2:], "kernel axis")
    if site.size(groups) > 1:
        site.mend("group", {0: [groups]})


@rule("Conv", "com.microsoft:FusedConv")
def conv(site: Site) -> None:
    convolution(site, site.x[0], site.x[1], site.y[0], site.x[2] if site.has(2) else [])
    if site.has(3):  # FusedConv adds a value of the output's shape
        site.same_all(site.x[3], site.y[0])


def channels_first(axes: Sequence[Axis]) -> list[Axis]:
    """(N, …, C) as (N, C, …)."""
    return [*axes[:1], *axes[-1:], *axes[1:-1]]


@rule("com.microsoft:NhwcConv", "com.microsoft:NhwcFusedConv")
def nhwc_conv(site: Site) -> None:
    """x and y (N, …, C), w as of Conv; NhwcFusedConv adds a value of the output's shape."""
    convolution(site, channels_first(site.x[0]), site.x[1], channels_first(site.y[0]), site.x[2] if site.has(2) else [])
    if site.has(3):
        site.same_all(site.x[3], site.y[0])


@rule("ConvTranspose")
def conv_transpose(site: Site) -> None:
    """x (N, groups·i, …), w (groups·i, o, kernel…), b (groups·o) -> y (N, groups·o, …)."""
    x, w, y = site.x[0], site.x[1], site.y[0]
    groups = site.new(site.get("group", 1))
    inputs = site.new(site.size(w[0]) // site.size(groups))
    site.same(x[1], w[0])
    grouped(site, w[0], groups, inputs)
    grouped(site, y[1], groups, w[1])
    if site.has(2):
        site.same(site.x[2][0], y[1])
    windows(site, x, y, [site.size(axis) for axis in w[2:]])
    site.fixed(w[2:], "kernel axis")
    if "output_shape" in site.attributes:
        site.fixed(y[2:], "an output_shape that says its size")
    if site.size(groups) > 1:
        site.mend("group", {0: [groups]})


@rule("DeformConv")
def deform_conv(site: Site) -> None:
    """A convolution with offset (N, offset_group·kernel·rank, …) and mask (N, offset_group·kernel, …) for runs of input channels."""
    x, w, y = site.x[0], site.x[1], site.y[0]
    convolution(site, x, w, y, site.x[3] if site.has(3) else [])
    site.fixed([*x[2:], *y[2:]], "spatial axis")  # offsets lead even a kernel of one place elsewhere
    for axes in (site.x[2], site.x[4] if site.has(4) else []):
        site.same_all(axes[:1], x[:1])
        site.fixed(axes[1:], "an offset for each place of the kernel")
    several = site.get("offset_group", 1)
    if several > 1:
        runs = site.new(several)
        site.fixed([runs], "offset groups")
        site.product([x[1]], [runs, site.new(site.size(x[1]) // several)])


def gemm_product(site: Site, a: Sequence[Axis], b: Sequence[Axis], c: Sequence[Axis], y: Sequence[Axis]) -> None:
    """A (M, K) or its transpose, B (K, N) or its transpose, C broadcast to (M, N)."""
    a = a[::-1] if site.get("transA", 0) else a
    b = b[::-1] if site.get("transB", 0) else b
    site.same(a[1], b[0])
    site.same(a[0], y[0])
    site.same(b[1], y[1])
    site.same_all(c[::-1], y[::-1])


@rule("Gemm", "com.microsoft:FusedGemm")
def gemm(site: Site) -> None:
    gemm_product(site, site.x[0], site.x[1], site.x[2] if site.has(2) else [], site.y[0])


def matrix_product(site: Site, a: Sequence[Axis], b: Sequence[Axis], result: Sequence[Axis]) -> None:
    """numpy.matmul: (…, M, K) by (…, K, N), leading axes broadcast; an operand of rank 1 is a row or a column."""
    y = list(result)
    site.same(a[-1], b[-2] if len(b) > 1 else b[-1])
    if len(b) > 1:
        site.same(b[-1], y.pop())
    if len(a) > 1:
        site.same(a[-2], y.pop())
    site.same_all(a[:-2][::-1], y[::-1])
    site.same_all(b[:-2][::-1], y[::-1])


@rule("MatMul", *(f"com.microsoft:{op}" for op in ("FusedMatMul", "TransposeMatMul")))
def matmul(site: Site) -> None:
    """The fused ones transpose what they are told to."""
    a, b = list(site.x[0]), list(site.x[1])
    for axes, flag in ((a, "transA"), (b, "transB")):
        if site.get(flag) and len(axes) > 1:
            axes[-2:] = axes[:-3:-1]
    if site.get("transBatchA") or site.get("transBatchB"):
        site.fixed([*a, *b, *site.y[0]], "transposed batch axes")
        return
    matrix_product(site, a, b, site.y[0])


@rule("Einsum")
def einsum(site: Site) -> None:
    """Axes of one letter are the same axis; an ellipsis stands for broadcast leading axes."""
    equation = str(site.get("equation", "")).replace(" ", "")
    terms, _, result = equation.partition("->")
    inputs = terms.split(",")
    if "->" not in equation:
        letters = sorted(c for c in set(terms) if c in string.ascii_letters and terms.count(c) == 1)
        result = ("..." if "..." in terms else "") + "".join(letters)
    homes: dict[str, list[Axis]] = {}
    for term, axes in zip([*inputs, result], [*site.x, site.y[0]], strict=True):
        front, dots, back = term.partition("...")
        middle = axes[len(front) : len(axes) - len(back)] if dots else []
        for letter, axis in [*zip(front, axes, strict=False), *zip(back, axes[len(axes) - len(back) :], strict=False)]:
            homes.setdefault(letter, []).append(axis)
        for i, axis in enumerate(middle[::-1]):
            homes.setdefault(f"...{i}", []).append(axis)
    for letter, axes in homes.items():
        wide = [a for a in axes if site.size(a) > 1]
        for axis in wide[1:]:
            site.same(wide[0], axis)
        if len(wide) == 1:
            summed = letter not in result and not letter.startswith("...")
            site.product(wide, wide) if summed else site.fixed(wide, "an Einsum axis that only one operand has")

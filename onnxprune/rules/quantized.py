"""Quantized operators: scales and zero points are one for the tensor or one for each index of an axis."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.relations import Axis, Site, rule
from onnxprune.rules.elementwise import broadcast
from onnxprune.rules.layers import convolution, gemm_product, matrix_product

MS = "com.microsoft"


def along(site: Site, positions: Sequence[int], axis: Axis) -> None:
    """Scales and zero points with a value for each index of the axis."""
    for position in positions:
        if site.has(position) and len(site.x[position]) == 1 and site.size(site.x[position][0]) == site.size(axis):
            site.same(site.x[position][0], axis)


@rule("DequantizeLinear", "QuantizeLinear", f"{MS}:DequantizeLinear", f"{MS}:QuantizeLinear")
def quantize(site: Site) -> None:
    """Elementwise, with parameters along `axis`."""
    x = site.x[0]
    site.same_all(x, site.y[0])
    if site.get("block_size", 0):
        site.fixed(x, "quantized in blocks")
        return
    axis = site.get("axis", 1)
    for parameter in site.x[1:]:
        if len(parameter) == 1 and site.size(parameter[0]) > 1:
            site.same(parameter[0], x[axis % len(x)])


@rule("DynamicQuantizeLinear")
def dynamic_quantize(site: Site) -> None:
    """The scale comes from the smallest and largest of all values."""
    site.same_all(site.x[0], site.y[0])
    site.statistics(site.x[0])


@rule("QLinearConv")
def qlinear_conv(site: Site) -> None:
    """x, its scale and zero point, w, its (a value an output channel), y's, b."""
    w = site.x[3]
    convolution(site, site.x[0], w, site.y[0], site.x[8] if site.has(8) else [])
    along(site, (4, 5), w[0])


@rule("ConvInteger")
def conv_integer(site: Site) -> None:
    """x, w and their zero points (w's a value an output channel)."""
    convolution(site, site.x[0], site.x[1], site.y[0], [])
    along(site, (3,), site.x[1][0])


@rule("QLinearMatMul")
def qlinear_matmul(site: Site) -> None:
    """a and b, each with scale and zero point; b's may be a value a column."""
    matrix_product(site, site.x[0], site.x[3], site.y[0])
    along(site, (4, 5), site.x[3][-1])


@rule("MatMulInteger", f"{MS}:MatMulIntegerToFloat", f"{MS}:DynamicQuantizeMatMul")
def matmul_integer(site: Site) -> None:
    """a and b, then what belongs to b's columns: zero points, scales and a bias; a float a is quantized by its extremes."""
    matrix_product(site, site.x[0], site.x[1], site.y[0])
    along(site, range(2, len(site.x)), site.x[1][-1])
    if site.node.op_type == "DynamicQuantizeMatMul":
        site.statistics(site.x[0])


@rule(f"{MS}:QGemm")
def qgemm(site: Site) -> None:
    """A and B with scale and zero point each (B's may be a value a column), C, then Y's."""
    gemm_product(site, site.x[0], site.x[3], site.x[6] if site.has(6) else [], site.y[0])
    along(site, (4, 5), site.y[0][1])


@rule(f"{MS}:QLinearAdd", f"{MS}:QLinearMul")
def qlinear_binary(site: Site) -> None:
    """a and b at positions 0 and 3, broadcast."""
    broadcast(site, (site.x[0], site.x[3]), site.y[0])


@rule(f"{MS}:QLinearSigmoid", f"{MS}:QLinearLeakyRelu")
def qlinear_unary(site: Site) -> None:
    site.same_all(site.x[0], site.y[0])


@rule(f"{MS}:QLinearAveragePool", f"{MS}:QLinearGlobalAveragePool")
def qlinear_pool(site: Site) -> None:
    """(N, C, …), or (N, …, C) with channels_last."""
    x, y = site.x[0], site.y[0]
    channel = -1 if site.get("channels_last", 0) else 1
    site.same(x[0], y[0])
    site.same(x[channel], y[channel])
    passing = (x[0], x[channel], y[0], y[channel])
    site.fixed([a for a in (*x, *y) if a not in passing], "spatial axis")


@rule(f"{MS}:QLinearConcat")
def qlinear_concat(site: Site) -> None:
    """The output's scale and zero point, then value, scale and zero point of each part."""
    axis, y = site.get("axis", 0), site.y[0]
    axis %= len(y)
    parts = site.x[2::3]
    for part in parts:
        site.same_all([a for i, a in enumerate(part) if i != axis], [a for i, a in enumerate(y) if i != axis])
    site.concat(y[axis], [part[axis] for part in parts])

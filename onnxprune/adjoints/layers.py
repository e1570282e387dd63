"""Layers and other products of two values."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.gradients import NoRuleError, Site, Value, adjoint
from onnxprune.linear import geometry
from onnxprune.operators import Convolution, operator


def _flipped(value: Value, rank: int) -> Value:
    """The last two axes, the other way round."""
    return value.transpose([*range(rank - 2), rank - 1, rank - 2])


@adjoint("MatMul")
def matmul(site: Site) -> Sequence[Value | None]:
    left, right, out = site.shape(0), site.shape(1), site.out
    if len(left) < 2 or len(right) < 2:
        raise NoRuleError
    a, b = site.x
    first = site.fit(0, site.g @ _flipped(b, len(right)), (*out[:-1], left[-1]))
    if len(right) == 2:  # one product in the place of many that are summed
        rows, made = a.reshape([-1, left[-1]]), site.g.reshape([-1, out[-1]])
        return first, _flipped(rows, 2) @ made
    return first, site.fit(1, _flipped(a, len(left)) @ site.g, (*out[:-2], *right[-2:]))


@adjoint("Gemm")
def gemm(site: Site) -> Sequence[Value | None]:
    """y = alpha·A·B + beta·C, A and B perhaps turned."""
    a, b = site.x[:2]
    g = site.g * site.get("alpha", 1.0)
    turned, other = bool(site.get("transA", 0)), bool(site.get("transB", 0))
    to_a = g @ (b if other else _flipped(b, 2))
    to_b = (a if turned else _flipped(a, 2)) @ g
    found: list[Value | None] = [_flipped(to_a, 2) if turned else to_a, _flipped(to_b, 2) if other else to_b]
    if site.has(2):
        found.append(site.fit(2, site.g * site.get("beta", 1.0)))
    return found


def _window(site: Site) -> Convolution:
    shape = geometry(site.node, site.node.input[1], len(site.shape(1)))
    found = operator(shape, site.shape(1), site.shape(0), site.out)
    if not isinstance(found, Convolution) or site.get("output_shape"):  # which says the padding in its own way
        raise NoRuleError
    return found


def _bias(site: Site) -> list[Value | None]:
    axes = [0, *range(2, len(site.out))]
    return [site.g.sum(axes, keepdims=False)] if site.has(2) else []


@adjoint("Conv")
def conv(site: Site) -> Sequence[Value | None]:
    window = _window(site)
    back = site.tape.op("ConvTranspose", site.g, site.x[1], **window.upward)
    return [back, _weighed(site, window, site.x[0], site.g, site.shape(0), site.out), *_bias(site)]


@adjoint("ConvTranspose")
def conv_transpose(site: Site) -> Sequence[Value | None]:
    window = _window(site)
    back = site.tape.op("Conv", site.g, site.x[1], **window.attributes)
    return [back, _weighed(site, window, site.g, site.x[0], site.out, site.shape(0)), *_bias(site)]


def _weighed(site: Site, window: Convolution, large: Value, small: Value, wide: tuple[int, ...], narrow: tuple[int, ...]) -> Value:
    """The adjoint in the weights: samples and channels change places, and a convolution's steps its dilations."""
    count, groups, spatial = wide[0], window.group, range(2, len(wide))
    inner = wide[1] // groups
    read = large.reshape([count, groups, inner, *wide[2:]]).transpose([2, 1, 0, *(i + 1 for i in spatial)])
    read = read.reshape([inner, groups * count, *wide[2:]])
    made = small.transpose([1, 0, *spatial])
    found = site.tape.op(
        "Conv",
        read,
        made,
        group=groups,
        kernel_shape=list(narrow[2:]),
        strides=list(window.dilations),
        dilations=list(window.strides),
        pads=[*window.before, *window.after],
    )
    for axis, size in enumerate(window.kernel):  # rows that the steps left over make more places than the kernel has
        found = found.part(2 + axis, 0, size)
    return found.transpose([1, 0, *spatial])


@adjoint("Einsum")
def einsum(site: Site) -> Sequence[Value | None]:
    """Of two factors, each of whose letters stands in the other or in the result."""
    equation = site.get("equation", b"")
    equation = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    terms, arrow, out = equation.partition("->")
    factors = terms.split(",")
    if len(factors) != 2 or not arrow or "." in equation or any(len(set(t)) < len(t) for t in (*factors, out)):
        raise NoRuleError
    found = []
    for mine, other, value in ((*factors, site.x[1]), (factors[1], factors[0], site.x[0])):
        if set(mine) - set(other) - set(out):
            raise NoRuleError
        found.append(site.tape.op("Einsum", site.g, value, equation=f"{out},{other}->{mine}"))
    return found

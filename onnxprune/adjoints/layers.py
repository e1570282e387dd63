"""Layers and other products of two values."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence

import numpy as np

from onnxprune.gradients import NoRuleError, Site, Value, adjoint
from onnxprune.linear import geometry
from onnxprune.operators import Convolution, operator

PLACES = 25  # of a kernel, up to which its weights' gradient is one product
COPIED = 2**26  # numbers of what a layer reads, each place of the kernel having its own: 256 MB


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
    if not isinstance(found, Convolution):
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
    """The adjoint in the weights; large, small: what a convolution with them reads, and what comes back to what it makes.

    One product for all places of a kernel, where there are few: a convolution with kernels as large as feature maps takes 2 to 12
    times as long (measured on ResNets), but for depthwise layers.
    """
    places = math.prod(window.kernel)
    few = window.group == 1 and places <= PLACES and places * wide[0] * wide[1] * math.prod(narrow[2:]) <= COPIED
    return (_as_product if few else _as_convolution)(site, window, large, small, wide, narrow)


def _as_product(site: Site, window: Convolution, large: Value, small: Value, wide: tuple[int, ...], narrow: tuple[int, ...]) -> Value:
    """What each place of the kernel reads, times what comes back, summed over samples and places."""
    spatial = range(2, len(wide))
    turned = [1, 0, *spatial]
    read = large.transpose(turned)
    if any(window.before) or any(window.after):
        read = site.tape.op("Pad", read, site.tape.integers([0, 0, *window.before, 0, 0, *window.after]))
    parts = []
    for place in itertools.product(*map(range, window.kernel)):
        first = [at * gap for at, gap in zip(place, window.dilations, strict=True)]
        last = [start + (n - 1) * step + 1 for start, n, step in zip(first, narrow[2:], window.strides, strict=True)]
        parts.append(site.tape.op("Slice", read, *map(site.tape.integers, (first, last, spatial, window.strides))))
    rows = site.tape.op("Concat", *parts, axis=0).reshape([len(parts) * wide[1], -1])
    found = small.transpose(turned).reshape([narrow[1], -1]) @ _flipped(rows, 2)
    return found.reshape([narrow[1], *window.kernel, wide[1]]).transpose([0, len(wide) - 1, *(i - 1 for i in spatial)])


def _as_convolution(site: Site, window: Convolution, large: Value, small: Value, wide: tuple[int, ...], narrow: tuple[int, ...]) -> Value:
    """Samples and channels change places, and a convolution's steps its dilations."""
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
    """Of factors each of whose letters stands in another one or in the result, with one size."""
    terms, out = _letters(site)
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, map(site.shape, range(len(terms))), strict=True):
        if len(set(term)) < len(term) or any(sizes.setdefault(letter, n) != n for letter, n in zip(term, shape, strict=True)):
            raise NoRuleError
    found = []
    for i, mine in enumerate(terms):
        others = [j for j in range(len(terms)) if j != i]
        if set(mine) - set(out).union(*(terms[j] for j in others)):
            raise NoRuleError
        equation = ",".join([out, *(terms[j] for j in others)]) + "->" + mine
        found.append(site.tape.op("Einsum", site.g, *(site.x[j] for j in others), equation=equation))
    return found


def _letters(site: Site) -> tuple[list[str], str]:
    """The factors and the result of an equation, with letters of its own in the place of dots."""
    left, arrow, out = site.text("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        raise NoRuleError
    free = [letter for letter in string.ascii_uppercase if letter not in left]
    many = {len(site.shape(i)) - len(term.replace("...", "")) for i, term in enumerate(terms) if "..." in term}
    if len(many) > 1 or max(many, default=0) > len(free):  # some are broadcast
        raise NoRuleError
    dots = "".join(free[: max(many, default=0)])
    return [term.replace("...", dots) for term in terms], out.replace("...", dots)


@adjoint("Attention")
def attention(site: Site) -> Sequence[Value | None]:
    """Of heads along axis 1, as many keys and values as queries; its shares are computed again."""
    queries, keys = site.shape(0), site.shape(1)
    plain = not any(site.has(i) for i in (4, 5, 6)) and not site.get("softcap", 0.0)
    if len(queries) != 4 or queries[:2] != keys[:2] or not plain:
        raise NoRuleError
    q, k, v = site.x[:3]
    scale = site.get("scale", 1 / math.sqrt(queries[3]))
    shares = site.tape.op("Softmax", (q @ _flipped(k, 4)) * scale + _mask(site, queries[2], keys[2]), axis=3)
    shares = shares.where(site.tape.op("Not", site.tape.op("IsNaN", shares)))
    back = site.g @ _flipped(v, 4)
    back = shares * (back - (back * shares).sum([3])) * scale
    return back @ k, _flipped(back, 4) @ q, _flipped(shares, 4) @ site.g


def _mask(site: Site, queries: int, keys: int) -> Value:
    """What is added before the softmax, a constant."""
    mask = site.array(3) if site.has(3) else np.float32(0)
    mask = np.where(mask, 0, -np.inf) if mask.dtype == bool else mask
    if site.get("is_causal", 0):
        if queries != keys:
            raise NoRuleError
        mask = mask + np.triu(np.full((queries, keys), -np.inf), 1)
    return site.tape.constant(mask)

"""Sums and means over axes, and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxprune.gradients import NoRuleError, Site, Value, adjoint


def _axes(site: Site) -> list[int]:
    rank = len(site.shape())
    given = site.array(1).ravel().tolist() if site.has(1) else site.get("axes")
    if not given:
        if site.get("noop_with_empty_axes", 0):
            return []
        return list(range(rank))
    return sorted(int(axis) % rank for axis in given)


def _kept(site: Site, value: Value) -> Value:
    """With an axis of 1 in the place of each that is gone."""
    axes = _axes(site)
    return value.reshape([1 if i in axes else n for i, n in enumerate(site.shape())])


def _spread(site: Site, value: Value) -> Value:
    return site.tape.op("Expand", value, site.tape.integers(site.shape()))


def _shared(site: Site, change: Value, extreme: Value, axes: Sequence[int]) -> Value:
    """To the numbers of the first input that are the extreme along axes, in equal parts; all with these axes kept."""
    tape = site.tape
    equal = tape.op("Equal", site.x[0], extreme)
    many = tape.op("Cast", equal, to=1).sum(axes)
    return _spread(site, change / many).where(equal)


@adjoint("ReduceSum")
def reduce_sum(site: Site) -> Sequence[Value | None]:
    return (_spread(site, _kept(site, site.g)),)


@adjoint("ReduceMean")
def reduce_mean(site: Site) -> Sequence[Value | None]:
    many = math.prod(site.shape()[axis] for axis in _axes(site))
    return (_spread(site, _kept(site, site.g) * (1 / max(1, many))),)


@adjoint("ReduceL2")
def reduce_l2(site: Site) -> Sequence[Value | None]:
    """0 where all numbers are."""
    some = site.tape.op("Greater", site.y[0], site.tape.constant(0.0))
    return (site.x[0] * _kept(site, (site.g / site.y[0]).where(some)),)


@adjoint("ReduceL1")
def reduce_l1(site: Site) -> Sequence[Value | None]:
    return (site.tape.op("Sign", site.x[0]) * _kept(site, site.g),)


@adjoint("ReduceLogSumExp")
def reduce_log_sum_exp(site: Site) -> Sequence[Value | None]:
    """y = log Σ exp(x): by the softmax."""
    return (site.tape.op("Exp", site.x[0] - _kept(site, site.y[0])) * _kept(site, site.g),)


@adjoint("ReduceSumSquare")
def reduce_sum_square(site: Site) -> Sequence[Value | None]:
    return (site.x[0] * _kept(site, site.g * 2.0),)


@adjoint("ReduceMax", "ReduceMin")
def reduce_extreme(site: Site) -> Sequence[Value | None]:
    """To the numbers that are it, in equal parts where there are several."""
    return (_shared(site, _kept(site, site.g), _kept(site, site.y[0]), _axes(site)),)


@adjoint("GlobalAveragePool")
def global_average_pool(site: Site) -> Sequence[Value | None]:
    return (_spread(site, site.g * (1 / max(1, math.prod(site.shape()[2:])))),)


def _pads(site: Site, reach: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis; reach: from the first to the last place of a window."""
    auto, rank = site.text("auto_pad", "NOTSET"), len(reach)
    if not auto.startswith("SAME"):
        given = (site.get("pads") if auto == "NOTSET" else None) or [0] * 2 * rank
        return list(given[:rank]), list(given[rank:])
    sizes = zip(site.shape()[2:], site.out[2:], reach, strides, strict=True)
    whole = [max((o - 1) * s + r - n, 0) for n, o, r, s in sizes]
    less, more = [n // 2 for n in whole], [n - n // 2 for n in whole]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


@adjoint("AveragePool")
def average_pool(site: Site) -> Sequence[Value | None]:
    """Each output, over how many it is the mean of, to all of those."""
    kernel = list(site.get("kernel_shape"))
    strides = list(site.get("strides") or [1] * len(kernel))
    dilations = list(site.get("dilations") or [1] * len(kernel))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    before, declared = _pads(site, reach, strides)
    after = [(o - 1) * s + r - n - b for n, o, s, r, b in zip(site.shape()[2:], site.out[2:], strides, reach, before, strict=True)]
    include = bool(site.get("count_include_pad", 0))
    counts = np.ones(site.out[2:])
    sizes = zip(site.shape()[2:], site.out[2:], kernel, strides, dilations, before, declared, strict=True)
    for axis, (n, o, k, s, d, b, a) in enumerate(sizes):
        places = np.arange(o)[:, None] * s - b + np.arange(k) * d
        inside = (places < n + a) & (places >= -b) if include else (places >= 0) & (places < n)
        counts = counts * inside.sum(axis=1).reshape([-1 if i == axis else 1 for i in range(len(kernel))])
    channels = site.shape()[1]
    ones = site.tape.constant(np.ones((channels, 1, *kernel)))
    return (
        site.tape.op(
            "ConvTranspose",
            site.g / site.tape.constant(counts),
            ones,
            group=channels,
            kernel_shape=kernel,
            strides=strides,
            dilations=dilations,
            pads=[*before, *(max(a, 0) for a in after)],
            output_padding=[max(-a, 0) for a in after],
        ),
    )


@adjoint("MaxPool")
def max_pool(site: Site) -> Sequence[Value | None]:
    """To the place that onnxruntime names as the largest, which may be that of several outputs."""
    names = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    given = {name: value for name in names if (value := site.get(name)) is not None}
    if site.get("storage_order", 0):
        raise NoRuleError
    where = site.tape.op("MaxPool", site.x[0], output=1, **given)
    return (_scattered(site, where),)


@adjoint("GlobalMaxPool")
def global_max_pool(site: Site) -> Sequence[Value | None]:
    """To the places that are the largest, in equal parts where there are several, as where a sequence is padded."""
    return (_shared(site, site.g, site.y[0], list(range(2, len(site.shape())))),)


def _scattered(site: Site, where: Value) -> Value:
    zeros = site.tape.op("ConstantOfShape", site.tape.integers([math.prod(site.shape())]))
    flat = site.tape.op("ScatterElements", zeros, where.reshape([-1]), site.g.reshape([-1]), axis=0, reduction="add")
    return flat.reshape(site.shape())

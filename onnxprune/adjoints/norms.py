"""Norms, and softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.gradients import NoRuleError, Site, Value, adjoint


def _normalized(site: Site, axes: Sequence[int], centred: bool = True, shape: Sequence[int] | None = None) -> tuple[Value, Value]:
    """(x − mean)/deviation over some axes, and 1/deviation; shape: that x is to have for it."""
    x = site.x[0] if shape is None else site.x[0].reshape(shape)
    x = x - x.mean(axes) if centred else x
    scale = site.tape.op("Reciprocal", site.tape.op("Sqrt", (x * x).mean(axes) + site.get("epsilon", 1e-5)))
    return x * scale, scale


def _through(g: Value, normal: Value, scale: Value, axes: Sequence[int], centred: bool = True) -> Value:
    """What passes a norm: the part of g across the mean and across the normalized values themselves."""
    left = g - normal * (g * normal).mean(axes)
    return (left - g.mean(axes) if centred else left) * scale


@adjoint("LayerNormalization")
def layer_normalization(site: Site) -> Sequence[Value | None]:
    rank = len(site.shape())
    axes = list(range(site.get("axis", -1) % rank, rank))
    normal, scale = _normalized(site, axes)
    back = _through(site.g * site.x[1], normal, scale, axes)
    return [back, site.fit(1, site.g * normal), *([site.fit(2, site.g)] if site.has(2) else [])]


@adjoint("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(site: Site) -> Sequence[Value | None]:
    rank = len(site.shape())
    axes = list(range(site.get("axis", -1) % rank, rank))
    normal, scale = _normalized(site, axes, centred=False)
    return _through(site.g * site.x[1], normal, scale, axes, centred=False), site.fit(1, site.g * normal)


def _beside(value: Value, rank: int) -> Value:
    """A number for each channel, to go along axis 1."""
    return value.reshape([1, -1, *[1] * (rank - 2)])


@adjoint("InstanceNormalization")
def instance_normalization(site: Site) -> Sequence[Value | None]:
    rank = len(site.shape())
    axes, others = list(range(2, rank)), [0, *range(2, rank)]
    normal, scale = _normalized(site, axes)
    back = _through(site.g * _beside(site.x[1], rank), normal, scale, axes)
    return back, (site.g * normal).sum(others, keepdims=False), site.g.sum(others, keepdims=False)


@adjoint("GroupNormalization")
def group_normalization(site: Site) -> Sequence[Value | None]:
    """Scales and biases are one a group (opset 18) or one a channel (opset 21)."""
    shape, scales = site.shape(), site.shape(1)[0]
    apart, beside = [shape[0], site.get("num_groups"), -1], [shape[0], scales, -1]
    normal, scale = _normalized(site, [2], shape=apart)
    g = site.g.reshape(beside)
    back = _through((g * _beside(site.x[1], 3)).reshape(apart), normal, scale, [2]).reshape(shape)
    return back, (g * normal.reshape(beside)).sum([0, 2], keepdims=False), g.sum([0, 2], keepdims=False)


@adjoint("LRN")
def lrn(site: Site) -> Sequence[Value | None]:
    """y = x·s^−beta, s = bias + alpha/size · Σ x² over the channels beside; which are these, a matrix says."""
    shape, x, size = site.shape(), site.x[0], site.get("size")
    alpha, beta = site.get("alpha", 1e-4) / size, site.get("beta", 0.75)
    apart = np.arange(shape[1]) - np.arange(shape[1])[:, None]
    near = (apart >= -((size - 1) // 2)) & (apart <= size // 2)
    summed = site.tape.constant(near) @ (x * x).reshape([shape[0], shape[1], -1])
    s = summed.reshape(shape) * alpha + site.get("bias", 1.0)
    shrunk = site.g * site.tape.op("Pow", s, site.tape.constant(-beta))
    spread = site.tape.constant(near.T) @ (shrunk * x / s).reshape([shape[0], shape[1], -1])
    return (shrunk - x * spread.reshape(shape) * (2 * alpha * beta),)


@adjoint("BatchNormalization")
def batch_normalization(site: Site) -> Sequence[Value | None]:
    """Of running statistics, which get no gradient."""
    if site.get("training_mode", 0):
        raise NoRuleError
    rank = len(site.shape())
    others = [0, *range(2, rank)]
    x, scale, _, mean, variance = site.x[:5]
    root = site.tape.op("Reciprocal", site.tape.op("Sqrt", _beside(variance, rank) + site.get("epsilon", 1e-5)))
    normal = (x - _beside(mean, rank)) * root
    back = site.g * (_beside(scale, rank) * root)
    return back, (site.g * normal).sum(others, keepdims=False), site.g.sum(others, keepdims=False)


def _axes(site: Site) -> list[int]:
    """Before opset 13 all axes from `axis` on were one."""
    rank = len(site.shape())
    axis = int(site.get("axis", -1 if site.opset >= 13 else 1)) % rank
    return [axis] if site.opset >= 13 else list(range(axis, rank))


@adjoint("Softmax")
def softmax(site: Site) -> Sequence[Value | None]:
    """Rows that are masked as a whole are no numbers; models put zeros there afterwards, which pass nothing back."""
    y, g = site.y[0], site.g
    y = y.where(site.tape.op("Not", site.tape.op("IsNaN", y)))
    return (y * (g - (g * y).sum(_axes(site))),)


@adjoint("LogSoftmax")
def log_softmax(site: Site) -> Sequence[Value | None]:
    return (site.g - site.tape.op("Exp", site.y[0]) * site.g.sum(_axes(site)),)

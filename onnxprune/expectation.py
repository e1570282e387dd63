"""What layers read, as far as the weights alone say: means and covariances of channels, from the model's input onwards.

A value is taken as a Gaussian field: a mean and a covariance of its channels, and a correlation NEAR between neighbouring places.
Inputs, and what an operator without a rule makes, are standard normal; linear layers pass the moments on exactly, and activations by
their Hermite series, Cov f(a)f(b) = Σₙ cₙ(a)cₙ(b) ρⁿ/n!; what is added or multiplied is taken as independent; behind a norm mean and
variance are those that it was trained to.  Where no norm says how large values are, readers get no mean to put into a bias.

UDFC (arXiv:2308.07209) and LBYL (arXiv:2502.08474) merge channels by the products of their filters: the case of white inputs and
no activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxprune.evidence import WIDEST, Evidence, Reading, features, passed_on
from onnxprune.folding import attributes
from onnxprune.grouping import Grouping
from onnxprune.importer import Model
from onnxprune.linear import CONVOLUTIONS, Linear, linears

NEAR = 0.65  # correlation of neighbouring places of a feature map
COLOURS = 0.9  # correlation of the channels of an image
MANY = 32  # groups of a convolution
TERMS = 8  # of the Hermite series
NODES, SHARES = np.polynomial.hermite_e.hermegauss(64)
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Field:
    """axis: of the channels; mean (channels,), covariance (channels, channels); sure: both go back to a norm, not to what inputs may be."""

    axis: int
    mean: np.ndarray
    covariance: np.ndarray
    sure: bool = False


Function = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]
ACTIVATIONS: dict[str, Function] = {
    "Relu": lambda x, _: np.maximum(x, 0),
    "Clip": lambda x, given: np.clip(x, given.get("min", -np.inf), given.get("max", np.inf)),
    "LeakyRelu": lambda x, given: np.where(x < 0, given.get("alpha", 0.01) * x, x),
    "Elu": lambda x, given: np.where(x < 0, given.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x),
    "Gelu": lambda x, _: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "HardSigmoid": lambda x, given: np.clip(given.get("alpha", 0.2) * x + given.get("beta", 0.5), 0, 1),
    "HardSwish": lambda x, _: x * np.clip(x / 6 + 0.5, 0, 1),
    "Sigmoid": lambda x, _: 1 / (1 + np.exp(-x)),
    "Tanh": lambda x, _: np.tanh(x),
}
POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
PASSING = {*POOLS, "Identity", "Dropout", "Cast", "Flatten", "Reshape", "Slice", "Squeeze"}


def expected(grouping: Grouping) -> Evidence:
    """Evidence without samples: readings by the moments that the weights alone let expect; `samples` is 0."""
    model = grouping.model
    fields = expect(model)
    readings: dict[int, list[Reading]] = {}
    layers: dict[str, Reading] = {}
    for layer in linears(model):
        weight = model.array(layer.weight)
        shape = layer.geometry(model.main[layer.node], weight.ndim)
        field = fields.get(layer.source)
        matrix = shape.matrix(weight)
        if field is None or shape.group != 1 or matrix.shape[2] > WIDEST:
            continue
        places = {g.id: f for g in grouping.groups if g.branch is None and (f := features(layer, shape, weight, g)) is not None}
        near = _near(weight.shape[2:] if layer.op in CONVOLUTIONS else ())
        axis = _channels(model, model.main[layer.node], layer)
        if field.axis != axis or len(field.mean) * len(near) != matrix.shape[2]:
            continue
        covariance = np.kron(field.covariance, near)
        mean = np.repeat(field.mean, len(near))
        rms = np.sqrt(np.diag(covariance) + mean**2)
        if not field.sure:  # a mean that is only supposed goes into no bias
            covariance, mean = covariance + np.outer(mean, mean), np.zeros_like(mean)
        goal = fields.get(passed_on(model, layer))
        power = float(np.trace(goal.covariance) + goal.mean @ goal.mean) if goal else 1.0
        size = np.repeat(activated(field, np.abs).mean, len(near))
        none = np.zeros((0, 0), np.int64)
        layers[layer.weight] = Reading(layer, none, matrix, mean[None], rms[None], covariance[None], max(power, 1e-30), size[None])
        for owner, where in places.items():
            readings.setdefault(owner, []).append(replace(layers[layer.weight], features=where))
    return Evidence(grouping, {g: tuple(r) for g, r in readings.items()}, 0, layers)


def expect(model: Model) -> dict[str, Field]:
    """{value: its field} of the main graph's values; those without an axis of channels are left out."""
    layers = {layer.node: layer for layer in linears(model)}
    aliases = {n.output[0]: n.input[0] for n in model.main if n.op_type == "Identity" and n.input[0] in model.tensors}
    constants = _Constants(model, aliases)
    fields = dict[str, Field]()
    guessed, supposed = set[str](), set[str]()  # begun from, no inputs; inputs and what is made of them: both with channels by rank alone
    for index, node in enumerate(model.main):
        axis = _channels(model, node, layers.get(index))
        for name in node.input:
            shape = model.shapes.get(name, ())
            if not name or name in constants or name in model.folded or len(shape) < 2:
                continue
            mine = axis if name == (layers[index].source if index in layers else node.input[0]) else None
            if name not in fields:
                (supposed if name in model.input_shapes else guessed).add(name)
            elif mine is None or fields[name].axis == mine:
                continue
            tells = mine is not None and (name in supposed or (name in guessed and node.op_type in CONVOLUTIONS))
            begun = start(shape, mine if tells else None) if tells or name not in fields else None
            if begun is not None:
                fields[name] = begun
        if node.op_type == "Transpose" and node.input[0] in guessed:
            continue
        made = _linear(model, layers[index], fields) if index in layers else _through(model, constants, node, fields)
        shape = model.shapes.get(node.output[0], ()) if node.output else ()
        if made is not None and made.axis < len(shape) and shape[made.axis] == len(made.mean):
            fields[node.output[0]] = made
            if axis is None and supposed.issuperset(name for name in node.input if name in fields):
                supposed.add(node.output[0])
    return fields


def _channels(model: Model, node: NodeProto, layer: Linear | None) -> int | None:
    """Which axis of what a layer or a norm reads holds the channels; None for other nodes."""
    rank = len(model.shapes.get(layer.source if layer else node.input[0] if node.input else "", ()))
    if layer is not None:
        left = layer.geometry(model.main[layer.node], len(model.tensors[layer.weight].dims)).left
        return 1 if layer.op in CONVOLUTIONS else rank - (2 if left else 1)
    return {"BatchNormalization": 1, "LayerNormalization": rank - 1}.get(node.op_type)


@dataclass(frozen=True)
class _Constants:
    """The tensors of a model, those that an Identity gives another name too."""

    model: Model
    aliases: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.model.tensors or name in self.aliases

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.model.array(self.aliases.get(name, name)), np.float64)


def start(shape: tuple[int, ...], axis: int | None = None) -> Field | None:
    """Standard normal, where the channels are not too many; colours go together.  axis: of the channels, or supposed by the rank."""
    if axis is None:
        axis = 1 if len(shape) > 3 or len(shape) == 2 else len(shape) - 1
    channels = shape[axis]
    if channels > WIDEST:
        return None
    together = COLOURS if len(shape) == 4 and channels <= 4 else 0.0
    return Field(axis, np.zeros(channels), (1 - together) * np.eye(channels) + together)


def _near(kernel: tuple[int, ...]) -> np.ndarray:
    """Correlations between the places under a kernel, (places, places)."""
    at = (
        np.stack(np.meshgrid(*[np.arange(n) for n in kernel], indexing="ij"), -1).reshape(-1, max(1, len(kernel)))
        if kernel
        else np.zeros((1, 1))
    )
    return np.asarray(NEAR ** np.sqrt(((at[:, None] - at[None]) ** 2).sum(-1)))


def _linear(model: Model, layer: Linear, fields: Mapping[str, Field]) -> Field | None:
    """The moments of what a layer makes."""
    weight = model.array(layer.weight)
    shape = layer.geometry(model.main[layer.node], weight.ndim)
    field = fields.get(layer.source)
    rank = len(model.shapes[layer.source])
    axis = 1 if layer.op in CONVOLUTIONS else rank - (2 if shape.left else 1)
    if field is None or field.axis != axis:
        return None
    near = _near(weight.shape[2:] if layer.op in CONVOLUTIONS else ())
    matrix = shape.matrix(weight)
    groups, wide, _ = matrix.shape
    taps = matrix.reshape(groups, wide, -1, len(near))
    if taps.shape[2] * groups != len(field.mean) or groups * wide > WIDEST:
        return None
    covariance = _depthwise(taps, near, field) if groups > 1 and taps.shape[2] == 1 else _grouped(taps, near, field)
    mean = np.einsum("goct,gc->go", taps, field.mean.reshape(groups, -1)).ravel()
    bias = layer.beta * model.array(layer.bias).ravel() if layer.bias and layer.add < 0 else 0.0
    return Field(axis, mean + bias, (covariance + covariance.T) / 2, field.sure)


def _grouped(taps: np.ndarray, near: np.ndarray, field: Field) -> np.ndarray:
    """Σ over taps s, t of near(s, t)·W(s) C W(t)ᵀ, block by block; taps (groups, out, in, taps)."""
    groups, wide, inner, _ = taps.shape
    spread = np.einsum("goct,ts->gocs", taps, near)
    parts = field.covariance.reshape(groups, inner, groups, inner)
    out = np.zeros((groups * wide, groups * wide))
    for g in range(groups):
        for h in range(groups) if groups <= MANY else (g,):  # of more groups only what is inside of one
            block = sum(spread[g, :, :, t] @ parts[g, :, h] @ taps[h, :, :, t].T for t in range(len(near)))
            out[g * wide : (g + 1) * wide, h * wide : (h + 1) * wide] = block
    return out


def _depthwise(taps: np.ndarray, near: np.ndarray, field: Field) -> np.ndarray:
    """The same where each channel is filtered alone."""
    groups, wide, _, _ = taps.shape
    filters = taps.reshape(groups * wide, -1)
    channels = np.repeat(np.arange(groups), wide)
    return np.asarray((filters @ near @ filters.T) * field.covariance[np.ix_(channels, channels)])


def _through(model: Model, constants: _Constants, node: NodeProto, fields: Mapping[str, Field]) -> Field | None:
    """The moments behind a node that is no linear layer; None where there is no rule."""
    op, sources = node.op_type, [fields.get(name) for name in node.input]
    first = sources[0] if sources else None
    if node.domain not in ("", "ai.onnx"):
        return None
    if op in ("Add", "Sub", "Mul", "Div") and len(sources) == 2:
        return _pair(model, constants, node, sources)
    if first is None:
        return None
    if op in ACTIVATIONS:
        given = dict(attributes(node))
        for key, name in zip(("min", "max"), node.input[1:], strict=False):
            if name and (name not in constants or constants[name].size != 1):
                return None
            given |= {key: float(constants[name].ravel()[0])} if name else {}
        return activated(first, lambda x: ACTIVATIONS[op](x, given))
    if op in ("BatchNormalization", "LayerNormalization"):
        return _normalized(constants, node, first)
    if op in PASSING:
        flat = op in ("Flatten", "Reshape", "Squeeze") and len(model.shapes.get(node.output[0], ())) == 2
        return replace(first, axis=1) if flat else first
    if op in ("ReduceMean", "ReduceMax"):
        return _reduced(model, constants, node, first)
    if op == "Transpose":
        rank = len(model.shapes[node.input[0]])
        return replace(first, axis=list(attributes(node).get("perm", range(rank)[::-1])).index(first.axis))
    if op == "Concat" and attributes(node).get("axis") == first.axis and all(s is not None and s.axis == first.axis for s in sources):
        parts = [s for s in sources if s is not None]
        whole = np.zeros((sum(len(p.mean) for p in parts),) * 2)
        at = 0
        for part in parts:
            whole[at : at + len(part.mean), at : at + len(part.mean)] = part.covariance
            at += len(part.mean)
        return Field(first.axis, np.concatenate([p.mean for p in parts]), whole, all(p.sure for p in parts))
    if op == "Pad":
        sides = _padded(model, constants, node, first.axis)
        if sides is None or min(sides) < 0:
            return None
        return replace(first, mean=np.pad(first.mean, sides), covariance=np.pad(first.covariance, (sides, sides)))
    return None


def _padded(model: Model, constants: _Constants, node: NodeProto, axis: int) -> tuple[int, int] | None:
    """How many channels a Pad puts in front and behind; None where that is not known."""
    rank, given = len(model.shapes[node.input[0]]), attributes(node).get("pads")
    axes = list(range(rank))
    if given is None and len(node.input) > 1 and node.input[1] in constants:
        given = constants[node.input[1]].astype(int).ravel().tolist()
    if len(node.input) > 3 and node.input[3]:
        if node.input[3] not in constants:
            return None
        axes = [int(one) % rank for one in constants[node.input[3]].ravel()]
    if given is None or len(given) != 2 * len(axes):
        return None
    return (given[axes.index(axis)], given[axes.index(axis) + len(axes)]) if axis in axes else (0, 0)


def _reduced(model: Model, constants: _Constants, node: NodeProto, field: Field) -> Field | None:
    """Over places, as pooling is."""
    given, rank = attributes(node), len(model.shapes[node.input[0]])
    axes = given.get("axes")
    if len(node.input) > 1 and node.input[1]:
        axes = constants[node.input[1]].astype(int) if node.input[1] in constants else None
    if axes is None or field.axis in (gone := {int(axis) % rank for axis in axes}):
        return None
    return field if given.get("keepdims", 1) else replace(field, axis=field.axis - sum(axis < field.axis for axis in gone))


def _pair(model: Model, constants: _Constants, node: NodeProto, sources: list[Field | None]) -> Field | None:
    """Sums and products of independent fields, and a constant number for each channel added or multiplied."""
    one, other = sources
    if one is not None and other is not None:
        if node.op_type == "Div" or one.axis != other.axis or len(one.mean) != len(other.mean):
            return None
        if node.op_type == "Mul":
            square, own = np.outer(one.mean, one.mean), np.outer(other.mean, other.mean)
            covariance = one.covariance * other.covariance + one.covariance * own + other.covariance * square
            return Field(one.axis, one.mean * other.mean, covariance, one.sure and other.sure)
        sign = 1 if node.op_type == "Add" else -1
        return Field(one.axis, one.mean + sign * other.mean, one.covariance + other.covariance, one.sure and other.sure)
    field, name = (one, node.input[1]) if one is not None else (other, node.input[0])
    if field is None or name not in constants or (one is None and node.op_type in ("Sub", "Div")):
        return None
    constant = constants[name]
    rank = len(model.shapes[node.output[0]])
    sizes = [1] * (rank - constant.ndim) + list(constant.shape)
    if constant.size not in (1, sizes[field.axis]) or (constant.size > 1 and constant.size != len(field.mean)):
        return None
    number = np.broadcast_to(constant.ravel(), field.mean.shape)
    if node.op_type in ("Add", "Sub"):
        return replace(field, mean=field.mean + (number if node.op_type == "Add" else -number))
    scale = number if node.op_type == "Mul" else 1 / number
    return replace(field, mean=field.mean * scale, covariance=field.covariance * scale[:, None] * scale)


def _normalized(constants: _Constants, node: NodeProto, field: Field) -> Field | None:
    """Behind a norm: the mean is its shift and the deviation its scale."""
    if len(node.input) < 3 or any(name not in constants for name in node.input[1:3]):
        return None
    scale, shift = (constants[name] for name in node.input[1:3])
    if scale.shape != field.mean.shape or shift.shape != field.mean.shape:
        return None
    deviation = np.sqrt(np.maximum(np.diag(field.covariance), 1e-12))
    factor = scale / deviation
    return Field(field.axis, shift, field.covariance * factor[:, None] * factor, True)


def activated(field: Field, function: Callable[[np.ndarray], np.ndarray]) -> Field:
    """The moments of a function of each channel, by its Hermite series; variances exactly."""
    deviation = np.sqrt(np.maximum(np.diag(field.covariance), 1e-24))
    shares = SHARES / SHARES.sum()
    values = function(field.mean[:, None] + deviation[:, None] * NODES)
    mean = values @ shares
    correlation = np.clip(field.covariance / deviation[:, None] / deviation, -1, 1)
    total, power = np.zeros_like(correlation), np.ones_like(correlation)
    for n in range(1, TERMS + 1):
        polynomial = np.polynomial.hermite_e.hermeval(NODES, [0] * n + [1])
        coefficients = values @ (shares * polynomial)
        power = power * correlation
        total += np.outer(coefficients, coefficients) * power / math.factorial(n)
    variance = np.maximum((values**2) @ shares - mean**2, 0)
    np.fill_diagonal(total, np.maximum(variance, np.diag(total)))
    return replace(field, mean=mean, covariance=total)

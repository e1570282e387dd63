"""Linear layers as maps whose weights are given at each call: forward, the adjoint in what they read, the adjoint in their weights.

A layer y = L(x; W) is linear in x and in W.  Of a convolution the adjoint in x is the transposed convolution with the same
weights, and the other way round; the adjoint in W sums, for each place of the kernel, products of what that place reads and y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from onnxprune.errors import OnnxPruneError
from onnxprune.linear import CONVOLUTIONS, Geometry
from onnxprune.running import first_line, session

OPSET = 11
EVERYTHING = (slice(None), slice(None))  # of the first two axes


class Operator(Protocol):
    """axis: that of the channels in what is made, also of the bias; all arrays are float32, weights shaped as the node's."""

    @property
    def axis(self) -> int: ...

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """L(x; W), without a bias."""
        ...

    def back(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The x for which <L(·; W), y> = <·, x>."""
        ...

    def weigh(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The W for which <L(x; ·), y> = <·, W>."""
        ...


@dataclass(frozen=True)
class Product:
    """A Gemm or a MatMul with its weight on the right; flipped: the weight is (out, in)."""

    flipped: bool
    axis: int = -1

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.asarray(x @ (weight.T if self.flipped else weight))

    def back(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.asarray(y @ (weight if self.flipped else weight.T))

    def weigh(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        rows, made = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        return np.asarray(made.T @ rows if self.flipped else rows.T @ made)


@dataclass(frozen=True)
class Convolution:
    """A Conv, or (`up`) a ConvTranspose, between fixed spatial sizes.

    large, small: the sizes on the side that a Conv reads and on the one that it makes; before, after: padding; axis: 1.
    """

    up: bool
    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    large: tuple[int, ...]
    small: tuple[int, ...]
    axis: int = 1

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return _made(self._upward if self.up else self._downward, x, weight)

    def back(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return _made(self._downward if self.up else self._upward, y, weight)

    def weigh(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        large, small = (y, x) if self.up else (x, y)
        count, groups = len(large), self.group
        padded = np.zeros((large.shape[1], count, *(b + n + a for b, n, a in zip(self.before, self.large, self.after, strict=True))), "f4")
        inside = tuple(slice(b, b + n) for b, n in zip(self.before, self.large, strict=True))
        padded[EVERYTHING + inside] = large.swapaxes(0, 1)
        made = np.ascontiguousarray(small.swapaxes(0, 1)).reshape(groups, small.shape[1] // groups, -1)
        found = np.empty((*self.kernel, groups, made.shape[1], large.shape[1] // groups), np.float32)
        for place in np.ndindex(*self.kernel):
            steps = zip(place, self.dilations, self.strides, self.small, strict=True)
            read = padded[EVERYTHING + tuple(slice(k * d, k * d + (o - 1) * s + 1, s) for k, d, s, o in steps)]
            found[place] = made @ read.reshape(groups, large.shape[1] // groups, -1).transpose(0, 2, 1)
        spatial = range(len(self.kernel))
        turned = found.transpose(*(len(self.kernel) + i for i in range(3)), *spatial)
        return np.ascontiguousarray(turned).reshape(small.shape[1], -1, *self.kernel)

    @cached_property
    def _downward(self) -> ort.InferenceSession:
        return _session("Conv", self.attributes)

    @cached_property
    def _upward(self) -> ort.InferenceSession:
        return _session("ConvTranspose", self.upward)

    @property
    def upward(self) -> dict[str, Any]:
        """The attributes of the ConvTranspose from the small side to the large one."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        sizes = zip(self.large, self.small, self.strides, reach, self.before, self.after, strict=True)
        rest = [n - ((o - 1) * s + r - b - a) for n, o, s, r, b, a in sizes]
        return self.attributes | {"output_padding": rest}

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the Conv from the large side to the small one."""
        return {
            "group": self.group,
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": (*self.before, *self.after),
        }


def operator(shape: Geometry, weight: Sequence[int], x: Sequence[int], y: Sequence[int]) -> Operator | None:
    """A layer's operator for the shapes of its weight, of what it reads and of what it makes; None where it is none of these kinds."""
    if shape.op not in CONVOLUTIONS:
        return None if shape.left or shape.scale != 1 else Product(shape.flipped)
    up = shape.op == "ConvTranspose"
    large, small = (y[2:], x[2:]) if up else (x[2:], y[2:])
    kernel = tuple(weight[2:])
    before = tuple(shape.before(x[2:], y[2:], kernel))
    sizes = zip(large, small, shape.strides, kernel, shape.dilations, before, strict=True)
    after = tuple(max((o - 1) * s + (k - 1) * d + 1 - n - b, 0) for n, o, s, k, d, b in sizes)
    if min((*shape.pads, *before), default=0) < 0 or math.prod((*large, *small)) == 0:
        return None
    return Convolution(up, shape.group, kernel, shape.strides, shape.dilations, before, after, tuple(large), tuple(small))


def _session(op: str, given: dict[str, Any]) -> ort.InferenceSession:
    """One node that reads x and w and makes y."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "w", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], **given)], op, values[:2], values[2:])
    return session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8), optimize=True, threads=0)


def _made(made_by: ort.InferenceSession, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(made_by.run(None, {"x": x, "w": weight})[0])
    except Exception as error:
        raise OnnxPruneError(f"onnxruntime does not run a layer by itself ({first_line(error)})", 4) from error

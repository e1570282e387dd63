"""The layers that multiply by a constant weight, each seen as a matrix product: rows of inputs times a matrix, plus a bias.

What a layer reads to make one of its outputs is a row (of a convolution the window under the kernel), so that a convolution,
a Gemm and a MatMul are the same thing: targets (rows, out) = rows (rows, features) · matrix (out, features)ᵀ + bias.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from onnxprune.emphasis import normed
from onnxprune.folding import attributes
from onnxprune.importer import FLOATS, Model
from onnxprune.padding import kept_places
from onnxprune.running import Arrays
from onnxprune.scopes import captured

CONVOLUTIONS = ("Conv", "ConvTranspose")
RECURRENT = ("LSTM", "GRU", "RNN")
SAME = ("SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True)
class Linear:
    """One layer of a model's main graph.

    source: the value that it reads; weight: its tensor; bias: the tensor that is added, "" where none is; output: the value with
    the bias added; add: the position of the node that adds the bias behind a MatMul or a bare Gemm, else -1; added: where the
    output goes into an Add that is nothing else's, the value it makes and the other operand; normed: that value, or the output, is
    what a norm over its channels reads (`emphasis`); operand, addend: what the nodes read, the weight and the bias or what Transpose,
    Cast and Identity make of them; turned: the weight's two axes have changed places there; beta: what Gemm multiplies the bias by.
    """

    node: int
    op: str
    source: str
    weight: str
    bias: str
    output: str
    add: int = -1
    added: tuple[str, str] | None = None
    normed: bool = False
    operand: str = ""
    addend: str = ""
    turned: bool = False
    beta: float = 1.0

    @property
    def takes_bias(self) -> bool:
        """Whether a bias can be given without another node."""
        return bool(self.bias) or (self.op in (*CONVOLUTIONS, "Gemm") and self.beta != 0)

    def geometry(self, node: NodeProto, rank: int) -> Geometry:
        """How its node reads, in the original or in the pruned model; rank: of its weight."""
        return geometry(node, self.operand, rank, self.turned)


def linears(model: Model) -> list[Linear]:
    """The linear layers of the main graph, in its order: Conv, ConvTranspose, Gemm and MatMul whose weight no one else reads."""
    reads = Counter(name for node in model.nodes for name in node.input if name)
    reads.update(model.outputs)
    for node in model.main:
        reads.update(captured(node))
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(model.main):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    found, made = [], made_by(model.main)
    for index, node in enumerate(model.main):
        layer = _linear(model, made, reads, index, node)
        if layer is None:
            continue
        after = readers.get(layer.output, [])
        bare = layer.op in ("MatMul", "Gemm") and not layer.bias and layer.operand == node.input[1]
        if bare and len(after) == 1 and reads[layer.output] == 1:
            layer = _with_bias(model, made, layer, after[0])
            after = readers.get(layer.output, [])
        if len(after) == 1 and reads[layer.output] == 1 and model.main[after[0]].op_type == "Add":
            add = model.main[after[0]]
            other = add.input[1 - list(add.input).index(layer.output)]
            alike = model.shapes.get(other) == model.shapes.get(layer.output) == model.shapes.get(add.output[0])
            if alike and other not in model.tensors and other != layer.output:
                layer = replace(layer, added=(add.output[0], other))
        goal = layer.added[0] if layer.added else layer.output
        axis = 1 if layer.op in CONVOLUTIONS else len(model.shapes[goal]) - 1
        left = layer.op == "MatMul" and node.input[0] == layer.operand  # its channels are not those that a norm is over
        found.append(replace(layer, normed=not left and normed(model, readers, goal, axis)))
    return found


def _linear(model: Model, made: Mapping[str, NodeProto], reads: Mapping[str, int], index: int, node: NodeProto) -> Linear | None:
    """A node as a layer, if it is one whose inputs and output are floats of known shapes, and whose weight no one else reads."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in (*CONVOLUTIONS, "Gemm", "MatMul"):
        return None
    (names, turned), position = _origin(model, made, node.input[1]), 1
    if node.op_type == "MatMul" and names[-1] not in model.tensors:
        (names, turned), position = _origin(model, made, node.input[0]), 0
    weight, operand, source = names[-1], names[0], node.input[1 - position]
    tensor = model.tensors.get(weight)
    if tensor is None or tensor.data_type not in FLOATS or weight in model.copies or any(reads[name] > 1 for name in names):
        return None
    if _origin(model, made, source)[0][-1] in model.tensors:
        return None
    if source not in model.shapes or node.output[0] not in model.shapes:
        return None
    if (node.op_type == "MatMul" and len(tensor.dims) != 2) or (node.op_type == "MatMul" and len(model.shapes[source]) < 2):
        return None
    given = attributes(node)
    gemm = node.op_type == "Gemm"
    if gemm and (given.get("transA", 0) or given.get("alpha", 1.0) == 0.0):
        return None
    beta = float(given.get("beta", 1.0)) if gemm else 1.0
    addend = node.input[2] if len(node.input) > 2 and beta != 0 else ""
    bias, crossed = (_origin(model, made, addend)[0][-1], _origin(model, made, addend)[1]) if addend else ("", False)
    if gemm and _zero(model, bias):
        bias = addend = ""
    if bias and (crossed or not _one_a_channel(model.tensors.get(bias), model.shapes[node.output[0]][1])):
        return None
    return Linear(index, node.op_type, source, weight, bias, node.output[0], operand=operand, addend=addend, turned=turned, beta=beta)


def _origin(model: Model, made: Mapping[str, NodeProto], name: str) -> tuple[list[str], bool]:
    """What a matrix or a kernel is behind Identity, Cast between floats and Transpose: all names, the first one last, and whether its
    two axes are turned."""
    names, turned = [name], False
    while name in made and name not in model.tensors:
        node = made[name]
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Cast", "Identity", "Transpose"):
            break
        if node.op_type == "Cast" and attributes(node).get("to") not in FLOATS:
            break
        if node.op_type == "Transpose":
            if len(model.shapes.get(name, ())) != 2:
                break
            turned ^= list(attributes(node).get("perm") or (1, 0)) == [1, 0]
        name = node.input[0]
        names.append(name)
    return names, turned


def _with_bias(model: Model, made: Mapping[str, NodeProto], layer: Linear, reader: int) -> Linear:
    """A MatMul together with the Add of a constant along its last axis that reads it."""
    add = model.main[reader]
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx") or add.output[0] not in model.shapes:
        return layer
    addend = add.input[1 - list(add.input).index(layer.output)]
    names, turned = _origin(model, made, addend)
    if turned or names[-1] in model.copies or not _one_a_channel(model.tensors.get(names[-1]), model.shapes[layer.output][-1]):
        return layer
    return replace(layer, bias=names[-1], addend=addend, output=add.output[0], add=reader, beta=1.0)


def _zero(model: Model, bias: str) -> bool:
    """Whether it is a scalar 0, which exporters write that have no bias to give."""
    return bias in model.tensors and not model.tensors[bias].dims and not model.array(bias).any()


def _one_a_channel(bias: TensorProto | None, width: int) -> bool:
    """Whether a tensor holds a floating-point number for each place of the last axis, and nothing else."""
    return bias is not None and bias.data_type in FLOATS and list(bias.dims) == [1] * (len(bias.dims) - 1) + [width]


@dataclass(frozen=True)
class Geometry:
    """How a layer's node, of the original or of the pruned model, reads its input: attributes, and which input is the weight.

    scale: what the weight is multiplied by (Gemm's alpha); asked: the sizes that a ConvTranspose is to make, () where it says none.
    """

    op: str
    left: bool = False
    flipped: bool = False
    group: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto: str = "NOTSET"
    extra: tuple[int, ...] = ()
    scale: float = 1.0
    asked: tuple[int, ...] = ()

    @property
    def out_first(self) -> bool:
        """Whether a matrix is held as (out, in)."""
        return self.left != self.flipped

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """What a weight multiplies by as (groups, out, features), float64; features are input channels, then the kernel's places."""
        w = np.asarray(weight, np.float64)
        w = w if self.scale == 1 else w * self.scale
        if self.op == "Conv":
            return np.asarray(w.reshape(self.group, w.shape[0] // self.group, -1))
        if self.op == "ConvTranspose":
            w = w.reshape(self.group, w.shape[0] // self.group, w.shape[1], -1)
            return np.asarray(w.transpose(0, 2, 1, 3).reshape(self.group, w.shape[2], -1))
        return np.asarray((w.reshape(-1, w.shape[-1]) if self.out_first else w.T)[None])

    def features(self, weight: Sequence[int]) -> int:
        """How many there are for the shape of a weight."""
        if self.op in CONVOLUTIONS:
            inputs = weight[1] if self.op == "Conv" else weight[0] // self.group
            return inputs * math.prod(weight[2:])
        return weight[1 if self.out_first else 0]

    def weight(self, matrix: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`, in the shape and type of another weight."""
        matrix = matrix if self.scale == 1 else matrix / self.scale
        if self.op == "ConvTranspose":
            groups, out, _ = matrix.shape
            matrix = matrix.reshape(groups, out, like.shape[0] // groups, -1).transpose(0, 2, 1, 3)
        elif self.op != "Conv" and not self.out_first:
            matrix = matrix[0].T
        return np.ascontiguousarray(matrix.reshape(like.shape).astype(like.dtype))

    def rows(self, x: np.ndarray, out: tuple[int, ...], kernel: tuple[int, ...], places: np.ndarray) -> np.ndarray:
        """What the layer reads at some places of its output, (groups, rows, features).

        out: the output's shape; kernel: the kernel's sizes; places: indices into the output's flattened spatial axes (of Gemm and
        MatMul: into all axes but the channels').
        """
        if self.op not in CONVOLUTIONS:
            return np.asarray(self._flat(x)[places][None])
        spatial = out[2:]
        at = np.unravel_index(places, spatial)
        size, channels = x.shape[0], x.shape[1]
        if not size:
            return np.zeros((self.group, 0, channels // self.group * math.prod(kernel)), x.dtype)
        picked: list[np.ndarray] = []
        valid = np.ones((len(places), *([1] * len(spatial))), bool)
        before = self.before(x.shape[2:], spatial, kernel)
        for axis, (p, k) in enumerate(zip(at, kernel, strict=True)):
            offsets = np.arange(k) * self.dilations[axis]
            if self.op == "Conv":
                index = p[:, None] * self.strides[axis] - before[axis] + offsets
                inside = (index >= 0) & (index < x.shape[2 + axis])
            else:
                index = p[:, None] + before[axis] - offsets
                inside = index % self.strides[axis] == 0
                index = index // self.strides[axis]
                inside &= (index >= 0) & (index < x.shape[2 + axis])
            shape = [len(places)] + [1] * len(spatial)
            shape[1 + axis] = k
            picked.append(np.where(inside, index, 0).reshape(shape))
            valid = valid & inside.reshape(shape)
        window: tuple[Any, ...] = (slice(None), slice(None), *picked)
        found = x[window]  # (n, channels, rows, *kernel)
        if not valid.all():
            found = np.where(valid, found, x.dtype.type(0))
        found = found.reshape(size, self.group, channels // self.group, len(places), -1)
        return np.asarray(found.transpose(1, 0, 3, 2, 4).reshape(self.group, size * len(places), -1))

    def targets(self, y: np.ndarray, places: np.ndarray) -> np.ndarray:
        """What the layer makes at these places, (groups, rows, out)."""
        if self.op not in CONVOLUTIONS:
            return np.asarray(self._flat(y)[places][None])
        flat = y.reshape(y.shape[0], self.group, y.shape[1] // self.group, math.prod(y.shape[2:]))[..., places]
        return np.asarray(flat.transpose(1, 0, 3, 2).reshape(self.group, -1, y.shape[1] // self.group))

    def out(self, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for the shapes of an input and of the weight."""
        if self.op not in CONVOLUTIONS:
            wide = math.prod(weight[:-1]) if self.out_first else weight[1]
            return (*x[:-2], wide, x[-1]) if self.left else (*x[:-1], wide)
        if self.asked:
            return (x[0], weight[1] * self.group, *self.asked)
        reach = [(k - 1) * d + 1 for k, d in zip(weight[2:], self.dilations, strict=True)]
        pads = [a + b for a, b in zip(self.pads[: len(reach)], self.pads[len(reach) :], strict=True)]
        sizes = zip(x[2:], reach, self.strides, pads, self.extra, strict=True)
        if self.op == "ConvTranspose":
            whole = [((n - 1) * s + r + e, n * s, p) for n, r, s, p, e in sizes]
            made = (min(full, wanted) if self.auto in SAME else full - (0 if self.auto == "VALID" else p) for full, wanted, p in whole)
            return (x[0], weight[1] * self.group, *made)
        if self.auto in SAME:
            return (x[0], weight[0], *(-(-n // s) for n, _, s, _, _ in sizes))
        return (x[0], weight[0], *((n + (0 if self.auto == "VALID" else p) - r) // s + 1 for n, r, s, p, _ in sizes))

    def places(self, out: tuple[int, ...]) -> int:
        """How many places there are to choose from, a sample of a convolution or a batch of another layer."""
        if self.op in CONVOLUTIONS:
            return math.prod(out[2:])
        return math.prod(out) // max(1, out[-2 if self.left else -1])

    def choose(self, out: tuple[int, ...], many: int, feeds: Arrays, rng: np.random.Generator) -> np.ndarray:
        """Places, ascending, for about `many` rows of a batch; of sequences those that a mask among the feeds does not turn off."""
        count = self.places(out)
        if self.op in CONVOLUTIONS:
            many = max(1, -(-many // max(1, out[0])))
        else:
            found = live(feeds, out, count)
            if found is not None:
                return found if len(found) <= many else np.sort(rng.choice(found, many, replace=False))
        return np.arange(count) if count <= many else np.sort(rng.choice(count, many, replace=False))

    def owners(self, out: tuple[int, ...], places: np.ndarray) -> np.ndarray:
        """The sample, along axis 0, that each row at these places is of."""
        if self.op in CONVOLUTIONS:
            return np.repeat(np.arange(out[0]), len(places))
        return np.asarray(places * out[0] // max(1, self.places(out)))

    def _flat(self, x: np.ndarray) -> np.ndarray:
        x = np.swapaxes(x, -1, -2) if self.left else x
        return x.reshape(-1, x.shape[-1])

    def before(self, size: Sequence[int], spatial: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Padding before each spatial axis; size: of what is read, spatial: of what is made."""
        if self.auto not in SAME and not self.asked:
            return [0] * len(spatial) if self.auto == "VALID" else list(self.pads[: len(spatial)])
        found = []
        for axis, (n, o, k) in enumerate(zip(size, spatial, kernel, strict=True)):
            reach = (k - 1) * self.dilations[axis] + 1
            small, large = (n, o) if self.op == "ConvTranspose" else (o, n)
            total = max((small - 1) * self.strides[axis] + reach + self.extra[axis] - large, 0)
            found.append(total // 2 if self.auto == "SAME_UPPER" else total - total // 2)
        return found


def makes_along(shape: Geometry) -> int:
    """The axis of a layer's weight that what it makes runs along."""
    if shape.op == "ConvTranspose":
        return 1
    return 0 if shape.op == "Conv" or shape.out_first else 1


def geometry(node: NodeProto, operand: str, rank: int, turned: bool = False) -> Geometry:
    """How a node reads; operand: its input that is the weight, or what is made of it; rank: of its weight; turned: behind a Transpose."""
    given = attributes(node)
    if node.op_type == "Gemm":
        return Geometry("Gemm", flipped=bool(given.get("transB", 0)) ^ turned, scale=float(given.get("alpha", 1.0)))
    if node.op_type == "MatMul":
        return Geometry("MatMul", left=node.input[0] == operand, flipped=turned)
    if node.op_type in RECURRENT:
        return Geometry(node.op_type, flipped=True)
    spatial = rank - 2
    return Geometry(
        node.op_type,
        group=int(given.get("group", 1)),
        strides=tuple(given.get("strides") or [1] * spatial),
        dilations=tuple(given.get("dilations") or [1] * spatial),
        pads=tuple(given.get("pads") or [0] * 2 * spatial),
        auto=given.get("auto_pad", "NOTSET"),
        extra=tuple(given.get("output_padding") or [0] * spatial),
        asked=tuple(given.get("output_shape") or ())[-spatial:],
    )


def live(feeds: Arrays, out: tuple[int, ...], count: int) -> np.ndarray | None:
    """The places, `count` of them, of (batch, sequence) that a mask among the feeds leaves on; None where there is none."""
    kept = kept_places(feeds, lambda shape: math.prod(shape) == count and out[0] in (shape[0], count))
    return None if kept is None else np.flatnonzero(kept.ravel())


def made_by(nodes: Iterable[NodeProto]) -> dict[str, NodeProto]:
    """The node that makes each value."""
    return {out: node for node in nodes for out in node.output if out}

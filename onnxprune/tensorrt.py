"""What of a model TensorRT's ONNX parser does not take, by its table of operators: operators, types, attributes, opset.

What it takes only with optimization profiles, or in another precision than the file says, is noted.  Nothing is run: TensorRT
itself has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.importer import Model
from onnxprune.scopes import all_graphs, flow
from onnxprune.tensorrt_operators import KNOWN_TYPES, OPERATORS, OPSETS, TYPED_INPUT, VERSION

SMALL = 64  # elements; larger tensors say nothing that type inference needs
MOST_K = 3840  # of TopK


@dataclass(frozen=True)
class Finding:
    """One reason: `op` is the operator, or '' where it is about the model; where: the nodes or values; refused: False for notes."""

    op: str
    reason: str
    where: tuple[str, ...]
    refused: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"where": list(self.where)}


@dataclass(frozen=True)
class Support:
    """What TensorRT does not take of a model, and what it takes with a remark; profiles: {input: (least, usual) sizes} to give."""

    findings: tuple[Finding, ...]
    profiles: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def refused(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.refused)

    @property
    def notes(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if not f.refused)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": "tensorrt",
            "version": VERSION,
            "refused": [f.to_json() for f in self.refused],
            "notes": [f.to_json() for f in self.notes],
            "profiles": {name: {"min": list(least), "opt": list(usual)} for name, (least, usual) in self.profiles.items()},
        }


def check(model: Model) -> Support:
    """Hold a model against the table; bodies of If, Loop and Scan and its own functions too."""
    kinds, found = _types(model.proto), list(_about_the_model(model))
    functions = {(f.domain, f.name) for f in model.proto.functions}
    bodies = [*(graph.node for graph in all_graphs(model.proto.graph)), *(f.node for f in model.proto.functions)]
    for node in (node for body in bodies for node in body if (node.domain, node.op_type) not in functions):
        for reason in _reasons(node, model, kinds):
            found.append(replace(reason, where=(node.name or next((o for o in node.output if o), node.op_type),)))
    merged: dict[tuple[str, str, bool], tuple[str, ...]] = {}
    for one in found:
        key = (one.op, one.reason, one.refused)
        merged[key] = merged.get(key, ()) + one.where
    profiles = {name: _profile(model, name) for name in model.inputs if name in model.input_shapes and not all(_sizes(model, name))}
    return Support(tuple(Finding(op, reason, where, refused) for (op, reason, refused), where in merged.items()), profiles)


def check_introduced(original: ModelProto, pruned: ModelProto) -> None:
    """Raises OnnxPruneError (exit code 4) where a pruned model has operators that TensorRT lacks and the original does not have."""
    known, ours = ({(n.domain, n.op_type) for g in all_graphs(p.graph) for n in g.node} for p in (original, pruned))
    new = sorted(op for domain, op in ours - known if domain or op not in OPERATORS)
    if new:
        raise OnnxPruneError(f"the pruned model needs {', '.join(new)}, which TensorRT lacks; leave those layers out with --exclude", 4)


def _sizes(model: Model, name: str) -> tuple[int, ...]:
    """An input's sizes as the file says them, 0 where it leaves them open."""
    value = next(v for v in model.proto.graph.input if v.name == name)
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)


def _profile(model: Model, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    usual = model.input_shapes[name]
    return tuple(size or 1 for size in _sizes(model, name)), usual


def _about_the_model(model: Model) -> Iterator[Finding]:
    opset = model.opsets.get("ai.onnx", 1)
    low, high = OPSETS
    if not low <= opset <= high:
        yield Finding("", f"opset {opset} is not between {low} and {high}; convert it with onnx.version_converter", ("opset_import",))
    if model.proto.graph.sparse_initializer:
        yield Finding("", "sparse tensors", tuple(t.values.name for t in model.proto.graph.sparse_initializer))
    for value in (*model.proto.graph.input, *model.proto.graph.output):
        kind = value.type.tensor_type.elem_type
        if not value.type.HasField("tensor_type"):
            yield Finding("", "inputs and outputs that are no tensors", (value.name,))
        elif kind not in KNOWN_TYPES:
            yield Finding("", f"inputs and outputs of type {_said(kind)}", (value.name,))
        elif kind == TensorProto.DOUBLE:
            yield Finding("", "double becomes float32", (value.name,), refused=False)
    for name in model.inputs:
        if name in model.input_shapes and not all(_sizes(model, name)):
            open_axes = ", ".join(str(i) for i, size in enumerate(_sizes(model, name)) if not size)
            reason = f"needs an optimization profile, as the size of axis {open_axes} is open"
            yield Finding("", reason, (name,), refused=False)


def _said(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower() if kind in TensorProto.DataType.values() else f"number {kind}"


def _types(proto: ModelProto) -> dict[str, int]:
    """The element type of every value that onnx can tell, by name; weights are left out of the inference, which needs none of them."""
    light = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    light.graph.name = proto.graph.name or "graph"
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    light.graph.output.extend(proto.graph.output)
    given = {v.name for v in proto.graph.input}
    for tensor in proto.graph.initializer:
        if int(np.prod(tensor.dims)) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            light.graph.initializer.append(tensor)
        elif tensor.name not in given:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    with suppress(Exception):  # types stay unknown where onnx cannot say them, and are not judged
        light = onnx.shape_inference.infer_shapes(light)
    kinds = {v.name: v.type.tensor_type.elem_type for g in all_graphs(light.graph) for v in (*g.input, *g.output, *g.value_info)}
    for graph in all_graphs(proto.graph):
        kinds |= {t.name: t.data_type for t in graph.initializer}
    return kinds


def _reasons(node: NodeProto, model: Model, kinds: Mapping[str, int]) -> Iterator[Finding]:
    op = node.op_type
    if node.domain not in ("", "ai.onnx"):
        yield Finding(f"{node.domain}.{op}", "an operator of another domain, which needs a plugin", ())
        return
    if op not in OPERATORS:
        yield Finding(op, "TensorRT has no such operator", ())
        return
    kind = _kind(node, kinds)
    if kind == TensorProto.DOUBLE:
        yield Finding(op, "double becomes float32", (), refused=False)
    elif kind and kind not in OPERATORS[op]:
        more = "; quantize without QuantizeBias" if op == "DequantizeLinear" and kind == TensorProto.INT32 else ""
        yield Finding(op, f"not in type {_said(kind)}{more}", ())
    if op in LIMITS:
        for reason in LIMITS[op](Look(node, model)):
            yield Finding(op, reason, ())


def _kind(node: NodeProto, kinds: Mapping[str, int]) -> int:
    """The type that the table speaks of: that of the input, or of what a node without one makes; 0 where it is not known."""
    if node.op_type in ("Shape", "Size", "If", "Loop", "Scan"):  # sizes and bodies, of any type
        return 0
    at = TYPED_INPUT.get(node.op_type, 0)
    name = node.input[at] if len(node.input) > at else ""
    if node.op_type == "ConstantOfShape" or not name:
        name = next((o for o in node.output if o), "")
    return kinds.get(name, 0)


# what the table says of single operators besides types: functions from a node to what of it is not taken


@dataclass(frozen=True)
class Look:
    """A node, and what is known of the values around it."""

    node: NodeProto
    model: Model

    @property
    def given(self) -> dict[str, Any]:
        return attributes(self.node)

    def has(self, position: int) -> bool:
        return len(self.node.input) > position and bool(self.node.input[position])

    def rank(self, position: int = 0) -> int | None:
        shape = self.model.shapes.get(self.node.input[position]) if self.has(position) else None
        return None if shape is None else len(shape)

    def number(self, position: int) -> np.ndarray | None:
        """The values of an input that is the same for all feeds; None where it is not, or not known."""
        name = self.node.input[position] if self.has(position) else ""
        if name in self.model.tensors:
            return numpy_helper.to_array(self.model.tensors[name])
        known = self.model.folded.get(name)
        return known.number if known is not None and not known.dynamic.any() else None

    def constant(self, position: int, what: str) -> Iterator[str]:
        if self.has(position) and self.number(position) is None:
            yield f"{what} must be constant"


def _pool(look: Look) -> Iterator[str]:
    if look.rank() not in (None, 4, 5):
        yield "pools in two or three dimensions only"
    if any(d != 1 for d in look.given.get("dilations", ())):
        yield "dilations other than 1"
    if look.node.op_type == "MaxPool" and sum(map(bool, look.node.output)) > 1:
        yield "the output of indices"


def _zero_point(look: Look) -> Iterator[str]:
    zero = look.number(2)
    if zero is None and look.has(2):
        yield "the zero point must be constant"
    elif zero is not None and np.any(zero):
        yield "zero points other than 0; quantize symmetrically"


def _recurrent(look: Look) -> Iterator[str]:
    names = list(look.given.get("activations", ()))
    half = len(names) // 2
    if look.given.get("direction") == "bidirectional" and names[:half] != names[half:]:
        yield "other activations backward than forward"
    if look.node.op_type == "LSTM" and (look.given.get("input_forget", 0) or look.given.get("layout", 0)):
        yield "input_forget or layout other than 0"


def _resize(look: Look) -> Iterator[str]:
    given = look.given
    taken = {
        "coordinate_transformation_mode": ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        "mode": ("nearest", "linear"),
        "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
        "keep_aspect_ratio_policy": ("stretch",),
    }
    yield from (f"{key} {given[key]}" for key, values in taken.items() if key in given and given[key] not in values)
    if given.get("antialias", 0):
        yield "antialias"


def _attention(look: Look) -> Iterator[str]:
    if look.rank() not in (None, 4):
        yield "queries, keys and values that are not 4-D"
    if look.has(4) or look.has(5) or look.has(6):
        yield "past keys and values"
    if sum(map(bool, look.node.output)) > 1:
        yield "outputs besides the first"
    if look.given.get("softcap", 0) or "qk_matmul_output_mode" in look.given:
        yield "softcap or qk_matmul_output_mode"


def _constant_node(look: Look) -> Iterator[str]:
    yield from (key for key in ("sparse_value", "value_string", "value_strings") if key in look.given)


def _dropout(look: Look) -> Iterator[str]:
    training = look.number(2)
    if look.has(2) and (training is None or bool(np.any(training))):
        yield "training mode"


def _loop(look: Look) -> Iterator[str]:
    links = flow(look.node, look.model.opsets.get("ai.onnx", 1))
    if links is not None and links.stacked and look.number(0) is None:
        yield "outputs that grow with a number of iterations that is not constant"


def _cast(look: Look) -> Iterator[str]:
    to = int(look.given.get("to", 0))
    if to and to not in OPERATORS["Cast"] and to != TensorProto.DOUBLE:
        yield f"to type {_said(to)}"


def _top_k(look: Look) -> Iterator[str]:
    count = look.number(1)
    if count is not None and count.size and int(count.ravel()[0]) >= MOST_K:
        yield f"K of {MOST_K} or more"
    if look.given.get("sorted", 1) != 1:
        yield "sorted other than 1"


def _layer_norm(look: Look) -> Iterator[str]:
    if sum(map(bool, look.node.output)) > 1:
        yield "outputs besides the first"


def _scatter(look: Look) -> Iterator[str]:
    if look.given.get("reduction", "none") != "none":
        yield "a reduction"


def _grid_sample(look: Look) -> Iterator[str]:
    if look.rank() not in (None, 4):
        yield "inputs that are not 4-D"


def _must_be_constant(position: int, what: str) -> Callable[[Look], Iterator[str]]:
    return lambda look: look.constant(position, what)


_REDUCTIONS: Sequence[str] = [op for op in OPERATORS if op.startswith("Reduce")]
LIMITS: dict[str, Callable[[Look], Iterator[str]]] = {
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), _pool),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _zero_point),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys((*_REDUCTIONS, "Squeeze", "Unsqueeze", "CumSum", "OneHot"), _must_be_constant(1, "its second input")),
    "Attention": _attention,
    "Cast": _cast,
    "Constant": _constant_node,
    "Dropout": _dropout,
    "GridSample": _grid_sample,
    "LayerNormalization": _layer_norm,
    "Loop": _loop,
    "Resize": _resize,
    "ScatterND": _scatter,
    "TopK": _top_k,
}

"""Step 3b: whole residual branches as units: conv blocks, attention, MLPs that an Add joins to the trunk.

A branch can be cut from its Add where zeros in its last projections make it exactly zero: the Add is then the trunk alone, and
what only the branch needed is dead.  So a branch is a group of one unit whose places are all of those tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from onnxprune.cost import COUNTED, count, mac_terms
from onnxprune.folding import attributes
from onnxprune.grouping import Branch, Group, Grouping, Member
from onnxprune.importer import FLOATS, Model
from onnxprune.liveness import Liveness
from onnxprune.naming import branch_name

Tensors = dict[str, None]  # in the order found

# operators whose result is zero where their first input is
_KEEPS_ZERO = {
    *("Abs", "Asin", "Asinh", "Atan", "AveragePool", "Cast", "Ceil", "Celu", "DepthToSpace", "Dropout", "Elu", "Erf", "Expand"),
    *("Flatten", "Floor", "Gather", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "Identity", "LeakyRelu", "MaxPool"),
    *("Mish", "Neg", "PRelu", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Round", "Selu", "Sign", "Sin"),
    *("Sinh", "Slice", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Tan", "Tanh", "Tile", "Transpose", "Unsqueeze"),
    *("com.microsoft:FastGelu", "com.microsoft:Gelu", "com.microsoft:QuickGelu"),
}
_SUMS = {"Add", "Concat", "Mean", "Sub", "Sum"}  # zero where all of their inputs are
NORMS = {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
_BIASED = {"Conv", "ConvTranspose", "Gemm"}


def with_branches(grouping: Grouping) -> Grouping:
    """The grouping with a group of kind "block" for every residual branch that can be cut, after those that it has."""
    finder = _Finder(grouping.model)
    start = max((g.id for g in grouping.groups), default=-1) + 1
    found = [one for node in grouping.model.main if (one := finder.branch(node)) is not None]
    blocks = [
        Group(
            start + i,
            1,
            "block",
            False,
            tuple(finder.member(name) for name in tensors),
            (),
            branch,
            branch_name(branch.layers, branch.output),
        )
        for i, (branch, tensors) in enumerate(found)
    ]
    return replace(grouping, groups=(*grouping.groups, *blocks))


class _Finder:
    """Looks at one Add after the other."""

    def __init__(self, model: Model) -> None:
        self.model, self.liveness = model, Liveness(model)
        self.order = {id(node): i for i, node in enumerate(model.main)}
        self.macs = {where: count(model, [(factor, axes, where)]) for factor, axes, where in mac_terms(model)}
        self.outward: dict[str, int] = {}  # for a layer's weight, the axis that it does not sum over
        self.constant = set(model.tensors) - self.liveness.defaults
        self.roots: dict[str, frozenset[str]] = {}  # of a constant that nodes compute, the tensors that it comes from
        self.above = {name: 1 << i for i, name in enumerate(model.inputs)}  # bit i: value i is this one or an ancestor of it
        for node in model.main:
            self._place(node)

    def _place(self, node: NodeProto) -> None:
        for position, name in enumerate(node.input):
            axis = outward(node, position)
            if name in self.model.tensors and axis is not None:
                self.outward[name] = axis % max(1, len(self.model.tensors[name].dims))
        reads, outs = self.liveness.inputs(node), [out for out in node.output if out]
        if node.op_type in ("Shape", "Size") or all(name in self.constant for name in reads):
            self.constant.update(outs)
            roots = frozenset[str]().union(*(self.roots.get(x, frozenset((x,))) for x in reads))
            self.roots.update((out, roots or frozenset((out,))) for out in outs)
            return
        past = 0
        for name in reads:
            past |= self.above.get(name, 0)
        for out in outs:
            self.above[out] = past | 1 << len(self.above)

    def _after(self, name: str, other: str) -> bool:
        """Whether a value that data makes is the other one, or computed from it."""
        return other in self.above and bool(self.above.get(name, 0) >> self.above[other].bit_length() - 1 & 1)

    def member(self, name: str) -> Member:
        """All of a tensor, as the one unit of a group."""
        dims = self.model.tensors[name].dims
        axis = self.outward.get(name, int(np.argmax(dims)))
        return Member(name, axis, np.arange(dims[axis])[None, :])

    def branch(self, node: NodeProto) -> tuple[Branch, Tensors] | None:
        """The branch that this Add can lose, and the tensors that make it zero; of two the one with more work in it."""
        if node.op_type not in ("Add", "Sum") or node.domain not in ("", "ai.onnx") or len(node.input) != 2:
            return None
        output, shapes, found = node.output[0], self.model.shapes, []
        for operand, trunk in (tuple(node.input), tuple(node.input)[::-1]):
            same = operand in shapes and shapes[operand] == shapes.get(trunk) == shapes.get(output)
            if operand == trunk or not same or operand in self.constant or trunk in self.constant:
                continue
            dead = self.liveness.without([Branch(output, trunk, operand)])
            makers = {id(n): n for v in dead if (n := self.liveness.makers.get(v)) is not None}
            inside = sorted(makers.values(), key=lambda n: self.order[id(n)])
            layers = sum(n.op_type in COUNTED for n in inside)
            if not layers or not self._residual(inside, trunk, dead):
                continue
            tensors = self._zeroing(operand, inside, dead)
            if tensors:
                found.append((Branch(output, trunk, operand, dead, layers), tensors))
        return max(found, key=lambda one: sum(self.macs.get(v, 0) for v in one[0].dead), default=None)

    def _residual(self, inside: Sequence[NodeProto], trunk: str, dead: frozenset[str]) -> bool:
        """Whether the branch and the trunk start from the same data."""
        outside = {name for node in inside for name in self.liveness.inputs(node)} - dead
        return any(self.above.get(name, 0) & self.above.get(trunk, 0) for name in outside)

    def _zeroing(self, operand: str, inside: Sequence[NodeProto], dead: frozenset[str]) -> Tensors | None:
        """The tensors whose zeros make the operand zero whatever the input; none of them is read outside of the branch."""
        known: dict[str, Tensors] = {}
        for name in dead & self.constant:
            tensor = self.model.tensors.get(name)
            if tensor is not None and tensor.data_type in FLOATS and len(tensor.dims) and min(tensor.dims):
                if name not in self.model.copies:
                    known[name] = {name: None}
                elif not self.model.array(name).any():
                    known[name] = {}  # zero as it is
        for node in inside:
            if node.op_type == "Constant":
                continue
            tensors = self._zero_after(node, known)
            if tensors is not None:
                outs = node.output if node.op_type == "Split" else node.output[:1]
                known.update((out, tensors) for out in outs if out)
        return known.get(operand)

    def _zero_after(self, node: NodeProto, known: Mapping[str, Tensors]) -> Tensors | None:
        """The tensors that make the node's result zero, where `known` are those that make its inputs so."""
        inputs = [name for name in node.input if name]
        op = f"{node.domain}:{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type

        def every(names: Sequence[str]) -> Tensors | None:
            return {t: None for name in names for t in known[name]} if all(name in known for name in names) else None

        if op in _BIASED:
            return every(inputs[1:]) if inputs[1] in self.constant else None
        if op in ("MatMul", "Einsum"):
            return next((known[name] for name in inputs if name in known and name in self.constant), None)
        if op in ("Mul", "Div"):  # LayerScale and gates multiply what may be zero by itself
            factors = sorted(inputs, key=lambda name: name in self.constant) if op == "Mul" else inputs[:1]
            made = known.get(inputs[0], {})
            if op == "Div" and any(known[name].keys() & made.keys() for name in known if self._after(inputs[1], name)):
                return None  # zero by its own norm
            for name in factors:
                others = frozenset[str]().union(*(self.roots.get(x, frozenset()) for x in inputs if x != name))
                if name in known and not others.intersection(known[name]):  # a weight over its own norm is not zero
                    return known[name]
            return None
        if op in NORMS and len(node.output) == 1 and not attributes(node).get("training_mode"):
            affine = every(inputs[1:3])
            return (every(inputs[:1]) or {}) | affine if affine else None
        if op == "DequantizeLinear":
            before = self.liveness.makers.get(inputs[0])
            if before is not None and before.op_type == "QuantizeLinear" and list(before.input[1:]) == list(node.input[1:]):
                return known.get(before.input[0])
            return known.get(inputs[1])  # a scale of zero
        if op in _SUMS:
            return every(inputs)
        return known.get(inputs[0]) if op in _KEEPS_ZERO and inputs else None


def outward(node: NodeProto, position: int) -> int | None:
    """The axis of a layer's weight at this input along which its outputs lie."""
    if node.op_type in ("Conv", "ConvTranspose") and position == 1:
        return 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm" and position == 1:
        return 0 if attributes(node).get("transB") else 1
    return (-2, -1)[position] if node.op_type == "MatMul" else None

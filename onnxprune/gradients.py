"""Reverse mode: from how a loss changes with some values of a graph to how it changes with its weights, as a graph of its own.

The nodes are taken last first; what one passes back to each value that it reads says its rule in `adjoints`, in operators again, so
that onnxruntime runs the backward pass as it runs the forward one:

    @adjoint("Sigmoid")
    def sigmoid(site):
        return (site.g * site.y[0] * (1 - site.y[0]),)

Nothing is guessed: a node without a rule passes nothing back, and weights before it are left out, as they would get a part of their
gradient only.  (Reverse accumulation: Linnainmaa 1976; rules of one line an operator as in HIPS autograd.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.folding import attributes
from onnxprune.scopes import captured

OPSET, IR = 18, 8
PREFIX = "∂/"  # of the names that are made here
Operand = "Value | float | int"


class NoRuleError(Exception):
    """What a node passes back is not known, as it stands here."""


@dataclass
class Tape:
    """The nodes of a graph that is being written, and its constants by name; prefix: of the names that it makes."""

    prefix: str = PREFIX
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def op(self, kind: str, *inputs: Value | None, output: int = 0, **given: Any) -> Value:
        """A node's output of this number."""
        name = f"{self.prefix}{len(self.nodes)}"
        made = [f"{name}.{i}" for i in range(output)] + [name]
        self.nodes.append(helper.make_node(kind, [v.name if v else "" for v in inputs], made, **given))
        return Value(self, name)

    def constant(self, array: Any, dtype: type = np.float32) -> Value:
        name = f"{self.prefix}constant {len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(array, dtype), name)
        return Value(self, name)

    def integers(self, numbers: Iterable[int]) -> Value:
        return self.constant(list(numbers), np.int64)


@dataclass(frozen=True)
class Value:
    """A value of the graph that is being written, or one of the forward pass that it reads."""

    tape: Tape
    name: str

    def _other(self, other: Value | float) -> Value:
        return other if isinstance(other, Value) else self.tape.constant(other)

    def __add__(self, other: Value | float) -> Value:
        return self.tape.op("Add", self, self._other(other))

    def __sub__(self, other: Value | float) -> Value:
        return self.tape.op("Sub", self, self._other(other))

    def __rsub__(self, other: float) -> Value:
        return self.tape.op("Sub", self._other(other), self)

    def __mul__(self, other: Value | float) -> Value:
        return self.tape.op("Mul", self, self._other(other))

    def __truediv__(self, other: Value | float) -> Value:
        return self.tape.op("Div", self, self._other(other))

    def __matmul__(self, other: Value) -> Value:
        return self.tape.op("MatMul", self, other)

    def __neg__(self) -> Value:
        return self.tape.op("Neg", self)

    def reshape(self, shape: Sequence[int]) -> Value:
        return self.tape.op("Reshape", self, self.tape.integers(shape), allowzero=1)

    def transpose(self, order: Sequence[int]) -> Value:
        return self if list(order) == list(range(len(order))) else self.tape.op("Transpose", self, perm=list(order))

    def sum(self, axes: Sequence[int], keepdims: bool = True) -> Value:
        return self.tape.op("ReduceSum", self, self.tape.integers(axes), keepdims=int(keepdims)) if axes else self

    def mean(self, axes: Sequence[int]) -> Value:
        return self.tape.op("ReduceMean", self, self.tape.integers(axes), keepdims=1) if axes else self

    def part(self, axis: int, start: int, stop: int) -> Value:
        """From `start` up to `stop` along an axis."""
        bounds = (self.tape.integers([n]) for n in (start, stop, axis))
        return self.tape.op("Slice", self, *bounds)

    def where(self, condition: Value) -> Value:
        """0 where a condition does not hold."""
        return self.tape.op("Where", condition, self, self.tape.constant(0.0))


@dataclass(frozen=True)
class Site:
    """A node with what is known of it, for a rule.

    shapes, arrays: of the values of the forward pass (of floats: the constant ones alone); gs: how the loss changes with each output,
    None where it does not.
    """

    node: NodeProto
    tape: Tape
    opset: int
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, np.ndarray]
    gs: tuple[Value | None, ...]

    @property
    def x(self) -> tuple[Value, ...]:
        return tuple(Value(self.tape, name) for name in self.node.input)

    @property
    def y(self) -> tuple[Value, ...]:
        return tuple(Value(self.tape, name) for name in self.node.output)

    @property
    def g(self) -> Value:
        """How the loss changes with the first output, for rules of operators with one."""
        if self.gs[0] is None or any(g is not None for g in self.gs[1:]):
            raise NoRuleError
        return self.gs[0]

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Of an input."""
        return self._shape(self.node.input[position])

    @property
    def out(self) -> tuple[int, ...]:
        """The first output's shape."""
        return self._shape(self.node.output[0])

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise NoRuleError
        return self.shapes[name]

    def has(self, position: int) -> bool:
        return len(self.node.input) > position and bool(self.node.input[position])

    def array(self, position: int) -> np.ndarray:
        """The numbers of an input that do not depend on the samples, or only on their sizes."""
        name = self.node.input[position] if self.has(position) else ""
        if name not in self.arrays:
            raise NoRuleError
        return self.arrays[name]

    @property
    def attributes(self) -> dict[str, Any]:
        return attributes(self.node)

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def text(self, name: str, default: str) -> str:
        """Of an attribute."""
        return str(self.get(name, default))

    def fit(self, position: int, value: Value, shape: Sequence[int] | None = None) -> Value:
        """Summed over what was broadcast of an input; shape: of the value, by default the output's."""
        shape = tuple(self.out if shape is None else shape)
        target = self.shape(position)
        if shape == target:
            return value
        lead = len(shape) - len(target)
        axes = [i for i, n in enumerate(shape) if i < lead or (target[i - lead] == 1 and n != 1)]
        return value.sum(axes).reshape(target)


Rule = Callable[[Site], Sequence["Value | None"]]
RULES: dict[str, Rule] = {}


def adjoint(*operators: str) -> Callable[[Rule], Rule]:
    """Register what operators pass back: a function of a `Site` that gives a value, or None, for each input (missing ones: None)."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


@dataclass(frozen=True)
class Backward:
    """A graph from values of the forward pass and the changes `starts` (value: input) to the changes `weights` (tensor: output).

    reads: the values of the forward pass that it takes, weights among them.
    """

    model: ModelProto
    starts: Mapping[str, str]
    reads: tuple[str, ...]
    weights: Mapping[str, str]


def backward(
    proto: ModelProto,
    ends: Collection[str],
    weights: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, np.ndarray],
    floats: Collection[str],
    kinds: Mapping[str, int] | None = None,
) -> Backward:
    """The backward pass of a model's main graph from some of its values to those of the weights whose gradient is known in full.

    shapes: of every value and tensor; arrays: those that do not depend on what the samples are; floats: the values and tensors that
    are floating-point numbers; kinds: the types (of `TensorProto`) of the others, by default truth values.  What has no shape (a
    sequence) may hold floats.
    """
    tape = Tape()
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    known: dict[str, list[Value]] = {end: [Value(tape, f"{PREFIX}start {i}")] for i, end in enumerate(ends)}
    starts = {end: changes[0].name for end, changes in known.items()}
    broken: set[str] = set()  # values on whose way to an end a rule is missing
    for node in reversed(proto.graph.node):
        read = [name for name in (*node.input, *captured(node)) if name in floats or (name and name not in shapes)]
        made = [name for name in node.output if name]
        if broken.intersection(made):
            broken.update(read)
        gs = tuple(_total(tape, known, name) for name in node.output)
        if not any(gs) or not read:
            continue
        try:
            back = _passed(Site(node, tape, opset, shapes, arrays, gs))
        except NoRuleError:
            broken.update(read)
            continue
        for name, change in zip(node.input, back, strict=False):
            if change is not None and name in floats:
                known.setdefault(name, []).append(change)
        broken.update(set(read) - {name for name, change in zip(node.input, back, strict=False) if change is not None})
    found = {name: total for name in weights if name not in broken and (total := _total(tape, known, name)) is not None}
    return _assembled(tape, {name: value.name for name, value in found.items()}, starts, proto, set(weights), shapes, floats, kinds or {})


def _passed(site: Site) -> Sequence[Value | None]:
    if site.node.domain not in ("", "ai.onnx") or site.node.op_type not in RULES:
        raise NoRuleError
    return RULES[site.node.op_type](site)


def _total(tape: Tape, known: dict[str, list[Value]], name: str) -> Value | None:
    """All that was passed back to a value."""
    changes = known.get(name, [])
    if len(changes) > 1:
        known[name] = [tape.op("Sum", *changes)]
    return known[name][0] if changes else None


def _assembled(
    tape: Tape,
    weights: Mapping[str, str],
    starts: Mapping[str, str],
    proto: ModelProto,
    changing: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    floats: Collection[str],
    kinds: Mapping[str, int],
) -> Backward:
    """The nodes that the weights' changes need, in order, with inputs and outputs; tensors that never change are constants."""
    needed, alive = set(weights.values()), []
    for node in reversed(tape.nodes):
        if needed.intersection(node.output):
            alive.append(node)
            needed.update((*node.input, *captured(node)))
    made = {name for node in alive for name in node.output}
    model = ModelProto(ir_version=IR, opset_import=[helper.make_opsetid("", OPSET)])
    graph = model.graph
    graph.name = "backward"
    graph.node.extend(reversed(alive))
    fixed = {t.name: t for t in proto.graph.initializer if t.name not in changing} | tape.constants
    graph.initializer.extend(tensor for name, tensor in fixed.items() if name in needed)
    given = sorted(needed - made - set(fixed) - {""})
    mine = {name: end for end, name in starts.items()}
    for name in given:  # what rules read is float, but for the conditions of Where and the places of Gather
        kind = TensorProto.FLOAT if name in mine or name in floats else kinds.get(name, TensorProto.BOOL)
        graph.input.append(helper.make_tensor_value_info(name, kind, shapes[mine.get(name, name)]))
    ends = {value: name for name, value in weights.items()}
    graph.output.extend(helper.make_tensor_value_info(value, TensorProto.FLOAT, shapes[name]) for value, name in ends.items())
    used = {end: name for end, name in starts.items() if name in given}
    return Backward(model, used, tuple(name for name in given if name not in mine), weights)

"""Sequences of tensors of one shape: a sequence is taken for a value with the axes of its elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from onnxprune.folding import attributes
from onnxprune.scopes import Flow

Partial = tuple[int | None, ...]
MAKERS = {"SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SplitToSequence"}


class Sequences:
    """The sequences of a model, those that may hold one another's elements together."""

    def __init__(self, nodes: Sequence[NodeProto], flows: Sequence[tuple[NodeProto, Flow]]) -> None:
        self._nodes = [n for n in nodes if n.op_type in MAKERS]
        self._one: dict[str, str] = {n.output[0]: n.output[0] for n in self._nodes}
        self._foreign: set[str] = set()
        if not self._nodes:
            return
        ties = [(n.input[0], n.output[0]) for n in nodes if n.op_type in ("Identity", "SequenceErase", "SequenceInsert")]
        for _, links in flows:
            ties += [(names[0], other) for names in links.carried for other in names[1:] if other]
            ties += [(value, other) for value, names in links.chosen for other in names if value]
        more = True
        while more:  # a tie of tensors is none of sequences until one side is known to be one
            more = False
            for left, right in ties:
                if (left in self._one or right in self._one) and self._find(left) != self._find(right):
                    self._one[self._find(left)] = self._find(right)
                    more = True
        made = set(self._one) & {o for n in nodes if n.op_type in (*MAKERS, "Identity") for o in n.output}
        made |= {name for _, links in flows for names in links.carried for name in (names[1], names[3])}
        self._foreign = set(self._one) - made - {value for _, links in flows for value, _ in links.chosen}
        self._readers = [n for n in nodes if n.op_type in ("ConcatFromSequence", "SequenceAt")]

    def _find(self, name: str) -> str:
        self._one.setdefault(name, name)
        while self._one[name] != name:
            name = self._one[name]
        return name

    def shapes(self, found: Mapping[str, Partial]) -> dict[str, Partial]:
        """The elements' sizes of every sequence all of whose elements have the same."""
        elements: dict[str, set[Partial | None]] = {self._find(name): {None} for name in self._foreign}
        for node in self._nodes:
            held = elements.setdefault(self._find(node.output[0]), set())
            if node.op_type == "SequenceConstruct":
                held |= {found.get(name) for name in node.input}
            elif node.op_type == "SequenceInsert":
                held.add(found.get(node.input[1]))
            elif node.op_type == "SplitToSequence":
                held.add(_split(node, found.get(node.input[0])))
        shapes = {web: next(iter(held)) for web, held in elements.items() if len(held) == 1}
        return {name: shape for name in list(self._one) if (shape := shapes.get(self._find(name))) is not None}

    def read(self, found: Mapping[str, Partial]) -> dict[str, Partial]:
        """The shapes of the tensors that are made of sequences."""
        if not self._nodes:
            return {}
        shapes, passed = self.shapes(found), dict[str, Partial]()
        for node in self._readers:
            shape, given = shapes.get(node.input[0]), attributes(node)
            if shape is None:
                continue
            if node.op_type == "SequenceAt":
                passed[node.output[0]] = shape
            elif given.get("new_axis", 0):
                place = given["axis"] % (len(shape) + 1)
                passed[node.output[0]] = (*shape[:place], None, *shape[place:])
            elif shape:
                place = given["axis"] % len(shape)
                passed[node.output[0]] = (*shape[:place], None, *shape[place + 1 :])
        return passed


def _split(node: NodeProto, shape: Partial | None) -> Partial | None:
    """Pieces of size 1, or of a size that is not followed."""
    if not shape:
        return None
    given = attributes(node)
    place = given.get("axis", 0) % len(shape)
    if len(node.input) > 1 and node.input[1]:
        return (*shape[:place], None, *shape[place + 1 :])
    return (*shape[:place], *([1] if given.get("keepdims", 1) else []), *shape[place + 1 :])

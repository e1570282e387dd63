"""Shapes that control flow nodes pass between the outside and their bodies.

What an iteration carries is taken to keep its shape until the body's own output says otherwise; a claim that the body
does not confirm is given up.  None is a size that is not known, or not the same in every iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto

from onnxprune.folding import Folded
from onnxprune.scopes import Flow, all_graphs, flow, taken, trips
from onnxprune.sequences import Partial, Sequences


def opset_of(proto: ModelProto) -> int:
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)


def _merged(left: Partial, right: Partial) -> Partial | None:
    """The sizes that both have; None where the ranks differ."""
    if len(left) != len(right):
        return None
    return tuple(a if a == b else None for a, b in zip(left, right, strict=True))


class Passing:
    """flows: the control flow nodes that are understood; types: element types by name."""

    def __init__(self, nodes: Sequence[NodeProto], proto: ModelProto, types: Mapping[str, int]) -> None:
        opset = opset_of(proto)
        self.flows: list[tuple[NodeProto, Flow]] = [(node, found) for node in nodes if (found := flow(node, opset)) is not None]
        self._control = {o for node, _ in self.flows for o in node.output if o}
        self._makers = {o: node for node in nodes for o in node.output if o} if self.flows else {}
        self.types = dict(types)
        self._declared: dict[str, Partial] = {}
        for graph in all_graphs(proto.graph) if self.flows else ():
            for value in (*graph.input, *graph.output, *graph.value_info):
                kind = value.type.tensor_type
                if value.type.HasField("tensor_type") and kind.elem_type:
                    self.types.setdefault(value.name, kind.elem_type)
                    self._declared[value.name] = tuple(d.dim_value or None for d in kind.shape.dim)
        self.sequences = Sequences(nodes, self.flows)
        self._found: Mapping[str, Partial] = {}
        self._limits: dict[str, Partial | None] = {}

    def understands(self, node: NodeProto) -> bool:
        return any(o in self._control for o in node.output)

    def shapes(self, folded: Mapping[str, Folded]) -> dict[str, Partial]:
        """Of the bodies' inputs and the nodes' outputs, out of what was learnt last."""
        found, passed = self._found, self.sequences.read(self._found)
        for node, links in self.flows:
            for initial, inner, after, last in links.carried:
                if (claim := self._claim(initial, inner)) is not None:
                    passed[inner] = claim
                    if last and after in found and (end := _merged(claim, found[after])) is not None:
                        passed[last] = end
            for outside, inner, axis in links.sliced:
                if found.get(outside):
                    place = axis % len(found[outside])
                    passed[inner] = (*found[outside][:place], *found[outside][place + 1 :])
            times = trips(node, links, found, folded, self._makers)
            for outside, inner, axis in links.stacked:
                if inner in found and outside:
                    place = axis % (len(found[inner]) + 1)
                    passed[outside] = (*found[inner][:place], times, *found[inner][place:])
            branch = taken(node, folded)
            for outside, names in links.chosen:
                several = [found.get(name) for name in (names if branch is None else names[branch : branch + 1])]
                shape = several[0]
                for other in several[1:]:
                    shape = _merged(shape, other) if shape is not None and other is not None else None
                if shape is not None and outside:
                    passed[outside] = shape
            for name in links.counted:
                passed[name] = self._declared.get(name, ())
            self._type(links)
        return passed

    def _claim(self, initial: str, inner: str) -> Partial | None:
        if initial not in self._found:
            return None
        limit = self._limits.get(inner, self._found[initial])
        return None if limit is None else _merged(self._found[initial], limit)

    def _type(self, links: Flow) -> None:
        """A value and what it is in the body have one element type."""
        pairs = [(outside, inner) for initial, body, after, last in links.carried for outside, inner in ((initial, body), (last, after))]
        pairs += [(outside, inner) for outside, inner, _ in (*links.sliced, *links.stacked)]
        pairs += [(outside, inner) for outside, names in links.chosen for inner in names]
        for pair in pairs:
            for one, other in (pair, pair[::-1]):
                if one in self.types and other:
                    self.types.setdefault(other, self.types[one])

    def learn(self, found: Mapping[str, Partial]) -> None:
        """Take note of the shapes that were found."""
        self._found = found

    def confirmed(self) -> bool:
        """Whether each claim is what the body gives in the end; those that are not are withdrawn, and all has to be found anew."""
        wrong: dict[str, Partial | None] = {}
        for _, links in self.flows:
            for initial, inner, after, _ in links.carried:
                claim, end = self._claim(initial, inner), self._found.get(after)
                agreed = None if claim is None or end is None else _merged(claim, end)
                if claim is not None and agreed != claim:
                    wrong[inner] = agreed
        self._limits |= wrong
        self._found = {} if wrong else self._found
        return not wrong

    def give_up(self) -> None:
        """Nothing is claimed any more."""
        self._limits = {inner: None for _, links in self.flows for _, inner, _, _ in links.carried}
        self._found = {}

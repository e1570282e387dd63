"""What nothing reads any more once residual branches are cut from their Adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from onnx import NodeProto

from onnxprune.grouping import Branch
from onnxprune.importer import Model
from onnxprune.scopes import captured


class Liveness:
    """How often every value of the main graph is read: by nodes, inside their subgraphs, and as a graph output."""

    def __init__(self, model: Model) -> None:
        self.makers: dict[str, NodeProto] = {out: node for node in model.main for out in node.output if out}
        self.inner = {id(node): captured(node) for node in model.main}
        self.reads: Counter[str] = Counter(model.outputs)
        # since IR version 4 an initializer that is also an input is a default that others may replace
        self.defaults = {v.name for v in model.proto.graph.input} & set(model.tensors) if model.proto.ir_version >= 4 else set()
        self.reads.update(self.defaults)
        for node in model.main:
            self.reads.update(self.inputs(node))

    def inputs(self, node: NodeProto) -> list[str]:
        """Every name that the node reads, as often as it does."""
        return [name for name in (*node.input, *self.inner[id(node)]) if name]

    def without(self, cuts: Collection[Branch]) -> frozenset[str]:
        """The values and tensors that nothing reads once all of these branches are cut."""
        left: dict[str, int] = {}
        dead: set[str] = set()
        trunks = {cut.output: cut.trunk for cut in cuts}
        waiting = [cut.operand for cut in cuts]
        while waiting:
            name = waiting.pop()
            left[name] = left.get(name, self.reads[name]) - 1
            if left[name]:
                continue
            dead.add(name)
            node = self.makers.get(name)
            # a node goes when the last of its outputs does
            if node is None or any(out and out not in dead and self.reads[out] for out in node.output):
                continue
            dead |= {out for out in node.output if out}
            waiting += [trunks[name]] if name in trunks else self.inputs(node)
        return frozenset(dead)

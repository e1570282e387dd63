"""A model run further and further: what later values are made of is kept for each batch, so that a run starts where the last one ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto

from onnxprune.capture import Tap, unquantized
from onnxprune.running import Arrays
from onnxprune.scopes import captured

Run = Callable[[int, Arrays], Arrays]
ROOM = 2**29  # bytes to keep, at most: where it is more, runs start from further back


class Frontier:
    """What is known of a model on `total` batches, which are the same each time.

    The values that some nodes make and others read, where the first have run and will make the same again.
    """

    def __init__(self, total: int, room: int = ROOM) -> None:
        self._total, self._room = total, room
        self.forget()

    def forget(self) -> None:
        """The model has changed before where it was run to."""
        self._kept: list[dict[str, np.ndarray]] = [{} for _ in range(self._total)]
        self._done: set[str] = set()

    def change(self, node: NodeProto) -> None:
        """A node is about to be another than it was."""
        if _name(node.output) in self._done:
            self.forget()

    def kept(self, number: int) -> dict[str, np.ndarray]:
        """The values that are known of a batch."""
        return {name: array for name, array in self._kept[number].items() if all(name in kept for kept in self._kept)}

    def advance(self, proto: ModelProto, changing: Collection[str], batches: Iterable[Arrays]) -> None:
        """Run a model as far as nothing that is changing goes into it."""
        before = self._done
        run = self.tap(proto, _crossing(proto, before | _settled(proto, changing)), changing)
        for number, feeds in enumerate(batches):
            run(number, feeds)
            if self._done is before:
                return  # there is no room for more

    def on(self, proto: ModelProto, other: ModelProto) -> Frontier:
        """One of another model that begins where this one of `proto` is, and keeps no more; from the inputs if they differ before."""
        found = Frontier(self._total, 0)
        nodes, one, two = {_name(node.output): node for node in proto.graph.node}, _tensors(proto), _tensors(other)
        before = [node for node in other.graph.node if _name(node.output) in self._done]
        read = {name for node in before for name in (*node.input, *captured(node))}
        alike = all(_same(node, nodes[_name(node.output)]) for node in before) and all(one.get(name) == two.get(name) for name in read)
        if not alike or list(proto.functions) != list(other.functions):
            return found
        found._kept, found._done = [dict(kept) for kept in self._kept], set(self._done)
        return found

    def look(self, proto: ModelProto, values: Iterable[str]) -> Run:
        """What `tap` gives, from where the last run ended and without going on from there: any batches, in any order."""
        known = _types(self.kept(0))
        tap = Tap(unquantized(proto), values, known=known)

        def run(number: int, feeds: Arrays) -> Arrays:
            return tap.run({**feeds, **{name: self._kept[number][name] for name in known}})

        return run

    def tap(self, proto: ModelProto, values: Iterable[str], changing: Collection[str] = ()) -> Run:
        """A function (number of the batch, its feeds) -> {value: array}, to be called for each batch.

        changing: tensors and values that may be others at the next call; all else of the model stays.  Raises OnnxPruneError
        (exit code 4) where onnxruntime does not take the model, and the function where it does not run it.
        """
        values = list(dict.fromkeys(values))
        done = self._done | (_behind(proto, values) & _settled(proto, changing))
        known = _types(self.kept(0))
        proto = unquantized(proto)
        keep = _crossing(proto, done) if self._room else []
        tap = Tap(proto, [*values, *keep], known=known)
        keeping = bool(keep) and not tap.others

        def run(number: int, feeds: Arrays) -> Arrays:
            nonlocal keeping
            found = tap.run({**feeds, **{name: self._kept[number][name] for name in known}})
            if keeping and number == 0:
                keeping = sum(found[name].nbytes for name in keep) * self._total <= self._room
                self._done = done if keeping else self._done
            if keeping:
                self._kept[number] = {name: found[name] for name in keep}
            return found

        return run


def _types(kept: Mapping[str, np.ndarray]) -> dict[str, np.dtype[Any]]:
    return {name: array.dtype for name, array in kept.items()}


def _same(one: NodeProto, other: NodeProto) -> bool:
    """Whether two nodes do the same to the same values, however they are written."""

    def content(node: NodeProto) -> list[object]:
        given = {a.name: a.SerializeToString(deterministic=True) for a in node.attribute}
        return [node.op_type, "" if node.domain == "ai.onnx" else node.domain, list(node.input), list(node.output), given]

    return content(one) == content(other)


def _tensors(proto: ModelProto) -> dict[str, TensorProto | SparseTensorProto]:
    return {**{t.name: t for t in proto.graph.initializer}, **{t.values.name: t for t in proto.graph.sparse_initializer}}


def _behind(proto: ModelProto, values: Iterable[str]) -> set[str]:
    """The nodes, by their first output, that some values are made by."""
    needed, found = set(values), set[str]()
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            found.add(_name(node.output))
            needed |= (set(node.input) | captured(node)) - {""}
    return found


def _settled(proto: ModelProto, changing: Collection[str]) -> set[str]:
    """The nodes that nothing which changes goes into."""
    moved, found = set(changing), set[str]()
    for node in proto.graph.node:
        if moved.intersection(node.output) or moved.intersection(node.input) or moved & captured(node):
            moved.update(node.output)
        else:
            found.add(_name(node.output))
    return found


def _crossing(proto: ModelProto, done: set[str]) -> list[str]:
    """What these nodes make of the inputs for others."""
    varying = {v.name for v in proto.graph.input} - {t.name for t in proto.graph.initializer}
    made, read = dict[str, None](), set[str]()
    for node in proto.graph.node:
        given = set(node.input) | captured(node)
        if given & varying:
            varying.update(name for name in node.output if name)
        if _name(node.output) in done:
            made.update((name, None) for name in node.output if name in varying)
        else:
            read |= given
    return [name for name in made if name in read]


def _name(outputs: Iterable[str]) -> str:
    return next((name for name in outputs if name), "")

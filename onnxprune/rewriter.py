"""Step 7: slice every tensor, mend every number that says a size, and leave a dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune import layouts
from onnxprune.assembly import assemble, copy_field
from onnxprune.errors import OnnxPruneError
from onnxprune.external import kept
from onnxprune.folding import Folded, fold
from onnxprune.grouping import Branch, Grouping
from onnxprune.importer import Model
from onnxprune.layouts import Dim, find
from onnxprune.relations import Axis, Mend, Reorder
from onnxprune.scopes import captured, flow

Remove = Mapping[int, np.ndarray]


class Widths:
    """Which indices of every axis stay."""

    def __init__(self, grouping: Grouping, remove: Remove) -> None:
        self.grouping, self.remove = grouping, remove
        self._kept: dict[Dim, np.ndarray] = {}
        for group in grouping.groups:
            if len(remove.get(group.id, ())) and group.branch is None:
                mask = np.ones(group.units, bool)
                mask[np.asarray(remove[group.id])] = False
                start = 0
                for leaf in group.leaves:
                    self._kept[leaf] = mask[start : start + leaf.size]
                    start += leaf.size
        self._masks: dict[Dim, np.ndarray | None] = {}

    def mask(self, axis: Axis) -> np.ndarray | None:
        """(size,) bool; None where all stay."""
        dim = self.grouping.dims.get(axis)
        if dim is None:
            return None
        root = find(dim)
        if root not in self._masks:
            layout = layouts.resolve(root)
            touched = any(leaf in self._kept for leaf in layouts.leaves(layout))
            mask = layouts.alive(layout, self._kept) if touched else None
            self._masks[root] = None if mask is None or mask.all() else mask
        return self._masks[root]

    def size(self, axis: Axis) -> int:
        mask = self.mask(axis)
        return int(mask.sum()) if mask is not None else self.full(axis)

    def full(self, axis: Axis) -> int:
        sizes = self.grouping.dependencies.sizes
        return sizes[axis[0]] if axis[0] in sizes else self.grouping.model.shapes[axis[0]][axis[1]]

    def cut(self, name: str, array: np.ndarray) -> np.ndarray:
        """A value of the original without the removed units; an axis of samples times units may have more samples, or fewer.

        Raises OnnxPruneError where the axis is of another size in another way.
        """
        for axis, mask in self.masks(name, array.ndim).items():
            size = array.shape[axis]
            once = mask[: np.gcd(len(mask), size)]  # the same for each sample
            if size != len(mask) and not (mask == np.resize(once, len(mask))).all():
                raise OnnxPruneError(f"'{name}' has {size} places along axis {axis} on these samples, {len(mask)} where it was read")
            array = np.compress(np.resize(once, size), array, axis=axis)
        return array

    def masks(self, name: str, rank: int) -> dict[int, np.ndarray]:
        """{axis that loses something: which of its indices stay}."""
        return {axis: mask for axis in range(rank) if (mask := self.mask((name, axis))) is not None}


def rewrite(grouping: Grouping, remove: Remove, arrays: Mapping[str, np.ndarray] | None = None) -> ModelProto:
    """The model without the removed units; `arrays` replaces tensors' values before they are sliced.

    Raises OnnxPruneError (exit code 4) where a size that the model computes at run time cannot follow.
    """
    model, widths = grouping.model, Widths(grouping, remove)
    tensors = {name: _sliced(model, name, widths, arrays or {}) for name in model.tensors}
    try:
        return _rewritten(model, widths, tensors, pinned=True)
    except OnnxPruneError:  # a size that run-time arithmetic mixes with others has to follow
        return _rewritten(model, widths, tensors, pinned=False)


def _rewritten(model: Model, widths: Widths, tensors: dict[str, TensorProto], pinned: bool) -> ModelProto:
    """pinned: what the model computes from sizes sees the old ones, and only what a rule mends gets new ones."""
    nodes = []
    for node in model.nodes:
        copy = NodeProto()
        if node.op_type == "Constant" and node.output[0] in tensors:
            copy = helper.make_node("Constant", [], list(node.output), name=node.name, doc_string=node.doc_string)
            copy.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, t=tensors[node.output[0]]))
        else:
            opened = flow(node, model.opsets.get("ai.onnx", 1)) is not None  # its bodies are filled last
            for one, value in node.ListFields():
                if one.name != "attribute":
                    copy_field(copy, one.name, value)
            copy.attribute.extend(a for a in node.attribute if not (opened and a.type == AttributeProto.GRAPH))
        nodes.append(copy)
    shapes = {v: tuple(widths.size((v, i)) for i in range(len(s))) for v, s in model.shapes.items()}
    static = {v: tuple(True for _ in s) for v, s in shapes.items()}
    now = model.folded if pinned else fold(nodes, tensors, shapes, static)
    editor = _Editor(model, widths, nodes, tensors, now)
    if pinned:
        editor.pin_sizes()
    for mend in widths.grouping.dependencies.mends:
        editor.mend(mend)
    editor.keep_data()
    editor.share()
    editor.cut([g.branch for g in widths.grouping.groups if g.branch is not None and len(widths.remove.get(g.id, ()))])
    return assemble(model, widths, editor)


def _sliced(model: Model, name: str, widths: Widths, arrays: Mapping[str, np.ndarray]) -> TensorProto:
    tensor = model.tensors[name]
    masks = widths.masks(name, len(tensor.dims))
    if name in model.external.places:  # sliced when it is written, or run
        header = TensorProto(name=tensor.name, data_type=tensor.data_type, doc_string=tensor.doc_string)
        header.dims.extend(kept(tuple(tensor.dims), masks))
        header.data_location = TensorProto.EXTERNAL
        return header
    if not masks and name not in arrays:
        return tensor
    array = arrays[name] if name in arrays else model.array(name)
    for axis, mask in masks.items():
        array = np.compress(mask, array, axis=axis)
    sliced = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), tensor.name)
    sliced.data_type = tensor.data_type
    sliced.doc_string = tensor.doc_string
    return sliced


class _Editor:
    """Changes nodes' attributes and inputs; constants that several nodes read are never changed in place."""

    def __init__(
        self, model: Model, widths: Widths, nodes: list[NodeProto], tensors: dict[str, TensorProto], now: Mapping[str, Folded]
    ) -> None:
        self.model, self.widths, self.nodes, self.tensors, self.now = model, widths, nodes, tensors, now
        self.places: dict[str, int] = {o: index for index, node in enumerate(model.nodes) for o in node.output if o}
        opset = model.opsets.get("ai.onnx", 1)
        self.bodies: dict[int, list[tuple[str, GraphProto]]] = {
            index: [(a.name, a.g) for a in node.attribute if a.type == AttributeProto.GRAPH]
            for index, node in enumerate(model.nodes)
            if flow(node, opset) is not None
        }
        self.before: dict[int, list[NodeProto]] = {}
        self.added: list[TensorProto] = []
        self.handled: set[tuple[int, int]] = set()
        self._taken = set(model.shapes) | set(model.tensors) | {o for n in nodes for o in n.output}

    def pin_sizes(self) -> None:
        """Shape and Size of what shrinks give the old numbers."""
        for index, node in enumerate(self.nodes):
            if node.op_type not in ("Shape", "Size") or not node.output[0]:
                continue
            source = self.model.shapes.get(node.input[0], ())
            if all(self.widths.mask((node.input[0], i)) is None for i in range(len(source))):
                continue
            old = self.model.folded.get(node.output[0])
            if old is None or (node.op_type == "Size" and old.dynamic.any()):
                raise _unable(node)
            out = node.output[0]
            if not old.dynamic.any():
                constant = helper.make_node("Constant", [], [out], name=node.name, value=numpy_helper.from_array(old.number, out))
                self.nodes[index] = constant
                continue
            fresh = self._name(out)
            run = NodeProto()
            run.CopyFrom(node)
            run.output[0] = fresh
            self.before[index] = [run]
            mask, number = self._constant(~old.dynamic, "static"), self._constant(old.number, out)
            self.nodes[index] = helper.make_node("Where", [mask, number, fresh], [out], name=f"{node.name or out}_pinned")

    def mend(self, mend: Mend | Reorder) -> None:
        if isinstance(mend, Reorder):
            self._reorder(mend)
            return
        node = self.nodes[mend.node]
        if isinstance(mend.where, int):
            self.handled.add((mend.node, mend.where))
        if isinstance(mend.keep, tuple):
            if any(self.widths.size(axis) == 1 for axis in mend.when.values()):
                self._say(mend.node, mend.where, mend.keep)
            return
        if mend.keep is not None:
            if self.widths.mask(mend.when[0]) is not None:
                for i in reversed(range(len(node.attribute))):
                    if node.attribute[i].name == mend.where:
                        del node.attribute[i]
                node.attribute.extend([helper.make_attribute(str(mend.where), float(mend.keep))])
            return
        if mend.take is not None:
            self._take(mend.node, mend.take)
            return
        changed = {
            k: sum(self.widths.size(a) for a in axes)
            for k, axes in mend.amounts.items()
            if any(self.widths.size(a) != self.widths.full(a) for a in axes)
            or (k in mend.when and self.widths.mask(mend.when[k]) is not None)
        }
        if isinstance(mend.where, str):
            if changed:
                self._attribute(node, mend.where, mend.amounts, changed)
        elif mend.where < len(node.input) and node.input[mend.where]:
            self._input(mend.node, mend.where, changed, set(mend.amounts))
        elif changed and node.op_type == "Split":
            sizes = [self.widths.size(a) for axes in mend.amounts.values() for a in axes]
            for i, attribute in reversed(list(enumerate(node.attribute))):
                if attribute.name == "num_outputs":
                    del node.attribute[i]
            del node.input[1:]
            node.input.append(self._constant(np.array(sizes, np.int64), "split"))

    def _attribute(self, node: NodeProto, name: str, amounts: Mapping[int, tuple[Axis, ...]], changed: dict[int, int]) -> None:
        for attribute in node.attribute:
            if attribute.name == name:
                if attribute.type == AttributeProto.INT:
                    attribute.i = changed[0]
                else:
                    for k, value in changed.items():
                        attribute.ints[k] = value
                return
        sizes = [sum(self.widths.size(a) for a in axes) for axes in amounts.values()]
        node.attribute.append(helper.make_attribute(name, sizes))

    def _input(self, index: int, position: int, changed: dict[int, int], said: set[int]) -> None:
        node = self.nodes[index]
        name = node.input[position]
        original = self.model.folded.get(name)
        if original is None:
            if changed:
                raise _unable(node)
            return
        wanted = np.ravel(original.number).astype(np.int64).copy()
        for k, value in changed.items():
            wanted[k] = value
        current = self.now.get(name)
        found = np.ravel(current.number).astype(np.int64) if current is not None else None
        if found is None or found.shape != wanted.shape:
            raise _unable(node)
        dynamic = np.ravel(original.dynamic)
        for k in range(len(wanted)):  # what is computed from a shape, and no axis says, follows by itself
            if k not in said and k not in changed and (dynamic[k] or original.from_shape):
                wanted[k] = found[k]
        wrong = wanted != found
        if not wrong.any():
            return
        if (wrong & dynamic).any():
            raise _unable(node)
        if not dynamic.any():
            node.input[position] = self._constant(wanted.reshape(original.number.shape).astype(original.number.dtype), name)
            return
        mask, fresh = self._constant(~dynamic, "static"), self._constant(wanted.astype(original.number.dtype), name)
        out = self._name(name)
        self.before.setdefault(index, []).append(helper.make_node("Where", [mask, fresh, name], [out], name=out))
        node.input[position] = out

    def _say(self, index: int, where: int | str, numbers: tuple[int, ...]) -> None:
        """What was left to the sizes: in an attribute or a last input; Squeeze of no axes is Identity."""
        node = self.nodes[index]
        if not numbers:
            node.op_type = "Identity"
        elif isinstance(where, str):
            node.attribute.append(helper.make_attribute(where, list(numbers)))
        else:
            node.input.append(self._constant(np.array(numbers, np.int64), node.output[0]))

    def _take(self, index: int, axes: tuple[Axis, ...]) -> None:
        source, *results = (self.widths.mask(axis) for axis in axes)
        if source is None and all(result is None for result in results):
            return
        node = self.nodes[index]
        number = self.model.folded[node.input[1]].number
        picked = _renumbered(number.astype(np.int64) % self.widths.full(axes[0]), source, results)
        node.input[1] = self._constant(picked.astype(number.dtype), node.input[1])

    def _reorder(self, mend: Reorder) -> None:
        if all(self.widths.mask(axis) is None for axis in (*mend.source, *mend.result)):
            return
        node, axis = self.nodes[mend.node], mend.axis
        order = _renumbered(mend.order, self.widths.mask(mend.source[axis]), [self.widths.mask(mend.result[axis])])
        inputs = [mend.source[axis][0], self._constant(order, node.output[0])]
        self.nodes[mend.node] = helper.make_node("Gather", inputs, list(node.output), name=node.name, axis=axis)

    def keep_data(self) -> None:
        """A size that reaches data (an attention scale) keeps its original number."""
        for index, node in enumerate(self.nodes):
            if node.op_type in ("Shape", "Size") or all(o in self.model.folded for o in node.output if o):
                continue
            for position, name in enumerate(node.input):
                old = self.model.folded.get(name)
                if old is None or not old.from_shape or (index, position) in self.handled:
                    continue
                new = self.now.get(name)
                if new is not None and (np.array_equal(new.number, old.number) or new.number.shape != old.number.shape):
                    continue  # unchanged, or a tensor of a shape that changes (ConstantOfShape)
                if old.dynamic.any():
                    raise _unable(node)
                node.input[position] = self._constant(old.number, name)

    def cut(self, branches: Sequence[Branch]) -> None:
        """What read a branch's Add reads its trunk; an Add that is a graph output, or read in a body, becomes an Identity."""
        trunks = {branch.output: branch.trunk for branch in branches}

        def trunk(name: str) -> str:
            while name in trunks:
                name = trunks[name]
            return name

        every = [*self.nodes, *(node for nodes in self.before.values() for node in nodes)]
        held = set(self.model.outputs).union(*(captured(node) for node in every)) if branches else set()
        for node in every:
            if any(out in trunks for out in node.output):
                out = node.output[0]
                identity = helper.make_node("Identity", [trunks[out]], [out], name=node.name) if out in held else NodeProto(output=[out])
                node.CopyFrom(identity)
            for position, name in enumerate(node.input):
                node.input[position] = trunk(name)

    def share(self) -> None:
        """Readers of one tensor share it again as far as it is of one shape for them."""
        fresh: dict[tuple[str, tuple[int, ...]], str] = {}
        for node in self.nodes:
            for i, name in enumerate(node.input):
                original = self.model.copies.get(name)
                if original is None:
                    continue
                shape = tuple(self.tensors[name].dims)
                if shape == tuple(self.tensors[original].dims):
                    node.input[i] = original
                    continue
                if (original, shape) not in fresh:
                    fresh[original, shape] = self._constant(numpy_helper.to_array(self.tensors[name]), original)
                node.input[i] = fresh[original, shape]

    def _name(self, base: str) -> str:
        k = 0
        while f"{base}_pruned{k or ''}" in self._taken:
            k += 1
        name = f"{base}_pruned{k or ''}"
        self._taken.add(name)
        return name

    def _constant(self, array: np.ndarray, base: str) -> str:
        name = self._name(base)
        self.added.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name


def _renumbered(picked: np.ndarray, source: np.ndarray | None, results: Sequence[np.ndarray | None]) -> np.ndarray:
    """Indices into an axis of which `source` stays, of which those stay that the masks of the result's axes keep."""
    if source is not None:
        picked = (np.cumsum(source) - 1)[picked]
    for axis, result in enumerate(results):
        if result is not None:
            picked = np.compress(result, picked, axis=axis)
    return picked


def _unable(node: NodeProto) -> OnnxPruneError:
    return OnnxPruneError(
        f"node '{node.name or node.output[0]}' ({node.op_type}) takes a size from run time that pruning changes; "
        "leave its layers out with --exclude",
        4,
    )

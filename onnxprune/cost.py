"""What a model costs, as a function of how many units each group keeps: MACs, parameters, channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, NodeProto

from onnxprune import layouts
from onnxprune.folding import attributes
from onnxprune.grouping import Grouping
from onnxprune.importer import FLOATS, Model
from onnxprune.layouts import Dim, Layout, find
from onnxprune.relations import Axis, Site
from onnxprune.scopes import flow, subgraphs, taken, trips

Term = tuple[float, tuple[Axis, ...]]


def mac_terms(model: Model) -> list[Term]:
    """Multiply-accumulates at the model's sizes: each term is a number times the sizes of axes.

    Conv and ConvTranspose: output (input) elements × kernel elements a channel; MatMul, Gemm and Einsum: output elements ×
    contracted size; recurrent layers: time × batch × elements of W and R.  The body of Loop and Scan counts as often as it
    runs, once where that is not known; both branches of an If count, as either may run, or the one that is always taken.
    """
    inner = {o for node in model.nodes for graph in _bodies(model, node) for one in graph.node for o in one.output}
    return _terms(model, [node for node in model.nodes if not any(o in inner for o in node.output if o)])


def _bodies(model: Model, node: NodeProto) -> list[GraphProto]:
    return list(subgraphs(node)) if flow(node, model.opsets.get("ai.onnx", 1)) is not None else []


def _inside(model: Model, node: NodeProto) -> list[Term]:
    """The terms of a control flow node's bodies."""
    links = flow(node, model.opsets.get("ai.onnx", 1))
    if links is None:
        return []
    if node.op_type == "If":
        branch = taken(node, model.folded)
        keys = ["then_branch", "else_branch"] if branch is None else [("then_branch", "else_branch")[branch]]
        return [term for key in keys for term in _terms(model, attributes(node)[key].node)]
    makers = {o: one for graph in subgraphs(node) for one in graph.node for o in one.output}
    times = trips(node, links, model.shapes, model.folded, makers)
    return [(f * (1 if times is None else times), axes) for graph in subgraphs(node) for f, axes in _terms(model, graph.node)]


def _terms(model: Model, nodes: Iterable[NodeProto]) -> list[Term]:
    terms: list[Term] = []
    for index, node in enumerate(nodes):
        terms += _inside(model, node)
        op = node.op_type
        names = [n for n in (*node.input[:3], node.output[0] if node.output else "") if n]
        if op not in COUNTED or any(n not in model.shapes for n in names):
            continue
        site = Site(index, node, 1, model.shapes, {})
        x, w, y = site.x[0], site.x[1] if len(site.x) > 1 else [], site.y[0]
        if op in ("QGemm", "QLinearConv", "QLinearMatMul"):
            w = site.x[3]
        if op in ("Conv", "ConvInteger", "QLinearConv"):
            terms.append((1, (*y, *w[1:])))
        elif op == "ConvTranspose":
            terms.append((1, (*x, *w[1:])))
        elif op in ("Gemm", "QGemm"):
            terms.append((1, (*y, x[0 if attributes(node).get("transA", 0) else 1])))
        elif op in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            terms.append((1, (*y, x[-1])))
        elif op == "Einsum":
            letters: dict[str, Axis] = {}
            equation = str(attributes(node)["equation"]).replace(" ", "").replace("...", "")
            for term, axes in zip(equation.split("->")[0].split(","), site.x, strict=True):
                letters |= dict(zip(term[::-1], axes[::-1], strict=False))
            terms.append((1, tuple(letters.values())))
        else:
            r = site.x[2]
            time, batch = (x[1], x[0]) if attributes(node).get("layout", 0) else (x[0], x[1])
            terms += [(1, (time, batch, *w)), (1, (time, batch, *r))]
    return terms


COUNTED = {
    *("Conv", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "MatMulInteger"),
    *("QLinearConv", "QGemm", "QLinearMatMul", "RNN"),
}


def parameter_terms(model: Model) -> list[Term]:
    """Elements of every float initializer and Constant, those in bodies included."""
    return [(1, tuple((name, i) for i in range(len(tensor.dims)))) for name, tensor in model.tensors.items() if tensor.data_type in FLOATS]


@dataclass(frozen=True)
class _Product:
    """A number times widths[i] for each i."""

    factor: float
    widths: tuple[int, ...]


class Counter:
    """Evaluates one budget at any number of units kept, given as {group id: units kept}."""

    def __init__(self, grouping: Grouping, terms: list[Term]) -> None:
        self._owner = {leaf: g.id for g in grouping.groups for leaf in g.leaves}
        self._share = {leaf: leaf.size / g.units for g in grouping.groups for leaf in g.leaves}
        self._layouts: list[Layout] = []
        numbers: dict[Dim, int] = {}
        self._fixed = 0.0
        self._products: list[_Product] = []
        for factor, axes in terms:
            changing: list[int] = []
            for axis in axes:
                dim = grouping.dims.get(axis)
                root = find(dim) if dim is not None else None
                if root is None or not self._prunable(root):
                    factor *= grouping.model.shapes[axis[0]][axis[1]]
                    continue
                if root not in numbers:
                    numbers[root] = len(self._layouts)
                    self._layouts.append(layouts.resolve(root))
                changing.append(numbers[root])
            if changing:
                self._products.append(_Product(factor, tuple(changing)))
            else:
                self._fixed += factor

    def _prunable(self, root: Dim) -> bool:
        return any(leaf in self._owner for leaf in layouts.leaves(layouts.resolve(root)))

    def __call__(self, kept: Mapping[int, int]) -> float:
        counts = {leaf: kept[g] * self._share[leaf] for leaf, g in self._owner.items() if g in kept}
        widths = [layouts.width(layout, counts) for layout in self._layouts]
        total = self._fixed
        for product in self._products:
            size = product.factor
            for i in product.widths:
                size *= widths[i]
            total += size
        return total


def counter(grouping: Grouping, of: str) -> Counter | _Units:
    """The budget's measure: `macs`, `params` or `channels`."""
    if of == "channels":
        return _Units(grouping)
    return Counter(grouping, mac_terms(grouping.model) if of == "macs" else parameter_terms(grouping.model))


class _Units:
    """Units left over all groups."""

    def __init__(self, grouping: Grouping) -> None:
        self._units = {g.id: g.units for g in grouping.groups}

    def __call__(self, kept: Mapping[int, int]) -> float:
        return float(sum(kept.get(g, n) for g, n in self._units.items()))


def count_macs(model: Model) -> int:
    """MACs of a model at its input shapes."""
    return round(sum(f * _sizes(model, axes) for f, axes in mac_terms(model)))


def _sizes(model: Model, axes: tuple[Axis, ...]) -> float:
    size = 1.0
    for name, axis in axes:
        size *= model.shapes[name][axis]
    return size

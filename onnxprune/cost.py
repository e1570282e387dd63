"""What a model costs, as a function of how many units each group keeps: MACs, parameters, channels, or what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto

from onnxprune import layouts
from onnxprune.folding import attributes
from onnxprune.grouping import Grouping
from onnxprune.importer import FLOATS, Model
from onnxprune.layouts import Dim, Layout, find
from onnxprune.liveness import Liveness
from onnxprune.relations import Axis, Site
from onnxprune.scopes import all_graphs, flow, subgraphs, taken, trips

Term = tuple[float, tuple[Axis, ...], str]


def mac_terms(model: Model) -> list[Term]:
    """Multiply-accumulates at the model's sizes: each term is a number times the sizes of axes, and the value that it makes.

    Conv and ConvTranspose: output (input) elements × kernel elements a channel; MatMul, Gemm and Einsum: output elements ×
    contracted size; recurrent layers: time × batch × elements of W and R.  The body of Loop and Scan counts as often as it
    runs, once where that is not known; both branches of an If count, as either may run, or the one that is always taken.
    """
    return [(factor, axes, named(node)) for node in model.main for factor, axes, _ in _terms(model, [node])]


def element_terms(model: Model) -> list[Term]:
    """Elements that each node of the main graph reads (weights too) and writes, as far as their sizes are known."""
    terms: list[Term] = []
    for node in model.main:
        names = [name for name in (*node.input, *node.output) if name in model.shapes]
        terms += [(1, tuple((name, i) for i in range(len(model.shapes[name]))), named(node)) for name in names]
    return terms


def named(node: NodeProto) -> str:
    """A value that is there as long as the node is."""
    return next((out for out in node.output if out), "")


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
    times = 1 if times is None else times
    return [(f * times, axes, made) for graph in subgraphs(node) for f, axes, made in _terms(model, graph.node)]


def _terms(model: Model, nodes: Iterable[NodeProto]) -> list[Term]:
    terms: list[Term] = []
    for index, node in enumerate(nodes):
        terms += _inside(model, node)
        op = ALIKE.get(node.op_type, node.op_type)
        names = [n for n in (*node.input[:3], node.output[0] if node.output else "") if n]
        if op not in COUNTED or any(n not in model.shapes for n in names):
            continue
        site = Site(index, node, 1, model.shapes, {})
        x, w, y, made = site.x[0], site.x[1] if len(site.x) > 1 else [], site.y[0], node.output[0]
        if op in ("QGemm", "QLinearConv", "QLinearMatMul"):
            w = site.x[3]
        if op in ("Conv", "ConvInteger", "QLinearConv"):
            terms.append((1, (*y, *w[1:]), made))
        elif op == "ConvTranspose":
            terms.append((1, (*x, *w[1:]), made))
        elif op in ("Gemm", "QGemm"):
            terms.append((1, (*y, x[0 if attributes(node).get("transA", 0) else 1]), made))
        elif op in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            terms.append((1, (*y, x[-1]), made))
        elif op in ATTENTION:
            terms += [(f, axes, made) for f, axes in attention_products(site)]
        elif op == "FusedMatMul":
            terms.append((1, (*y, x[-2 if attributes(node).get("transA", 0) and len(x) > 1 else -1]), made))
        elif op == "Einsum":
            letters: dict[str, Axis] = {}
            equation = str(attributes(node)["equation"]).replace(" ", "")
            for term, axes in zip(equation.split("->")[0].split(","), site.x, strict=True):
                first, dots, last = term.partition("...")
                others = [str(i) for i in range(len(axes) - len(first) - len(last))][::-1] if dots else []  # counted from the last
                for letter, (name, axis) in zip((*first, *others, *last), axes, strict=False):
                    if letter not in letters or model.shapes[name][axis] != 1:  # else: broadcast
                        letters[letter] = (name, axis)
            terms.append((1, tuple(letters.values()), made))
        else:
            r = site.x[2]
            time, batch = (x[1], x[0]) if attributes(node).get("layout", 0) else (x[0], x[1])
            terms += [(1, (time, batch, *w), made), (1, (time, batch, *r), made)]
    return terms


NARROW = frozenset(
    (
        *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1),
        *(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ),
    )
)
ALIKE = {  # onnxruntime's own operators that compute the products of another
    **dict.fromkeys(("FusedConv", "NhwcConv", "NhwcFusedConv"), "Conv"),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"), "MatMul"),
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), "FusedMatMul"),
    "DynamicQuantizeLSTM": "LSTM",
    "FusedGemm": "Gemm",
}
ATTENTION = ("Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention")
COUNTED = {
    *ATTENTION,
    *("Conv", "ConvInteger", "ConvTranspose", "Einsum", "FusedMatMul", "GRU", "Gemm", "LSTM", "MatMul", "MatMulInteger"),
    *("QLinearConv", "QGemm", "QLinearMatMul", "RNN"),
}


def attention_products(site: Site) -> list[tuple[float, tuple[Axis, ...]]]:
    """Queries by keys and weights by values (without a past), and the projection where it is inside."""
    q, k, y = site.x[0], site.x[1] if len(site.x) > 1 else [], site.y[0]
    if len(k) == 2:  # a weight
        return [(1, (*y[:2], *k)), (2, (*y, q[1]))]
    if len(q) not in (3, 4) or len(k) not in (3, 4):  # packed
        return [(2, (*y, q[1]))]
    keys = k[1 if len(k) == 3 else 2]
    return [(1, (*q, keys)), (1, (*y, keys))]


def parameter_terms(model: Model) -> list[Term]:
    """Elements of every float initializer and Constant and of every quantized weight, those in bodies included."""
    hosts = {name: named(node) for node in model.main for graph in subgraphs(node) for name in _made(graph)}
    counted = ((name, tensor) for name, tensor in model.tensors.items() if is_parameter(tensor) and name not in model.copies)
    return [(1, tuple((name, i) for i in range(len(tensor.dims))), hosts.get(name, name)) for name, tensor in counted]


def is_parameter(tensor: TensorProto) -> bool:
    """Floats, and what has 8 bits or less and more than one axis, as quantized weights have."""
    return tensor.data_type in FLOATS or (tensor.data_type in NARROW and len(tensor.dims) > 1)


def _made(graph: GraphProto) -> list[str]:
    """The tensors of a subgraph and of those in it."""
    graphs = list(all_graphs(graph))
    return [t.name for one in graphs for t in one.initializer] + [o for one in graphs for n in one.node for o in n.output]


@dataclass(frozen=True)
class _Product:
    """A number times widths[i] for each i, while the value is alive."""

    factor: float
    widths: tuple[int, ...]
    value: str


class Measure(Protocol):
    """What is left of a budget, as a function of {group id: units kept}; a group that is not named keeps all."""

    @property
    def steps(self) -> Mapping[int, int]:
        """Widths of a group between two multiples of its step cost as much as the wider one; 1 where a group has none."""

    def __call__(self, kept: Mapping[int, int]) -> float: ...


class Counter:
    """Evaluates one budget at any number of units kept, given as {group id: units kept}; what cut branches leave dead is gone."""

    def __init__(self, grouping: Grouping, terms: list[Term]) -> None:
        self._owner = {leaf: g.id for g in grouping.groups for leaf in g.leaves}
        self._share = {leaf: leaf.size / g.units for g in grouping.groups for leaf in g.leaves}
        self._layouts: list[Layout] = []
        numbers: dict[Dim, int] = {}
        self._products: list[_Product] = []
        self._cuts = Cuts(grouping)
        self._alive: dict[frozenset[int], tuple[float, list[_Product]]] = {}
        for factor, axes, value in terms:
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
            self._products.append(_Product(factor, tuple(changing), value))

    @property
    def steps(self) -> Mapping[int, int]:
        return {}

    def _prunable(self, root: Dim) -> bool:
        return any(leaf in self._owner for leaf in layouts.leaves(layouts.resolve(root)))

    def _widths(self, kept: Mapping[int, int]) -> list[float]:
        counts = {leaf: kept[g] * self._share[leaf] for leaf, g in self._owner.items() if g in kept}
        return [layouts.width(layout, counts) for layout in self._layouts]

    def by_value(self, kept: Mapping[int, int]) -> dict[str, float]:
        """The budget of each term's value, with no branch cut."""
        values, owners, factors, indices = self._table
        sizes = np.array([*self._widths(kept), 1.0])[indices].prod(axis=1) * factors
        return dict(zip(values, np.bincount(owners, sizes, len(values)).tolist(), strict=True))

    @cached_property
    def _table(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """The values, and for each product its value's number, its factor, and the numbers of its widths; -1 for none."""
        numbers = {value: i for i, value in enumerate(dict.fromkeys(p.value for p in self._products))}
        most = max((len(p.widths) for p in self._products), default=0)
        indices = np.array([[*p.widths, *[-1] * (most - len(p.widths))] for p in self._products], np.int64)
        owners = np.array([numbers[p.value] for p in self._products], np.int64)
        return list(numbers), owners, np.array([p.factor for p in self._products], float), indices.reshape(len(self._products), most)

    def __call__(self, kept: Mapping[int, int]) -> float:
        widths = self._widths(kept)
        total, products = self._left(self._cuts.among(kept))
        for product in products:
            size = product.factor
            for i in product.widths:
                size *= widths[i]
            total += size
        return total

    def _left(self, cut: frozenset[int]) -> tuple[float, list[_Product]]:
        """What no width changes, and the other products, without what is dead."""
        if cut not in self._alive:
            dead = self._cuts.dead(cut)
            alive = [p for p in self._products if p.value not in dead]
            self._alive = {cut: (sum(p.factor for p in alive if not p.widths), [p for p in alive if p.widths])}
        return self._alive[cut]


class Cuts:
    """Which branches are cut, and what they leave dead together."""

    def __init__(self, grouping: Grouping) -> None:
        self._branches = {g.id: g.branch for g in grouping.groups if g.branch is not None}
        self._liveness = Liveness(grouping.model) if self._branches else None
        self._last: tuple[frozenset[int], frozenset[str]] = (frozenset(), frozenset())

    def among(self, kept: Mapping[int, int]) -> frozenset[int]:
        return frozenset(g for g in self._branches if kept.get(g) == 0)

    def dead(self, cut: Iterable[int]) -> frozenset[str]:
        """The values and tensors that nothing reads without these branches."""
        cut = frozenset(cut)
        if cut != self._last[0] and self._liveness is not None:
            self._last = cut, self._liveness.without([self._branches[g] for g in cut])
        return self._last[1]


def counter(grouping: Grouping, of: str | Measure) -> Measure:
    """The budget's measure: `macs`, `params` or `channels`, or one that was made before (such as `latency.Latency`)."""
    if not isinstance(of, str):
        return of
    if of == "channels":
        return _Units(grouping)
    return Counter(grouping, mac_terms(grouping.model) if of == "macs" else parameter_terms(grouping.model))


class _Units:
    """Units left over all groups; those that live only where a cut branch was are gone."""

    def __init__(self, grouping: Grouping) -> None:
        self._groups = grouping.groups
        self._cuts = Cuts(grouping)

    @property
    def steps(self) -> Mapping[int, int]:
        return {}

    def __call__(self, kept: Mapping[int, int]) -> float:
        dead = self._cuts.dead(self._cuts.among(kept))
        return float(sum(kept.get(g.id, g.units) for g in self._groups if not dead or any(m.tensor not in dead for m in g.members)))


def count_macs(model: Model) -> int:
    """MACs of a model at its input shapes."""
    return count(model, mac_terms(model))


def count(model: Model, terms: Iterable[Term]) -> int:
    """The sum of terms at the model's own sizes."""
    return round(sum(factor * _sizes(model, axes) for factor, axes, _ in terms))


def _sizes(model: Model, axes: tuple[Axis, ...]) -> float:
    size = 1.0
    for name, axis in axes:
        size *= model.shapes[name][axis]
    return size

"""What a plan does to each layer: its width, its weights' shapes, its MACs and parameters, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from onnx import NodeProto

from onnxprune.cost import ALIKE, COUNTED, Cuts, Term, mac_terms
from onnxprune.importer import FLOATS, Model
from onnxprune.plans import Plan
from onnxprune.relations import Axis
from onnxprune.rewriter import Widths
from onnxprune.scopes import subgraphs

CHANNELS_FIRST = ("Conv", "ConvInteger", "ConvTranspose", "QLinearConv")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerChange:
    """One node that multiplies, before and after; what a cut branch leaves dead is 0 after.

    name: the node's, or its output's where it has none.  width: units that it makes, None of a product of two activations and of
    control flow.  weights: {tensor: (shape before, after)} of what it reads, directly or through constant nodes; groups: ids of
    those that its weights belong to.  macs, parameters: (before, after); a tensor that two layers read counts in both.
    """

    name: str
    op: str
    width: tuple[int, int] | None
    weights: Mapping[str, tuple[Shape, Shape]]
    groups: tuple[int, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]


def layer_changes(plan: Plan) -> list[LayerChange]:
    """The layers of the main graph, in its order."""
    grouping, model = plan.grouping, plan.grouping.model
    widths = Widths(grouping, plan.remove)
    dead = Cuts(grouping).dead(g.id for g in grouping.groups if g.branch is not None and len(plan.remove.get(g.id, ())))
    terms: dict[str, list[Term]] = {}
    for term in mac_terms(model):
        terms.setdefault(term[2], []).append(term)
    owners: dict[str, list[int]] = {}
    for group in grouping.groups:
        for member in group.members:
            owners.setdefault(member.tensor, []).append(group.id)
    constants = _constants(model)
    found = []
    for node in model.main:
        made = next((out for out in node.output if out), "")
        if made not in terms:
            continue
        gone = made in dead
        read = dict.fromkeys(tensor for name in node.input for tensor in constants.get(name, ()))
        weights = {name: (tuple(model.tensors[name].dims), _left(widths, model, name, gone)) for name in read}
        floats = [shapes for name, shapes in weights.items() if model.tensors[name].data_type in FLOATS]
        found.append(
            LayerChange(
                name=node.name or made,
                op=node.op_type,
                width=_width(model, widths, node, made, gone) if weights else None,
                weights=weights,
                groups=tuple(sorted({g for name in weights for g in owners.get(name, ())})),
                macs=(_count(terms[made], widths.full), 0 if gone else _count(terms[made], widths.size)),
                parameters=(sum(math.prod(old) for old, _ in floats), 0 if gone else sum(math.prod(new) for _, new in floats)),
            )
        )
    return found


def _count(terms: Iterable[Term], size: Callable[[Axis], int]) -> int:
    return round(sum(factor * math.prod(map(size, axes)) for factor, axes, _ in terms))


def _left(widths: Widths, model: Model, name: str, gone: bool) -> Shape:
    return tuple(0 if gone else widths.size((name, i)) for i in range(len(model.tensors[name].dims)))


def _width(model: Model, widths: Widths, node: NodeProto, made: str, gone: bool) -> tuple[int, int] | None:
    op = ALIKE.get(node.op_type, node.op_type)
    rank = len(model.shapes.get(made, ()))
    if op not in COUNTED or any(True for _ in subgraphs(node)) or rank < 2:
        return None
    axis: Axis = (made, 1 if op in CHANNELS_FIRST else rank - 1)
    return widths.full(axis), 0 if gone else widths.size(axis)


def _constants(model: Model) -> dict[str, list[str]]:
    """The tensors that each value is made of, of the values that no input takes part in."""
    found = {name: [name] for name in model.tensors} | {name: [tensor] for name, tensor in model.copies.items()}
    for node in model.main:
        read = [name for name in node.input if name]
        if read and all(name in found for name in read):
            made = list(dict.fromkeys(tensor for name in read for tensor in found[name]))
            found |= {out: made for out in node.output if out}
    return found

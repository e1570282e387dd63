"""Where a model's parameters and multiply-accumulates are, layer by layer and group by group, and how much of them could go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto

from onnxprune import layouts
from onnxprune.allocations import Limits, check_floor
from onnxprune.branches import with_branches
from onnxprune.certificate import Proof, certify
from onnxprune.cost import Counter, Term, count, mac_terms, parameter_terms
from onnxprune.grouping import Group, Grouping, group
from onnxprune.importer import Model, load
from onnxprune.relations import Axis
from onnxprune.scopes import captured
from onnxprune.sizing import guessed


@dataclass(frozen=True)
class Layer:
    """A node of the main graph that holds parameters or multiplies; what is inside a Loop, Scan or If counts as that node's.

    weights: its tensors and their shapes; output: the shape of its first result; groups: those with units in its weights or products;
    fixed: where there are none, why.
    """

    name: str
    op: str
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    output: tuple[int, ...]
    parameters: int
    macs: int
    groups: tuple[int, ...]
    fixed: str | None

    def to_json(self) -> dict[str, Any]:
        weights = [{"tensor": name, "shape": list(shape)} for name, shape in self.weights]
        return {**asdict(self), "weights": weights, "output": list(self.output), "groups": list(self.groups)}


@dataclass(frozen=True)
class Share:
    """Shares (0 to 1) of the model's MACs and parameters."""

    macs: float
    parameters: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds.

    macs, parameters: of the whole model, MACs at the sizes of `grouping.model.input_shapes`; alone: {group: what goes with all of its
    units but those that --min-keep keeps}, of a residual branch with the branch.
    reach: the largest reductions, when every group that may go is down to `min_keep` ("min_keep"), to one unit ("one_unit"), and when
    the residual branches are cut too ("branches"; absent where there are none).
    assumed: the inputs with sizes besides the batch that the file leaves open and nobody gave.
    """

    grouping: Grouping = field(repr=False)
    proof: Proof | None = field(repr=False)
    layers: tuple[Layer, ...]
    macs: int
    parameters: int
    alone: Mapping[int, Share]
    reach: Mapping[str, Share]
    min_keep: float
    assumed: tuple[str, ...] = ()

    @property
    def untouched(self) -> tuple[Layer, ...]:
        """The layers in which nothing can go."""
        return tuple(layer for layer in self.layers if not layer.groups)

    def to_json(self) -> dict[str, Any]:
        """Docs/exploring.md; `groups` without their places, which are in `groups --json`."""
        idle = set(self.proof.unexercised) if self.proof else set()
        return {
            "format": 1,
            "model": self.grouping.model.name,
            "input_shapes": {k: list(v) for k, v in self.grouping.model.input_shapes.items()},
            "macs": self.macs,
            "parameters": self.parameters,
            "layers": [layer.to_json() for layer in self.layers],
            "groups": [
                {
                    "id": g.id,
                    "units": g.units,
                    "kind": g.kind,
                    "statistics": g.statistics,
                    "exercised": None if self.proof is None else g.id not in idle,
                    "tensors": list(dict.fromkeys(m.tensor for m in g.members)),
                    "alone": asdict(self.alone[g.id]),
                }
                for g in self.grouping.groups
            ],
            "fixed": [{"tensor": t, "axis": a, "reason": r} for t, a, r in self.grouping.fixed],
            "min_keep": self.min_keep,
            "reach": {name: asdict(share) for name, share in self.reach.items()},
        }


def inspect(
    model: str | os.PathLike[str] | ModelProto,
    *,
    feeds: Mapping[str, np.ndarray] | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    allow_io: Sequence[str] = (),
    min_keep: float = 0.1,
    verify: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Layers, groups, what each is worth, what is fixed, and the largest reduction that `prune` could reach.

    min_keep: units (or, below 1, the share) that every group keeps, as in `prune`.  Groups that the inputs do not exercise stay whole
    in the reductions, as `prune` leaves them.
    Raises OnnxPruneError for bad input (exit code 2) and where onnxruntime cannot run the model (4).
    """
    limits = Limits(check_floor(min_keep))
    if progress:
        progress("reading the model")
    grouping, proof = with_branches(group(load(model, feeds, input_shapes), allow_io)), None
    if verify and grouping.groups:
        grouping, proof, _ = certify(grouping, feeds, seed, progress=progress)
    products, tensors = mac_terms(grouping.model), parameter_terms(grouping.model)
    costs = Counter(grouping, products), Counter(grouping, tensors)

    def share(kept: Mapping[int, int]) -> Share:
        return Share(*(max(0.0, 1 - cost(kept) / cost({})) if cost({}) else 0.0 for cost in costs))

    def least(one: Group) -> int:
        return 0 if one.branch is not None else limits.least(one.id, one.units)

    idle = set(proof.unexercised) if proof else set()
    free = [g for g in grouping.groups if g.id not in idle]
    widths = [g for g in free if g.branch is None]
    single = {g.id: 1 for g in widths}
    reach = {"min_keep": share({g.id: least(g) for g in widths}), "one_unit": share(single)}
    if len(widths) < len(free):
        reach["branches"] = share(single | {g.id: 0 for g in free if g.branch is not None})
    return Inspection(
        grouping=grouping,
        proof=proof,
        layers=tuple(_layers(grouping, products, tensors)),
        macs=count(grouping.model, products),
        parameters=count(grouping.model, tensors),
        alone={g.id: share({g.id: least(g)}) for g in grouping.groups},
        reach=reach,
        min_keep=min_keep,
        assumed=tuple(guessed(grouping.model.proto, feeds, input_shapes or {})),
    )


def _layers(grouping: Grouping, products: Sequence[Term], tensors: Sequence[Term]) -> list[Layer]:
    model = grouping.model
    makers = {o: i for i, node in enumerate(model.main) for o in node.output if o}
    owners = _owners(model)
    own: dict[int, tuple[list[Term], list[Term]]] = {}
    for term in products:
        own.setdefault(makers[term[2]], ([], []))[0].append(term)
    for term in tensors:
        host = owners.get(term[2], makers.get(term[2]))
        if host is not None:
            own.setdefault(host, ([], []))[1].append(term)
    reasons: dict[str, str] = {}
    for tensor, _, reason in grouping.fixed:
        reasons.setdefault(tensor, reason)
    owner = {leaf: g.id for g in grouping.groups for leaf in g.leaves}
    found = []
    for index in sorted(own):
        node, (multiplied, held) = model.main[index], own[index]
        axes = [axis for _, named, _ in (*multiplied, *held) for axis in named]
        groups = sorted({owner[leaf] for axis in axes for leaf in layouts.leaves(grouping.layout(axis)) if leaf in owner})
        weights = {named[0][0]: model.shapes[named[0][0]] for _, named, _ in held if named}
        found.append(
            Layer(
                name=node.name or next((o for o in node.output if o), ""),
                op=node.op_type,
                weights=tuple(weights.items()),
                output=tuple(int(n) for n in model.shapes.get(node.output[0], ())),
                parameters=count(model, held),
                macs=count(model, multiplied),
                groups=tuple(groups),
                fixed=None if groups else _why(grouping, axes, [r for w in weights if (r := reasons.get(w))]),
            )
        )
    return found


def _why(grouping: Grouping, axes: Iterable[Axis], known: Sequence[str]) -> str:
    """Why none of these axes may change: what is said of the weights, else of what is multiplied."""
    frozen = (leaf.reason for axis in axes for leaf in layouts.leaves(grouping.layout(axis)) if leaf.reason)
    return next(iter(known), None) or next(frozen, "a single unit")


def _owners(model: Model) -> dict[str, int]:
    """For each tensor the main graph's first node that reads it together with what depends on the inputs.

    A weight that is transposed, cast or dequantized on its way belongs to the layer that it reaches; one that reaches none, to the
    first node that reads it.
    """
    constant = set(model.tensors)
    readers: dict[str, int] = {}
    for i, node in enumerate(model.main):
        for name in (*node.input, *captured(node)):
            readers.setdefault(name, i)
        if node.input and _constant(node, constant):
            constant.update(node.output)
    found: dict[str, int] = {}
    for name in model.tensors:
        place = readers.get(name)
        while place is not None and (made := model.main[place].output[0]) in constant and made in readers:
            place = readers[made]
        if place is not None:
            found[name] = place
    for copy, original in model.copies.items():
        if copy in found:
            found.setdefault(original, found[copy])
    return found


def _constant(node: NodeProto, known: set[str]) -> bool:
    return not any(a.HasField("g") for a in node.attribute) and all(name in known for name in node.input if name)

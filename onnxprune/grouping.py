"""Step 3: solve the relations into groups of coupled units, and where each unit lives."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxprune import layouts
from onnxprune.dependencies import Dependencies, relate
from onnxprune.errors import OnnxPruneError
from onnxprune.heads import head_leaves
from onnxprune.importer import FLOATS, Model
from onnxprune.layouts import Dim, Layout, find, freeze
from onnxprune.naming import named
from onnxprune.relations import Axis, Concat, Fixed, Product, Same, Statistics
from onnxprune.shuffles import find_shuffles


@dataclass(frozen=True)
class Member:
    """One place of a group: indices (units, places a unit) along one axis of one of the file's tensors."""

    tensor: str
    axis: int
    indices: np.ndarray


@dataclass(frozen=True)
class Branch:
    """A residual branch: the Add that makes `output` adds its `operand` to its `trunk`, and is the trunk once it is cut.

    dead: the values and tensors that nothing reads then; layers: how many of them layers make.
    """

    output: str
    trunk: str
    operand: str
    dead: frozenset[str] = field(default=frozenset(), repr=False)
    layers: int = 0


@dataclass(frozen=True)
class Group:
    """Units that live in the same places in the same way; any of them may go.

    kind: "channel", "head" (attention heads), or "block": a residual branch, which is one unit and may go as well.
    name: what people call it (`naming`).
    """

    id: int
    units: int
    kind: str
    statistics: bool
    members: tuple[Member, ...]
    leaves: tuple[Dim, ...] = field(repr=False, compare=False)
    branch: Branch | None = field(default=None, repr=False, compare=False)
    name: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        members = [{"tensor": m.tensor, "axis": m.axis, "indices": m.indices.tolist()} for m in self.members]
        place = {"add": self.branch.output} if self.branch else {}
        return {"id": self.id, "units": self.units, "kind": self.kind, **place, "statistics": self.statistics, "members": members}


@dataclass(frozen=True)
class Grouping:
    """The groups of a model, what is fixed and why, and the layout of every axis in terms of the groups' units."""

    model: Model
    dependencies: Dependencies
    groups: tuple[Group, ...]
    fixed: tuple[tuple[str, int, str], ...]
    dims: Mapping[Axis, Dim] = field(repr=False)

    def layout(self, axis: Axis) -> Layout:
        return layouts.resolve(self.dims[axis]) if axis in self.dims else []

    def to_json(self) -> dict[str, Any]:
        """The `groups --json` format of docs/formats.md, in the file's own tensors."""
        return {
            "format": 1,
            "model": self.model.name,
            "groups": [group.to_json() for group in self.groups],
            "fixed": [{"tensor": t, "axis": a, "reason": r} for t, a, r in self.fixed],
        }


def group(model: Model, allow_io: Sequence[str] = ()) -> Grouping:
    """Solve a model's axes into groups; channel shuffles are read in the way that leaves more units free.

    allow_io: globs over the names of graph inputs and outputs that may change size.  Raises OnnxPruneError for one that matches none.
    """
    ends = (*model.inputs, *model.outputs)
    for pattern in allow_io:
        if not fnmatch.filter(ends, pattern):
            raise OnnxPruneError(f"{model.name}: no input or output matches --allow-io '{pattern}'; it has {', '.join(ends[:8])}")
    found = [_grouped(model, relate(model, allow_io))]
    shuffles = find_shuffles(model)
    if shuffles:
        found.append(_grouped(model, relate(model, allow_io, shuffles)))
    best = max(found, key=lambda grouping: (-len(grouping.fixed), sum(g.units for g in grouping.groups)))
    return replace(best, groups=named(model, best.groups))


def _grouped(model: Model, dependencies: Dependencies) -> Grouping:
    return collect(model, dependencies, solve(model, dependencies))


def solve(model: Model, dependencies: Dependencies) -> dict[Axis, Dim]:
    """A Dim for every axis that a relation speaks of, so that all relations hold."""
    dims: dict[Axis, Dim] = {}

    def dim(axis: Axis) -> Dim:
        if axis not in dims:
            size = dependencies.sizes[axis[0]] if axis[0] in dependencies.sizes else model.shapes[axis[0]][axis[1]]
            dims[axis] = Dim(size, "an axis of size 1" if size == 1 and axis[0] not in dependencies.sizes else "")
        return dims[axis]

    structural: list[Concat | Product] = []
    statistics: list[Axis] = []
    fixed: list[Fixed] = []
    for relation in dependencies.relations:
        match relation:
            case Same(a, b):
                layouts.bind(dim(a), [[dim(b)]]) if find(dim(a)) is not find(dim(b)) else None
            case Fixed():
                fixed.append(relation)
            case Statistics(axis):
                statistics.append(axis)
                dim(axis)
            case _:
                structural.append(relation)
    for relation in fixed:
        freeze(dim(relation.axis), relation.reason)
    seen = set()
    for relation in structural:
        if isinstance(relation, Product):
            left, right = [dim(a) for a in relation.left], [dim(a) for a in relation.right]
            key = (tuple(find(d).number for d in left), tuple(find(d).number for d in right))
            if left != right and key not in seen:
                layouts.product(left, right, "its reshapes do not fit together")
        else:
            whole, parts = dim(relation.whole), [dim(a) for a in relation.parts]
            key = ((find(whole).number,), tuple(find(d).number for d in parts))
            if key not in seen:
                layouts.concat(whole, parts)
        seen.add(key)
    _keep_axes_whole(dims, dependencies.sizes)
    return dims


def _roots(dims: Mapping[Axis, Dim]) -> dict[Dim, list[Axis]]:
    roots: dict[Dim, list[Axis]] = {}
    for axis, dim in dims.items():
        roots.setdefault(find(dim), []).append(axis)
    return roots


def _keep_axes_whole(dims: Mapping[Axis, Dim], inner: Mapping[str, int]) -> None:
    """A unit that is all of some axis cannot go, as no axis may become empty; nor one that is both factors of a product."""
    for root, axes in _roots(dims).items():
        layout = layouts.resolve(root)
        for segment in layout:
            seen: set[Dim] = set()
            for factor in segment if len(segment) > 1 else ():
                inside = layouts.leaves([[factor]])
                for leaf in inside & seen:
                    freeze(leaf, "it is multiplied with itself")
                seen |= inside
        if all(name in inner for name, _ in axes):
            continue  # a part or factor that only a rule knows, such as padding, may become empty
        common = set.intersection(*[{find(d) for d in segment} for segment in layout]) if layout else set()
        for dim in common:
            if dim.size == 1:
                freeze(dim, "all of an axis")


def collect(model: Model, dependencies: Dependencies, dims: Mapping[Axis, Dim]) -> Grouping:
    """Groups out of the solved axes: leaves that live in the same way together form one."""
    roots = _roots(dims)
    marked = {r.axis for r in dependencies.relations if isinstance(r, Statistics)}
    statistical: set[Dim] = set()
    roles: dict[Dim, list[tuple[int, ...]]] = {}
    places: dict[Dim, list[tuple[str, int, np.ndarray]]] = {}
    for root, axes in roots.items():
        layout = layouts.resolve(root)
        constant = [a for a in axes if a[0] in model.tensors and a[0] not in model.copies]
        if any(axis in marked for axis in axes):
            statistical |= layouts.leaves(layout)
        inner = all(name in dependencies.sizes for name, _ in axes)
        for leaf, role in () if inner else _roles(layout):
            roles.setdefault(leaf, []).append((root.number, *role))
        if constant:
            for leaf, indices in layouts.positions(layout).items():
                places.setdefault(leaf, []).extend((name, axis, indices) for name, axis in constant)
    heads = head_leaves(model, dims)
    families: dict[tuple[object, ...], list[Dim]] = {}
    for leaf in sorted(roles, key=lambda d: d.number):
        if leaf.reason:
            continue
        if leaf not in places:
            freeze(leaf, "no tensor of the file carries it")
            continue
        # two runs of units are alike where each has one place, of its own, on the same axes
        single = len({role[0] for role in roles[leaf]}) == len(roles[leaf]) and not any(role[1] for role in roles[leaf])
        alike = sorted(roles[leaf]) if single else [(leaf.number,)]
        families.setdefault((leaf in statistical, single, *alike), []).append(leaf)
    groups = []
    order = {name: i for i, name in enumerate(model.tensors)}
    for family in families.values():
        units = sum(leaf.size for leaf in family)
        if units < 2:
            freeze(family[0], "a single unit")
            continue
        tables = [sorted(places[leaf], key=lambda p: (order[p[0]], p[1])) for leaf in family]
        members = []
        for rows in zip(*tables, strict=True):
            name, axis, _ = rows[0]
            members.append(Member(name, axis, np.concatenate([r[2] for r in rows]) if len(rows) > 1 else rows[0][2]))
        kind = "head" if heads.intersection(family) else "channel"
        groups.append(Group(0, units, kind, family[0] in statistical, tuple(members), tuple(family)))
    groups.sort(key=lambda g: min(order[m.tensor] for m in g.members))
    numbered = tuple(replace(g, id=i) for i, g in enumerate(groups))
    return Grouping(model, dependencies, numbered, _fixed(model, dims), dims)


def _roles(layout: Layout) -> list[tuple[Dim, tuple[int, ...]]]:
    """For each leaf in a layout: the number of factors beside it, and those factors."""
    found: list[tuple[Dim, tuple[int, ...]]] = []
    for segment in layout:
        numbers = [find(d).number for d in segment]
        for i, dim in enumerate(segment):
            dim = find(dim)
            around = (*numbers[:i], -1, *numbers[i + 1 :])
            inside = [(dim, (0,))] if dim.layout is None else _roles(dim.layout)
            found += [(leaf, (len(segment) - 1 + role[0], *around, *role[1:])) for leaf, role in inside]
    return found


def without(grouping: Grouping, ids: Mapping[int, str]) -> Grouping:
    """The grouping with some groups frozen, each for a reason."""
    for one in grouping.groups:
        if one.id in ids:
            for leaf in one.leaves:
                freeze(leaf, ids[one.id])
    kept = tuple(g for g in grouping.groups if g.id not in ids)
    return replace(grouping, groups=kept, fixed=_fixed(grouping.model, grouping.dims))


def _fixed(model: Model, dims: Mapping[Axis, Dim]) -> tuple[tuple[str, int, str], ...]:
    found = []
    for (name, axis), dim in dims.items():
        tensor = model.tensors.get(name)
        if tensor is None or name in model.copies or tensor.data_type not in FLOATS or tensor.dims[axis] < 2:
            continue
        frozen = sorted((d for d in layouts.leaves(layouts.resolve(dim)) if d.reason), key=lambda d: d.number)
        if frozen:
            found.append((name, axis, frozen[0].reason))
    return tuple(found)

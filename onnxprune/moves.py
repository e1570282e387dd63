"""Which position of a value in one model is which in another: after a permutation of units, after their removal, or both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune import layouts
from onnxprune.grouping import Group, Grouping, Member
from onnxprune.relations import Axis
from onnxprune.rewriter import Remove, Widths
from onnxprune.running import Arrays, Lazy


def shuffled(group: Group, seed: int) -> np.ndarray:
    """An order of the units, (units,), in which none keeps its place."""
    cycle = np.random.default_rng([seed, group.units, *group.members[0].indices[:2].ravel().tolist()]).permutation(group.units)
    order = np.empty(group.units, np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order


def permuted(arrays: Arrays, groups: Sequence[Group], seed: int = 1, omit: Member | None = None) -> Arrays:
    """The tensors of the groups with their units in another order wherever they live (but in the member to omit)."""
    if isinstance(arrays, Lazy):
        many, homes = arrays, by_tensor(groups)

        def one(name: str) -> np.ndarray:
            array = many[name]
            return permuted({name: array}, homes[name], seed, omit).get(name, array)

        return Lazy(homes, one)
    changed: dict[str, np.ndarray] = {}
    for group in groups:
        order = shuffled(group, seed)
        for member in group.members:
            if member is omit or member.tensor not in arrays:
                continue
            array = changed.get(member.tensor, arrays[member.tensor])
            index = np.arange(array.shape[member.axis])
            index[member.indices.ravel()] = member.indices[order].ravel()
            changed[member.tensor] = np.take(array, index, axis=member.axis)
    return changed


def by_tensor(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups that live in each tensor."""
    homes: dict[str, list[Group]] = {}
    for group in groups:
        for name in dict.fromkeys(member.tensor for member in group.members):
            homes.setdefault(name, []).append(group)
    return homes


class Moves:
    """From a model that lost the units `before` to one whose groups are permuted by `seed` and that lost the units `after`."""

    def __init__(
        self, grouping: Grouping, groups: Sequence[Group] = (), seed: int = 0, before: Remove | None = None, after: Remove | None = None
    ) -> None:
        self.grouping = grouping
        self._orders = {g.id: (g, shuffled(g, seed)) for g in groups}
        self._homes = {leaf: g.id for g in groups for leaf in g.leaves}
        self._before, self._after = Widths(grouping, before or {}), Widths(grouping, after or {})

    def index(self, axis: Axis) -> np.ndarray | None:
        """Where each position of the second model's axis is on the first's; None where nothing moves."""
        layout = self.grouping.layout(axis)
        before, after = self._before.mask(axis), self._after.mask(axis)
        moving = {self._homes[leaf] for leaf in layouts.leaves(layout) if leaf in self._homes}
        if not moving and before is None and after is None:
            return None
        index = np.arange(self._after.full(axis))
        rows = layouts.positions(layout) if moving else {}
        for group, order in (self._orders[i] for i in sorted(moving)):
            places = np.concatenate([rows[leaf] for leaf in group.leaves])
            step = np.arange(len(index))
            step[places.ravel()] = places[order].ravel()
            index = index[step]
        if after is not None:
            index = index[after]
        return index if before is None else (np.cumsum(before) - 1)[index]

    def array(self, name: str, array: np.ndarray) -> np.ndarray:
        """The second model's value, made of the first's."""
        for i in range(np.ndim(array)):
            index = self.index((name, i))
            if index is not None and np.shape(array)[i] == self._before.size((name, i)):  # else: other input sizes
                array = np.take(array, index, axis=i)
        return array

    def arrays(self, values: Arrays) -> dict[str, np.ndarray]:
        return {name: value if isinstance(value, list) else self.array(name, np.asarray(value)) for name, value in values.items()}

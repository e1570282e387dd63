"""Widths in coarse steps: groups go a step up or down, alone or two at once, while that loses less and the budget stays met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Kept = dict[int, int]
TURNS = 64  # exchanges, at most
TRIED = 8  # that look best as far as what they save adds up; the best of them is made


@dataclass(frozen=True)
class Aim:
    """losses: {group: what is lost at each number of its units removed}; units: {group: how many it has}.

    miss: what widths miss the budget by, rising with what goes; by the tolerance, or less, is as good as not at all.
    """

    losses: Mapping[int, np.ndarray]
    units: Mapping[int, int]
    miss: Callable[[Kept], float]
    tolerance: float

    def loss(self, group: int, keep: int) -> float:
        return float(self.losses[group][self.units[group] - keep])

    def key(self, kept: Kept) -> tuple[float, float]:
        """By how much more than the tolerance the budget is missed, and what is lost; the least is best."""
        excess = max(0.0, abs(self.miss(kept)) - self.tolerance)
        return round(excess, 9), sum(self.loss(g, n) for g, n in kept.items() if g in self.losses)


def exchanged(kept: Kept, free: set[int], beside: Callable[[int, int], list[int]], aim: Aim) -> Kept:
    """From the units that groups keep, others of the free groups that suit the aim better, one or two groups' steps at a time.

    beside(group, units kept): the widths a step below and above.
    """
    best, effects = aim.key(kept), dict[tuple[int, int], float]()
    for _ in range(TURNS):
        gap = aim.miss(kept)
        moves = [(g, n) for g in sorted(free & set(kept)) for n in beside(g, kept[g])]
        effects |= {move: aim.miss(kept | dict([move])) - gap for move in moves if move not in effects}
        options = _promising(kept, moves, np.array([effects[move] for move in moves]), gap, aim)
        option = min(options, key=aim.key, default=kept)
        found = aim.key(option)
        if found >= (best[0], best[1] * (1 - 1e-6)):
            break
        changed = {g for g in kept if option[g] != kept[g]}
        effects = {move: effect for move, effect in effects.items() if move[0] not in changed}  # the others change little
        kept, best = option, found
    return kept


def _promising(kept: Kept, moves: Sequence[tuple[int, int]], effects: np.ndarray, gap: float, aim: Aim) -> list[Kept]:
    """The moves, and pairs of moves in different groups, that should be best, were their effects to add up."""
    if not moves:
        return []
    groups = np.array([g for g, _ in moves])
    bound = float(np.finfo(np.float32).max)  # in place of a loss without bounds
    costs = np.array([min(aim.loss(g, n), bound) - min(aim.loss(g, kept[g]), bound) for g, n in moves])
    effects, costs = np.append(effects, 0.0), np.append(costs, 0.0)  # the last: no second move
    excess = np.maximum(0.0, np.abs(gap + effects[:-1, None] + effects[None]) - aim.tolerance)
    excess[:, :-1][groups[:, None] == groups[None]] = np.inf
    order = np.lexsort(((costs[:-1, None] + costs[None]).ravel(), excess.ravel()))[:TRIED]
    pairs = [divmod(int(i), len(costs)) for i in order if np.isfinite(excess.ravel()[i])]
    return [kept | dict(moves[i] for i in pair if i < len(moves)) for pair in pairs]

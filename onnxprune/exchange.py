"""Widths in coarse steps: groups go some steps up or down, alone or two at once, while that loses less and the budget stays met."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Kept = dict[int, int]
TURNS = 64  # exchanges, at most
MOVES = 256  # of all groups from which pairs are made: many groups have less to choose from, a step each way at least
SPANS = (2, 4, 8, 64)  # steps off widths that are to be met nearly
PRICES = (2, 4, 8, 16, 32, 64)  # of missing all of the budget, in what is lost at first
TRIED = 8  # that look best as far as what they save adds up; the best of them is made
MANY = 64  # are tried of widths that meet a budget hardly ever


@dataclass(frozen=True)
class Aim:
    """losses: {group: what is lost at each number of its units removed}; units: {group: how many it has}.

    miss: what widths miss the budget by, rising with what goes; by the tolerance, or less, is as good as not at all.  tried: how many
    moves are tried of which the best is made.
    """

    losses: Mapping[int, np.ndarray]
    units: Mapping[int, int]
    miss: Callable[[Kept], float]
    tolerance: float
    tried: int = TRIED

    def loss(self, group: int, keep: int) -> float:
        return float(self.losses[group][self.units[group] - keep])

    def key(self, kept: Kept, price: float = np.inf) -> tuple[float, float]:
        """By how much more than the tolerance the budget is missed, and what is lost; the least is best.  With a price, one sum."""
        excess = max(0.0, abs(self.miss(kept)) - self.tolerance)
        lost = sum(self.loss(g, n) for g, n in kept.items() if g in self.losses)
        return (round(excess, 9), lost) if np.isinf(price) else (0.0, lost + price * excess)


def exchanged(kept: Kept, levels: Mapping[int, Sequence[int]], aim: Aim) -> Kept:
    """From the units that groups keep, others that suit the aim better, by a move of one group or of two at a time.

    levels: {group: numbers of units to choose from, ascending} of those that may change.  Missing the budget has a price at first,
    that rises: with none allowed the first place that no move betters is often a bad one.
    """
    loss = max(aim.key(kept)[1], 1e-30)
    found = [_descended(kept, levels, aim, np.inf)]
    for price in PRICES:
        kept = _descended(kept, levels, aim, price * loss)
        found.append(_descended(kept, levels, aim, np.inf))
    return min(found, key=aim.key)


def landed(
    kept: Kept, levels: Mapping[int, Sequence[int]], units: Mapping[int, int], miss: Callable[[Kept], float], tolerance: float
) -> Kept:
    """The widths nearest to those given that meet the budget, where groups have few to choose from: first a few steps off, then any."""
    far = {g: ((np.arange(units[g] + 1) - (units[g] - kept[g])) / units[g]) ** 2 for g in levels}
    aim, found = Aim(far, units, miss, tolerance, MANY), [kept]
    for span in SPANS:
        some = {g: [n for n in widths if n == kept[g] or n in _near(widths, kept[g], span)] for g, widths in levels.items()}
        found.append(exchanged(kept, some, aim))
        if abs(miss(found[-1])) <= tolerance:
            break
    return min(found, key=aim.key)


def _descended(kept: Kept, levels: Mapping[int, Sequence[int]], aim: Aim, price: float) -> Kept:
    """Move by move to where none is better; price: what missing all of the budget counts as lost, or infinite."""
    span = max(1, MOVES // (2 * max(1, len(levels))))
    best, effects = aim.key(kept, price), dict[tuple[int, int], float]()
    for _ in range(TURNS):
        gap = aim.miss(kept)
        moves = [(g, n) for g, some in levels.items() for n in _near(some, kept[g], span)]
        effects |= {move: aim.miss(kept | dict([move])) - gap for move in moves if move not in effects}
        options = _promising(kept, moves, np.array([effects[move] for move in moves]), gap, aim, price)
        option = min(options, key=lambda widths: aim.key(widths, price), default=kept)
        found = aim.key(option, price)
        if found >= (best[0], best[1] * (1 - 1e-6)):
            break
        changed = {g for g in kept if option[g] != kept[g]}
        effects = {move: effect for move, effect in effects.items() if move[0] not in changed}  # the others change little
        kept, best = option, found
    return kept


def _near(levels: Sequence[int], keep: int, span: int) -> list[int]:
    """The next levels below and above, as many as the span each."""
    below, above = bisect_left(levels, keep), bisect_right(levels, keep)
    return [*levels[max(0, below - span) : below], *levels[above : above + span]]


def _promising(kept: Kept, moves: Sequence[tuple[int, int]], effects: np.ndarray, gap: float, aim: Aim, price: float) -> list[Kept]:
    """The moves, and pairs of moves in different groups, that should be best, were their effects to add up."""
    if not moves:
        return []
    groups = np.array([g for g, _ in moves])
    bound = float(np.finfo(np.float32).max)  # in place of a loss without bounds
    costs = np.array([min(aim.loss(g, n), bound) - min(aim.loss(g, kept[g]), bound) for g, n in moves])
    effects, costs = np.append(effects, 0.0), np.append(costs, 0.0)  # the last: no second move
    excess = np.maximum(0.0, np.abs(gap + effects[:-1, None] + effects[None]) - aim.tolerance)
    excess[:, :-1][groups[:, None] == groups[None]] = np.inf
    lost = costs[:-1, None] + costs[None]
    order = (np.lexsort((lost.ravel(), excess.ravel())) if np.isinf(price) else np.argsort((lost + price * excess).ravel()))[: aim.tried]
    pairs = [divmod(int(i), len(costs)) for i in order if np.isfinite(excess.ravel()[i])]
    return [kept | dict(moves[i] for i in pair if i < len(moves)) for pair in pairs]

"""Step 5: which units go, so that a budget is met.

An allocation is a function (scores, strength) -> {group: share of its units to remove}, monotone in strength from 0 to 1 and
registered under a name; `choose` finds the strength that meets the budget.

    @allocation("only-wide")
    def only_wide(scores, strength):
        return {g: strength if len(s) >= 64 else 0.0 for g, s in scores.items()}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune import layouts
from onnxprune.cost import Measure, counter
from onnxprune.errors import OnnxPruneError
from onnxprune.exchange import Aim, Kept, exchanged, landed
from onnxprune.grouping import Grouping
from onnxprune.layouts import find
from onnxprune.registry import Registry

Scores = Mapping[int, np.ndarray]
Allocation = Callable[[Scores, float], dict[int, float]]
Savings = Mapping[int, np.ndarray]
allocation: Registry[Allocation] = Registry("allocation", "onnxprune.allocations")


@allocation("uniform")
def uniform(scores: Scores, strength: float) -> dict[int, float]:
    """The same share of every group."""
    return dict.fromkeys(scores, strength)


@allocation("global")
def globally(scores: Scores, strength: float) -> dict[int, float]:
    """One threshold over the scores of all groups, each divided by what a unit of the group costs: those below it go."""
    pool = np.sort(np.concatenate(list(scores.values())))
    if strength >= 1:
        return dict.fromkeys(scores, 1.0)
    threshold = pool[int(strength * len(pool))]
    return {g: float((s < threshold).mean()) for g, s in scores.items()}


@allocation("standardized")
def standardized(scores: Scores, strength: float) -> dict[int, float]:
    """One threshold over the scores, each less its group's mean and by its deviation (FLAP, arXiv:2312.11983)."""
    return globally({g: (s - s.mean()) / max(float(s.std()), 1e-12) for g, s in scores.items()}, strength)


@allocation("pq")
def pq(scores: Scores, strength: float) -> dict[int, float]:
    """Each group keeps a share in proportion to 1 − I of its scores, at most all: unequal scores say that fewer units will do.

    I is the PQ index for p = ½, q = 1, so 1 − I = (Σ√s)² / (d·Σs); SAP keeps d·(1 − I) / (1 + η)² of d (Diao et al. 2023,
    arXiv:2302.05601), and the strength takes the place of η.
    """
    kept = {}
    for g, values in scores.items():
        s = np.maximum(np.where(np.isfinite(values), values, 0), 0)
        kept[g] = float(np.sqrt(s).sum() ** 2 / (len(s) * s.sum())) if s.sum() > 0 else 1.0
    least = min(kept.values(), default=1.0)
    return {g: 1 - min(1.0, (1 - strength) * share / least) for g, share in kept.items()}


DISTORTION = "distortion"  # measured on samples (`curves`), and split by dynamic programming
BALANCED = "balanced"  # the geometric mean of that and of the scores' own sums, as later layers make up for some of what is measured
MEASURED = (DISTORTION, BALANCED)
LATENCY = "latency"  # a budget that is measured (`latency`), not counted
BUDGETS = ("macs", "params", "channels", LATENCY)


def names() -> list[str]:
    """All allocations that can be asked for."""
    return sorted({*allocation.names(), *MEASURED})


BINS = 2000
LEVELS = 48
POINT = 0.01  # of the budget
FEW = 16  # groups: of more, single steps meet a budget


@dataclass(frozen=True)
class Limits:
    """floor: units (or, below 1, the share) that each group keeps at least; steps: {group: kept units are all or a multiple of it}."""

    floor: float = 0.1
    steps: Mapping[int, int] = field(default_factory=dict)

    def step(self, group: int) -> int:
        return self.steps.get(group, 1)

    def least(self, group: int, units: int) -> int:
        """Units that a group keeps at least."""
        floor = max(1, int(np.ceil(self.floor * units)) if self.floor < 1 else min(units, int(self.floor)))
        return min(units, -(-floor // self.step(group)) * self.step(group))

    def kept(self, group: int, units: int, share: float) -> int:
        """Units kept of a group when `share` of it is to go."""
        keep, step = round(units * (1 - share)), self.step(group)
        if keep < units:
            keep = max(1, round(keep / step)) * step
        return min(units, max(self.least(group, units), keep))

    def levels(self, group: int, units: int) -> np.ndarray:
        """The numbers of units that may go, ascending."""
        kept = np.arange(self.least(group, units), units + 1)
        return np.asarray(units - kept[(kept % self.step(group) == 0) | (kept == units)][::-1])

    def end(self, group: int, units: int, keep: int, step: int) -> int:
        """The widest number of units kept that costs no more than `keep`, where only multiples of `step` cost less."""
        end = min(units, -(-keep // step) * step)
        return end if end == units else max(keep, end - end % self.step(group))


@dataclass(frozen=True)
class Choice:
    """remove: {group: units, ascending}; reached: the share of the budget that goes."""

    remove: dict[int, np.ndarray]
    reached: float


def secondary(grouping: Grouping) -> set[int]:
    """Groups that multiply with a larger one on some axis; one of the two is enough to narrow it."""
    owner = {leaf: g for g in grouping.groups for leaf in g.leaves}
    found: set[int] = set()
    for dim in {find(d) for d in grouping.dims.values()}:
        for segment in layouts.resolve(dim):
            owners = {owner[f].id: owner[f] for d in segment for f in layouts.leaves([[d]]) if f in owner}
            if len(owners) > 1 and len(segment) > 1:
                largest = max(owners.values(), key=lambda g: (g.units, -g.id))
                found |= set(owners) - {largest.id}
    return found


def choose(
    grouping: Grouping,
    scores: Scores,
    ratio: float,
    of: str | Measure = "macs",
    rule: str = "uniform",
    limits: Limits | None = None,
    shares: Mapping[int, float] | None = None,
    cut: Sequence[int] = (),
    losses: Mapping[int, np.ndarray] | None = None,
    near: float = POINT,
) -> Choice:
    """The lowest-scored units of each group, so many that `ratio` of the budget goes.

    shares: {group: share} of groups whose ratio the user gave; cut: residual branches that go as well; losses: {group: what is
    lost at each number of units removed, (units + 1,)}, which are then split instead of the scores.  Where the budget's measure
    has steps, widths end where one ends: what is within a step costs nothing more.  near: what the budget may be missed by before
    widths leave those of the rule.  Where the budget is out of reach, the closest found is returned, or by losses what loses least.
    """
    limits, shares = limits or Limits(), dict(shares or {})
    units = {g.id: g.units for g in grouping.groups}
    cost = counter(grouping, of)
    whole = cost({})
    second = secondary(grouping)
    if losses is None:
        allocation.get(rule)  # an unknown name is refused, even where no group is left to ask it about
    price = {g: _price(cost, whole, g, units[g]) for g in scores}
    gone = dict.fromkeys(cut, 0)

    def kept_at(strength: float, only: set[int], saved: Savings) -> Kept:
        free = {g: s for g, s in scores.items() if g in only and g not in shares}
        if rule == "global":
            free = {g: s / price[g] if price[g] else np.full(len(s), np.inf) for g, s in free.items()}
        if losses is not None:
            levels = {g: limits.levels(g, units[g]) for g in free}
            parted = split({g: losses[g][: levels[g][-1] + 1] for g in free}, saved, strength, levels)
            wanted = {g: n / units[g] for g, n in parted.items()} | shares
        else:
            wanted = (_asked(rule, free, strength) if free else {}) | shares
        return {g: limits.kept(g, units[g], wanted[g]) for g in wanted}

    def reached(kept: Mapping[int, int]) -> float:
        return 1 - cost({**kept, **gone}) / whole if whole else 0.0

    def savings(beside: Kept) -> Savings:
        return {g: _savings(cost, whole, g, units[g], beside) for g in scores} if losses is not None else {}

    def bisected(only: set[int], saved: Savings) -> Kept:
        low, high = kept_at(0.0, only, saved), kept_at(1.0, only, saved)
        weak, strong = 0.0, 1.0
        for _ in range(22):
            middle = (weak + strong) / 2
            kept = kept_at(middle, only, saved)
            if reached(kept) < ratio:
                weak, low = middle, kept
            else:
                strong, high = middle, kept
            if low == high or abs(reached(high) - ratio) < 2e-4:
                break
        return _between(low, high, limits, miss)

    def miss(kept: Kept) -> float:
        return reached(kept) - ratio

    saved = savings({})
    first = {g for g in scores if g not in second or losses is not None}  # what is measured says by itself which of the two to narrow
    only = first if reached(kept_at(1.0, first, saved)) >= ratio else set(scores)
    best = bisected(only, saved)
    steps = {g: max(limits.step(g), cost.steps.get(g, 1) // limits.step(g) * limits.step(g)) for g in best}
    coarse = Limits(limits.floor, {g: step for g, step in steps.items() if step > 1})
    free = only - set(shares)

    def levels_of(group: int) -> list[int]:
        return [int(n) for n in units[group] - coarse.levels(group, units[group])[::-1]]

    if losses is not None and coarse.steps:
        aim = Aim(losses, units, miss, POINT / 2)
        levels = {g: levels_of(g) for g in sorted(free & set(best))}
        best = exchanged(best, levels, aim)
        again = bisected(only, savings(best))  # what a group saves depends on how wide the others are
        best = min(best, exchanged(again, levels, aim), key=aim.key)
    else:
        best = _nudge(best, units, coarse, miss, free)
        if abs(miss(best)) > near and len(best) <= FEW:
            other = landed(best, {g: levels_of(g) for g in sorted(free & set(best))}, units, miss, near)
            best = other if losses is None or abs(miss(other)) <= near else best  # what only comes nearer may lose far more
    best = {g: n if g in shares else limits.end(g, units[g], n, cost.steps.get(g, 1)) for g, n in best.items()}
    remove = {b: np.zeros(1, np.int64) for b in cut}
    for g, keep in best.items():
        if keep < units[g]:
            order = np.argsort(scores[g], kind="stable")
            remove[g] = np.sort(order[: units[g] - keep])
    return Choice(remove, reached(best))


def _asked(rule: str, scores: Scores, strength: float) -> dict[int, float]:
    """An allocation's shares; raises OnnxPruneError where they are not numbers."""
    found = allocation.call(rule, scores, strength)
    try:
        shares = {g: float(share) for g, share in found.items() if g in scores}
    except (AttributeError, TypeError, ValueError):
        shares = {-1: np.nan}
    if np.isnan(list(shares.values())).any():
        raise OnnxPruneError(
            f"the allocation '{rule}' gives {found!r:.60}; it must give {{group: share of its units}}, numbers from 0 to 1"
        )
    return shares


def _price(cost: Measure, whole: float, group: int, units: int) -> float:
    """The share of the budget that a unit of a group costs, down to the end of the next step; 0 where nothing goes so."""
    step = cost.steps.get(group, 1)
    below = (units - 1) // step * step
    return max(whole - cost({group: below}), 0.0) / whole / (units - below) if whole and below else 0.0


def _savings(cost: Measure, whole: float, group: int, units: int, beside: Kept) -> np.ndarray:
    """The share of the budget that goes with each number of units of one group, the others being as wide as `beside`, (units + 1,)."""
    full = cost({**beside, group: units})

    def saved(keep: int) -> float:
        return (full - cost({**beside, group: keep})) / whole if whole else 0.0

    step = cost.steps.get(group, 1)
    if step > 1:
        ends = np.minimum(units, -(-(units - np.arange(units + 1)) // step) * step)
        widths, place = np.unique(ends, return_inverse=True)
        return np.array([saved(int(n)) for n in widths])[place]
    at = np.unique(np.linspace(0, units, LEVELS).round().astype(int))
    return np.interp(np.arange(units + 1), at, [saved(units - int(n)) for n in at])


def split(
    losses: Mapping[int, np.ndarray], saved: Mapping[int, np.ndarray], strength: float, levels_of: Mapping[int, np.ndarray] | None = None
) -> dict[int, int]:
    """Units to remove of each group so that `strength` of all that can be saved is, and the sum of the losses is least.

    losses, saved: {group: at each number of units removed}; levels_of: the numbers to choose from, ascending from 0 to the last of
    the losses, else all; at most LEVELS of them.  Dynamic programming over what is saved, in BINS steps.
    """
    if not losses:
        return {}
    most = {g: np.maximum.accumulate(saved[g][: len(losses[g])]) for g in losses}
    unit = sum(float(m[-1]) for m in most.values()) / BINS
    if unit <= 0:
        return dict.fromkeys(losses, 0)
    best = np.full(BINS + 1, np.inf)
    best[0] = 0.0
    taken: list[tuple[int, np.ndarray, np.ndarray]] = []
    for g, loss in losses.items():
        levels = levels_of[g] if levels_of else np.arange(len(loss))
        levels = levels[np.diff(most[g][levels], prepend=-np.inf) > 0]  # to remove more of a step saves nothing
        levels = levels[np.unique(np.linspace(0, len(levels) - 1, LEVELS).round().astype(int))]
        choice = np.zeros(BINS + 1, np.int64)
        new = np.full(BINS + 1, np.inf)
        for i, level in enumerate(levels):
            step = int(most[g][level] / unit + 1e-9)
            there = np.full(BINS + 1, np.inf)
            there[step:] = best[: BINS + 1 - step] + loss[level]
            better = there < new
            new[better], choice[better] = there[better], i
        best = new
        taken.append((g, levels, choice))
    goal = min(BINS, round(strength * BINS))
    reachable = np.flatnonzero(np.isfinite(best))
    beyond = reachable[reachable >= goal]
    place = int(beyond[np.argmin(best[beyond])]) if len(beyond) else int(reachable[-1])
    found = {}
    for g, levels, choice in reversed(taken):
        level = int(levels[choice[place]])
        found[g] = level
        place -= int(most[g][level] / unit + 1e-9)
    return {g: found[g] for g in losses}


def _between(low: Kept, high: Kept, limits: Limits, miss: Callable[[Kept], float]) -> Kept:
    """Take groups over from low to high, one by one, the last of them in part, and stop where the budget is met best."""
    differ = [g for g in high if low.get(g) != high[g]]
    options = [low | {g: high[g] for g in differ[:k]} for k in _around(len(differ), lambda k: miss(low | {g: high[g] for g in differ[:k]}))]
    last = [g for g in differ if options[0].get(g) != options[-1][g]]
    if last and last[0] in low:  # many of its units may score alike
        group = last[0]
        keep = [n for n in range(low[group] - 1, high[group], -1) if n % limits.step(group) == 0]
        parts = [options[0] | {group: n} for n in keep]
        options += [parts[k] for k in _around(len(parts) - 1, lambda k: miss(parts[k]))] if parts else []
    return min(options, key=lambda kept: abs(miss(kept)))


def _around(most: int, miss: Callable[[int], float]) -> tuple[int, int]:
    """The two neighbours among 0 … most between which a rising function passes zero, by bisection."""
    a, b = 0, max(most, 0)
    while b - a > 1:
        middle = (a + b) // 2
        if miss(middle) < 0:
            a = middle
        else:
            b = middle
    return a, b


def _nudge(kept: Kept, units: Mapping[int, int], limits: Limits, miss: Callable[[Kept], float], free: set[int]) -> Kept:
    """A step more or less in single groups, or in two at once where steps are coarse, while the budget is missed by more than a
    fifth of a point and it helps."""
    for _ in range(8):
        gap = miss(kept)
        if abs(gap) < 2e-3:
            break
        moves = [(g, keep) for g in sorted(free & set(kept))[:256] for keep in _beside(kept[g], g, units[g], limits)]
        ahead = [move for move in moves if (move[1] > kept[move[0]]) == (gap > 0)]
        options: list[Kept] = [kept | {g: keep} for g, keep in ahead]
        closest = min(options, key=lambda k: abs(miss(k)), default=kept)
        if limits.steps and abs(miss(closest)) >= 2e-3 and len(moves) > 1:
            closest = min(closest, _both(kept, moves, miss), key=lambda k: abs(miss(k)))
        if abs(miss(closest)) >= abs(gap):
            break
        kept = closest
    return kept


def _beside(keep: int, group: int, units: int, limits: Limits) -> list[int]:
    """The next widths below and above."""
    step = limits.step(group)
    below, above = (keep - 1) // step * step, min(units, (keep // step + 1) * step)
    return [n for n in (below, above) if n != keep and n >= limits.least(group, units)]


def _both(kept: Kept, moves: Sequence[tuple[int, int]], miss: Callable[[Kept], float]) -> Kept:
    """The two moves in different groups that should meet the budget best, as far as what they save adds up."""
    gap = miss(kept)
    effects = np.array([miss(kept | {g: keep}) - gap for g, keep in moves])
    sums = np.abs(gap + effects[:, None] + effects[None])
    numbers = np.array([g for g, _ in moves])
    sums[numbers[:, None] == numbers[None]] = np.inf
    first, second = np.unravel_index(int(np.argmin(sums)), sums.shape)
    return kept | dict([moves[int(first)], moves[int(second)]])


def nearest(choices: Iterable[Choice], ratio: float) -> Choice:
    """The first choice that is within a point of the budget; the closest of all where none is."""
    tried = []
    for choice in choices:
        tried.append(choice)
        if abs(choice.reached - ratio) <= POINT:
            return choice
    return min(tried, key=lambda choice: abs(choice.reached - ratio))


def check_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise OnnxPruneError(f"the ratio is {ratio}; it is the share to remove and must lie between 0 and 1: write 0.4 or 40%")
    return ratio


def check_floor(min_keep: float) -> float:
    if not 0 <= min_keep < np.inf:
        raise OnnxPruneError(f"min-keep is {min_keep}; it is a share below 1 or a number of units, 0 at least")
    return min_keep


def check_allocation(name: str, samples: bool) -> None:
    """Raises OnnxPruneError where there is no such allocation, or where it is measured on samples and there are none."""
    if name not in (*names(), "auto"):
        raise OnnxPruneError(f"no allocation is named '{name}'; there are: {', '.join([*names(), 'auto'])}")
    if name in (*MEASURED, "auto") and not samples:
        raise OnnxPruneError(f"--allocation {name} measures on samples; give --calibration (samples, or 'noise')")


def check_budget(of: str) -> str:
    if of not in BUDGETS:
        raise OnnxPruneError(f"no budget is named '{of}'; there are: {', '.join(BUDGETS)}")
    return of

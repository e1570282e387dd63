"""Step 5b: which residual branches go, alone or before channels, and what `--granularity` leaves to choose from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.allocations import Choice
from onnxprune.branches import with_branches
from onnxprune.certificate import Bench
from onnxprune.cost import Measure, counter
from onnxprune.equivalence import WHOLE, distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Grouping
from onnxprune.rewriter import Widths, rewrite

KINDS = {"channel": "channels", "head": "attention heads", "block": "residual branches", "all": "channels or residual branches"}
MIXES = 6  # how many numbers of branches are tried before channels meet the budget
POINT = 0.01


def check_granularity(granularity: str) -> str:
    if granularity not in KINDS:
        raise OnnxPruneError(f"no granularity is named '{granularity}'; there are: {', '.join(KINDS)}")
    return granularity


def at_granularity(grouping: Grouping, granularity: str) -> Grouping:
    """The grouping with the groups to choose from: `channel` all widths, `head` attention heads alone, `block`, or `all`.

    Raises OnnxPruneError (exit code 3) where the model has groups, and none of them is of that kind.
    """
    if granularity == "channel":
        return grouping
    found = with_branches(grouping) if granularity != "head" else grouping
    groups = tuple(g for g in found.groups if granularity in ("all", g.kind))
    if not groups and (found.groups or granularity == "block"):
        others = "; it has other groups: see `onnxprune groups`" if found.groups else ""
        raise OnnxPruneError(f"{grouping.model.name}: has no {KINDS[granularity]} that can be pruned{others}", 3)
    return replace(found, groups=groups)


class Blocks:
    """The residual branches to choose from, cheapest first: lowest score for what they cost.

    scores: {group id: score}; shares: {group id: share} that the user gave: of the branches with one share that part goes.
    """

    def __init__(self, grouping: Grouping, scores: Mapping[int, float], of: str | Measure, shares: Mapping[int, float]) -> None:
        self._cost = counter(grouping, of)
        self._whole = self._cost({}) or 1.0
        self.own = {b: self.reached([b]) for b in scores}
        paid = [b for b in scores if self.own[b] > 0]
        order = sorted(paid, key=lambda b: (scores[b] / self.own[b], b))
        self.free = [b for b in order if b not in shares]
        self.given: list[int] = []
        for share in sorted({shares[b] for b in order if b in shares}):
            same = [b for b in order if shares.get(b) == share]
            self.given += same[: round(share * len(same))]

    def reached(self, cut: Collection[int]) -> float:
        """The share of the budget that goes with these branches."""
        return 1 - self._cost(dict.fromkeys(cut, 0)) / self._whole

    def closest(self, ratio: float) -> Choice:
        """Cheapest first while it helps; then swaps, where the budget is still missed by more than a point."""

        def miss(cut: Collection[int]) -> float:
            return abs(self.reached(cut) - ratio)

        cut = list(self.given)
        for block in self.free:
            if miss([*cut, block]) < miss(cut):
                cut.append(block)
        while miss(cut) > POINT:
            gap = self.reached(cut) - ratio
            swaps = [(a, b) for a in cut if a not in self.given for b in self.free if b not in cut]
            swaps.sort(key=lambda ab: abs(gap - self.own[ab[0]] + self.own[ab[1]]))
            better = ([b for b in cut if b != gone] + [new] for gone, new in swaps[:8])
            best = min(better, key=miss, default=cut)
            if miss(best) >= miss(cut):
                break
            cut = best
        return Choice(dict.fromkeys(sorted(cut), WHOLE), self.reached(cut))

    def prefixes(self, ratio: float) -> list[list[int]]:
        """A few numbers of branches, from none to as many as the budget holds, each the cheapest; and those that meet it alone."""
        most = 0
        while most < len(self.free) and self.reached([*self.given, *self.free[: most + 1]]) <= ratio + POINT:
            most += 1
        found = [[*self.given, *self.free[:k]] for k in sorted({round(k) for k in np.linspace(0, most, MIXES)})]
        alone = self.closest(ratio)
        return [*found, sorted(alone.remove)] if abs(alone.reached - ratio) <= POINT else found


def mixed(
    bench: Bench, grouping: Grouping, ratio: float, prefixes: Sequence[Sequence[int]], widths: Callable[[Sequence[int]], Choice]
) -> Choice:
    """Some branches, and of the channels so many that the budget is met: the mix that changes the outputs least.

    What channels and branches cost in accuracy does not compare in weights; here each mix is made, run on the bench's inputs,
    and compared with the original by `equivalence.distortion`.
    """
    best: tuple[tuple[float, float], Choice] | None = None
    for cut in prefixes:
        choice = widths(cut)
        try:
            outputs = bench.opened(rewrite(grouping, choice.remove), Widths(grouping, choice.remove)).run(bench.feeds)
            change = distortion(bench.reference, outputs)
        except OnnxPruneError:
            change = float("inf")
        rank = (max(0.0, abs(choice.reached - ratio) - POINT), change)
        if best is None or rank < best[0]:
            best = rank, choice
    assert best is not None  # there is always the mix without any branch
    return best[1]

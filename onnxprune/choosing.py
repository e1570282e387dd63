"""Which units and branches go: chosen for a budget, and again without the groups whose removal fails its proof."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from onnxprune.allocations import POINT, Choice, Limits, choose, nearest
from onnxprune.certificate import Bench, Proof, prepare
from onnxprune.cost import Cuts, Measure
from onnxprune.depth import Blocks, mixed
from onnxprune.equivalence import influences
from onnxprune.errors import OnnxPruneError, ProofError
from onnxprune.ground import Ground
from onnxprune.grouping import Grouping, without
from onnxprune.importer import Model
from onnxprune.latency import land
from onnxprune.result import Result
from onnxprune.rewriter import rewrite
from onnxprune.selection import Losses, Scores
from onnxprune.stopwatch import Timer

Arrays = Mapping[str, np.ndarray]
Progress = Callable[[str], None]
ROUNDS = 4  # of planning without the groups whose removal fails the proof


@dataclass(frozen=True)
class Left:
    """What there is to choose from: groups and their proof, the scores of their units, what is lost without each branch, given shares."""

    grouping: Grouping
    proof: Proof | None
    scores: Scores
    lost: Mapping[int, float]
    shares: Mapping[int, float]

    def without(self, wrong: Mapping[int, str]) -> Left:
        """Without the groups whose removal fails the proof."""
        proof = self.proof
        if proof is not None:
            proven, unchecked = (tuple(i for i in ids if i not in wrong) for ids in (proof.proven, proof.unchecked))
            proof = replace(proof, frozen={**proof.frozen, **wrong}, proven=proven, unchecked=unchecked)
        scores = {i: units for i, units in self.scores.items() if i not in wrong}
        lost, shares = ({i: n for i, n in named.items() if i not in wrong} for named in (self.lost, self.shares))
        return Left(without(self.grouping, wrong), proof, scores, lost, shares)


def first_right(
    left: Left, choice_of: Callable[[Left], Choice], made_by: Callable[[Choice, Left], Result], progress: Progress | None
) -> Result | None:
    """The first result that passes its proof, planned again without the groups that fail it; None where nothing can go.

    Raises ProofError where none does.
    """
    failure: ProofError | None = None
    for _ in range(ROUNDS):
        choice = choice_of(left)
        if not choice.remove:
            break
        try:
            return made_by(choice, left)
        except ProofError as error:
            failure = error
        if progress:
            progress(f"planning again without {len(failure.groups)} groups")
        left = left.without(failure.groups)
        if not left.scores and not left.lost:
            break
    if failure is not None:
        raise failure
    return None


def nothing_goes(name: str, ratio: float, of: str, min_keep: float, left: Left, removing: Callable[[float], Choice]) -> OnnxPruneError:
    """Why nothing goes, and what to ask for; removing: the choice at a ratio."""
    if not left.scores:
        return OnnxPruneError(f"{name}: to cut none of its branches is closest to {ratio:.1%} of {of}; ask for more", 3)
    least = _least(removing, ratio)
    if least is not None:
        return OnnxPruneError(f"{name}: no unit takes as little as {ratio:g} of {of}; ask for {least:.2g} or more", 3)
    if left.scores.keys() <= left.shares.keys():
        return OnnxPruneError(f"{name}: the shares that are given with --layer-ratio take no unit; give larger ones", 3)
    return OnnxPruneError(f"{name}: nothing can go within --min-keep {min_keep:g} and the alignment; ask for less of them", 3)


def _least(removing: Callable[[float], Choice], ratio: float) -> float | None:
    """The least ratio, up to a twentieth, at which something goes, with two digits; None where nothing does below 1."""
    below = ratio
    while not removing(above := min(2 * below, 1.0)).remove:
        if above == 1.0:
            return None
        below = above
    while above > 1.05 * below:
        middle = float(np.sqrt(below * above))
        below, above = (below, middle) if removing(middle).remove else (middle, above)
    digit = 10.0 ** (np.floor(np.log10(above)) - 1)
    return float(np.ceil(above / digit) * digit)


def lost_without(
    ground: Ground, chosen: Collection[int], criterion: str, feeds: Arrays | None, seed: int
) -> tuple[dict[int, float], Bench | None]:
    """How much the outputs change without each of the chosen residual branches, and what they were run on, if they were."""
    branches = [g for g in ground.grouping.groups if g.id in chosen and g.branch is not None]
    if not branches:
        return {}, ground.bench
    if ground.study.progress:
        ground.study.progress(f"choosing among {len(branches)} branches")
    bench = ground.bench or prepare(ground.grouping, feeds, seed)
    lost = {b.id: ground.proof.influence[b.id] for b in branches if b.id in ground.proof.influence} if ground.proof else {}
    lost |= influences(bench, [b for b in branches if b.id not in lost])
    if criterion == "random":
        lost = {b.id: float(np.random.default_rng([seed, b.id]).random()) for b in branches}
    return lost, bench


def chosen_for(
    bench: Bench | None,
    grouping: Grouping,
    scores: Mapping[int, np.ndarray],
    lost: Mapping[int, float],
    ratio: float,
    of: str | Measure,
    rule: str,
    limits: Sequence[Limits],
    shares: Mapping[int, float],
    losses: Losses = None,
    near: float = POINT,
) -> Choice:
    """Units to remove for a budget, by the `scores` of width groups and what the outputs have `lost` without each branch."""

    def widths(cut: Sequence[int] = ()) -> Choice:
        dead = Cuts(grouping).dead(cut)
        alive = {g.id for g in grouping.groups if not dead or any(m.tensor not in dead for m in g.members)}
        left = {g: s for g, s in scores.items() if g in alive}
        given = {g: shares[g] for g in left if g in shares}
        return nearest((choose(grouping, left, ratio, of, rule, limit, given, cut, losses, near) for limit in limits), ratio)

    if not lost or bench is None:
        return widths()
    blocks = Blocks(grouping, lost, of, shares)
    return mixed(bench, grouping, ratio, blocks.prefixes(ratio), widths) if scores else blocks.closest(ratio)


def landed(
    removing: Callable[[float], Choice],
    ratio: float,
    loaded: Model,
    grouping: Grouping,
    ground: Ground,
    timer: Timer,
    progress: Progress | None,
) -> Choice:
    """The choice whose measured latency is nearest to what is asked."""

    def made(choice: Choice) -> ModelProto:
        stored = ground.stored
        if stored is not None:  # kernels of integers are timed, as in the original
            return rewrite(stored.grouping, {stored.numbers[i]: units for i, units in choice.remove.items()})
        return ground.study.finish(rewrite(grouping, choice.remove))

    found = land(loaded.proto, ratio, removing, made, timer, progress)
    return replace(found.choice, reached=1 - found.seconds[1] / found.seconds[0]) if found else Choice({}, 0.0)

"""The certificate: proof, on the user's own model, that its groups are right.

If the units of a group are permuted wherever they live, the outputs stay; so a permutation of all groups that leaves the
outputs alone certifies them, and one that does not names the groups that are wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.equivalence import UNSEEN, certify_blocks, influences
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Group, Grouping, without
from onnxprune.importer import FLOATS, Model
from onnxprune.moves import Moves, permuted
from onnxprune.naming import group_names
from onnxprune.parts import Parts
from onnxprune.rewriter import Widths
from onnxprune.running import LEAST, LOADING, MOST, Arrays, Lazy, Runner, Runs, distance, jittered, some, widened, with_sizes
from onnxprune.shapes import seeded_feeds
from onnxprune.traced import other_sizes

Progress = Callable[[str], None]
SHARE = 8  # of the memory for weights, one part of a model that runs in parts: a part is held as it was, permuted and masked
MARGIN = 16  # units in the last place that a group's weights must be able to move where rounding alone moves the outputs


@dataclass(frozen=True)
class Proof:
    """What was shown, each gap in standard deviations of an output.

    rounding: what moving every weight by one unit in its last place changes; tolerance: what counts as equal.
    proven, unexercised, unchecked: group ids.  frozen: {id of a group that failed: why}.
    commuting, masked: gaps of the pruned model, None where there was nothing to compare; statistics: groups that lose units
    and change a mean, variance, maximum or softmax, for which masking does not apply.  moved: how far the outputs are from the
    original's without the removed units: 0 where these inputs show nothing of them, None where no output is of floats.
    matches: how far a given model is from what the plan leaves; infinite where its weights were trained on.  influence: {id of a
    residual branch: how much the outputs change without it, see `equivalence.influences`}.  pinned: axes that the file leaves open
    and that take one size alone.  names: of all groups, those that failed too; inputs: {name: shape} of what was run; seeded: whether
    the program made these inputs itself.
    """

    rounding: float
    tolerance: float
    permutation: float
    proven: tuple[int, ...]
    unexercised: tuple[int, ...] = ()
    unchecked: tuple[int, ...] = ()
    frozen: Mapping[int, str] = field(default_factory=dict)
    commuting: float | None = None
    masked: float | None = None
    statistics: tuple[int, ...] = ()
    matches: float | None = None
    influence: Mapping[int, float] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    moved: float | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seeded: bool = False

    def to_json(self) -> dict[str, Any]:
        return {k: (list(v) if isinstance(v, tuple) else v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class Bench:
    """The original model, ready to run with any of its groups' tensors changed.

    elsewhere: inputs of another batch and of other symbolic sizes, if the model takes such.
    """

    model: Model
    runner: Runs
    feeds: Arrays
    arrays: Arrays
    reference: Arrays
    rounding: float
    elsewhere: Arrays | None = None

    @property
    def watch(self) -> list[str]:
        return behind_integers(self.model)

    def opened(self, proto: ModelProto, widths: Widths, names: Collection[str] = (), arrays: Arrays | None = None) -> Runs:
        """A model made of the original by `widths`, ready to run with the tensors `names` changed; arrays: values that it was made of."""
        if not isinstance(self.runner, Parts):
            return Runner(proto, names, watch=self.watch)
        before, model = self.arrays if arrays is None else arrays, self.model

        def values(name: str) -> np.ndarray:
            return widths.cut(name, before[name] if name in before else model.array(name))

        return Parts(proto, proto.graph.node, self.runner.limit, values, self.watch)

    @property
    def tolerance(self) -> float:
        return min(MOST, max(LEAST, 5 * self.rounding))

    def gap(self, arrays: Arrays, moves: Moves) -> float:
        """How far the outputs are, with these tensors, from where they should move; infinitely where the model does not run."""
        try:
            return distance(moves.arrays(self.reference), self.runner.run(moves.arrays(self.feeds), arrays))
        except OnnxPruneError:
            return float("inf")


def prepare(grouping: Grouping, feeds: Arrays | None = None, seed: int = 0) -> Bench:
    """Run the original, on the feeds or on seeded inputs of the scale at which rounding matters least.

    Raises OnnxPruneError where onnxruntime cannot, which says nothing of the pruning (exit code 2).
    """
    model = grouping.model
    names = sorted({m.tensor for g in grouping.groups for m in g.members})
    ready = runner(model, names)
    arrays: Arrays = Lazy(names, model.array) if model.external.places else {name: model.array(name) for name in names}
    if feeds is not None:
        return _bench(grouping, ready, feeds, arrays, seed)
    seeded = seeded_feeds(model.proto, model.input_shapes, seed)
    best = _bench(grouping, ready, seeded, arrays, seed)
    for scale in _SCALES:  # outputs that normal inputs drive into saturation are all rounding
        if 5 * best.rounding <= MOST:
            break
        try:
            other = _bench(grouping, ready, {k: _scaled(v, scale) for k, v in seeded.items()}, arrays, seed)
        except OnnxPruneError:
            continue
        best = min(best, other, key=lambda bench: bench.rounding)
    return best


def runner(model: Model, names: Sequence[str] = ()) -> Runs:
    """What runs a model with the tensors `names` changed: part by part where its weights were left in other files."""
    watch = behind_integers(model)
    if not model.external.places:
        return Runner(model.proto, names, watch=watch)
    return Parts(model.proto, model.main, model.external.limit // SHARE, model.array, watch)


_SCALES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: 127.5 * (1 + np.tanh(x)),  # like pixels, 0 to 255
    lambda x: 0.5 * (1 + np.tanh(x)),  # 0 to 1
    lambda x: 0.1 * x,
)


def _scaled(array: np.ndarray, scale: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    floats = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return scale(array.astype(np.float32)).astype(array.dtype) if floats else array


def _bench(grouping: Grouping, ready: Runs, feeds: Arrays, arrays: Arrays, seed: int) -> Bench:
    model = grouping.model
    try:
        reference = ready.run(feeds)
    except OnnxPruneError as error:
        empty = next((name for name, array in feeds.items() if not np.size(array)), None)
        if LOADING in str(error):
            remedy = "the proof runs the model; mend the file, or leave the proof out with --no-verify"
        elif empty is not None:
            remedy = f"'{empty}' has no elements: leave out samples that are empty"
        else:
            remedy = f"these are inputs of {with_sizes(feeds)}; give such that it takes with --feeds, or their sizes with --input-shape"
        raise OnnxPruneError(f"{model.name}: {error}; {remedy}", 2) from error
    bench = Bench(model, ready, feeds, arrays, reference, 0.0)
    rng = np.random.default_rng([seed, 1])
    still = Moves(grouping)
    rounding = max(bench.gap(jittered(arrays, rng), still) for _ in range(2)) if arrays else 0.0
    return replace(bench, rounding=rounding if np.isfinite(rounding) else MOST)


def behind_integers(model: Model) -> list[str]:
    """The float values from which integer outputs (classes, indices) are computed: what can be compared in their stead."""
    makers = {o: n for n in model.nodes for o in n.output if o}
    floats = {v.name for v in model.proto.graph.output if v.type.tensor_type.elem_type in FLOATS}
    found: list[str] = []
    for name in model.outputs:
        if name in floats or name not in makers:
            continue
        node = makers[name]
        while node.op_type in ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Cast") and node.input[0] in makers:
            node = makers[node.input[0]]
        if node.op_type in ("ArgMax", "ArgMin"):
            found.append(node.input[0])
    return found


def certify(
    grouping: Grouping, feeds: Arrays | None = None, seed: int = 0, seconds: float = 20.0, progress: Progress | None = None
) -> tuple[Grouping, Proof, Bench]:
    """Prove every group by permutation, and every residual branch by masking; what fails is frozen in the grouping returned.

    seconds: how long the check that each group was exercised may take; what is left then is unchecked, and said so.
    """
    say = progress or (lambda text: None)
    groups = [g for g in grouping.groups if g.branch is None]
    blocks = [g for g in grouping.groups if g.branch is not None]
    say(f"permuting {len(groups)} groups")
    bench = prepare(grouping, feeds, seed)
    failed: dict[int, str] = {}
    worst = 0.0
    trials = [partial(_permuted_gap, bench, grouping, order) for order in (seed + 1, seed + 2)]
    if bench.tolerance >= MOST:  # there an order passes by chance, and the next may not
        trials.insert(0, partial(_jittered_gap, bench, grouping, seed))
    for trial in trials:
        gap, wrong = _search(bench, groups, trial, say)
        failed |= wrong
        groups = [g for g in groups if g.id not in failed]
        worst = max(worst, gap)
    elsewhere, pinned = other_sizes(grouping.model.proto.graph.input, bench.feeds, bench.runner.run, seed)
    bench = replace(bench, elsewhere=elsewhere)
    if bench.elsewhere is not None and groups:  # sizes that agree by chance do so at one size only
        there = replace(bench, feeds=bench.elsewhere, reference=bench.runner.run(bench.elsewhere), rounding=2 * bench.rounding)
        _, wrong = _search(there, groups, partial(_permuted_gap, there, grouping, seed + 1), say)
        sizes = ", ".join(f"{k} {list(np.shape(v))}" for k, v in bench.elsewhere.items())
        failed |= {k: f"{why} on inputs of {sizes}" for k, why in wrong.items()}
        groups = [g for g in groups if g.id not in failed]
    if blocks:
        say(f"cutting {len(blocks)} branches")
        failed |= certify_blocks(bench, grouping, blocks, say)
        blocks = [b for b in blocks if b.id not in failed]
    certified = without(grouping, failed) if failed else grouping
    say(f"checking that {len(groups)} groups are exercised")
    end = time.monotonic() + seconds
    proven, idle, open_ = _exercised(bench, certified, seed + 1, end, worst)
    influence = influences(bench, blocks, end)
    proven += tuple(i for i, lost in influence.items() if lost > UNSEEN)
    idle += tuple(i for i, lost in influence.items() if lost <= UNSEEN)
    open_ += tuple(b.id for b in blocks if b.id not in influence)
    names = {m.tensor for g in (*groups, *blocks) for m in g.members}
    bench = replace(bench, arrays=some(bench.arrays, names))
    proof = Proof(
        rounding=bench.rounding,
        tolerance=bench.tolerance,
        permutation=worst,
        proven=proven,
        unexercised=idle,
        unchecked=open_,
        frozen=failed,
        influence=influence,
        pinned=tuple(pinned),
        names=group_names(grouping),
        inputs={name: tuple(np.shape(array)) for name, array in bench.feeds.items()},
        seeded=feeds is None,
    )
    return certified, proof, bench


def _permuted_gap(bench: Bench, grouping: Grouping, seed: int, part: list[Group]) -> float:
    return bench.gap(permuted(bench.arrays, part, seed), Moves(grouping, part, seed))


def _jittered_gap(bench: Bench, grouping: Grouping, seed: int, part: list[Group]) -> float:
    names = sorted({m.tensor for g in part for m in g.members})
    moved = jittered(some(bench.arrays, names), np.random.default_rng([seed, 2]), MARGIN)
    return bench.gap(moved, Moves(grouping))


def _search(bench: Bench, groups: list[Group], gap_of: Callable[[list[Group]], float], say: Progress) -> tuple[float, dict[int, str]]:
    """Bisect for the groups whose permutation moves the outputs; what is left passes together."""
    failed: dict[int, str] = {}
    gaps: dict[int, float] = {}

    def search(part: list[Group]) -> None:
        if not part:
            return
        gap = gap_of(part)
        if gap <= bench.tolerance:
            gaps.update((g.id, gap) for g in part)
        elif len(part) == 1:
            failed[part[0].id] = _blame(bench, gap)
        else:
            say(f"looking for wrong groups among {len(part)}")
            search(part[: len(part) // 2])
            search(part[len(part) // 2 :])

    search(groups)
    left = sorted((g for g in groups if g.id not in failed), key=lambda g: gaps[g.id])
    whole = gap_of(left) if failed and left else max(gaps.values(), default=0.0)
    while left and whole > bench.tolerance:  # each alone is within rounding, all together are not
        keep = len(left) * 3 // 4
        failed |= {g.id: _blame(bench, whole) for g in left[keep:]}
        left = left[:keep]
        whole = gap_of(left) if left else 0.0
    return whole, failed


def _blame(bench: Bench, gap: float) -> str:
    if bench.tolerance >= MOST:
        return f"not provable: rounding alone changes the outputs by {bench.rounding:.2g} standard deviations"
    return f"the permutation test fails (outputs change by {gap:.2g} standard deviations)"


def _exercised(
    bench: Bench, grouping: Grouping, seed: int, end: float, rounding: float
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Ids of the groups whose wrong permutation changes the outputs, of those where nothing changes, and of those left open.

    end: when, by time.monotonic, no more is begun.
    """
    proven: list[int] = []
    idle: list[int] = []
    unchecked: list[int] = []
    noise = max(2 * rounding, 1e-6)  # twice what right permutations do
    for group in sorted((g for g in grouping.groups if g.branch is None), key=lambda g: -_weight(bench.model, g)):
        if time.monotonic() > end:
            unchecked.append(group.id)
            continue
        moves = Moves(grouping, [group] if len(group.members) > 1 else [], seed)
        changes = any(bench.gap(arrays, moves) > noise for arrays in _wrongly_permuted(bench, group, seed))
        (proven if changes else idle).append(group.id)
    return tuple(sorted(proven)), tuple(sorted(idle)), tuple(sorted(unchecked))


def _weight(model: Model, group: Group) -> int:
    """How many weights a group's units hold: the largest groups are checked first."""
    return sum(math.prod(model.tensors[m.tensor].dims) for m in group.members)


def _wrongly_permuted(bench: Bench, group: Group, seed: int) -> Iterator[Arrays]:
    """Permutations of one group with one member left out, the largest weights first, integers after floats (whose units may be equal).

    Noise where there is but one member.
    """
    tensors = bench.model.tensors
    if len(group.members) < 2:
        member = group.members[0]
        array = widened(bench.arrays[member.tensor])
        noise = np.zeros(array.shape)
        there: list[Any] = [slice(None)] * array.ndim
        there[member.axis] = member.indices.ravel()
        noise[tuple(there)] = np.random.default_rng(seed).standard_normal(noise[tuple(there)].shape) * (array.std() + 1e-3)
        if array.dtype.kind == "f":
            yield {member.tensor: (array + noise).astype(array.dtype)}
        return
    floats = [m for m in group.members if tensors[m.tensor].data_type in FLOATS]
    others = [m for m in group.members if tensors[m.tensor].data_type not in FLOATS]
    for part in (floats, others):
        for one in sorted(part, key=lambda m: -math.prod(tensors[m.tensor].dims))[:3]:
            yield permuted(bench.arrays, [group], seed, omit=one)

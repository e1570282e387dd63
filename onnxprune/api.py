"""The whole way in Python: `prune`, `groups`, `plan`, `apply` and `verify`, in the words of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from onnxprune.allocations import (
    DISTORTION,
    LATENCY,
    MEASURED,
    POINT,
    Choice,
    Limits,
    check_allocation,
    check_budget,
    check_floor,
    check_ratio,
    choose,
    nearest,
)
from onnxprune.branches import with_branches
from onnxprune.calibration import read_calibration
from onnxprune.certificate import Bench, Proof, certify, prepare, runner
from onnxprune.compensation import TURNING, check_compensation
from onnxprune.compensation import compensation as compensations
from onnxprune.cost import Cuts, Measure, counter
from onnxprune.criteria import criterion as criteria
from onnxprune.depth import Blocks, at_granularity, check_granularity, mixed
from onnxprune.equivalence import influences
from onnxprune.errors import OnnxPruneError, ProofError
from onnxprune.external import AT_ONCE, IN_MEMORY
from onnxprune.fidelity import Fidelity, fidelity
from onnxprune.ground import Ground, lay
from onnxprune.grouping import Grouping, group, without
from onnxprune.importer import File, Model, load, read
from onnxprune.latency import land, learned, met
from onnxprune.moves import Moves
from onnxprune.plans import Plan, match, read_plan
from onnxprune.quantized import Stored, requantized
from onnxprune.reconstruction import Refit
from onnxprune.rewriter import Widths, rewrite
from onnxprune.selection import PCA, Losses, Scores, check_criterion, in_steps, select
from onnxprune.shapes import seeded_feeds
from onnxprune.sizing import check_sized, guessed, sized, tell_guessed
from onnxprune.stopwatch import Stopwatch, Timer, check_device
from onnxprune.study import Study
from onnxprune.tensorrt import Support, check_introduced
from onnxprune.tensorrt import check as supported
from onnxprune.tiles import Align, check_align
from onnxprune.verification import check_model, compare, prove_surgery
from onnxprune.writing import write_model

Source = str | os.PathLike[str] | ModelProto
Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[str], None]
Calibration = str | os.PathLike[str] | Arrays | Callable[[], Any]
FEW = 256  # samples on which the result is compared with the original
ROUNDS = 4  # of planning without the groups whose removal fails the proof


@dataclass(frozen=True)
class Result:
    """A pruned model, the plan that made it, its proof (None without verification), and its costs before and after.

    refits: the layers that compensation fitted anew; fidelity: how near the outputs on calibration samples stay to the original's,
    without compensation and with it.  support: what TensorRT does not take of the original, where that is the target.
    scores, losses: {group id: (units,)} and, of allocations that measure, what the outputs lose at each number of units removed,
    {group id: (units + 1,)}: what the units were chosen by.
    macs, parameters: (before, after); reached: share of the budget that went; on_budget: within a point of what was asked, a latency
    within five percent; latency: seconds (before, after), where that was the budget.
    model: where weights were left in other files, as they exceed `memory`, those of the result have no values in it: `save` it.
    """

    model: ModelProto = field(repr=False)
    plan: Plan = field(repr=False)
    proof: Proof | None
    macs: tuple[int, int]
    parameters: tuple[int, int]
    reached: float
    on_budget: bool
    refits: tuple[Refit, ...] = field(default=(), repr=False)
    fidelity: tuple[Fidelity, Fidelity] | None = field(default=None, repr=False)
    scores: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    losses: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    support: Support | None = field(default=None, repr=False)
    latency: tuple[float, float] | None = None

    def save(self, path: str | os.PathLike[str], *, shard_size: int | None = None, progress: Progress | None = None) -> None:
        """Write the model, whole or not at all; weights go to PATH.data where the original's stand in other files, or over 2 GiB.

        shard_size: bytes of each data file at most (PATH-00001-of-00004.data, …).  Raises OnnxPruneError where the disk does not take it.
        """
        original, widths = self.plan.grouping.model, Widths(self.plan.grouping, self.plan.remove)

        def pieces(name: str) -> Iterator[np.ndarray]:
            place = original.external.places[name]
            return place.rows(widths.masks(name, len(place.shape)))

        files = original.external.files
        write_model(self.model, path, pieces=pieces, external=bool(files), shard_size=shard_size, inputs=files, progress=progress)

    def to_json(self) -> dict[str, Any]:
        return {
            "macs": list(self.macs),
            "parameters": list(self.parameters),
            "latency": list(self.latency) if self.latency else None,
            "reached": self.reached,
            "on_budget": self.on_budget,
            "options": dict(self.plan.options),
            "proof": self.proof.to_json() if self.proof else None,
            "refits": [refit.to_json() for refit in self.refits],
            "fidelity": [found.to_json() for found in self.fidelity] if self.fidelity else None,
            "support": self.support.to_json() if self.support else None,
        }


def groups(
    model: Source,
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    allow_io: Sequence[str] = (),
    verify: bool = True,
    memory: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Grouping:
    """The groups of coupled units of a model and its residual branches, certified on it, and what is fixed and why.

    Raises OnnxPruneError for bad input (exit code 2) and where onnxruntime cannot run the model (4).
    """
    found = with_branches(group(_load(model, feeds, input_shapes, progress, memory), allow_io))
    return certified(found, feeds, seed, verify, progress)[0]


def plan(model: Source, ratio: float, **options: Any) -> Plan:
    """Choose what goes, for a budget; the options are those of `prune`."""
    return prune(model, ratio, **options).plan


def prune(
    model: Source,
    ratio: float,
    *,
    of: str = "macs",
    granularity: str = "channel",
    criterion: str | None = None,
    allocation: str | None = None,
    calibration: Calibration | None = None,
    preprocess: str | None = None,
    samples: int | None = None,
    compensation: str | None = None,
    steps: int = 1,
    scope: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layer_ratios: Mapping[str, float] | None = None,
    min_keep: float = 0.1,
    align: Align = 1,
    target: str | None = None,
    allow_io: Sequence[str] = (),
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    timer: Timer | None = None,
    verify: bool = True,
    memory: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Remove `ratio` of a budget (`macs`, `params`, `channels` or `latency`) and prove that the surgery was right.

    granularity: `channel` (all widths, heads too), `head` (whole attention heads alone), `block` (whole residual branches) or
    `all`: branches first where that changes the outputs less, then channels.  criterion and allocation are about widths:
    branches go by how much the outputs change without them, for what they cost (`random`: by chance).
    calibration: samples for what looks at activations (see `read_calibration`, whose `preprocess` and limit of `samples` these are):
    with them the defaults are criterion `obs`, allocation `distortion` and compensation `distill`; with "none", data-free,
    `obs`, `global` and `merge` by what the weights alone let expect; where it is not given `l2`, `uniform` and `none`.  `auto` for
    criterion or allocation takes what changes the outputs least.  steps: rounds in which units are chosen, each on what the round
    before left and fitted.
    scope, exclude, layer_ratios: globs over node and tensor names.  min_keep: units (or, below 1, the share) that every
    group keeps, residual branches apart.  Groups that the inputs do
    not exercise stay whole.  align: widths that layers work on stay multiples of it, or {glob: number} for layers so named; target:
    `cpu`, `tensorrt` or `cuda` chooses it for each group, as coarse as the group and the budget allow.
    Sizes that the file leaves open are those of feeds or input_shapes, else of the first sample, else as small as the model runs on,
    which is not enough for a latency.  Latency is measured on this machine with onnxruntime's `provider` and `threads` (or by a
    `timer` of your own), and the widths are those at which its kernels are fast.  Everything else is deterministic for a seed.
    memory: bytes of weights to hold at once; a model with more of them in other files is read a tensor at a time and proven part by
    part, which calibration and compensation cannot do (if not given 512 MiB, with those 2 GiB).

    Raises OnnxPruneError for bad input (exit code 2), where nothing can be pruned (3) and where the proof fails (4).

    >>> result = onnxprune.prune("model.onnx", 0.4)                 # doctest: +SKIP
    >>> onnx.save(result.model, "smaller.onnx")                     # doctest: +SKIP
    """
    check_ratio(ratio)
    check_budget(of)
    check_granularity(granularity)
    given, free = calibration not in (None, "none"), calibration == "none"
    criterion = criterion or ("obs" if given or free else "l2")
    allocation = allocation or ("global" if free else DISTORTION if given and criterion != PCA else "uniform")
    compensation = compensation or ("distill" if given else "merge" if free else "none")
    check_criterion(criterion, given, free)
    check_allocation(allocation, given)
    check_compensation(compensation, given)
    check_floor(min_keep)
    if steps < 1:
        raise OnnxPruneError(f"steps is {steps}; it is a number of rounds, 1 at least")
    check_align(align, target)
    if of == LATENCY and timer is None:
        check_device(provider, threads)
    whole = _takes_all(of, criterion, allocation, compensation, given or free, steps)
    _say(progress, "reading the model")
    file = read(model, memory if memory is not None else AT_ONCE if whole else IN_MEMORY)
    if whole:
        file.external.need_memory(file.name, whole)
    sizes = sized(file.proto, feeds, input_shapes, [calibration], preprocess)
    if of == LATENCY:
        check_sized(file.proto, file.name, feeds, sizes)
    loaded = _loaded(file, feeds, sizes)
    source = "none" if calibration is None else calibration
    data = read_calibration(source, loaded, preprocess=preprocess, limit=samples, seed=seed)
    assumed = guessed(loaded.proto, feeds, sizes)
    tell_guessed(loaded, assumed, calibration)

    def find(one: Model) -> Grouping:
        return at_granularity(group(one, allow_io), granularity)

    def prove(found: Grouping) -> tuple[Grouping, Proof | None, Bench | None]:
        return certified(found, feeds, seed, verify, progress)

    grouping, proof, bench = prove(find(loaded))
    _some(grouping)
    study = Study(grouping, data, progress, turns=compensation in TURNING, seed=seed)
    ground = lay(Ground(grouping, proof, bench, study), criterion, find, prove, feeds)
    chosen, shares = ground.free(scope, exclude, layer_ratios or {})
    _say(progress, f"scoring {len(chosen)} groups")
    limits = ground.limits(min_keep, align, target)
    clock = timer or Stopwatch(_timed_on(loaded, feeds), provider, threads) if of == LATENCY else None
    budget = ground.measure(learned(ground.named, clock, seed, progress)) if clock else of

    def widths(scores: Scores, rule: str, losses: Losses, share: float) -> Choice:
        near = POINT if share == 1 else np.inf  # rounds on the way need not land
        return _choice(None, ground.grouping, scores, {}, ratio * share, budget, rule, limits, shares, losses, near)

    selection = select(ground.grouping, chosen, criterion, allocation, seed, ground.study, widths)
    selection = in_steps(selection, ground.grouping, seed, ground.study, compensation, widths, steps)
    lost, bench = _lost_without(ground, chosen, criterion, feeds, seed)
    options = {
        "ratio": ratio,
        "of": of,
        "granularity": granularity,
        "criterion": selection.criterion,
        "allocation": selection.allocation,
        "calibration": data.source if calibration is not None else None,
        "compensation": compensation,
        "steps": steps,
        "scope": list(scope),
        "exclude": list(exclude),
        "layer_ratios": dict(layer_ratios or {}),
        "min_keep": min_keep,
        "align": align if isinstance(align, int) else dict(align),
        "target": target,
        "allow_io": list(allow_io),
        "seed": seed,
        "input_shapes": {k: list(v) for k, v in loaded.input_shapes.items()},
        "assumed": assumed,
        "samples": data.count or None,
    }
    if clock:
        options["device"] = dict(clock.device)

    def choice_of(left: _Left) -> Choice:
        def removing(share: float) -> Choice:
            rule, losses = selection.allocation, selection.losses
            return _choice(bench, left.grouping, left.scores, left.lost, share, budget, rule, limits, left.shares, losses)

        return _landed(removing, ratio, loaded, left.grouping, ground, clock, progress) if clock else removing(ratio)

    def made_by(choice: Choice, left: _Left) -> Result:
        made = Plan(left.grouping, choice.remove, options, choice.reached)
        result = _finish(made, left.proof, bench, abs(choice.reached - ratio) <= 0.01, progress)
        result = replace(result, scores=left.scores, losses=selection.losses or {})
        result = _compensated(result, ground.study, compensation, bench)
        if ground.stored is not None:
            result = _stored(result, ground.stored, ground.study)
        result = _for_target(result, loaded, target)
        return _timed(result, loaded, ratio, clock, progress) if clock else result

    result = _first_right(_Left(ground.grouping, ground.proof, selection.scores, lost, shares), choice_of, made_by, progress)
    if result is not None:
        return result
    if not selection.scores:
        raise OnnxPruneError(f"{loaded.name}: to cut none of its branches is closest to {ratio:.1%} of {of}; ask for more", 3)
    raise OnnxPruneError(f"{loaded.name}: nothing can go within --min-keep {min_keep:g} and the alignment; ask for less of them", 3)


def apply(
    model: Source,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    verify: bool = False,
    memory: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Surgery alone: remove what a plan says from the model it was made for, or from a fine-tuned sister.

    Raises OnnxPruneError (exit code 2) where the plan does not fit the model.
    """
    return _apply(model, plan, feeds, input_shapes, verify, seed, progress, memory)[0]


def verify(
    model: Source,
    pruned: Source | None = None,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    allow_io: Sequence[str] = (),
    memory: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Proof:
    """Prove the groups of a model; with a plan, what the plan leaves; with a pruned model too, that it is just that.

    Without a plan a pruned model is checked for its interface, for loading, and for finite outputs.
    Raises OnnxPruneError: exit code 2 where the plan does not fit the model, 4 where the proof fails.
    """
    if plan is not None:
        result, bench = _apply(model, plan, feeds, input_shapes, True, seed, progress, memory)
        if result.proof is None or bench is None:
            raise OnnxPruneError("the model has no groups, so there is nothing to prove; `onnxprune groups` says why", 3)
        if pruned is None:
            return result.proof
        return replace(
            result.proof, matches=compare(bench, result.plan, result.model, load(pruned, memory=IN_MEMORY if memory is None else memory))
        )
    found = with_branches(group(_load(model, feeds, input_shapes, progress, memory), allow_io))
    _some(found)
    _, proof, bench = certify(found, feeds, seed, progress=progress)
    if pruned is not None:
        other = load(pruned, memory=IN_MEMORY if memory is None else memory)
        check_model(bench, other.proto, ready=runner(other))
    return proof


def planned(
    model: Source,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    progress: Progress | None = None,
    memory: int | None = None,
) -> Plan:
    """A plan on the model it was made for, or on a fine-tuned sister.

    Raises OnnxPruneError (exit code 2) where the plan does not fit the model.
    """
    content = plan.to_json() if isinstance(plan, Plan) else read_plan(plan)
    options = content.get("options") or {}
    sizes = {k: tuple(v) for k, v in (options.get("input_shapes") or {}).items()}
    try:
        loaded = _load(model, feeds, input_shapes or ({} if feeds else sizes), progress, memory)
    except OnnxPruneError:
        if feeds or input_shapes or not sizes:
            raise
        loaded = _load(model, None, None, progress, memory)  # the plan's shapes do not fit: `match` says what else does not
    found = group(loaded, options.get("allow_io") or ())
    if any(entry["units"] == 1 and entry.get("remove") for entry in content["groups"]):
        found = with_branches(found)
    return match(found, content)


def _apply(
    model: Source,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    feeds: Arrays | None,
    input_shapes: Shapes | None,
    verify: bool,
    seed: int,
    progress: Progress | None,
    memory: int | None,
) -> tuple[Result, Bench | None]:
    made = planned(model, plan, feeds, input_shapes, progress, memory)
    proof, bench = None, None
    if verify:
        grouping, proof, bench = certified(made.grouping, feeds, seed, True, progress)
        lost = [i for i in made.remove if proof and i in proof.frozen]
        if lost and proof:
            raise OnnxPruneError(
                f"{made.grouping.model.name}: group {lost[0]} ('{proof.names[lost[0]]}') of the plan fails its proof: "
                f"{proof.frozen[lost[0]]}",
                4,
            )
        made = replace(made, grouping=grouping)
    return _finish(made, proof, bench, True, progress), bench


def _load(model: Source, feeds: Arrays | None, input_shapes: Shapes | None, progress: Progress | None, memory: int | None) -> Model:
    _say(progress, "reading the model")
    return _loaded(read(model, IN_MEMORY if memory is None else memory), feeds, input_shapes)


def _loaded(file: File, feeds: Arrays | None, input_shapes: Shapes | None) -> Model:
    loaded = load(file, feeds, input_shapes)
    for name, tensor in loaded.tensors.items():
        if tensor.data_location == TensorProto.EXTERNAL and name not in loaded.external.places:
            raise OnnxPruneError(f"{loaded.name}: tensor '{name}' stands in another file, which only a path tells; give the model's path")
    return loaded


def _takes_all(of: str, criterion: str, allocation: str, compensation: str, calibrated: bool, steps: int) -> str:
    """The option that takes all weights at once; "" where one tensor at a time is enough."""
    wrong = {
        "--of latency": of == LATENCY,
        "--calibration": calibrated,
        f"--criterion {criterion}": criterion not in criteria.names(),
        f"--allocation {allocation}": allocation in (*MEASURED, "auto"),
        f"--compensation {compensation}": compensation != "none",
        f"--steps {steps}": steps > 1,
    }
    return next((what for what, bad in wrong.items() if bad), "")


def _say(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress(text)


def certified(
    grouping: Grouping, feeds: Arrays | None, seed: int, verify: bool, progress: Progress | None
) -> tuple[Grouping, Proof | None, Bench | None]:
    """The groups that pass their proof, the proof, and what it ran on; as they are, with None, where none is asked for."""
    if not verify or not grouping.groups:
        return grouping, None, None
    return certify(grouping, feeds, seed, progress=progress)


@dataclass(frozen=True)
class _Left:
    """What there is to choose from: groups and their proof, the scores of their units, what is lost without each branch, given shares."""

    grouping: Grouping
    proof: Proof | None
    scores: Scores
    lost: Mapping[int, float]
    shares: Mapping[int, float]

    def without(self, wrong: Mapping[int, str]) -> _Left:
        """Without the groups whose removal fails the proof."""
        proof = self.proof
        if proof is not None:
            proven, unchecked = (tuple(i for i in ids if i not in wrong) for ids in (proof.proven, proof.unchecked))
            proof = replace(proof, frozen={**proof.frozen, **wrong}, proven=proven, unchecked=unchecked)
        scores = {i: units for i, units in self.scores.items() if i not in wrong}
        lost, shares = ({i: n for i, n in named.items() if i not in wrong} for named in (self.lost, self.shares))
        return _Left(without(self.grouping, wrong), proof, scores, lost, shares)


def _first_right(
    left: _Left, choice_of: Callable[[_Left], Choice], made_by: Callable[[Choice, _Left], Result], progress: Progress | None
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
        _say(progress, f"planning again without {len(failure.groups)} groups")
        left = left.without(failure.groups)
        if not left.scores and not left.lost:
            break
    if failure is not None:
        raise failure
    return None


def _lost_without(
    ground: Ground, chosen: Collection[int], criterion: str, feeds: Arrays | None, seed: int
) -> tuple[dict[int, float], Bench | None]:
    """How much the outputs change without each of the chosen residual branches, and what they were run on, if they were."""
    branches = [g for g in ground.grouping.groups if g.id in chosen and g.branch is not None]
    if not branches:
        return {}, ground.bench
    _say(ground.study.progress, f"choosing among {len(branches)} branches")
    bench = ground.bench or prepare(ground.grouping, feeds, seed)
    lost = {b.id: ground.proof.influence[b.id] for b in branches if b.id in ground.proof.influence} if ground.proof else {}
    lost |= influences(bench, [b for b in branches if b.id not in lost])
    if criterion == "random":
        lost = {b.id: float(np.random.default_rng([seed, b.id]).random()) for b in branches}
    return lost, bench


def _choice(
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


def _timed_on(model: Model, feeds: Arrays | None) -> Arrays:
    """The feeds, or seeded ones at the model's sizes, in the types of its inputs."""
    given = seeded_feeds(model.proto, model.input_shapes)
    return {name: np.asarray(feeds[name]).astype(array.dtype) for name, array in given.items()} if feeds is not None else given


def _landed(
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


def _timed(result: Result, loaded: Model, ratio: float, timer: Timer, progress: Progress | None) -> Result:
    """The result with the latency of what it is in the end."""
    _say(progress, "timing the result")
    before, after = timer.latencies([loaded.proto, result.model])
    return replace(result, latency=(before, after), reached=1 - after / before, on_budget=met((before, after), ratio))


def _some(grouping: Grouping) -> None:
    if not grouping.groups:
        raise OnnxPruneError(f"{grouping.model.name}: nothing can be pruned ({why_not(grouping)}); see `onnxprune groups`", 3)


def why_not(grouping: Grouping) -> str:
    """Why a model has no groups."""
    reasons = list(dict.fromkeys(reason for _, _, reason in grouping.fixed))[:3]
    functions = [f.name for f in grouping.model.proto.functions]
    if functions and not reasons:
        return (
            f"its weights are inside local functions such as '{functions[0]}', which onnx.inliner leaves as they are because the "
            "versions of their domains do not agree; export it without functions"
        )
    return "; ".join(reasons) or "it has no weights"


def _compensated(result: Result, study: Study, name: str, bench: Bench | None) -> Result:
    """The result finished, and with its weights compensated where that is asked for; checked again where numbers are new."""
    cut, result = result.model, replace(result, model=study.finish(result.model))
    model, refits = result.model, list[Refit]()
    if name != "none":
        model, refits = compensations.get(name)(study.on(result.plan.grouping), result.plan, result.model)
    if bench is not None and (name != "none" or model is not cut):
        check_model(bench, model, Moves(result.plan.grouping, after=result.plan.remove))
    if name == "none" or not study.samples.count:
        return replace(result, model=model)
    _say(study.progress, "comparing with the original")
    original = result.plan.grouping.model.proto
    found = fidelity(original, [result.model, model], study.part(FEW))
    return replace(result, model=model, refits=tuple(refits), fidelity=(found[0], found[1]))


def _stored(result: Result, stored: Stored, study: Study) -> Result:
    """What was done to a copy in floats done to the file itself, proven on it, and quantized again.

    Raises ProofError with the groups of the copy.
    """
    options, numbers = result.plan.options, stored.numbers
    remove = {numbers[i]: units for i, units in result.plan.remove.items()}
    made = Plan(stored.grouping, remove, options, result.reached)
    try:
        cut = _finish(made, stored.proof, stored.bench, result.on_budget, study.progress)
    except ProofError as error:
        raise ProofError(str(error), {i: error.groups[own] for i, own in numbers.items() if own in error.groups}) from error
    original = stored.grouping.model.proto
    model = requantized(result.model, original, cut.model)
    if stored.bench is not None:
        check_model(stored.bench, model, Moves(cut.plan.grouping, after=remove))
    found = fidelity(original, [cut.model, model], study.part(FEW)) if result.fidelity else None
    scores, losses = ({numbers[i]: one for i, one in named.items() if i in numbers} for named in (result.scores, result.losses))
    fidelities = (found[0], found[1]) if found else None
    return replace(cut, model=model, refits=result.refits, fidelity=fidelities, scores=scores, losses=losses)


def _for_target(result: Result, original: Model, target: str | None) -> Result:
    """The result with what TensorRT does not take of the original; raises OnnxPruneError (exit code 4) where pruning adds to that."""
    if target != "tensorrt":
        return result
    check_introduced(original.proto, result.model)
    return replace(result, support=supported(original))


def _finish(made: Plan, proof: Proof | None, bench: Bench | None, on_budget: bool, progress: Progress | None) -> Result:
    """Rewrite, prove, count."""
    _say(progress, "rewriting")
    if proof is not None and bench is not None:
        pruned, grouping, proof = prove_surgery(bench, made.grouping, made.remove, proof, progress)
        made = replace(made, grouping=grouping)
    else:
        pruned = rewrite(made.grouping, made.remove)
    kept = {g.id: g.units - len(made.remove.get(g.id, ())) for g in made.groups}
    macs, parameters = counter(made.grouping, "macs"), counter(made.grouping, "params")
    return Result(
        model=pruned,
        plan=made,
        proof=proof,
        macs=(round(macs({})), round(macs(kept))),
        parameters=(round(parameters({})), round(parameters(kept))),
        reached=made.reached,
        on_budget=on_budget,
    )

"""The whole way in Python: `prune`, `groups`, `plan`, `apply` and `verify`, in the words of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from onnxprune.allocations import (
    DISTORTION,
    LATENCY,
    MEASURED,
    POINT,
    Choice,
    check_allocation,
    check_budget,
    check_floor,
    check_ratio,
)
from onnxprune.branches import with_branches
from onnxprune.calibration import read_calibration
from onnxprune.certificate import Bench, Proof, certify, runner
from onnxprune.choosing import Left, chosen_for, first_right, landed, lost_without, nothing_goes
from onnxprune.compensation import TURNING, check_compensation
from onnxprune.criteria import criterion as criteria
from onnxprune.depth import at_granularity, check_granularity
from onnxprune.errors import OnnxPruneError
from onnxprune.external import AT_ONCE, IN_MEMORY
from onnxprune.finishing import compensated, finish, for_target, stored_as, timed
from onnxprune.ground import Ground, lay
from onnxprune.grouping import Grouping, group
from onnxprune.importer import File, Model, load, read
from onnxprune.latency import learned
from onnxprune.plans import Plan, check_of_file, match, read_plan
from onnxprune.result import Result
from onnxprune.selection import PCA, Losses, Scores, check_criterion, in_steps, select
from onnxprune.shapes import seeded_feeds
from onnxprune.sizing import check_sized, guessed, sized, tell_guessed
from onnxprune.stopwatch import Stopwatch, Timer, check_device
from onnxprune.study import Study
from onnxprune.tiles import Align, check_align
from onnxprune.verification import check_model, compare

Source = str | os.PathLike[str] | ModelProto
Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[str], None]
Calibration = str | os.PathLike[str] | Arrays | Callable[[], Any]


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
    check_of_file(options.get("criterion"))
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
    if samples is not None and not given:
        raise OnnxPruneError("--samples says how many samples of --calibration are used; give that too (data, or 'noise')")
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
        return chosen_for(None, ground.grouping, scores, {}, ratio * share, budget, rule, limits, shares, losses, near)

    selection = select(ground.grouping, chosen, criterion, allocation, seed, ground.study, compensation, widths)
    selection = in_steps(selection, ground.grouping, seed, ground.study, compensation, widths, steps)
    lost, bench = lost_without(ground, chosen, criterion, feeds, seed)
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

    def removing(left: Left, share: float) -> Choice:
        rule, losses = selection.allocation, selection.losses
        return chosen_for(bench, left.grouping, left.scores, left.lost, share, budget, rule, limits, left.shares, losses)

    def choice_of(left: Left) -> Choice:
        by_share = partial(removing, left)
        return landed(by_share, ratio, loaded, left.grouping, ground, clock, progress) if clock else by_share(ratio)

    def made_by(choice: Choice, left: Left) -> Result:
        made = Plan(left.grouping, choice.remove, options, choice.reached)
        result = finish(made, left.proof, bench, abs(choice.reached - ratio) <= 0.01, progress)
        result = replace(result, scores=left.scores, losses=selection.losses or {})
        result = compensated(result, ground.study, compensation, bench)
        if ground.stored is not None:
            result = stored_as(result, ground.stored, ground.study)
        result = for_target(result, loaded, target)
        return timed(result, loaded, ratio, clock, progress) if clock else result

    left = Left(ground.grouping, ground.proof, selection.scores, lost, shares)
    result = first_right(left, choice_of, made_by, progress)
    if result is None:
        raise nothing_goes(loaded.name, ratio, of, min_keep, left, partial(removing, left))
    return result


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
    return finish(made, proof, bench, True, progress), bench


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


def _timed_on(model: Model, feeds: Arrays | None) -> Arrays:
    """The feeds, or seeded ones at the model's sizes, in the types of its inputs."""
    given = seeded_feeds(model.proto, model.input_shapes)
    return {name: np.asarray(feeds[name]).astype(array.dtype) for name, array in given.items()} if feeds is not None else given


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

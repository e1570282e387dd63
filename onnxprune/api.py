"""The whole way in Python: `prune`, `groups`, `plan`, `apply` and `verify`, in the words of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune.allocations import DISTORTION, Choice, Limits, check_allocation, check_budget, check_ratio, choose
from onnxprune.branches import with_branches
from onnxprune.calibration import read_calibration
from onnxprune.certificate import Bench, Proof, certify, prepare
from onnxprune.compensation import TURNING, check_compensation
from onnxprune.compensation import compensation as compensations
from onnxprune.cost import Cuts, counter
from onnxprune.depth import Blocks, at_granularity, check_granularity, mixed
from onnxprune.equivalence import influences
from onnxprune.errors import OnnxPruneError, ProofError
from onnxprune.fidelity import Fidelity, fidelity
from onnxprune.grouping import Grouping, group, without
from onnxprune.importer import Model, load
from onnxprune.moves import Moves
from onnxprune.plans import Plan, match, read_plan
from onnxprune.reconstruction import Refit
from onnxprune.rewriter import rewrite
from onnxprune.rotation import Rotated, rotate
from onnxprune.scoping import may_go
from onnxprune.selection import PCA, Losses, Scores, check_criterion, in_steps, select
from onnxprune.study import Study
from onnxprune.verification import check_model, compare, prove_surgery

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
    without compensation and with it.  scores, losses: {group id: (units,)} and, of allocations that measure, what the outputs lose at
    each number of units removed, {group id: (units + 1,)}: what the units were chosen by.
    macs, parameters: (before, after); reached: share of the budget that went; on_budget: within a point of what was asked.
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

    def to_json(self) -> dict[str, Any]:
        return {
            "macs": list(self.macs),
            "parameters": list(self.parameters),
            "reached": self.reached,
            "on_budget": self.on_budget,
            "options": dict(self.plan.options),
            "proof": self.proof.to_json() if self.proof else None,
            "refits": [refit.to_json() for refit in self.refits],
            "fidelity": [found.to_json() for found in self.fidelity] if self.fidelity else None,
        }


def groups(
    model: Source,
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    allow_io: Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Grouping:
    """The groups of coupled units of a model and its residual branches, certified on it, and what is fixed and why.

    Raises OnnxPruneError for bad input (exit code 2) and where onnxruntime cannot run the model (4).
    """
    found = with_branches(group(_load(model, feeds, input_shapes, progress), allow_io))
    return certify(found, feeds, seed, progress=progress)[0] if verify and found.groups else found


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
    align: int = 1,
    allow_io: Sequence[str] = (),
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Remove `ratio` of a budget (`macs`, `params` or `channels`) and prove that the surgery was right.

    granularity: `channel` (all widths, heads too), `head` (whole attention heads alone), `block` (whole residual branches) or
    `all`: branches first where that changes the outputs less, then channels.  criterion and allocation are about widths:
    branches go by how much the outputs change without them, for what they cost (`random`: by chance).
    calibration: samples for what looks at activations (see `read_calibration`, whose `preprocess` and limit of `samples` these are):
    with them the defaults are criterion `obs`, allocation `distortion` and compensation `refine`; with "none", data-free,
    `obs`, `global` and `merge` by what the weights alone let expect; where it is not given `l2`, `uniform` and `none`.  `auto` for
    criterion or allocation takes what changes the outputs least.  steps: rounds in which units are chosen, each on what the round
    before left and fitted.
    scope, exclude, layer_ratios: globs over node and tensor names.  min_keep: units (or, below 1, the share) that every
    group keeps, residual branches apart.  Groups that the inputs do
    not exercise stay whole.  align: kept units are a multiple of it.  Deterministic for a seed.

    Raises OnnxPruneError for bad input (exit code 2), where nothing can be pruned (3) and where the proof fails (4).

    >>> result = onnxprune.prune("model.onnx", 0.4)                 # doctest: +SKIP
    >>> onnx.save(result.model, "smaller.onnx")                     # doctest: +SKIP
    """
    check_ratio(ratio)
    check_budget(of)
    check_granularity(granularity)
    given = calibration is not None and calibration != "none"
    free = calibration == "none"
    criterion = criterion or ("obs" if given or free else "l2")
    allocation = allocation or ("global" if free else DISTORTION if given and criterion != PCA else "uniform")
    compensation = compensation or ("refine" if given else "merge" if free else "none")
    check_criterion(criterion, given, free)
    check_allocation(allocation, given)
    check_compensation(compensation, given)
    if min_keep < 0:
        raise OnnxPruneError(f"min-keep is {min_keep}; it is a share below 1 or a number of units, 0 at least")
    if steps < 1:
        raise OnnxPruneError(f"steps is {steps}; it is a number of rounds, 1 at least")
    if align < 1:
        raise OnnxPruneError(f"align is {align}; it is a number of units, 1 at least")
    loaded = _load(model, feeds, input_shapes, progress)
    source = "none" if calibration is None else calibration
    data = read_calibration(source, loaded, preprocess=preprocess, limit=samples, seed=seed)
    found = at_granularity(group(loaded, allow_io), granularity)
    grouping, proof, bench = _certified(found, feeds, seed, verify, progress)
    _some(grouping)
    study = Study(grouping, data, progress, turns=compensation in TURNING)
    rotated: Rotated | None = None
    if criterion == PCA:
        rotated = rotate(grouping, study.batches(), bench, progress=progress)
        if not rotated.scores:
            reason = next(iter(rotated.skipped.values()), "it has no groups of channels")
            raise OnnxPruneError(f"{loaded.name}: none of its streams can be turned into principal components ({reason}); try obs", 3)
        turned = replace(load(rotated.model, feeds, loaded.input_shapes), name=loaded.name)
        grouping, proof, bench = _certified(at_granularity(group(turned, allow_io), granularity), feeds, seed, verify, progress)
        study = replace(study, grouping=grouping, known=rotated.scores_in(grouping), finish=rotated.rescaled)
    chosen, shares = may_go(grouping, scope, exclude, layer_ratios or {})
    idle = set(proof.unexercised) if proof else set()
    if chosen and chosen <= idle:
        raise OnnxPruneError(f"{loaded.name}: these inputs exercise none of its groups, so nothing is proven; give --feeds that do", 3)
    chosen -= idle  # their coupling is not proven
    shares = {g: share for g, share in shares.items() if g in chosen}
    if not chosen:
        raise OnnxPruneError(f"{loaded.name}: no group is left to prune; widen --scope or --exclude less", 3)
    _say(progress, f"scoring {len(chosen)} groups")
    limits = Limits(min_keep, align)

    def widths(scores: Scores, rule: str, losses: Losses, share: float) -> Choice:
        return _choice(None, grouping, scores, {}, ratio * share, of, rule, limits, shares, losses)

    selection = select(grouping, chosen, criterion, allocation, seed, study, widths)
    selection = in_steps(selection, grouping, seed, study, compensation, widths, steps)
    scores = selection.scores
    branches = [g for g in grouping.groups if g.id in chosen and g.branch is not None]
    lost: dict[int, float] = {}
    if branches:
        _say(progress, f"choosing among {len(branches)} branches")
        bench = bench or prepare(grouping, feeds, seed)
        lost = {b.id: proof.influence[b.id] for b in branches if b.id in proof.influence} if proof else {}
        lost |= influences(bench, [b for b in branches if b.id not in lost])
        if criterion == "random":
            lost = {b.id: float(np.random.default_rng([seed, b.id]).random()) for b in branches}
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
        "align": align,
        "allow_io": list(allow_io),
        "seed": seed,
        "input_shapes": {k: list(v) for k, v in loaded.input_shapes.items()},
    }
    failure: ProofError | None = None
    for _ in range(ROUNDS):
        choice = _choice(bench, grouping, scores, lost, ratio, of, selection.allocation, limits, shares, selection.losses)
        if not choice.remove:
            break
        made = Plan(grouping, choice.remove, options, choice.reached)
        try:
            result = _finish(made, proof, bench, abs(choice.reached - ratio) <= 0.01, progress)
            result = replace(result, scores=scores, losses=selection.losses or {})
            return _compensated(result, study, compensation, bench)
        except ProofError as error:
            failure = error
        _say(progress, f"planning again without {len(failure.groups)} groups")
        grouping, proof = _less(grouping, proof, failure.groups)
        scores = {k: v for k, v in scores.items() if k not in failure.groups}
        lost = {k: v for k, v in lost.items() if k not in failure.groups}
        shares = {k: v for k, v in shares.items() if k not in failure.groups}
        if not scores and not lost:
            break
    if failure is not None:
        raise failure
    if not scores:
        raise OnnxPruneError(f"{loaded.name}: to cut none of its branches is closest to {ratio:.1%} of {of}; ask for more", 3)
    raise OnnxPruneError(f"{loaded.name}: nothing can go within --min-keep {min_keep:g} and --align {align}; ask for less of them", 3)


def apply(
    model: Source,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    verify: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Surgery alone: remove what a plan says from the model it was made for, or from a fine-tuned sister.

    Raises OnnxPruneError (exit code 2) where the plan does not fit the model.
    """
    return _apply(model, plan, feeds, input_shapes, verify, seed, progress)[0]


def verify(
    model: Source,
    pruned: Source | None = None,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    allow_io: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Proof:
    """Prove the groups of a model; with a plan, what the plan leaves; with a pruned model too, that it is just that.

    Without a plan a pruned model is checked for its interface, for loading, and for finite outputs.
    Raises OnnxPruneError: exit code 2 where the plan does not fit the model, 4 where the proof fails.
    """
    if plan is not None:
        result, bench = _apply(model, plan, feeds, input_shapes, True, seed, progress)
        if result.proof is None or bench is None:
            raise OnnxPruneError("the model has no groups; there is nothing to prove", 3)
        if pruned is None:
            return result.proof
        moves = Moves(result.plan.grouping, after=result.plan.remove)
        return replace(result.proof, matches=compare(bench, result.model, load(pruned).proto, moves))
    found = with_branches(group(_load(model, feeds, input_shapes, progress), allow_io))
    _some(found)
    _, proof, bench = certify(found, feeds, seed, progress=progress)
    if pruned is not None:
        check_model(bench, load(pruned).proto)
    return proof


def planned(
    model: Source,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Plan:
    """A plan on the model it was made for, or on a fine-tuned sister.

    Raises OnnxPruneError (exit code 2) where the plan does not fit the model.
    """
    content = plan.to_json() if isinstance(plan, Plan) else read_plan(plan)
    options = content.get("options") or {}
    sizes = {k: tuple(v) for k, v in (options.get("input_shapes") or {}).items()}
    try:
        loaded = _load(model, feeds, input_shapes or ({} if feeds else sizes), progress)
    except OnnxPruneError:
        if feeds or input_shapes or not sizes:
            raise
        loaded = _load(model, None, None, progress)  # the plan's shapes do not fit: `match` says what else does not
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
) -> tuple[Result, Bench | None]:
    made = planned(model, plan, feeds, input_shapes, progress)
    proof, bench = None, None
    if verify:
        grouping, proof, bench = _certified(made.grouping, feeds, seed, True, progress)
        lost = [i for i in made.remove if proof and i in proof.frozen]
        if lost and proof:
            tensor = next(g.members[0].tensor for g in made.groups if g.id == lost[0])
            raise OnnxPruneError(
                f"{made.grouping.model.name}: group {lost[0]} ('{tensor}') of the plan fails its proof: {proof.frozen[lost[0]]}", 4
            )
        made = replace(made, grouping=grouping)
    return _finish(made, proof, bench, True, progress), bench


def _load(model: Source, feeds: Arrays | None, input_shapes: Shapes | None, progress: Progress | None) -> Model:
    _say(progress, "reading the model")
    return load(model, feeds, input_shapes)


def _say(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress(text)


def _certified(
    grouping: Grouping, feeds: Arrays | None, seed: int, verify: bool, progress: Progress | None
) -> tuple[Grouping, Proof | None, Bench | None]:
    if not verify or not grouping.groups:
        return grouping, None, None
    return certify(grouping, feeds, seed, progress=progress)


def _choice(
    bench: Bench | None,
    grouping: Grouping,
    scores: Mapping[int, np.ndarray],
    lost: Mapping[int, float],
    ratio: float,
    of: str,
    rule: str,
    limits: Limits,
    shares: Mapping[int, float],
    losses: Losses = None,
) -> Choice:
    """Units to remove for a budget, by the `scores` of width groups and what the outputs have `lost` without each branch."""

    def widths(cut: Sequence[int] = ()) -> Choice:
        dead = Cuts(grouping).dead(cut)
        alive = {g.id for g in grouping.groups if not dead or any(m.tensor not in dead for m in g.members)}
        left = {g: s for g, s in scores.items() if g in alive}
        return choose(grouping, left, ratio, of, rule, limits, {g: shares[g] for g in left if g in shares}, cut, losses)

    if not lost or bench is None:
        return widths()
    blocks = Blocks(grouping, lost, of, shares)
    return mixed(bench, grouping, ratio, blocks.prefixes(ratio), widths) if scores else blocks.closest(ratio)


def _less(grouping: Grouping, proof: Proof | None, wrong: Mapping[int, str]) -> tuple[Grouping, Proof | None]:
    """Without the groups whose removal fails the proof."""
    if proof is not None:
        proven, unchecked = (tuple(i for i in ids if i not in wrong) for ids in (proof.proven, proof.unchecked))
        proof = replace(proof, frozen={**proof.frozen, **wrong}, proven=proven, unchecked=unchecked)
    return without(grouping, wrong), proof


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
    """The result with its weights compensated, where that is asked for; checked again, as numbers are new."""
    result = replace(result, model=study.finish(result.model))
    if name == "none":
        return result
    model, refits = compensations.get(name)(study.on(result.plan.grouping), result.plan, result.model)
    if bench is not None:
        check_model(bench, model, Moves(result.plan.grouping, after=result.plan.remove))
    if not study.samples.count:
        return replace(result, model=model)
    _say(study.progress, "comparing with the original")
    original = result.plan.grouping.model.proto
    found = fidelity(original, [result.model, model], study.part(FEW))
    return replace(result, model=model, refits=tuple(refits), fidelity=(found[0], found[1]))


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

"""Step 8: the proof that the surgery was right: pruning commutes with permuting, and equals masking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from onnxprune.certificate import MARGIN, Bench, Progress, Proof, behind_integers, runner
from onnxprune.errors import OnnxPruneError, ProofError
from onnxprune.grouping import Group, Grouping
from onnxprune.importer import FLOATS, Model
from onnxprune.masking import contractions, excuses, zeroed
from onnxprune.moves import Moves, permuted, shuffled
from onnxprune.naming import group_names
from onnxprune.parts import without
from onnxprune.plans import Plan
from onnxprune.rewriter import Remove, Widths, rewrite
from onnxprune.running import LEAST, MOST, Arrays, Lazy, Runner, Runs, distance, first_line, jittered, session, some

COMMUTING = 5  # the seed of the order in which units are permuted before they are removed


def prove_surgery(
    bench: Bench, grouping: Grouping, remove: Remove, proof: Proof, progress: Progress | None = None
) -> tuple[ModelProto, Grouping, Proof]:
    """The pruned model; that it is a model like the original, and commuting and masked equivalence.

    Groups of which zeros are not the same as removing, for a reason that the graph shows, are marked `statistics` in the
    grouping that is returned.  Raises ProofError (exit code 4) where the pruned model does not compute what it must; it
    names the groups that cause it.
    """
    say = progress or (lambda text: None)
    losing = [g for g in grouping.groups if len(remove.get(g.id, ()))]
    say("permuting before pruning")
    try:
        pruned, gap, moved = _pruned(bench, grouping, losing, remove)
    except OnnxPruneError as error:
        say(f"looking for the cause among {len(losing)} groups")
        raise _failure(grouping, _culprits(losing, error, lambda part: _pruned(bench, grouping, part, remove))) from error
    say("comparing with the masked original")
    marked, wrong, masked = _masked(bench, grouping, losing, remove)
    if wrong:
        raise _failure(grouping, wrong)
    grouping = replace(grouping, groups=tuple(replace(g, statistics=g.statistics or g.id in marked) for g in grouping.groups))
    plain = [g for g in grouping.groups if len(remove.get(g.id, ())) and not g.statistics]
    try:
        _elsewhere(bench, grouping, plain, remove)
    except OnnxPruneError as error:
        raise _failure(grouping, _culprits(plain, error, lambda part: _elsewhere(bench, grouping, part, remove))) from error
    changing = tuple(g.id for g in grouping.groups if g.statistics and len(remove.get(g.id, ())))
    return pruned, grouping, replace(proof, commuting=gap, masked=masked, statistics=changing, moved=moved)


def _failure(grouping: Grouping, wrong: Mapping[int, str]) -> ProofError:
    first = next(g for g in grouping.groups if g.id in wrong)
    names = group_names(grouping)
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    message = f"group {first.id} ('{names[first.id]}'){more} fails the proof of the pruned model: {wrong[first.id]}; nothing is written"
    return ProofError(message, {k: f"removing its units would fail the proof: {why}" for k, why in wrong.items()})


def _culprits(losing: list[Group], error: OnnxPruneError, check: Callable[[list[Group]], object]) -> dict[int, str]:
    """The groups with which the check raises, and why; found by bisection.

    Raises the error where the check fails without any group, too.
    """
    found: dict[int, str] = {}

    def why(part: list[Group]) -> str:
        try:
            check(part)
        except OnnxPruneError as reason:
            return str(reason)
        return ""

    def search(part: list[Group], reason: str) -> None:
        if len(part) == 1:
            found[part[0].id] = reason
            return
        halves = part[: len(part) // 2], part[len(part) // 2 :]
        reasons = [why(half) for half in halves]
        for half, own in zip(halves, reasons, strict=True):
            if own:
                search(half, own)
        if not any(reasons):  # either half passes without the other
            found.update((g.id, reason) for g in halves[1])

    if not losing or why([]):
        raise error
    search(losing, str(error))
    return found


def check_model(bench: Bench, pruned: ModelProto, moves: Moves | None = None, ready: Runs | None = None) -> dict[str, np.ndarray]:
    """Checker, shape inference, a session, the interface and finite outputs; returns the outputs as float32.

    moves: what inputs that may shrink lose; ready: what runs the model, where it does not hold all of its weights.
    Raises OnnxPruneError (exit code 4) where any of it fails.
    """
    for check in (onnx.checker.check_model, _infer_strictly):
        try:
            check(inside(pruned))
        except Exception as error:
            try:
                check(inside(bench.model.proto))
            except Exception:  # the original fails it as well
                continue
            raise OnnxPruneError(f"the pruned model is not well-formed ({first_line(error)})", 4) from error
    ready = ready or Runner(pruned, watch=behind_integers(bench.model))
    outputs = ready.run(moves.arrays(bench.feeds) if moves else bench.feeds)
    before, after = bench.model.proto.graph, pruned.graph
    held = {*bench.model.tensors, *(t.name for t in after.initializer)}  # inputs too, in old files
    old, new = (
        {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output) if v.name not in held} for graph in (before, after)
    )
    if old != new:
        raise OnnxPruneError("the pruned model has other inputs or outputs", 4)
    for name, array in bench.reference.items():
        if isinstance(array, list) and isinstance(outputs.get(name), list):  # a sequence
            continue
        ours = np.asarray(outputs[name]) if name in outputs else None
        if ours is None or ours.ndim != np.ndim(array):
            raise OnnxPruneError(f"the pruned model's output '{name}' has another shape", 4)
        if ours.dtype.kind == "f" and np.isfinite(array).all() and not np.isfinite(ours).all():
            raise OnnxPruneError(f"the pruned model's output '{name}' is not finite", 4)
    if _has_halves(pruned) and not bench.model.external.places:
        try:
            session(pruned, optimize=True)
        except OnnxPruneError:
            session_of_original(bench)
    return outputs


def _infer_strictly(proto: ModelProto) -> None:
    onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def inside(proto: ModelProto) -> ModelProto:
    """The model with inputs for the weights that it does not hold, so that the rest of it can be checked."""
    if all(t.data_location != TensorProto.EXTERNAL for t in proto.graph.initializer):
        return proto
    declared = {v.name for v in proto.graph.input}
    out = without(proto, {t.name for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL})
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in declared:
            out.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return out


def compare(bench: Bench, made: Plan, expected: ModelProto, given: Model) -> float:
    """How far a model's outputs are from those of what the plan leaves.

    Raises OnnxPruneError (exit code 4) where its tensors have other names or shapes, or its interface differs.
    """
    shapes = [{t.name: tuple(t.dims) for t in proto.graph.initializer} for proto in (expected, given.proto)]
    for name, shape in shapes[0].items():
        if shapes[1].get(name) != shape:
            found = list(shapes[1][name]) if name in shapes[1] else "missing"
            raise OnnxPruneError(f"'{name}' is {found} in the pruned model; the plan leaves {list(shape)}", 4)
    moves = Moves(made.grouping, after=made.remove)
    ours = check_model(bench, expected, moves, bench.opened(expected, Widths(made.grouping, made.remove)))
    return distance(ours, check_model(bench, given.proto, moves, runner(given)))


def session_of_original(bench: Bench) -> None:
    """Raises nothing where the original does not load either (a type that this provider lacks)."""
    try:
        session(bench.model.proto, optimize=True)
    except OnnxPruneError:
        return
    raise OnnxPruneError("the pruned model does not load in onnxruntime, the original does", 4)


def _has_halves(proto: ModelProto) -> bool:
    return any(t.data_type in FLOATS and t.data_type != FLOATS[0] for t in proto.graph.initializer)


def _of_floats(value: Any) -> bool:
    """Whether an array, or one of a sequence, holds floating-point numbers."""
    return any(map(_of_floats, value)) if isinstance(value, list) else np.asarray(value).dtype.kind == "f"


def _pruned(bench: Bench, grouping: Grouping, losing: list[Group], remove: Remove) -> tuple[ModelProto, float | None, float | None]:
    """The model without the units of some groups, the gap to pruning after a permutation, and how far the outputs moved.

    Raises OnnxPruneError (exit code 4) where it is not well-formed, or the gap is more than rounding or not to be told from it.
    """
    gone = {g.id: remove[g.id] for g in losing}
    pruned = rewrite(grouping, gone)
    narrow = Moves(grouping, after=gone)
    widths = Widths(grouping, gone)
    outputs = check_model(bench, pruned, narrow, bench.opened(pruned, widths))
    floats = {name: array for name, array in narrow.arrays(bench.reference).items() if _of_floats(array) and name in outputs}
    moved = distance(floats, outputs) if floats else None
    if all(g.branch is not None for g in losing):  # a branch is one unit, which has nowhere else to go
        return pruned, None, moved
    feeds = narrow.arrays(bench.feeds)
    same = {g.id: np.sort(np.argsort(shuffled(g, COMMUTING))[remove[g.id]]) for g in losing}
    before = permuted(bench.arrays, losing, seed=COMMUTING)
    other = rewrite(grouping, same, before)
    moves = Moves(grouping, losing, COMMUTING, gone, same)
    names = {t.name for t in pruned.graph.initializer if t.name in bench.arrays and t.data_type in FLOATS}
    ready = bench.opened(pruned, widths, names)
    small: Arrays = Lazy(sorted(names), lambda name: widths.cut(name, bench.arrays[name]))
    if not isinstance(bench.arrays, Lazy):
        small = {t.name: onnx.numpy_helper.to_array(t) for t in pruned.graph.initializer if t.name in names}
    rounding = distance(outputs, ready.run(feeds, jittered(small, np.random.default_rng(3))))
    rounding = max(rounding, bench.rounding) if np.isfinite(rounding) else MOST
    tolerance = min(MOST, max(LEAST, 5 * rounding))
    if tolerance >= MOST:  # there the next order may move the outputs by chance
        touched = {m.tensor for g in losing for m in g.members}
        stirred = jittered(some(small, touched), np.random.default_rng(3), MARGIN)
        if (shift := distance(outputs, ready.run(feeds, stirred))) > MOST:
            raise OnnxPruneError(f"not provable: rounding alone changes the pruned model's outputs by {shift:.2g} standard deviations", 4)
    twin = bench.opened(other, Widths(grouping, same), arrays=before)
    gap = distance(moves.arrays(outputs), twin.run(moves.arrays(feeds)))
    if bench.elsewhere is not None:
        there = narrow.arrays(bench.elsewhere)
        gap = max(gap, distance(moves.arrays(ready.run(there)), twin.run(moves.arrays(there))))
    if gap > tolerance:
        raise OnnxPruneError(
            f"pruning a permuted model gives other outputs (by {gap:.2g} standard deviations, {tolerance:.2g} are rounding)", 4
        )
    return pruned, gap, moved


def _elsewhere(bench: Bench, grouping: Grouping, losing: list[Group], remove: Remove) -> None:
    """At other input sizes too the pruned model equals the masked original.  Raises OnnxPruneError (exit code 4) where not."""
    if bench.elsewhere is None or not losing:
        return
    gap = _masked_gap(bench, grouping, losing, remove, bench.elsewhere)
    if gap > 2 * bench.tolerance:
        sizes = {k: list(np.shape(v)) for k, v in bench.elsewhere.items()}
        raise OnnxPruneError(f"on inputs of {sizes} it differs from the masked original by {gap:.2g} standard deviations", 4)


def _masked_gap(bench: Bench, grouping: Grouping, part: list[Group], remove: Remove, feeds: Arrays) -> float:
    """How far the model without the units of some groups is from the original with zeros in their place."""
    gone = {g.id: remove[g.id] for g in part}
    moves, model, least = Moves(grouping, after=gone), bench.model, float("inf")
    try:
        pruned = rewrite(grouping, gone)
    except OnnxPruneError:
        return least
    for readers in (contractions(model), None):
        zeros = zeroed(bench.arrays, part, remove, readers)
        try:
            outputs = bench.opened(pruned, Widths(grouping, gone)).run(moves.arrays(feeds))
            gap = distance(moves.arrays(bench.runner.run(feeds, zeros)), outputs)
        except OnnxPruneError:
            continue
        least = min(least, gap)
        if least <= bench.tolerance:
            break
    return least


def _masked(bench: Bench, grouping: Grouping, losing: list[Group], remove: Remove) -> tuple[set[int], dict[int, str], float | None]:
    """Where zeroing does not equal removing: ids of groups with a reason for that, why others are wrong; and the gap of the rest."""
    plain = [g for g in losing if not g.statistics]
    reasons: dict[int, str] = {}
    apart: set[int] = set()

    def gap(part: list[Group]) -> float:
        return _masked_gap(bench, grouping, part, remove, bench.feeds)

    def search(part: list[Group], found: float) -> None:
        if found <= bench.tolerance:
            return
        if len(part) == 1:
            apart.add(part[0].id)
            return
        for half in (part[: len(part) // 2], part[len(part) // 2 :]):
            search(half, gap(half))

    if not plain:
        return set(), {}, None
    worst = gap(plain)
    search(plain, worst)
    rest = [g for g in plain if g.id not in apart]
    if worst > bench.tolerance:
        reasons = excuses(grouping)
        rest.sort(key=lambda g: (g.branch is None, g.id in reasons))  # branches have no other proof: the last to be doubted
        worst = gap(rest) if rest else 0.0
    while rest and worst > bench.tolerance:  # each alone is within rounding, all together are not
        keep = len(rest) * 3 // 4
        apart |= {g.id for g in rest[keep:]}
        rest = rest[:keep]
        worst = gap(rest) if rest else 0.0
    wrong = {i: "zeros in place of its units give other outputs than removing them" for i in apart if i not in reasons}
    return apart - set(wrong), wrong, worst if rest else None

"""Step 8: the proof that the surgery was right: pruning commutes with permuting, and equals masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from onnxprune.certificate import LEAST, MOST, Bench, Progress, Proof, behind_integers, permuted, shuffled
from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.grouping import Group, Grouping, Member
from onnxprune.importer import FLOATS, Model
from onnxprune.rewriter import rewrite
from onnxprune.running import Arrays, Runner, distance, first_line, jittered, session


def prove_surgery(
    bench: Bench, grouping: Grouping, remove: Mapping[int, np.ndarray], pruned: ModelProto, proof: Proof, progress: Progress | None = None
) -> tuple[Grouping, Proof]:
    """Commuting and masked equivalence for the pruned model, and that it is a model like the original.

    Groups whose removal is not the same as zeros where a layer sums over them are marked `statistics` in the grouping that
    is returned.  Raises OnnxPruneError (exit code 4) where the pruned model does not compute what it must.
    """
    say = progress or (lambda text: None)
    say("checking the pruned model")
    outputs = check_model(bench, pruned)
    losing = [g for g in grouping.groups if len(remove.get(g.id, ()))]
    gap, tolerance = None, bench.tolerance
    if any(g.branch is None for g in losing):  # a branch is one unit, which has nowhere else to go
        say("permuting before pruning")
        gap, tolerance = _commuting(bench, grouping, losing, remove, pruned, outputs)
    if gap is not None and gap > tolerance:
        raise OnnxPruneError(
            f"the pruned model failed its proof: pruning a permuted model gives other outputs (by {gap:.2g} standard deviations, "
            f"{tolerance:.2g} are rounding); nothing is written",
            4,
        )
    say("comparing with the masked original")
    grouping, masked = _masked(bench, grouping, remove)
    _elsewhere(bench, grouping, remove)
    marked = tuple(g.id for g in grouping.groups if g.statistics and len(remove.get(g.id, ())))
    return grouping, replace(proof, commuting=gap, masked=masked, statistics=marked)


def check_model(bench: Bench, pruned: ModelProto) -> dict[str, np.ndarray]:
    """Checker, shape inference, a session, the interface and finite outputs; returns the outputs as float32.

    Raises OnnxPruneError (exit code 4) where any of it fails.
    """
    for check in (onnx.checker.check_model, _infer_strictly):
        try:
            check(pruned)
        except Exception as error:
            try:
                check(bench.model.proto)
            except Exception:  # the original fails it as well
                continue
            raise OnnxPruneError(f"the pruned model is not well-formed ({first_line(error)}); nothing is written", 4) from error
    outputs = Runner(pruned, watch=behind_integers(bench.model)).run(bench.feeds)
    before, after = bench.model.proto.graph, pruned.graph
    old = {v.name: v.type.tensor_type.elem_type for v in (*before.input, *before.output) if v.name not in bench.model.tensors}
    new = {v.name: v.type.tensor_type.elem_type for v in (*after.input, *after.output) if v.name not in bench.model.tensors}
    if old != new:
        raise OnnxPruneError("the pruned model has other inputs or outputs; nothing is written", 4)
    for name, array in bench.reference.items():
        ours = np.asarray(outputs[name]) if name in outputs else None
        if ours is None or ours.ndim != np.ndim(array):
            raise OnnxPruneError(f"the pruned model's output '{name}' has another shape; nothing is written", 4)
        if ours.dtype.kind == "f" and np.isfinite(array).all() and not np.isfinite(ours).all():
            raise OnnxPruneError(f"the pruned model's output '{name}' is not finite; nothing is written", 4)
    if _has_halves(pruned):
        try:
            session(pruned, optimize=True)
        except OnnxPruneError:
            session_of_original(bench)
    return outputs


def _infer_strictly(proto: ModelProto) -> None:
    onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def compare(bench: Bench, expected: ModelProto, given: ModelProto) -> float:
    """How far a model's outputs are from those of what the plan leaves.

    Raises OnnxPruneError (exit code 4) where its tensors have other names or shapes, or its interface differs.
    """
    shapes = [{t.name: tuple(t.dims) for t in proto.graph.initializer} for proto in (expected, given)]
    for name, shape in shapes[0].items():
        if shapes[1].get(name) != shape:
            found = list(shapes[1][name]) if name in shapes[1] else "missing"
            raise OnnxPruneError(f"'{name}' is {found} in the pruned model; the plan leaves {list(shape)}", 4)
    return distance(check_model(bench, expected), check_model(bench, given))


def session_of_original(bench: Bench) -> None:
    """Raises nothing where the original does not load either (a type that this provider lacks)."""
    try:
        session(bench.model.proto, optimize=True)
    except OnnxPruneError:
        return
    raise OnnxPruneError("the pruned model does not load in onnxruntime, the original does; nothing is written", 4)


def _has_halves(proto: ModelProto) -> bool:
    return any(t.data_type in FLOATS and t.data_type != FLOATS[0] for t in proto.graph.initializer)


def _commuting(
    bench: Bench, grouping: Grouping, losing: list[Group], remove: Mapping[int, np.ndarray], pruned: ModelProto, outputs: Arrays
) -> tuple[float, float]:
    """The gap between pruning and pruning after a permutation, and what counts as equal on the pruned model."""
    moved = permuted(bench.arrays, losing, seed=5)
    same = {g.id: np.sort(np.argsort(shuffled(g, 5))[remove[g.id]]) for g in losing}
    other = rewrite(grouping, same, moved)
    names = {t.name for t in pruned.graph.initializer if t.name in bench.arrays and t.data_type in FLOATS}
    runner = Runner(pruned, names, watch=behind_integers(bench.model))
    small = {t.name: onnx.numpy_helper.to_array(t) for t in pruned.graph.initializer if t.name in names}
    rounding = distance(outputs, runner.run(bench.feeds, jittered(small, np.random.default_rng(3))))
    rounding = max(rounding, bench.rounding) if np.isfinite(rounding) else MOST
    tolerance = min(MOST, max(LEAST, 5 * rounding))
    twin = Runner(other, watch=behind_integers(bench.model))
    gap = distance(outputs, twin.run(bench.feeds))
    if bench.elsewhere is not None:
        gap = max(gap, distance(runner.run(bench.elsewhere), twin.run(bench.elsewhere)))
    return gap, tolerance


def _elsewhere(bench: Bench, grouping: Grouping, remove: Mapping[int, np.ndarray]) -> None:
    """At other input sizes too the pruned model equals the masked original."""
    plain = [g for g in grouping.groups if len(remove.get(g.id, ())) and not g.statistics]
    if bench.elsewhere is None or not plain:
        return
    pruned = Runner(rewrite(grouping, {g.id: remove[g.id] for g in plain}), watch=behind_integers(bench.model))
    outputs = pruned.run(bench.elsewhere)
    gap = float("inf")
    for readers in (contractions(bench.model), None):
        masked = bench.runner.run(bench.elsewhere, zeroed(bench.arrays, plain, remove, readers))
        gap = min(gap, distance(masked, outputs))
    if gap > 2 * bench.tolerance:
        sizes = {k: list(np.shape(v)) for k, v in bench.elsewhere.items()}
        raise OnnxPruneError(
            f"the pruned model failed its proof on inputs of {sizes}: it differs from the masked original by {gap:.2g} "
            "standard deviations; nothing is written",
            4,
        )


def _masked(bench: Bench, grouping: Grouping, remove: Mapping[int, np.ndarray]) -> tuple[Grouping, float | None]:
    """Zeroing equals removing wherever layers sum over the units; groups for which it does not are marked `statistics`."""
    sums = contractions(bench.model)
    marked: set[int] = set()
    worst: float | None = None

    def gap(part: list[Group]) -> float:
        pruned = Runner(rewrite(grouping, {g.id: remove[g.id] for g in part}), watch=behind_integers(bench.model))
        try:
            outputs = pruned.run(bench.feeds)
        except OnnxPruneError:
            return float("inf")
        gaps = []
        for readers in (sums, None):
            try:
                masked = bench.runner.run(bench.feeds, zeroed(bench.arrays, part, remove, readers))
            except OnnxPruneError:
                continue
            gaps.append(distance(masked, outputs))
            if gaps[-1] <= bench.tolerance:
                break
        return min(gaps, default=float("inf"))

    def search(part: list[Group]) -> None:
        nonlocal worst
        if not part:
            return
        found = gap(part)
        if found <= bench.tolerance:
            worst = max(worst or 0.0, found)
        elif len(part) == 1:
            marked.add(part[0].id)
        else:
            search(part[: len(part) // 2])
            search(part[len(part) // 2 :])

    losing = [g for g in grouping.groups if len(remove.get(g.id, ())) and not g.statistics]
    losing.sort(key=lambda g: g.branch is None)  # branches have no other proof, so they are the last to be doubted
    search(losing)
    while marked and (rest := [g for g in losing if g.id not in marked]):
        whole = gap(rest)
        if whole <= bench.tolerance:
            worst = whole
            break
        marked |= {g.id for g in rest[len(rest) * 3 // 4 :]}
    for branch in (g.branch for g in losing if g.id in marked and g.branch is not None):
        raise OnnxPruneError(
            f"the pruned model failed its proof: cutting the branch at '{branch.output}' is not the same as zeros in it; "
            "nothing is written",
            4,
        )
    if marked:
        grouping = replace(grouping, groups=tuple(replace(g, statistics=g.statistics or g.id in marked) for g in grouping.groups))
    return grouping, worst if any(g.id not in marked for g in losing) else None


def contractions(model: Model) -> set[tuple[str, int]]:
    """The (tensor, axis) pairs of constants that a layer sums over."""
    found: set[tuple[str, int]] = set()
    for node in model.nodes:
        for position, name in enumerate(node.input):
            if name not in model.tensors:
                continue
            rank = len(model.tensors[name].dims)
            if node.op_type == "Conv" and position == 1:
                found.add((name, 1))
            elif node.op_type == "ConvTranspose" and position == 1:
                found.add((name, 0))
            elif node.op_type == "Gemm" and position < 2:
                flipped = attributes(node).get("transB" if position else "transA", 0)
                found.add((name, 1 - position if not flipped else position))
            elif node.op_type == "MatMul" and rank >= 2:
                found.add((name, rank - 2 if position else rank - 1))
            elif node.op_type in ("LSTM", "GRU", "RNN") and position in (1, 2):
                found.add((name, 2))
    return found


def zeroed(
    arrays: Arrays, groups: Sequence[Group], remove: Mapping[int, np.ndarray], readers: set[tuple[str, int]] | None
) -> dict[str, np.ndarray]:
    """The tensors with the removed units' slices zero: everywhere, or only where `readers` sum over them."""
    changed: dict[str, np.ndarray] = {}
    for group in groups:
        members: Sequence[Member] = group.members
        if readers is not None:
            members = [m for m in members if (m.tensor, m.axis) in readers] or members
        for member in members:
            array = changed[member.tensor] if member.tensor in changed else arrays[member.tensor].copy()
            index: list[Any] = [slice(None)] * array.ndim
            index[member.axis] = member.indices[remove[group.id]].ravel()
            array[tuple(index)] = 0
            changed[member.tensor] = array
    return changed

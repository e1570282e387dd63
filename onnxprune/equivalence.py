"""The proof of residual branches: cutting one computes what zeros in its last projections do, and its loss shows in the outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto

from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Group, Grouping
from onnxprune.rewriter import Widths, rewrite
from onnxprune.running import Arrays, Lazy, Runs, distance

if TYPE_CHECKING:
    from onnxprune.certificate import Bench

EXACT = 1e-5  # standard deviations: a branch of zeros adds nothing, so there is hardly any rounding to allow for
UNSEEN = 1e-12  # a millionth of a standard deviation, squared: an influence that is none
WHOLE = np.zeros(1, np.int64)  # the one unit of a branch


def without_members(bench: Bench, blocks: Sequence[Group]) -> Arrays:
    """Zeros for every tensor of the blocks."""
    if isinstance(bench.arrays, Lazy):
        many = bench.arrays
        return Lazy((m.tensor for block in blocks for m in block.members), lambda name: np.zeros_like(many[name]))
    return {m.tensor: np.zeros_like(bench.arrays[m.tensor]) for block in blocks for m in block.members}


def certify_blocks(bench: Bench, grouping: Grouping, blocks: Sequence[Group], say: Callable[[str], None]) -> dict[int, str]:
    """{id of a block whose cut is not what zeros are: why}, on the bench's inputs and on those of other sizes.

    Blocks are cut all together, but for those inside of another, which are then cut without it; failures by bisection.
    """
    failed: dict[int, str] = {}

    def gap(part: Sequence[Group]) -> float:
        worst = 0.0
        try:
            gone = {b.id: WHOLE for b in part}
            cut = _open(bench, rewrite(grouping, gone), Widths(grouping, gone))
            for feeds in (bench.feeds, bench.elsewhere):
                if feeds is not None:
                    masked = bench.runner.run(feeds, without_members(bench, part))
                    worst = max(worst, distance(masked, cut.run(feeds)))
        except OnnxPruneError:
            return float("inf")
        return worst

    def search(part: Sequence[Group]) -> None:
        found = gap(part) if part else 0.0
        if found <= EXACT:
            return
        if len(part) == 1:
            failed[part[0].id] = f"cutting it is not the same as zeros in it (outputs differ by {found:.2g} standard deviations)"
            return
        say(f"looking for wrong branches among {len(part)}")
        search(part[: len(part) // 2])
        search(part[len(part) // 2 :])

    for level in levels(blocks):
        search(level)
    return failed


def _open(bench: Bench, cut: ModelProto, widths: Widths) -> Runs:
    """The cut model with the same tensors open as the original's: a constant weight may go another way, and round otherwise."""
    left = {t.name for t in cut.graph.initializer} | {n.output[0] for n in cut.graph.node if n.op_type == "Constant"}
    return bench.opened(cut, widths, left & set(bench.arrays))


def levels(blocks: Sequence[Group]) -> list[list[Group]]:
    """The blocks by the number of other blocks around them, fewest first."""
    found: dict[int, list[Group]] = {}
    for block in blocks:
        around = sum(other.branch.output != block.branch.output and block.branch.output in other.branch.dead for other in blocks)  # type: ignore[union-attr]
        found.setdefault(around, []).append(block)
    return [found[depth] for depth in sorted(found)]


def influences(bench: Bench, blocks: Sequence[Group], end: float = math.inf) -> dict[int, float]:
    """How much the outputs change when each block alone is cut: mean of ‖y − y′‖² / ‖y − ȳ‖² over the float outputs.

    ShortGPT (arXiv:2403.03853) calls what a block does to its input its influence; here it is what the outputs lose, without
    labels.  Infinite where the outputs are not finite any more.  end: when, by time.monotonic, no more is begun.
    """
    found: dict[int, float] = {}
    for block in blocks:
        if time.monotonic() > end:
            break
        found[block.id] = distortion(bench.reference, _run(bench, without_members(bench, [block])))
    return found


def _run(bench: Bench, arrays: Arrays) -> Mapping[str, np.ndarray]:
    try:
        return bench.runner.run(bench.feeds, arrays)
    except OnnxPruneError:
        return {}


def _parts(values: Arrays) -> dict[str, np.ndarray]:
    """Arrays as they are, and those of sequences each by itself."""
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        found |= {f"{name}[{i}]": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
    return found


def distortion(before: Arrays, after: Arrays) -> float:
    """Mean over the float outputs of the squared change by the variance; infinite where they do not compare.

    Where all outputs are integers, the mean share of them that changes.
    """
    before, after = _parts(before), _parts(after)
    lost: list[float] = []
    for name, array in before.items():
        if np.asarray(array).dtype.kind != "f" or not np.size(array):
            continue
        if name not in after or np.shape(after[name]) != np.shape(array):
            return float("inf")
        old, new = np.asarray(array, np.float64), np.asarray(after[name], np.float64)
        finite = np.isfinite(old)
        old, new = old[finite], new[finite]
        if not np.isfinite(new).all():
            return float("inf")
        if old.size:
            spread = float(old.var()) or float((old**2).mean()) or 1.0
            lost.append(float(((old - new) ** 2).mean()) / spread)
    if not lost:
        pairs = ((np.asarray(array), np.asarray(after[name])) for name, array in before.items() if name in after)
        lost = [float(np.mean(old != new)) for old, new in pairs if old.size and old.shape == new.shape]
    return float(np.mean(lost)) if lost else 0.0

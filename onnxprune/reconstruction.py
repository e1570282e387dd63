"""Compensation by least squares, layer after layer: what each reads comes from the pruned model, what it should make from the original.

The targets of a layer whose output goes into a residual Add are what the Add should make less what the other operand is now, so
that the error that has come along the residual stream is taken back in the branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from onnx import ModelProto, numpy_helper

from onnxprune.frontier import Frontier, Run
from onnxprune.leastsquares import reconstructed
from onnxprune.linear import CONVOLUTIONS
from onnxprune.matching import Matched, match, narrowed
from onnxprune.moments import Observed
from onnxprune.passes import stages
from onnxprune.plans import Plan
from onnxprune.products import Product
from onnxprune.recurrences import spelled_out
from onnxprune.rewriter import Widths
from onnxprune.ridge import Fit
from onnxprune.running import Arrays
from onnxprune.seats import Seat, bias_of, original_goal, put, seats, tensors_of

Batches = Callable[[], Iterable[Arrays]]
ROWS = 65536  # of a layer, or 16 times its features where that is more


@dataclass(frozen=True)
class Refit:
    """A layer that was fitted anew: its node, and the share of its targets' variance that it misses before and after.

    Of a layer right before a Relu or Clip it is what the Relu or Clip lets through that counts.  partner: the layer before it,
    where the two were refined together (`refinement`) after they were fitted.
    """

    node: str
    before: float
    after: float
    shrinkage: float
    partner: str = ""

    @property
    def changed(self) -> bool:
        """Whether a fit held on the samples kept apart, so that the layer is not as it was cut."""
        return math.isfinite(self.shrinkage) or self.after < self.before

    def to_json(self) -> dict[str, Any]:
        """An infinite shrinkage (the weights stay as they are) is None: JSON has no infinity."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in vars(self).items()}


Solve = Callable[[Observed, np.ndarray, np.ndarray, bool], Fit]
Match = Callable[[Plan, ModelProto, Product, Batches, float, tuple[Frontier, Frontier], Collection[str]], Matched | None]
Find = Callable[[Plan, ModelProto], list[Seat]]


class After(Protocol):
    """What may change a model further when a layer is fitted."""

    def changing(self, seat: Seat) -> Collection[str]:
        """Tensors and values before the layer that may change with it."""

    def __call__(self, proto: ModelProto, seat: Seat, known: tuple[Frontier, Frontier]) -> Refit | None:
        """Change the model; known: how far it and the original have been run."""


def reconstruct(
    plan: Plan,
    pruned: ModelProto,
    batches: Batches,
    solve: Solve = reconstructed,
    matched: Match | None = match,
    held: float = 0.25,
    progress: Callable[[str], None] | None = None,
    after: After | None = None,
    find: Find = seats,
) -> tuple[ModelProto, list[Refit]]:
    """A copy of the pruned model with the weights and biases of its layers fitted to the original, layer after layer.

    batches: yields feeds anew at each call; every fourth batch (`held`: the share) chooses the shrinkage.  Tensors keep their names
    and shapes; a Conv, ConvTranspose or Gemm without a bias gets one.  Where a pass for each layer would take long, several layers
    share one, and only layers that lost inputs are fitted.  matched: fits products of two activations that lost terms, such as queries
    by keys, when the layers before them are done; None: they are left alone.  after: what changes layers further, left out where they
    share passes.  find: the layers to fit, and what each is to make.
    """
    out = ModelProto()
    out.CopyFrom(pruned)
    widths = Widths(plan.grouping, plan.remove)
    sizes = [max((len(v) for v in feeds.values() if np.ndim(v)), default=1) for feeds in batches()]
    if not sizes:
        if progress:
            progress("the layers stay as they are: no batch is full; give more samples, or those of one size one after another")
        return out, []
    passes, hurried = stages(plan.grouping.model, find(plan, out), sum(sizes))
    waiting = narrowed(plan, out) if matched is not None else []
    report: list[Refit] = []
    if len(sizes) < 2 and progress:
        progress("the layers stay as they are: one batch of samples leaves none to see by whether a fit holds; give more")
    if after and hurried:
        after = None
        if progress:
            progress("no layers are refined together: the model or the calibration set is too large")
    mine, whole = Frontier(len(sizes)), Frontier(len(sizes))

    def fit_products(end: float, changing: Collection[str]) -> None:
        """Those before a node."""
        while matched is not None and waiting and waiting[0].node < end:
            product = waiting.pop(0)
            node = plan.grouping.model.main[product.node]
            name = node.name or node.output[0]
            found = matched(plan, out, product, batches, held, (mine, whole), changing)
            if found:
                report.append(Refit(name, found.before, found.after, found.shrinkage))
            if progress:
                why = "is left alone: more than reshapes and a scale is between it and the layers before"
                progress(f"fitted {name}" if found else f"{name} {why}")

    for number, stage in enumerate(passes):
        left = list(chain(*passes[number:]))
        changing = {name for seat in left for name in (seat.weight, *seat.node.output, *(after.changing(seat) if after else ())) if name}
        fit_products(stage[0].layer.node, changing)
        if progress:
            progress(f"fitting the layers that stay, pass {number + 1} of {len(passes)}")
        ahead = mine.tap(out, [name for seat in stage for name in (seat.source, seat.other) if name], changing)
        spelled = spelled_out(plan.grouping.model, (seat.layer for seat in stage))
        goals = whole.tap(spelled, [seat.goal for seat in stage])
        for seat, observed in zip(stage, _observe(out, widths, stage, batches, len(sizes), held, ahead, goals), strict=True):
            fitted = _fit(out, seat, observed, solve)
            report.append(Refit(seat.node.name or seat.node.output[0], fitted.before, fitted.after, fitted.shrinkage))
            more = after(out, seat, (mine, whole)) if after else None
            if more:
                report.append(more)
    fit_products(math.inf, ())
    return out, report


def _observe(
    pruned: ModelProto, widths: Widths, stage: Sequence[Seat], batches: Batches, total: int, held: float, mine: Run, original: Run
) -> list[Observed]:
    """What the layers of a stage read and should make, over the batches to fit to and over those to choose by.

    mine, original: what the pruned model and the original make of a batch, by its number and feeds.
    """
    tensors = tensors_of(pruned)
    weights = [numpy_helper.to_array(tensors[seat.weight]) for seat in stage]
    shapes = [seat.shape.matrix(weight).shape for seat, weight in zip(stage, weights, strict=True)]
    found = [Observed.of(shape, seat.bounds, seat.layer.normed) for seat, shape in zip(stage, shapes, strict=True)]
    every = max(2, min(round(1 / held), total))  # one batch is held out where there are two
    for number, feeds in enumerate(batches()):
        now, then = mine(number, feeds), original(number, feeds)
        for position, (seat, weight) in enumerate(zip(stage, weights, strict=True)):
            goal = original_goal(widths, seat, then[seat.goal])
            if not _side_by_side(seat, weight.shape, now, goal.shape):
                continue
            many = max(ROWS, 16 * found[position].seen.x.shape[1]) // total
            places = seat.shape.choose(goal.shape, many, feeds, np.random.default_rng([position, number]))
            kernel = weight.shape[2:] if seat.shape.op in CONVOLUTIONS else ()
            rows = seat.shape.rows(now[seat.source], goal.shape, kernel, places)
            wanted = seat.shape.targets(goal, places)
            beside = seat.shape.targets(now[seat.other], places) if seat.other else np.zeros_like(wanted)
            found[position].add(rows, wanted, beside, number % every == every - 1, total)
    return [each.done() for each in found]


def _side_by_side(seat: Seat, weight: tuple[int, ...], now: Arrays, goal: tuple[int, ...]) -> bool:
    """Whether a layer of the pruned model has the places of the original's, and any: how many may depend on what was computed before."""
    read, count = np.shape(now[seat.source]), math.prod(goal)
    same = read[0] == goal[0] if seat.shape.op in CONVOLUTIONS else math.prod(seat.shape.out(read, weight)) == count
    return count > 0 and same and (not seat.other or np.size(now[seat.other]) == count)


def _fit(proto: ModelProto, seat: Seat, observed: Observed, solve: Solve) -> Fit:
    """Fit one layer, and write what was found into the model."""
    matrix = seat.shape.matrix(numpy_helper.to_array(tensors_of(proto)[seat.weight]))
    groups, wide, _ = matrix.shape
    bias = bias_of(proto, seat, groups * wide).reshape(groups, wide)
    if not (observed.seen.count + observed.held.count and observed.seen.finite and observed.held.finite):
        return Fit(matrix, bias, np.inf, np.nan, np.nan)
    found = solve(observed, matrix, bias, seat.layer.takes_bias)
    if not put(proto, seat, found.matrix, found.bias):
        return Fit(matrix, bias, np.inf, found.before, found.before)
    return found

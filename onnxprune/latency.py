"""Latency as a budget: what a model takes at any widths, by what its kernels took at a few (`probing`), and how it is met."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxprune import caching
from onnxprune.allocations import Choice
from onnxprune.cost import Counter, Term, element_terms, mac_terms
from onnxprune.grouping import Group, Grouping
from onnxprune.probing import Found, Kept, Progress, Rate, ends, measured
from onnxprune.stopwatch import Timer

ROUNDS = 8  # of planning, measuring and correcting
NEAR, ENOUGH = 0.05, 0.02  # relative distance from the latency that was asked for: what counts as met, and what is not bettered


class Latency:
    """Time of a run at any number of units kept, {group id: units kept}, as a share of the whole model's.

    rates: of each node's first output; steps: {group id: step}, a width within which costs what its end does; rest: time in no node.
    """

    def __init__(self, grouping: Grouping, rates: Mapping[str, Rate], steps: Mapping[int, int], rest: float = 0.0) -> None:
        model = grouping.model
        terms: list[Term] = [(f * rates[v][0], axes, v) for f, axes, v in mac_terms(model) if v in rates]
        terms += [(f * rates[v][1], axes, v) for f, axes, v in element_terms(model) if v in rates]
        terms += [(constant, (), v) for v, (_, _, constant) in rates.items() if constant]
        self._counter = Counter(grouping, terms)
        self._units = {g.id: g.units for g in grouping.groups}
        self._steps = dict(steps)
        self._rest = rest

    @property
    def steps(self) -> Mapping[int, int]:
        return self._steps

    def __call__(self, kept: Kept) -> float:
        return self._counter({**kept, **ends(self._units, kept, self._steps)}) + self._rest


def learned(grouping: Grouping, timer: Timer, seed: int = 0, progress: Progress | None = None) -> Latency:
    """The latency of a model as a function of its widths, measured by `timer`, or read where it was measured before.

    Raises OnnxPruneError (exit code 4) where the model cannot be timed.
    """
    key = _key(grouping, timer)
    found = _read(grouping, caching.read(key))
    if found is None:
        found = measured(grouping, timer, seed, progress)
        rates, steps, rest = found
        names = {_place(g): steps[g.id] for g in grouping.groups if g.id in steps}
        caching.write(key, {"rates": {v: list(rate) for v, rate in rates.items()}, "steps": names, "rest": rest})
    return Latency(grouping, *found)


# what was measured before


def _key(grouping: Grouping, timer: Timer) -> dict[str, str | int]:
    """All that the times depend on: the graph and its sizes (no values of weights), where units live, and the device."""
    model, digest = grouping.model, hashlib.sha256()
    for node in model.main:
        digest.update(node.SerializeToString(deterministic=True) if node.op_type != "Constant" else node.output[0].encode())
    for name in sorted(model.shapes):
        digest.update(f"{name}{tuple(model.shapes[name])}".encode())
    for name in sorted(model.tensors):
        digest.update(f"{name}{model.tensors[name].data_type}{tuple(model.tensors[name].dims)}".encode())
    for one in grouping.groups:
        digest.update(f"{_place(one)}{one.units}".encode())
    return {"model": digest.hexdigest(), **timer.device}


def _place(group: Group) -> str:
    return (
        f"{group.members[0].tensor}:{group.members[0].axis}:{int(group.members[0].indices.flat[0])}"
        if group.members
        else f"block{group.id}"
    )


def _read(grouping: Grouping, content: Mapping[str, Any] | None) -> Found | None:
    """What a cache file says; None where there is none, or it says nothing sensible."""
    if content is None:
        return None
    try:
        rates, places, rest = content["rates"], content["steps"], float(content["rest"])
        found: dict[str, Rate] = {str(v): (float(a), float(b), float(c)) for v, (a, b, c) in rates.items()}
        steps = {g.id: int(places[_place(g)]) for g in grouping.groups if _place(g) in places}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    numbers = [n for rate in found.values() for n in rate]
    if not found or not np.isfinite([*numbers, rest]).all() or min([*numbers, rest]) < 0 or min(steps.values(), default=1) < 1:
        return None
    return found, steps, rest


# meeting the budget


@dataclass(frozen=True)
class Landed:
    """A choice, and the measured seconds of the whole model and of what the choice leaves of it."""

    choice: Choice
    seconds: tuple[float, float]

    @property
    def left(self) -> float:
        return self.seconds[1] / self.seconds[0]


def land(
    original: ModelProto,
    ratio: float,
    choose: Callable[[float], Choice],
    made: Callable[[Choice], ModelProto],
    timer: Timer,
    progress: Progress | None = None,
) -> Landed | None:
    """The choice with which the `made` model's latency is nearest to 1 - ratio of the original's; None where nothing can go.

    A sum of kernels is not quite the whole, so what is asked of the cost model follows from what was measured: on the line through
    the nearest two of the measurements (the whole model is the first), or by bisection where that line leads astray.
    """
    asked, goal, low, high = 1 - ratio, 1 - ratio, 0.0, 1.0
    tried: dict[tuple[tuple[int, int], ...], Landed] = {}
    points = [(1.0, 1.0)]  # time left by the cost model, and measured
    for _ in range(ROUNDS):
        choice = choose(1 - goal)
        widths = tuple(sorted((g, len(units)) for g, units in choice.remove.items()))
        if widths and widths not in tried:
            if progress:
                progress("timing the whole")
            before, after = timer.latencies([original, made(choice)])
            tried[widths] = Landed(choice, (before, after))
            points.append((1 - choice.reached, after / before))
        left = tried[widths].left if widths else 1.0
        if abs(left / asked - 1) <= ENOUGH:
            break
        low, high = (low, goal) if left > asked else (goal, high)
        (one, first), (other, second) = sorted([*points, *points[:1]], key=lambda point: abs(point[1] - asked))[:2]
        goal = one + (asked - first) * (other - one) / (second - first) if second != first else low
        if not low < goal < high:
            goal = (low + high) / 2
    return min(tried.values(), key=lambda landed: abs(landed.left / asked - 1), default=None)


def met(seconds: tuple[float, float], ratio: float) -> bool:
    """Whether the second is within five percent of 1 - ratio of the first."""
    return abs(seconds[1] / seconds[0] / (1 - ratio) - 1) <= NEAR

"""Widths that go in steps: what is lost is the least that the steps allow, and narrow groups have steps of their own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from test_latency import Device, chain

import onnxprune
from onnxprune.allocations import POINT, Limits, choose
from onnxprune.exchange import Aim, exchanged
from onnxprune.grouping import Grouping, group
from onnxprune.importer import load

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)
WIDTHS, STEP = (32, 144, 96, 112, 128, 16), 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def rising(rng: np.random.Generator, units: int) -> np.ndarray:
    """A loss at each number of units removed, of another size in each group."""
    return np.cumsum(np.concatenate([[0.0], np.sort(rng.exponential(1.0, units))])) * rng.exponential(1.0)


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0.1, 0.9))
def test_no_step_or_pair_of_steps_is_left_that_loses_less(seed: int, units: list[int], goal: float) -> None:
    rng = np.random.default_rng(seed)
    losses = {g: rising(rng, n) for g, n in enumerate(units)}
    price = rng.uniform(0.1, 1, len(units))
    price /= price @ units  # each unit of a group saves as much, so that all goes with all units

    def miss(kept: dict[int, int]) -> float:
        return 1 - sum(price[g] * n for g, n in kept.items()) - goal

    aim = Aim(losses, dict(enumerate(units)), miss, 0.02)
    start = {g: int(rng.integers(0, n + 1)) for g, n in enumerate(units)}
    levels = {g: list(range(n + 1)) for g, n in enumerate(units) if g or seed % 3}  # the first may have to stay
    found = exchanged(start, levels, aim)
    assert all(found[g] == start[g] for g in set(start) - set(levels))
    assert aim.key(found) <= aim.key(start)
    single = [{g: n} for g in levels for n in (found[g] - 1, found[g] + 1) if 0 <= n <= units[g]]
    pairs = [one | other for one, other in itertools.combinations(single, 2) if not one.keys() & other.keys()]
    best = min((aim.key(found | move) for move in [*single, *pairs]), default=aim.key(found))
    assert best[0] >= aim.key(found)[0] - 1e-8
    assert best[0] > aim.key(found)[0] or best[1] >= aim.key(found)[1] * (1 - 1e-5)


class Stairs:
    """The time of a chain of MatMuls whose widths count as the next multiple of STEP."""

    def __init__(self, grouping: Grouping) -> None:
        place = {member.tensor: g.id for g in grouping.groups for member in g.members if member.axis == 1}
        self.order = [place.get(f"w{i}") for i in range(1, len(WIDTHS))]
        self.steps = {g.id: STEP for g in grouping.groups}

    def __call__(self, kept: Mapping[int, int]) -> float:
        widths = [-(-kept.get(-1 if g is None else g, whole) // STEP) * STEP for g, whole in zip(self.order, WIDTHS[1:], strict=True)]
        return float(sum(a * b for a, b in itertools.pairwise([WIDTHS[0], *widths])))


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_in_coarse_steps_loses_hardly_more_than_the_least(ratio: float, seed: int) -> None:
    grouping, rng = group(load(chain(WIDTHS))), np.random.default_rng(seed)
    cost, units = Stairs(grouping), {g.id: g.units for g in grouping.groups}
    scores = {g: rng.exponential(1.0, n) for g, n in units.items()}
    losses = {g: rising(rng, n) for g, n in units.items()}
    choice = choose(grouping, scores, ratio, cost, limits=Limits(0.1), losses=losses)
    lost = sum(float(losses[g][len(gone)]) for g, gone in choice.remove.items())
    levels = [list(range(STEP, u + 1, STEP)) for u in units.values()]
    options = [dict(zip(units, some, strict=True)) for some in itertools.product(*levels)]
    enough = [kept for kept in options if abs(1 - cost(kept) / cost({}) - ratio) <= POINT / 2]
    least = min(sum(float(losses[g][units[g] - n]) for g, n in kept.items()) for kept in enough)
    assert abs(choice.reached - ratio) <= POINT / 2 + 1e-9
    assert lost <= 1.1 * least


class Fine(Device):
    """Where a width up to a block's costs what the next multiple of 4 does, and a wider one what the next multiple of 16 does."""

    def layers(self, model: ModelProto) -> dict[str, float]:
        dims = {t.name: t.dims for t in model.graph.initializer}
        sizes = {n.output[0]: dims[n.input[1]] for n in model.graph.node if n.op_type == "MatMul"}
        return {out: float(np.prod([-(-d // s) * s for d in size for s in (4 if d <= 16 else 16,)])) for out, size in sizes.items()}


def test_narrow_groups_have_steps_of_their_own() -> None:
    widths = (32, 16, 144, 16, 128, 16, 96, 16)
    result = onnxprune.prune(chain(widths), 0.4, of="latency", timer=Fine(16))
    assert result.on_budget
    sizes = {t.name: list(t.dims) for t in result.model.graph.initializer}
    kept: dict[int, list[int]] = {whole: [] for whole in widths[1:-1]}
    for i, whole in enumerate(widths[1:-1], 1):
        kept[whole].append(sizes[f"w{i}"][1])
    assert min(kept[16]) < 16  # a step of 16 would leave them whole
    assert all(n % 4 == 0 for n in kept[16])
    assert all(n % 16 == 0 for whole in (144, 128, 96) for n in kept[whole])

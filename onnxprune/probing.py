"""Where time goes in a model as its widths change, measured.

A few narrowed copies of the whole model are timed kernel by kernel, so that fusions and layouts are those of the real thing.
A kernel's time is then a·MACs + b·elements + c, its coefficients fitted to what was measured (never negative).  Times are shares
of a run of the whole model.  Widths at which kernels are slower than the fit say what steps are: see `_stepped`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from onnx import ModelProto, NodeProto

from onnxprune.cost import Counter, element_terms, mac_terms, named
from onnxprune.errors import OnnxPruneError
from onnxprune.folding import attributes
from onnxprune.grouping import Group, Grouping
from onnxprune.rewriter import rewrite
from onnxprune.stopwatch import Kernels, Timer

Kept = Mapping[int, int]
Rate = tuple[float, float, float]  # time a multiply-accumulate, time an element, time
Found = tuple[Mapping[str, Rate], Mapping[int, int], float]  # of nodes (by their first output); steps of groups; time in no node
Progress = Callable[[str], None]
REGULAR, TRIALS = 8, 3  # narrowed copies that are timed at widths that are multiples of much, twice; and at each level
LEVELS = (1, 2, 4, 8, 16)  # a width of level 4 is a multiple of 4 and not of 8; such widths say whether steps are 8
WIDTHS = 3  # levels, at least, that a group holds which is tried at one
NARROWEST = 0.2  # share of a group that the narrowest copies keep
STEEP = 0.5  # share of what a width would cost more on a step from which on the step is believed


@dataclass(frozen=True)
class _Probes:
    """Narrowed copies: units kept in each, and of each kernel the MACs, elements and time in each, (copies, kernels)."""

    kept: tuple[Kept, ...]
    macs: np.ndarray
    elements: np.ndarray
    times: np.ndarray

    def of(self, *copies: int) -> _Probes:
        return _Probes(tuple(self.kept[i] for i in copies), self.macs[[*copies]], self.elements[[*copies]], self.times[[*copies]])


class _Bench:
    """Times narrowed copies of a model, all by the same kernels."""

    def __init__(self, grouping: Grouping, timer: Timer, progress: Progress | None) -> None:
        self.grouping = grouping
        self.groups = _narrowable(grouping)
        self._timer, self._progress = timer, progress
        self._amounts = (Counter(grouping, mac_terms(grouping.model)), Counter(grouping, element_terms(grouping.model)))
        self._times: list[tuple[Kept, Kernels]] = []

    def time(self, kept: Sequence[Kept]) -> None:
        def narrowed() -> Iterator[ModelProto]:
            for each in kept:
                if self._progress:
                    self._progress("timing kernels at other widths")
                yield rewrite(self.grouping, {g.id: np.arange(each[g.id], g.units) for g in self.groups if each[g.id] < g.units})

        self._times += zip(kept, self._timer.kernels(self.grouping.model.proto, narrowed()), strict=True)
        self.kernels = _fused(self.grouping, [times for _, times in self._times])
        self._kernel_of = {value: kernel for kernel, values in self.kernels.items() for value in values}

    @property
    def count(self) -> int:
        return len(self._times)

    def amounts(self, kept: Kept) -> np.ndarray:
        """MACs and elements of each kernel, (2, kernels)."""
        return np.array([self._summed(amount.by_value(kept)) for amount in self._amounts])

    def _summed(self, amounts: Mapping[str, float]) -> list[float]:
        found = dict.fromkeys(self.kernels, 0.0)
        for value, amount in amounts.items():
            found[self._kernel_of[value]] += amount
        return list(found.values())

    def probes(self, steps: Mapping[int, int] | None = None) -> _Probes:
        """All that was timed so far; MACs and elements are those at the ends of the steps."""
        units = {g.id: g.units for g in self.groups}
        amounts = np.array([self.amounts({**kept, **ends(units, kept, steps or {})}) for kept, _ in self._times])
        times = np.array([self._summed(times) for _, times in self._times])
        return _Probes(tuple(kept for kept, _ in self._times), amounts[:, 0], amounts[:, 1], times)


def measured(grouping: Grouping, timer: Timer, seed: int, progress: Progress | None) -> Found:
    """The rates of a model's nodes and the steps of its groups, from the coarsest level down: a kind whose step is found keeps to it.

    Raises OnnxPruneError (exit code 4) where the model cannot be timed.
    """
    bench, rng = _Bench(grouping, timer, progress), np.random.default_rng(seed)
    whole = {g.id: g.units for g in bench.groups}
    shares = [float(share) for share in np.linspace(NARROWEST, 1, REGULAR + 1)[:-1]]
    kept: list[Kept] = [whole, *({g: _regular(n, share) for g, n in whole.items()} for share in shares)]
    bench.time([*kept, *({g: _regular(n, float(rng.uniform(NARROWEST, 1))) for g, n in whole.items()} for _ in range(REGULAR))])
    kinds = {g.id: _kind(grouping, g) for g in bench.groups}
    found: dict[str, int] = {}
    for level in sorted(LEVELS, reverse=True):
        free = [g for g, kind in kinds.items() if kind not in found and whole[g] >= WIDTHS * level]
        if free:
            first = bench.count
            bench.time([_at_level(whole, free, level, rng) for _ in range(TRIALS)])
            stepped = _stepped(bench, kinds, level, first)
            found |= dict.fromkeys(stepped, 2 * level)
    steps = {g: found[kind] for g, kind in kinds.items() if kind in found}
    probes = bench.probes(steps)
    fits = _fitted(probes, _on_steps(bench, probes, steps))
    rest = 1 - float(_predicted(fits, bench.amounts(ends(whole, whole, steps))).sum())
    constants = sum(c for _, _, c in fits)
    less = max(0.0, 1 + rest / constants) if rest < 0 < constants else 1.0  # the profiler takes time too, a little at each kernel
    fits = [(a, b, c * less) for a, b, c in fits]
    rates = {v: (a, b, c * (v == values[0])) for values, (a, b, c) in zip(bench.kernels.values(), fits, strict=True) for v in values}
    return {v: rate for v, rate in rates.items() if v}, steps, rates[""][2] + max(0.0, rest)


def _narrowable(grouping: Grouping) -> list[Group]:
    """The width groups, without those whose removal the rewriter cannot carry through."""
    groups = [g for g in grouping.groups if g.branch is None]

    def narrows(some: Sequence[Group]) -> bool:
        try:
            return bool(rewrite(grouping, {g.id: np.arange(g.units // 2, g.units) for g in some}).graph.node)
        except OnnxPruneError:
            return False

    return groups if narrows(groups) else [g for g in groups if narrows([g])]


def _regular(units: int, share: float) -> int:
    """About that share of the units, a multiple of the largest power of two that leaves a choice."""
    most = 2 * max(LEVELS)
    while most > 1 and units < 2 * most:
        most //= 2
    return min(units, max(1, round(units * share / most)) * most)


def _at_level(whole: Kept, free: Collection[int], level: int, rng: np.random.Generator) -> dict[int, int]:
    """Every other of the free groups at an odd multiple of the level, the others regular."""
    found = {}
    for g, units in whole.items():
        share, odd = float(rng.uniform(NARROWEST, 1)), bool(rng.integers(2))
        width = (2 * max(0, round((units * share / level - 1) / 2)) + 1) * level
        found[g] = width if odd and g in free and width < units else _regular(units, share)
    return found


def _fused(grouping: Grouping, times: Sequence[Kernels]) -> dict[str, list[str]]:
    """{a value with a kernel of its own in every copy: the nodes (by a value each) that run in it}, "" for the rest.

    What is fused into the node that reads it has no entry in `times`, and belongs to that node's kernel.
    """
    model = grouping.model
    names = {o: named(node) for node in model.main for o in node.output if o}
    visible = {names[v]: v for v in set(times[0]).intersection(*times[1:]) if v in names}
    readers: dict[str, str] = {}
    for node in model.main:
        for name in node.input:
            readers.setdefault(name, named(node))
    kernel: dict[str, str] = {}
    for node in reversed(model.main):
        after = next((readers[o] for o in node.output if o in readers), "")
        kernel[named(node)] = visible.get(named(node), kernel.get(after, ""))
    for value in set().union(*times) - {""}:  # timed in some copies only
        kernel.setdefault(value, kernel.get(names.get(value, ""), ""))
    found: dict[str, list[str]] = {"": [""]}
    for value, place in kernel.items():
        found.setdefault(place, []).append(value)
    return found


# fitting


def _fitted(probes: _Probes, use: np.ndarray) -> list[Rate]:
    """For each kernel a, b, c ≥ 0 such that a·MACs + b·elements + c is nearest to its times, relative to them; use: (copies, kernels)."""
    found: list[Rate] = []
    for i in range(probes.times.shape[1]):
        rows = use[:, i] & (probes.times[:, i] > 0)
        times = probes.times[rows, i]
        columns = np.stack([probes.macs[rows, i], probes.elements[rows, i], np.ones(len(times))], axis=1)
        a, b, c = nonnegative(columns / times[:, None], np.ones(len(times))) if len(times) else np.zeros(3)
        found.append((float(a), float(b), float(c)))
    return found


def nonnegative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients, by trying every subset of a few columns."""
    count = columns.shape[1]
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    best, least = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for chosen in map(list, combinations(range(count), size)):
            solved = np.linalg.lstsq(columns[:, chosen] / scale[chosen], target, rcond=None)[0]
            if (solved < 0).any():
                continue
            error = float(((columns[:, chosen] / scale[chosen] @ solved - target) ** 2).sum())
            if error < least * (1 - 1e-9):
                best, least = np.zeros(count), error
                best[chosen] = solved / scale[chosen]
    return best


def _on_steps(bench: _Bench, probes: _Probes, steps: Mapping[int, int]) -> np.ndarray:
    """Which kernels of which copies have widths at the ends of steps alone, (copies, kernels)."""
    whole = bench.amounts({})
    touched = {g.id: (bench.amounts({g.id: g.units // 2}) != whole).any(axis=0) for g in bench.groups if g.id in steps}
    regular = np.ones(probes.times.shape, bool)
    for i, kept in enumerate(probes.kept):
        for g in bench.groups:
            if g.id in steps and kept[g.id] % steps[g.id] and kept[g.id] != g.units:
                regular[i] &= ~touched[g.id]
    regular[0] = True  # the model as it is
    return regular


def _stepped(bench: _Bench, kinds: Mapping[int, str], level: int, first: int) -> list[str]:
    """Kinds of groups at whose odd multiples of `level` time is lost, as the copies from `first` on show.

    Were a kind's steps twice the level, then such a width would cost as much as the next even multiple.  Least squares over all
    kernels and copies tells which share of that is seen; it counts where it is more than STEEP, and more than noise.
    """
    probes = bench.probes()
    before, after = probes.of(*range(first)), probes.of(*range(first, len(probes.kept)))
    fits = _fitted(before, np.ones(before.times.shape, bool))
    columns = {kind: i for i, kind in enumerate(sorted(set(kinds.values())))}
    rows, targets = [], []
    for i, kept in enumerate(after.kept):
        plain = _predicted(fits, np.stack([after.macs[i], after.elements[i]]))
        row = np.zeros((len(plain), len(columns)))
        for g in bench.groups:
            if kept[g.id] & -kept[g.id] == level and kept[g.id] < g.units:
                wider = bench.amounts({**kept, g.id: min(g.units, kept[g.id] + level)})
                row[:, columns[kinds[g.id]]] += _predicted(fits, wider) - plain
        seen = plain > 0
        weight = 1 / np.sqrt(plain[seen])  # noise grows with a kernel's time, not as fast as it
        rows.append(row[seen] * weight[:, None])
        targets.append((after.times[i] - plain)[seen] * weight)
    matrix, target = np.concatenate(rows), np.concatenate(targets)
    inverse = np.linalg.pinv(matrix.T @ matrix)
    share = inverse @ matrix.T @ target
    noise = float(((matrix @ share - target) ** 2).sum()) / max(1, len(target) - len(columns))
    doubt = np.sqrt(np.maximum(noise * np.diag(inverse), 0))
    return [kind for kind, i in columns.items() if share[i] > STEEP and share[i] > 2 * doubt[i]]


def _predicted(fits: Sequence[Rate], amounts: np.ndarray) -> np.ndarray:
    """The time of each kernel at its MACs and elements, (2, kernels)."""
    rates = np.array(fits)
    return np.asarray(rates[:, 0] * amounts[0] + rates[:, 1] * amounts[1] + rates[:, 2])


def _kind(grouping: Grouping, group: Group) -> str:
    """Groups of one kind are narrowed by the same kernels: the layers that hold their units, and how many places a unit has there.

    Groups too narrow to be tried at the coarser levels are a kind of their own, as there steps may be others.
    """
    model, tensors = grouping.model, {m.tensor for m in group.members}
    stored = {n.output[0]: n.input[0] for n in model.main if n.op_type == "DequantizeLinear"}

    def weight(node: NodeProto) -> str:
        name = stored.get(node.input[1], node.input[1])
        return model.copies.get(name, name)

    layers = {
        f"{node.op_type}{'/' if attributes(node).get('group', 1) not in (1, None) else ''}"
        for node in model.main
        if len(node.input) > 1 and node.op_type != "DequantizeLinear" and weight(node) in tensors
    }
    level = max((n for n in LEVELS if group.units >= WIDTHS * n), default=0)
    return f"{group.kind} {min(m.indices.shape[1] for m in group.members)} {' '.join(sorted(layers))} {level}"


def ends(units: Kept, kept: Kept, steps: Mapping[int, int]) -> dict[int, int]:
    """Where the steps end that groups with steps are in; a group as wide as the file has it may end within one."""
    return {g: -(-kept.get(g, units[g]) // step) * step for g, step in steps.items()}

"""The charts of a report: their numbers, in plain data, and the same numbers as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune.markup import Cell, Html, Section, chart, code, element, join, table

BINS = 30
WIDE = 50.0  # times that the largest score is the smallest, from which on scores are drawn logarithmically
COSTS = (("macs", "MACs, millions", 1e-6), ("parameters", "parameters, millions", 1e-6), ("latency_s", "latency, ms", 1e3))
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Sensitivity:
    """points: {a group's label: ((share of its units removed, change), …), rising shares}; measure: what the change is.

    qualities: the same for a quality that was measured too, such as accuracy; quality: what it is.
    """

    points: Mapping[str, Sequence[tuple[float, float]]]
    measure: str = "change of the outputs"
    qualities: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    quality: str = "accuracy"


@dataclass(frozen=True)
class SweepPoint:
    """One pruned model.  label: what it has in common with others (a criterion); value: its quality, more is better.

    ratio: what was asked, None of the original; macs, parameters, latency_s: what it costs, None where that was not measured;
    pareto: whether no other is better and cheaper, or of which costs (names of these fields) that holds.
    """

    label: str
    value: float
    ratio: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency_s: float | None = None
    pareto: bool | Sequence[str] = False


@dataclass(frozen=True)
class Sweep:
    """Models beside each other; measure: what their value is."""

    points: Sequence[SweepPoint]
    measure: str = "accuracy"


def scores_section(
    scores: Mapping[int, np.ndarray],
    removed: Mapping[int, np.ndarray],
    labels: Mapping[int, str],
    criterion: str,
    charts: dict[str, Any],
) -> Section:
    """How the scores of each group's units are distributed.

    scores: {group id: (units,)}; removed: {group id: units that go}; labels: {group id: its name}; `charts` gets what is drawn.
    """
    found = [_distribution(g, labels[g], np.asarray(values, np.float64), removed.get(g)) for g, values in scores.items()]
    charts["scores"] = found
    rows: list[list[object]] = []
    for one in found:
        figures = [*one["quantiles"], one["cut"]]
        cells = ["–" if v is None else Cell(f"{v:.3g}", v) for v in figures]
        rows.append([join([f"{one['id']} ", code(one["label"])]), _number(one["units"]), _number(one["gone"]), *cells])
    columns = ("Group", "Units", "Removed", *(f"{q:.0%}" for q in QUANTILES), "Highest removed")
    numbers = table("Scores of each group, by quantile", columns, rows, id="scores-table", kinds=" nnnnnnnn")
    choices = [element("option", f"{one['id']}: {one['label']}", value=one["id"]) for one in found]
    pick = element("div", element("label", "Group ", element("select", *choices, data_for="histogram")), class_="controls")
    colours = (("stays", "--kept"), ("removed", "--gone"))
    key = element("ul", *(element("li", element("i", style=f"background:var({c})"), name) for name, c in colours), class_="key")
    body = [
        element("p", f"Criterion {criterion}: units with low scores go first.", class_="note"),
        element("h3", "All groups"),
        chart(
            "spread",
            "Scores of each group: the range from 5 % to 95 % of its units, the middle half, the median, and the highest score removed",
            "Thin: 5 % to 95 % of a group's units; thick: the middle half, with a gap at the median; diamond: the highest score that was "
            "removed. Scores of 0 or less are drawn at the left edge.",
            numbers,
        ),
        element("h3", "One group"),
        chart(
            "histogram",
            "How many units of the chosen group have which score, those that stay and those that are removed",
            "How many units have which score.",
            table("Scores of the chosen group", ("Score from", "to", "Stay", "Removed"), [], id="histogram-table", kinds="nnnn"),
            join([pick, key]),
        ),
    ]
    return Section("scores", "Scores", join(body))


def _number(value: float) -> Cell:
    return Cell(f"{value:g}", value)


def _distribution(group: int, label: str, values: np.ndarray, removed: np.ndarray | None) -> dict[str, Any]:
    """One group's quantiles and histogram; scores that are not finite are left out."""
    gone = np.zeros(len(values), bool)
    gone[np.asarray(() if removed is None else removed, np.int64)] = True
    real = np.isfinite(values)
    seen, least, most = values[real], float(values[real].min(initial=math.inf)), float(values[real].max(initial=-math.inf))
    log = least > 0 and most > WIDE * least
    if least < most:
        edges = np.geomspace(least, most, BINS + 1) if log else np.linspace(least, most, BINS + 1)
        edges[0], edges[-1] = least, most
    else:
        middle = least if len(seen) else 0.0
        edges = np.array([middle - abs(middle) / 2 - 1e-9, middle + abs(middle) / 2 + 1e-9])
    return {
        "id": group,
        "label": label,
        "units": len(values),
        "gone": int(gone.sum()),
        "quantiles": [float(q) for q in np.quantile(seen, QUANTILES)] if len(seen) else [None] * len(QUANTILES),
        "cut": float(values[gone & real].max()) if (gone & real).any() else None,
        "log": log,
        "edges": [float(edge) for edge in edges],
        "kept": np.histogram(values[real & ~gone], edges)[0].tolist(),
        "removed": np.histogram(values[real & gone], edges)[0].tolist(),
    }


def sensitivity_section(found: Sensitivity, charts: dict[str, Any]) -> Section:
    """What each group alone costs the outputs, over the share of its units that goes; `charts` gets what is drawn."""
    charts["sensitivity"] = {"measure": found.measure, "series": _series(found.points)}
    numbers = [_by_ratio(found.points, found.measure, "sensitivity-table", "{:.3g}")]
    choices = [element("option", label, value=label) for label in found.points]
    controls = [element("label", "Show ", element("select", element("option", "all", value=""), *choices, data_for="sensitivity"))]
    measures = found.measure
    if found.qualities:
        charts["sensitivity"]["quality"] = {"measure": found.quality, "series": _series(found.qualities)}
        numbers.append(_by_ratio(found.qualities, found.quality, "sensitivity-quality-table", "{:.4g}"))
        both = [element("option", name, value=value) for name, value in ((found.measure, ""), (found.quality, "quality"))]
        controls.append(element("label", "Of ", element("select", *both, data_for="sensitivity-measure")))
        measures += f" or {found.quality}"
    controls.append(element("label", element("input", type="checkbox", data_log="sensitivity"), "logarithmic"))
    shown = chart(
        "sensitivity",
        f"{measures}, for each group alone, over the share of its units that is removed: a line a group",
        "A line a group, which alone loses units; steep lines are sensitive groups.",
        join(numbers),
        element("div", *controls, class_="controls"),
    )
    return Section("sensitivity", "Sensitivity", shown)


def _series(points: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
    return [{"label": label, "points": [list(map(float, point)) for point in line]} for label, line in points.items()]


def _by_ratio(points: Mapping[str, Sequence[tuple[float, float]]], measure: str, id: str, form: str) -> Html:
    """A row a group, a column a share of its units."""
    ratios = sorted({round(float(ratio), 2) for line in points.values() for ratio, _ in line if ratio > 0})
    rows: list[list[object]] = []
    for label, line in points.items():
        values = {round(float(ratio), 2): float(value) for ratio, value in line}
        rows.append([code(label), *(Cell(form.format(values[r]), values[r]) if r in values else "–" for r in ratios)])
    columns = ("Group", *(f"{ratio:.0%}" for ratio in ratios))
    return table(f"{measure}, by share of a group's units removed", columns, rows, id=id, kinds=" " + "n" * len(ratios))


def sweep_section(sweep: Sweep, charts: dict[str, Any]) -> Section:
    """Whole models beside each other, quality over cost; `charts` gets what is drawn."""
    costs = [cost for cost in COSTS if any(getattr(point, cost[0]) is not None for point in sweep.points)]
    charts["sweep"] = {
        "measure": sweep.measure,
        "axes": [dict(zip(("key", "title", "scale"), cost, strict=True)) for cost in costs],
        "points": [{**vars(p), "pareto": _pareto(p, costs)} for p in sweep.points],
    }
    rows: list[list[object]] = []
    for point in sweep.points:
        values = [(getattr(point, key), scale) for key, _, scale in costs]
        cells = ["–" if v is None else Cell(f"{v * scale:.4g}", v) for v, scale in values]
        ratio = "–" if point.ratio is None else Cell(f"{point.ratio:.1%}", point.ratio)
        rows.append([point.label, ratio, Cell(f"{point.value:.4g}", point.value), *cells, _named(point, costs)])
    columns = ("Models", "Ratio", sweep.measure, *(title for _, title, _ in costs), "Pareto")
    numbers = table(f"{sweep.measure} and cost of each model", columns, rows, id="sweep-table", kinds=" nn" + "n" * len(costs))
    choices = [element("option", title, value=key) for key, title, _ in costs]
    shown = chart(
        "sweep",
        f"{sweep.measure} of each model over what it costs, Pareto points ringed",
        "A dot a model; ringed and joined: no other is both better and cheaper.",
        numbers,
        element("div", element("label", "Over ", element("select", *choices, data_for="sweep")), class_="controls"),
    )
    return Section("sweep", "Sweep", shown)


def _pareto(point: SweepPoint, costs: Sequence[tuple[str, str, float]]) -> list[str]:
    """The costs of which it is a Pareto point."""
    return [key for key, _, _ in costs if (point.pareto if isinstance(point.pareto, bool) else key in point.pareto)]


def _named(point: SweepPoint, costs: Sequence[tuple[str, str, float]]) -> str:
    best = _pareto(point, costs)
    return "yes" if best and len(best) == len(costs) else ", ".join(title.partition(",")[0] for key, title, _ in costs if key in best)

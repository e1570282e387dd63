"""Plots of sensitivities and sweeps, as SVG, PNG or PDF by matplotlib (the extra `bench`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from onnxprune.errors import OnnxPruneError
from onnxprune.writing import check_target, write_bytes

ENDINGS = (".svg", ".png", ".pdf")
NAMED = 12  # groups that the legend names
COSTS = {"macs": "MACs", "parameters": "parameters", "latency": "latency"}
MARKS = "osD^vPX*"


def check_plot(path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Path:
    """Raises OnnxPruneError where such a plot cannot be made or written here, before any work is done for it."""
    target = check_target(path, source)
    if target.suffix.lower() not in ENDINGS:
        raise OnnxPruneError(f"{target}: a plot's name ends in {', '.join(ENDINGS)}; give one of them")
    _figure(target, 1, 1)
    return target


def _figure(target: Path, columns: int, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OnnxPruneError(f"{target}: plots need matplotlib: pip install 'onnxprune[bench]'") from error
    return Figure(figsize=(5.2 * columns + 1.6, height), layout="constrained")


def _save(figure: Any, target: Path) -> None:
    stream = BytesIO()
    figure.savefig(stream, format=target.suffix.lower()[1:], dpi=150)
    write_bytes(stream.getvalue(), target)


def plot_sensitivity(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """`Sensitivity.to_json()`: a line for each group over the share of its units that go; the most sensitive ones are named."""
    target = check_plot(path)
    points = [p for p in content["points"] if p["change"] is not None]
    ids = sorted({p["group"] for p in points})
    worst = sorted(ids, key=lambda g: -max(p["change"] for p in points if p["group"] == g))[:NAMED]
    judged = content["measure"] is not None
    figure = _figure(target, 2 if judged else 1, 4.4)
    axes = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    from matplotlib import colormaps

    for place, group in enumerate(ids):
        own = [p for p in points if p["group"] == group]
        name = f"{group}: {own[0].get('name') or own[0]['tensor']}" if group in worst else None
        color = colormaps["viridis"](place / max(1, len(ids) - 1))
        style = {"color": color, "marker": MARKS[place % len(MARKS)], "markersize": 4, "linewidth": 1.2}
        axes[0].plot([p["ratio"] for p in own], [p["change"] for p in own], label=name, **style)
        if judged:
            seen = [p for p in own if p["quality"] is not None]
            axes[1].plot([p["ratio"] for p in seen], [p["quality"] for p in seen], **style)
    if any(p["change"] > 0 for p in points):
        axes[0].set_yscale("log")
    axes[0].set_ylabel("squared change of the outputs by their variance")
    if judged:
        axes[1].axhline(content["before"], color="black", linestyle=":", linewidth=1, label="original")
        axes[1].set_ylabel(content["measure"])
        axes[1].legend(fontsize=7)
    for one in axes:
        one.set_xlabel("share of the group's units removed")
        one.grid(alpha=0.3)
    figure.suptitle(f"{content['model']}: one group alone" + (f" (the {NAMED} most sensitive named)" if len(ids) > NAMED else ""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, title="group")
    _save(figure, target)


def plot_sweep(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """`Sweep.to_json()`: quality over MACs, parameters and latency, a line for each criterion and allocation; Pareto points are ringed."""
    target = check_plot(path)
    original = content["original"]
    points = [p for p in content["points"] if p.get("error") is None]
    costs = [cost for cost in COSTS if any(p.get(cost) is not None for p in points)]
    figure = _figure(target, max(1, len(costs)), 4.2)
    axes: Sequence[Any] = figure.subplots(1, max(1, len(costs)), squeeze=False)[0]
    lines = sorted({(p["criterion"], p["allocation"]) for p in points})
    for view, cost in zip(axes, costs, strict=False):
        for place, line in enumerate(lines):
            own = sorted(
                (p for p in points if (p["criterion"], p["allocation"]) == line and p.get(cost) is not None), key=lambda p: p[cost]
            )
            x, y = [p[cost] / (p[f"{cost}_before"] or 1) for p in own], [p["quality"] for p in own]
            view.plot(x, y, marker=MARKS[place % len(MARKS)], markersize=4, linewidth=1.2, label=", ".join(line))
        best = [p for p in points if cost in p["pareto"]]
        x, y = [p[cost] / (p[f"{cost}_before"] or 1) for p in best], [p["quality"] for p in best]
        view.plot(x, y, "o", markersize=10, markerfacecolor="none", markeredgecolor="black", label="Pareto")
        view.plot([1], [original["quality"]], "k*", markersize=10, label="original")
        view.set_xlabel(f"{COSTS[cost]}, share of the original's")
        view.set_ylabel(content["measure"])
        view.grid(alpha=0.3)
    figure.suptitle(content["model"])
    if costs:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    _save(figure, target)

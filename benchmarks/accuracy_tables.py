"""Rows of accuracy.py chosen, averaged and set in tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
NAMES = ("criterion", "allocation", "compensation", "calibration")
COMPENSATIONS = ("none", "mean", "moments", "update", "reconstruct", "refine", "distill")


def mean(rows: Iterable[Row], metric: str) -> float | None:
    values = [row[metric] for row in rows if metric in row]
    return statistics.fmean(values) if values else None


def cell(rows: Sequence[Row], metric: str) -> str:
    """The mean over the seeds; with what is gone where that is not what was asked for; nothing where nothing was run."""
    value = mean(rows, metric)
    if value is None:
        return "fails" if rows else ""
    gone, asked = mean(rows, "macs") or 0.0, rows[0]["ratio"]
    text = f"{value:.3f}" if metric == "cosine" else f"{100 * value:.1f}"
    return text if abs(gone - asked) <= 0.0105 else f"{text} ({gone:.0%} gone)"


def table(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    rules = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rules, *body])


def grouped(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in fields)].append(row)
    return found


def options(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """onnxprune's rows with these names."""
    return [row for row in rows if row["options"] and all(row["options"][name] == value for name, value in wanted.items())]

"""Every criterion by every allocation by every compensation: a page of all, and what wins on average, from the rows of accuracy.py."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from accuracy_data import SUBJECTS
from accuracy_tables import COMPENSATIONS, NAMES, Row, cell, grouped, options, table

PAGE = """# All pairs of criteria and allocations

What is left with each compensation: top-1 accuracy of the ResNets, for MiniLM the mean cosine of the sentence embeddings to the original's.
Made by `benchmarks/accuracy.py`; which win, and the peers, in [Accuracy](accuracy.md)."""
SUMMARY = """Each criterion with each allocation and each compensation, fitted to few samples or none, so that all of them could be run:
[all pairs](accuracy-pairs.md). Under the best and the worst come the means over all criteria and over all allocations, the best of each
column **bold**; blank where some pairs were not run."""


def few(row: Row) -> bool:
    """Of onnxprune, with a part of the samples or none."""
    return bool(row["options"]) and (":" in row["options"]["calibration"] or row["options"]["calibration"] == "none")


def cases(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of each model, ratio and number of samples with which several pairs were run."""
    for (model, ratio), some in grouped(options(rows), "model", "ratio").items():
        for calibration in dict.fromkeys(row["options"]["calibration"] for row in some):
            found = options(some, calibration=calibration)
            if len({(row["options"]["criterion"], row["options"]["allocation"]) for row in found}) > 2:
                count = calibration.partition(":")[2] or {"none": "no", "noise": "made-up"}.get(calibration, "all")
                measured = {row["evaluated"] for row in found if "evaluated" in row}
                on = f", measured on {max(measured)} others" if measured else ""
                yield f"{model}, {ratio:.0%} of the MACs gone, {count} samples{on}", found


def page(rows: list[Row]) -> str:
    """A table of each case and each compensation, criteria by allocations."""
    return "\n\n".join([PAGE, *(f"## {title}\n\n{crossed(found)}" for title, found in cases(rows))]) + "\n"


def crossed(rows: list[Row]) -> str:
    parts = []
    for compensation in present(rows, "compensation"):
        found = options(rows, compensation=compensation)
        criteria, allocations = present(found, "criterion"), present(found, "allocation")
        if len(criteria) * len(allocations) < 3:
            continue
        body = [[f"`{c}`", *(shown(options(found, criterion=c, allocation=a)) for a in allocations)] for c in criteria]
        parts.append(f"Compensation `{compensation}`:\n\n{table(['', *(f'`{a}`' for a in allocations)], body)}")
    return "\n\n".join(parts)


def summary(rows: list[Row], default: dict[str, str]) -> str:
    """What wins in each case that was run with few samples: pair by pair, then on average."""
    parts = [SUMMARY]
    for title, found in cases([row for row in rows if few(row)]):
        parts += [f"### {title}", extremes(found, default), averages(found, "allocation"), averages(found, "criterion")]
    return "\n\n".join(parts)


def extremes(rows: list[Row], default: dict[str, str]) -> str:
    """The best, the default's, the median and the worst pair with each compensation."""
    body, metric = [], metric_of(rows)
    for compensation in present(rows, "compensation"):
        found = [row for row in options(rows, compensation=compensation) if metric in row]
        ranked = sorted(found, key=lambda row: -row[metric])
        own = options(found, criterion=default["criterion"], allocation=default["allocation"])
        middle = figure(statistics.median(row[metric] for row in found), metric)
        first, last = (f"{shown([row])} ({pair(row['options'])})" for row in (ranked[0], ranked[-1]))
        body.append([f"`{compensation}`", f"{len(found)}", first, shown(own), middle, last])
    return table(["compensation", "pairs", "best", pair(default), "median", "worst"], body)


def averages(rows: list[Row], name: str) -> str:
    """The mean over all others of each of a kind (criterion or allocation), a column a compensation; nothing where a pair is missing."""
    metric, other = metric_of(rows), next(n for n in NAMES[:2] if n != name)
    compensations, kinds, others = (present(rows, n) for n in ("compensation", name, other))
    found = {tuple(row["options"][n] for n in (name, other, "compensation")): row[metric] for row in rows if metric in row}
    means = {
        (kind, c): statistics.fmean(found[kind, o, c] for o in others) if all((kind, o, c) in found for o in others) else None
        for kind, c in itertools.product(kinds, compensations)
    }
    texts = {pair: "" if value is None else figure(value, metric) for pair, value in means.items()}
    known = {c: [m for k in kinds if (m := means[k, c]) is not None] for c in compensations}
    best = {c: figure(max(some), metric) if len(some) > 1 else "" for c, some in known.items()}

    def entry(kind: str, compensation: str) -> str:
        text = texts[kind, compensation]
        return f"**{text}**" if text and text == best[compensation] else text

    return table([name, *(f"`{c}`" for c in compensations)], [[f"`{kind}`", *(entry(kind, c) for c in compensations)] for kind in kinds])


def present(rows: list[Row], name: str) -> list[str]:
    """The names of a kind that were run, compensations from the least to the most."""
    known = COMPENSATIONS if name == "compensation" else ()
    found = list(dict.fromkeys(row["options"][name] for row in rows))
    return [each for each in known if each in found] + sorted(each for each in found if each not in known)


def pair(names: dict[str, str]) -> str:
    return f"`{names['criterion']}`, `{names['allocation']}`"


def metric_of(rows: Sequence[Row]) -> str:
    return SUBJECTS[rows[0]["model"]].measure


def shown(rows: Sequence[Row]) -> str:
    return cell(rows, metric_of(rows)) if rows else ""


def figure(value: float, metric: str) -> str:
    return cell([{metric: value, "macs": 0.0, "ratio": 0.0}], metric)

"""The tables and the plot of accuracy.py, from its rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accuracy_data import SUBJECTS
from accuracy_pairs import few, summary
from accuracy_tables import NAMES, Row, cell, grouped, mean, options, table

INTRODUCTION = """Top-1 accuracy on 5000 images, with 1024 unlabelled samples or none. `distill` fits all layers by gradient, `refine`
pairs of them, everything else is in closed form; no labels, no training code. Made by
`benchmarks/accuracy.py`; [benchmarks/README.md](../benchmarks/README.md) says how."""
OUTPUTS = """Without and with the default's compensation; of several outputs the worst. YuNet's worst says whether there is a face; in these
pictures is none, and it is close to zero everywhere."""
CIFAR = [name for name, subject in SUBJECTS.items() if subject.kind == "cifar"]
OTHERS = [name for name, subject in SUBJECTS.items() if subject.kind == "other"]


def matrix(rows: list[Row], models: Sequence[str]) -> str:
    """Every method on every model and ratio, the best mean first, what fails somewhere last."""
    cells = grouped(rows, "method", "model", "ratio")
    columns = [(m, r) for m in models for r in sorted({row["ratio"] for row in rows}) if any(k[1:] == (m, r) for k in cells)]

    def place(method: str) -> tuple[int, float]:
        values = [mean(cells.get((method, *column), []), SUBJECTS[column[0]].measure) for column in columns]
        known = [v for v in values if v is not None]
        return len(values) - len(known), -statistics.fmean(known) if known else 0.0

    methods = sorted(sorted({row["method"] for row in rows}), key=place)
    head = ["method", *(f"{m.partition('-')[0]}, {r:.0%}" for m, r in columns), "s", "MiB"]
    last = [{"ratio": columns[-1][1], "model": columns[-1][0]}] if columns else []
    body = []
    for method in methods:
        final = cells.get((method, last[0]["model"], last[0]["ratio"]), []) if last else []
        cost = [f"{value:.1f}" if (value := mean(final, "seconds")) is not None and value == value else ""]
        cost.append(f"{value:.0f}" if (value := mean(final, "mib")) is not None else "")
        body.append([method, *(cell(cells.get((method, *c), []), SUBJECTS[c[0]].measure) for c in columns), *cost])
    return table(head, body)


def failures(rows: list[Row]) -> str:
    reasons: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if "failed" in row:
            reasons[row["failed"]].add(row["method"])
    return "\n".join(f"- {', '.join(sorted(methods))}: {reason}" for reason, methods in sorted(reasons.items()))


def best(rows: Iterable[Row], metric: str) -> tuple[float, str] | None:
    """Of the methods with a result, the best by its mean over the seeds."""
    found = [(value, str(method)) for (method,), some in grouped(rows, "method").items() if (value := mean(some, metric)) is not None]
    return max(found, default=None)


def glance(rows: list[Row], default: dict[str, str], free: dict[str, str]) -> str:
    """What is to be reached and what is reached, for the models with labels."""
    body = []
    for (model, ratio), some in sorted(grouped([r for r in rows if r["model"] in CIFAR], "model", "ratio").items()):
        target, without = (dict(pairs).get(ratio) for pairs in (SUBJECTS[model].target, SUBJECTS[model].free))
        before = mean(some, "before")
        peers = [row for row in some if not row["options"]]
        line = [model, f"{ratio:.0%}", percent(before), percent(target)]
        for chosen in (FAMILIES["Torch-Pruning"], FAMILIES["Torch-Pruning, norms recalibrated"], FAMILIES["onnxsim"]):
            found = best(filter(chosen, peers), "accuracy")
            line.append(f"{percent(found[0])} ({found[1].split(' + ')[0].partition(' ')[2]})" if found else "")
        reached = [cell(options(some, **wanted), "accuracy") for wanted in (default, free)]
        body.append([*line, reached[0], percent(without), reached[1]])
    head = [
        "model",
        "MACs gone",
        "unpruned",
        "to reach",
        "Torch-Pruning, its best",
        "the same, norms recalibrated, its best",
        "onnxsim, its best",
    ]
    return table([*head, "onnxprune", "to reach without samples", "onnxprune without samples"], body)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def ablation(rows: list[Row], default: dict[str, str]) -> str:
    """What each compensation adds to the default's criterion and allocation."""
    chosen = options([r for r in rows if r["model"] in CIFAR], **{k: default[k] for k in ("criterion", "allocation")})
    return matrix(chosen, CIFAR)


def featured(rows: list[Row], default: dict[str, str]) -> list[Row]:
    """The peers, and of onnxprune what has the default's criterion and allocation."""
    return [r for r in rows if not r["options"] or all(r["options"][name] == default[name] for name in NAMES[:2])]


def fidelity(rows: list[Row], default: dict[str, str]) -> str:
    """The models without labels, without and with the default's compensation."""
    body = []
    for (model, ratio), some in grouped([r for r in rows if r["model"] in OTHERS and r["options"]], "model", "ratio").items():
        line = [model, f"{ratio:.0%}"]
        plain, full = (options(some, **(default | {"compensation": name})) for name in ("none", default["compensation"]))
        if reason := next((row["failed"] for row in plain + full if "failed" in row), ""):
            body.append([*line, reason, "", "", "", ""])
            continue
        line.append(f"{gone:.0%}" if (gone := mean(full, "macs")) is not None else "")
        for metric, shown in (("cosine", "{:.4f}"), ("sqnr", "{:.1f}"), ("agreement", "{:.3f}"), ("accuracy", "{:.3f}")):
            pair = [mean(part, metric) for part in (plain, full)]
            line.append(" → ".join(shown.format(value) for value in pair if value is not None))
        body.append(line)
    return table(["model", "asked", "MACs gone", "cosine", "SQNR, dB", "same top-1", "accuracy"], body)


def steps(rows: list[Row], default: dict[str, str]) -> str:
    """Seconds and peak MiB of each step of the default, where it prunes most."""
    body = []
    for (model,), some in grouped([r for r in options(rows, **default) if "steps" in r], "model").items():
        row = max(some, key=lambda r: (r["ratio"], -r["seed"]))
        body += [
            [model if i == 0 else "", name, f"{s:.1f}", f"{size}"] for i, (name, s, size) in enumerate(row["steps"]) if s >= 0.5 or i == 0
        ]
    return table(["model", "step", "s", "MiB"], body, left=2)


def markdown(rows: list[Row], names: Sequence[str], without: Sequence[str]) -> str:
    """The whole page; names and without: the settings that stand for onnxprune with and without samples."""
    default, free = (dict(zip(NAMES, values, strict=True)) for values in (names, without))
    partial, rows = ([row for row in rows if few(row) is wanted] for wanted in (True, False))
    cifar, minilm = ([row for row in rows if row["model"] in models] for models in (CIFAR, ["minilm"]))
    others = [row for row in rows if row["model"] in OTHERS]
    parts = [f"# Accuracy without labels\n\n{INTRODUCTION}"]
    if cifar:
        chosen, other = (", ".join(f"{name} `{value}`" for name, value in setting.items()) for setting in (default, free))
        parts.append(f"## At a glance\n\n{glance(cifar, default, free)}\n\nonnxprune: {chosen}; without samples: {other}.")
        every = matrix(featured(cifar, default), CIFAR)
        parts.append(f"## All of them\n\n{every}\n\n![accuracy over the MACs that are gone](accuracy.svg)")
    if any("failed" in row for row in cifar):
        parts.append(f"What fails:\n\n{failures(cifar)}")
    if any(row["options"] for row in cifar):
        parts.append(f"## What each compensation adds\n\n{ablation(cifar, default)}")
    if partial:
        parts.append(f"## Which criterion and allocation\n\n{summary(partial, default)}")
    if minilm:
        parts.append(f"## all-MiniLM-L6-v2\n\nMean cosine of the sentence embeddings to the original's.\n\n{matrix(minilm, ['minilm'])}")
    if any("failed" in row for row in minilm):
        parts.append(f"What fails:\n\n{failures(minilm)}")
    if others:
        parts.append(f"## The other models\n\n{OUTPUTS}\n\n{fidelity(others, default)}")
    if any("steps" in row for row in options(rows, **default)):
        parts.append(f"## Time and memory of each step\n\n{steps(rows, default)}")
    return "\n\n".join(parts) + "\n"


def _tool(name: str, recalibrated: bool) -> Callable[[Row], bool]:
    return lambda row: not row["options"] and row["method"].startswith(name) and (" + " in row["method"]) == recalibrated


FAMILIES: dict[str, Callable[[Row], bool]] = {  # of the peers the best result is drawn
    "Torch-Pruning": _tool("Torch-Pruning", False),
    "Torch-Pruning, norms recalibrated": _tool("Torch-Pruning", True),
    "onnxsim": lambda row: not row["options"] and row["method"].startswith("onnxsim"),
}


def draw(rows: list[Row], names: Sequence[str], without: Sequence[str], path: Path) -> None:
    """Accuracy over the MACs that are gone: the peers' best, the default, the default without its parts, what is to be reached."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "onnxprune", "font.size": 9, "savefig.facecolor": "white"}
    default, free = (dict(zip(NAMES, values, strict=True)) for values in (names, without))
    rows = [row for row in rows if not few(row)]
    models = [m for m in CIFAR if any(row["model"] == m for row in rows)]
    figure, panels = plt.subplots(1, max(len(models), 1), figsize=(8.4, 3.6), layout="constrained", sharey=True, squeeze=False)
    for panel, model in zip(panels[0], models, strict=False):
        own = [row for row in rows if row["model"] == model]
        start = (0.0, 100 * (mean(own, "before") or 0.0))
        settings = {
            "onnxprune": default,
            "onnxprune without samples": free,
            "onnxprune, no compensation": default | {"compensation": "none"},
        }
        for place, (title, setting) in enumerate(settings.items()):
            line(panel, start, options(own, **setting), label=title, color=f"C{place}")
        for place, (title, chosen) in enumerate(FAMILIES.items(), len(settings)):
            line(panel, start, list(filter(chosen, own)), label=f"{title}, its best", color=f"C{place}", linestyle="--")
        ratios, targets = zip(*SUBJECTS[model].target, strict=True)
        marks = {"marker": "_", "markersize": 14, "color": "black", "linestyle": ""}
        panel.plot([100 * r for r in ratios], [100 * t for t in targets], label="to reach", **marks)
        panel.set(title=model, xlabel="% of the MACs gone", ylabel="top-1, %" if panel is panels[0][0] else "")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def line(panel: Any, start: tuple[float, float], rows: Iterable[Row], **style: Any) -> None:
    """From the unpruned model over the best result at each ratio."""
    found = {ratio: best(some, "accuracy") for (ratio,), some in sorted(grouped(rows, "ratio").items())}
    points = [start, *((100 * ratio, 100 * one[0]) for ratio, one in found.items() if one)]
    if len(points) > 1:
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)

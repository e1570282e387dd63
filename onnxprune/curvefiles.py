"""What `sensitivity` and `sweep` keep in their JSON files, as the curves of a report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.charts import Sensitivity, Sweep, SweepPoint
from onnxprune.errors import OnnxPruneError
from onnxprune.keeping import key_of

COSTS = {"macs": "macs", "parameters": "parameters", "latency": "latency_s"}
REMEDY = "give the state file of `onnxprune sensitivity`, or the folder or results.json of `onnxprune sweep`"


@dataclass(frozen=True)
class Curves:
    """lead: what they show, in a sentence each."""

    sensitivity: Sensitivity | None = None
    sweep: Sweep | None = None
    lead: str = ""


def read_curves(paths: Iterable[str | os.PathLike[str]], model: str | os.PathLike[str]) -> Curves:
    """Those of state files, of results.json or of folders with one; of several of a kind the last one counts.

    Raises OnnxPruneError for what is none of these, and for what was measured on another model.
    """
    contents, digest = [], ""
    for path in paths:
        place = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
        except OSError as error:
            raise OnnxPruneError(f"{place}: cannot be read ({error.strerror}); {REMEDY}") from error
        except ValueError as error:
            raise OnnxPruneError(f"{place}: is not a JSON file ({error}); {REMEDY}") from error
        if not isinstance(content, dict) or content.get("kind") not in ("sensitivity", "sweep"):
            raise OnnxPruneError(f"{place}: holds no curves; {REMEDY}")
        digest = digest or key_of(model)["model"]
        if content.get("key", {}).get("model") != digest:
            raise OnnxPruneError(f"{place}: was measured on another model ({content.get('model')}) than {model}; measure this one")
        try:
            of_content([content])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OnnxPruneError(f"{place}: is not whole ({type(error).__name__}: {error}); {REMEDY}") from error
        contents.append(content)
    return of_content(contents)


def of_content(contents: Iterable[Mapping[str, Any]]) -> Curves:
    """The curves of `Sensitivity.to_json()` and `Sweep.to_json()`."""
    sensitivity: Sensitivity | None = None
    sweep: Sweep | None = None
    lead: dict[str, str] = {}
    for content in contents:
        if content["kind"] == "sensitivity":
            sensitivity = _sensitivity(content)
            judged = "" if content["before"] is None else f"; {content['measure']} of the original: {content['before']:.4g}"
            lead["sensitivity"] = f"What {len(sensitivity.points)} groups are worth, each one alone.{judged}"
        else:
            sweep = _sweep(content)
            measured = f"{content['measure']} of the original: {content['original']['quality']:.4g}"
            lead["sweep"] = f"{len(sweep.points) - 1} models beside the original; {measured}."
    return Curves(sensitivity, sweep, " ".join(lead.values()))


def _sensitivity(content: Mapping[str, Any]) -> Sensitivity:
    changes: dict[str, list[tuple[float, float]]] = {}
    qualities: dict[str, list[tuple[float, float]]] = {}
    for point in content["points"]:
        name = point.get("name") or point["tensor"]
        label = f"{point['group']}: {name}" if name else f"group {point['group']}"
        for lines, value, start in ((changes, point["change"], 0.0), (qualities, point["quality"], content["before"])):
            if value is not None:
                lines.setdefault(label, [] if start is None else [(0.0, float(start))]).append((float(point["ratio"]), float(value)))
    change = "change of the outputs, of their variance"
    return Sensitivity(changes, change, qualities, str(content["measure"]))


def _sweep(content: Mapping[str, Any]) -> Sweep:
    original, made = content["original"], [point for point in content["points"] if point["error"] is None]
    latencies = [point["latency_before"] for point in made if point["latency_before"] is not None]
    latency = sum(latencies) / len(latencies) if latencies else None
    points = [SweepPoint("original", original["quality"], None, original["macs"], original["parameters"], latency)]
    for point in made:
        label, best = f"{point['criterion']} by {point['allocation']}", [COSTS[cost] for cost in point["pareto"]]
        points.append(
            SweepPoint(label, point["quality"], point["ratio"], point["macs"], point["parameters"], point["latency"], pareto=best)
        )
    return Sweep(points, str(content["measure"]))

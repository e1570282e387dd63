"""The least that a pruned model must reach, figure by figure: `--fail-under accuracy=0.95,speedup=1.3`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxprune.errors import OnnxPruneError

if TYPE_CHECKING:
    from onnxprune.benchmark import Measurement
    from onnxprune.evaluation import Evaluation
    from onnxprune.result import Result

MISSED = 5  # exit code
FIGURES = {
    "accuracy": "the pruned model's, from 0 to 1; needs --eval with labels",
    "agreement": "share of samples with the original's class; needs --eval",
    "cosine": "of the output that is least like the original's; needs --eval, or --calibration and a compensation",
    "macs": "share of the MACs that went",
    "metric": "the pruned model's --metric",
    "params": "share of the parameters that went",
    "speedup": "latency of the original by that of the pruned model",
}
SHARES = ("accuracy", "agreement", "cosine", "macs", "params")
SAMPLED = ("accuracy", "agreement", "metric")  # known only with --eval


@dataclass(frozen=True)
class Gate:
    """A figure, the least that it may be, and what it is; None where it could not be had, which does not pass."""

    figure: str
    least: float
    found: float | None

    @property
    def passed(self) -> bool:
        return self.found is not None and self.found >= self.least

    def __str__(self) -> str:
        digits = 4
        while not self.passed and self.found is not None and digits < 17 and f"{self.found:.{digits}g}" == f"{self.least:.{digits}g}":
            digits += 1
        found = "is not known" if self.found is None else f"is {self.found:.{digits}g}"
        return f"{self.figure} {found}, {self.least:.{digits}g} at least was asked"

    def to_json(self) -> dict[str, Any]:
        return {"figure": self.figure, "least": self.least, "found": self.found, "passed": self.passed}


def read_gates(texts: Sequence[str]) -> dict[str, float]:
    """{figure: least} of texts such as `accuracy=0.95,speedup=1.3`; `95%` is 0.95.  Raises OnnxPruneError for what is none."""
    found: dict[str, float] = {}
    for text in (part.strip() for one in texts for part in one.split(",")):
        figure, _, number = text.partition("=")
        if figure not in FIGURES:
            raise OnnxPruneError(f"--fail-under '{text}': no figure is named so; there are: {', '.join(FIGURES)}")
        try:
            least = float(number.rstrip("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            least = math.nan
        if not math.isfinite(least):
            raise OnnxPruneError(f"--fail-under '{text}': write it as {figure}=NUMBER")
        if figure in SHARES and not 0 <= least <= 1:
            raise OnnxPruneError(f"--fail-under '{text}': it is a share from 0 to 1, or such as {figure}=95%")
        found[figure] = least
    return found


def check_known(gates: Mapping[str, float], evaluation: object, metric: object, calibration: object, compensation: object = None) -> None:
    """Raises OnnxPruneError where a figure cannot come out, before any work is done."""
    for figure in gates:
        sampled = figure in SAMPLED or (figure == "cosine" and (calibration in (None, "none") or compensation == "none"))
        if sampled and evaluation is None:
            raise OnnxPruneError(f"--fail-under {figure}: {FIGURES[figure]}")
        if figure == "metric" and metric is None:
            raise OnnxPruneError("--fail-under metric: give --metric too")


def judged(gates: Mapping[str, float], result: Result, evaluation: Evaluation | None, measured: Sequence[Measurement]) -> list[Gate]:
    """Every gate with what was found: on the samples of --eval where there are such, else on those of --calibration."""
    compared = evaluation.outputs if evaluation else result.fidelity[1].outputs if result.fidelity else ()
    cosines = [o.cosine for o in compared if o.cosine is not None]
    found: dict[str, float | None] = {
        "accuracy": evaluation.after if evaluation else None,
        "agreement": evaluation.agreement if evaluation else None,
        "cosine": min(cosines, default=None),
        "macs": _gone(result.macs),
        "metric": evaluation.metric_after if evaluation else None,
        "params": _gone(result.parameters),
        "speedup": measured[0].latency_median_s / measured[1].latency_median_s if len(measured) == 2 else None,
    }
    known = {figure: value for figure, value in found.items() if value is not None and math.isfinite(value)}
    return [Gate(figure, least, known.get(figure)) for figure, least in gates.items()]


def _gone(counts: tuple[int, int]) -> float:
    before, after = counts
    return 1 - after / before if before else 0.0

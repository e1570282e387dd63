"""Structured pruning of ONNX models, with its proof: `onnxprune.prune("model.onnx", 0.4)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onnxprune.allocations import allocation
    from onnxprune.api import apply, groups, plan, prune, verify
    from onnxprune.criteria import criterion
    from onnxprune.dependencies import dependency_graph
    from onnxprune.errors import OnnxPruneError
    from onnxprune.handoff import HandOff, keep_indices, slice_state
    from onnxprune.htmlreport import html_report
    from onnxprune.inspection import Inspection, inspect
    from onnxprune.relations import rule
    from onnxprune.result import Result
    from onnxprune.sensitivities import Sensitivity, sensitivity
    from onnxprune.sweeping import Sweep, sweep

_HOMES = {
    **dict.fromkeys(("apply", "groups", "plan", "prune", "verify"), "onnxprune.api"),
    **dict.fromkeys(("HandOff", "keep_indices", "slice_state"), "onnxprune.handoff"),
    **dict.fromkeys(("Inspection", "inspect"), "onnxprune.inspection"),
    **dict.fromkeys(("Sensitivity", "sensitivity"), "onnxprune.sensitivities"),
    **dict.fromkeys(("Sweep", "sweep"), "onnxprune.sweeping"),
    "OnnxPruneError": "onnxprune.errors",
    "Result": "onnxprune.result",
    "allocation": "onnxprune.allocations",
    "criterion": "onnxprune.criteria",
    "dependency_graph": "onnxprune.dependencies",
    "html_report": "onnxprune.htmlreport",
    "rule": "onnxprune.relations",
}

__all__ = [
    "HandOff",
    "Inspection",
    "OnnxPruneError",
    "Result",
    "Sensitivity",
    "Sweep",
    "allocation",
    "apply",
    "criterion",
    "dependency_graph",
    "groups",
    "html_report",
    "inspect",
    "keep_indices",
    "plan",
    "prune",
    "rule",
    "sensitivity",
    "slice_state",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:  # onnxruntime and onnx are loaded when something is first asked of them
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxprune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)

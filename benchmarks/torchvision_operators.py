"""torchvision's operators where its binary does not load, as torch and it can be of different builds."""

from __future__ import annotations

import importlib
from typing import Any

KEPT: list[Any] = []  # what is declared ends with its library
SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms(Tensor dets, Tensor scores, float t) -> Tensor")


def import_torchvision() -> Any:
    """torchvision, whose own import looks its operators up; where they are missing they are declared, and cannot be run."""
    import torch

    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        KEPT.append(torch.library.Library("torchvision", "DEF"))
        for schema in SCHEMAS:
            KEPT[-1].define(schema)
        return importlib.import_module("torchvision")

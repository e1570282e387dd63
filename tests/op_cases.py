"""Small graphs of one purpose each: an operator between layers, what must be prunable there and what must stay.

`covers` and `leaves` list places as "tensor:axis"; "tensor:axis=8" says the units there, "=2+4" those of two groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from outside import Weight, as_constants, build

Place = tuple[str, int]
IMAGE, ROWS = "float[2,3,6,6] x", "float[2,5,6] x"
FIRST, LAST = "h = Conv <pads=[1,1,1,1]> (x, w1, b1)", "y = Conv (z, w2)"


@dataclass(frozen=True)
class Case:
    """A model and what is known of it; `runs` False where onnxruntime has no kernel, `masks` where zeros are not neutral."""

    name: str
    inputs: str
    body: str
    covers: str
    leaves: str
    weights: dict[str, Weight]
    outputs: str = "float y"
    opset: int = 17
    constants: bool = False
    statistics: bool | None = None
    runs: bool = True
    masks: bool = True
    tolerance: float = 1e-4
    bugs: str = ""

    def model(self) -> ModelProto:
        made = build(self.inputs, self.body, self.outputs, self.weights, self.opset)
        return as_constants(made) if self.constants else made


def places(text: str) -> dict[Place, list[int]]:
    """{(tensor, axis): the units of its groups, [] where nothing is said of them}."""
    found = {}
    for word in text.split():
        place, _, units = word.partition("=")
        tensor, _, axis = place.rpartition(":")
        found[tensor, int(axis)] = sorted(int(n) for n in units.split("+")) if units else []
    return found


@dataclass
class Table:
    """The cases as pytest wants them."""

    rows: list[pytest.ParameterSet] = field(default_factory=list)  # type: ignore[name-defined]

    def add(self, case: Case) -> None:
        marks = [pytest.mark.xfail(strict=True, reason=case.bugs)] if case.bugs else []
        self.rows.append(pytest.param(case, id=case.name, marks=marks))

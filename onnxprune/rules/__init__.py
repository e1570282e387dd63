"""The op rules, one module a family; importing the package registers them all."""

from onnxprune.rules import (
    attention,
    control,
    elementwise,
    indexing,
    layers,
    movement,
    norms,
    quantized,
    recurrent,
    reductions,
    signals,
    slicing,
    streaming,
)

__all__ = [
    "attention",
    "control",
    "elementwise",
    "indexing",
    "layers",
    "movement",
    "norms",
    "quantized",
    "recurrent",
    "reductions",
    "signals",
    "slicing",
    "streaming",
]

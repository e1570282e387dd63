"""The op rules, one module a family; importing the package registers them all."""

from onnxprune.rules import attention, control, elementwise, layers, movement, norms, quantized, recurrent, reductions, slicing

__all__ = ["attention", "control", "elementwise", "layers", "movement", "norms", "quantized", "recurrent", "reductions", "slicing"]

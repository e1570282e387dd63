"""What every operator passes back, grouped by family (`gradients`).  y: what it makes; g: how the loss changes with y."""

from onnxprune.adjoints import elementwise, layers, movement, norms, recurrent, reductions, resizing

__all__ = ["elementwise", "layers", "movement", "norms", "recurrent", "reductions", "resizing"]

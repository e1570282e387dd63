"""One layer's least squares: the weights that make of the inputs that are left what the original made of all of them.

minimize  mean ‖y − Wx − b‖² + λ·s·‖W − W₀‖²    (s: mean variance of a feature; W₀: the weights that were only sliced)

In closed form W = (Σ_yx + λsW₀)(Σ_xx + λsI)⁻¹, b = ȳ − Wx̄ with centred Σ.  It pulls towards W₀, so on the rows that it was
fitted to no layer is worse than it was.  OBS (Hassibi and Stork, 1993) is the case λ = 0 where x is a part of the original's own
input; the shrinkage λ is the one with the least error on rows that the fit has not seen.
"""

from __future__ import annotations

import numpy as np

from onnxprune.moments import Moments, Observed
from onnxprune.rectified import rectified
from onnxprune.ridge import Fit, fit

SHRINKAGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def shrunk(seen: Moments, held: Moments, matrix: np.ndarray, bias: np.ndarray, intercept: bool = True) -> Fit:
    """The fit to all rows, with the shrinkage that does best on the held-out ones when fitted to the others.

    Where the layer as it is does best on those, it stays as it is.
    """
    best, error = None, held.error(matrix, bias)
    if seen.count:
        for shrinkage in (*SHRINKAGES, np.inf):
            missed = held.error(*fit(seen, matrix, bias, shrinkage, intercept))
            if np.isfinite(missed) and missed < error:
                best, error = shrinkage, missed
    both = seen + held
    scale = max(both.spread(), 1e-30)
    if best is None:
        left = both.error(matrix, bias) / scale
        return Fit(matrix, bias, np.inf, left, left)
    fitted = fit(both, matrix, bias, best, intercept)
    return Fit(*fitted, best, both.error(matrix, bias) / scale, both.error(*fitted) / scale)


def reconstructed(observed: Observed, matrix: np.ndarray, bias: np.ndarray, intercept: bool = True) -> Fit:
    """Least squares, and where an activation with bounds follows, towards what it lets through."""
    found = shrunk(observed.seen, observed.held, matrix, bias, intercept)
    return rectified(observed, found, matrix, bias, intercept) if observed.window else found

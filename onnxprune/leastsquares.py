"""One layer's least squares: the weights that make of the inputs that are left what the original made of all of them.

minimize  mean ‖y − Wx − b‖² + λ·s·‖W − W₀‖²    (s: mean variance of a feature; W₀: the weights that were only sliced)

In closed form W = (Σ_yx + λsW₀)(Σ_xx + λsI)⁻¹, b = ȳ − Wx̄ with centred Σ.  It pulls towards W₀, so on the rows that it was
fitted to no layer is worse than it was.  OBS (Hassibi and Stork, 1993) is the case λ = 0 where x is a part of the original's own
input; the shrinkage λ is the one with the least error on rows that the fit has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.moments import Moments

SHRINKAGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Fit:
    """matrix (groups, out, features), bias (groups, out); before, after: share of the targets' variance that is missed."""

    matrix: np.ndarray
    bias: np.ndarray
    shrinkage: float
    before: float
    after: float


def fit(moments: Moments, matrix: np.ndarray, bias: np.ndarray, shrinkage: float, intercept: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The weights for one shrinkage λ; infinite: only the bias is fitted."""
    if np.isinf(shrinkage):
        if not intercept:
            return matrix, bias
        x, y = moments.means()
        return matrix, y - np.einsum("gof,gf->go", matrix, x)
    n = max(1, moments.count)
    xx, yx = moments.xx / n, moments.yx / n
    if intercept:
        x, y = moments.means()
        xx = xx - x[:, :, None] * x[:, None, :]
        yx = yx - y[:, :, None] * x[:, None, :]
    else:
        yx = yx - bias[:, :, None] * (moments.x / n)[:, None, :]
    diagonal = np.einsum("gff->gf", xx)
    pull = shrinkage * np.maximum(diagonal.mean(axis=1), 1e-30)[:, None, None]
    solved = np.linalg.solve(xx + pull * np.eye(xx.shape[1]), (yx + pull * matrix).transpose(0, 2, 1)).transpose(0, 2, 1)
    if intercept:
        bias = y - np.einsum("gof,gf->go", solved, x)
    return solved, bias


def shrunk(seen: Moments, held: Moments, matrix: np.ndarray, bias: np.ndarray, intercept: bool = True) -> Fit:
    """The fit to all rows, with the shrinkage that does best on the held-out ones when fitted to the others.

    Where the layer as it is does best on those, it stays as it is.
    """
    before = held.error(matrix, bias)
    best, error = None, before
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

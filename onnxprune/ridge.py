"""Ridge regression in closed form, from moments alone, pulling towards given weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.moments import Moments

CONSTANT = 1e-8  # of the mean square: a variance below it is rounding, and what is as good as constant is not fitted to


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
    size = np.einsum("gff->gf", xx).mean(axis=1)
    if intercept:
        x, y = moments.means()
        xx = xx - x[:, :, None] * x[:, None, :]
        yx = yx - y[:, :, None] * x[:, None, :]
    else:
        yx = yx - bias[:, :, None] * (moments.x / n)[:, None, :]
    diagonal = np.einsum("gff->gf", xx)
    varies = np.maximum(diagonal.mean(axis=1), CONSTANT * size)
    pull = shrinkage * np.maximum(varies, 1e-30)[:, None, None]
    solved = np.linalg.solve(xx + pull * np.eye(xx.shape[1]), (yx + pull * matrix).transpose(0, 2, 1)).transpose(0, 2, 1)
    if intercept:
        bias = y - np.einsum("gof,gf->go", solved, x)
    return solved, bias

"""Least squares behind a Relu or Clip: only what they let through has to be right.

minimize  mean ‖c(z) − c(Wx + b + s)‖²   (z: wanted; s: what the residual Add adds; c: clips to the bounds)

by majorization: where c cuts z off, a prediction beyond the bound is as good as the bound, so it is its own target; each step is
the same ridge regression with other targets and lowers the loss (Zhang et al. 2015, arXiv:1411.4229, reconstruct behind the
nonlinearity too).  The number of steps is the one with the least loss on held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnxprune.moments import Moments, Observed
from onnxprune.ridge import Fit, fit

STEPS = 8
Weights = tuple[np.ndarray, np.ndarray]


def rectified(observed: Observed, found: Fit, matrix: np.ndarray, bias: np.ndarray, intercept: bool = True) -> Fit:
    """A fit continued towards what the bounds let through; `before` and `after` are of that.

    matrix, bias: the weights as they were sliced, which are kept where nothing does better.
    """
    rows = _Rows(observed)
    start: Weights = (matrix, bias)
    linear: Weights = (found.matrix, found.bias)
    if np.isfinite(found.shrinkage):
        pull = found.shrinkage
        first = fit(observed.seen, matrix, bias, pull, intercept)
        losses = [rows.loss(w, True) for w in _steps(observed.seen, rows, False, first, start, pull, intercept)]
        steps = int(np.argmin(losses))
        both = observed.seen + observed.held
        for number, made in enumerate(_steps(both, rows, None, linear, start, pull, intercept)):
            if number == steps:
                linear = made
                break
    before, after = rows.loss(start, None), rows.loss(linear, None)
    scale = max(rows.spread(), 1e-30)
    if not after < before:
        return replace(found, matrix=matrix, bias=bias, shrinkage=np.inf, before=before / scale, after=before / scale)
    return replace(found, matrix=linear[0], bias=linear[1], before=before / scale, after=after / scale)


def _joined(observed: Observed, part: int, held: bool) -> np.ndarray:
    """The rows, what is wanted or what is beside, of all batches that are held out or not."""
    found = [batch.arrays[part] for batch in observed.window if batch.held == held]
    return np.concatenate(found or [observed.window[0].arrays[part][:, :0]], axis=1)


class _Rows:
    """The rows that were kept, end to end: x, what is wanted of c's input, and what is beside the layer's output."""

    def __init__(self, observed: Observed) -> None:
        assert observed.bounds is not None
        self.low, self.high = observed.bounds
        self.parts = {held: [_joined(observed, i, held) for i in range(3)] for held in (False, True)}

    def _chosen(self, held: bool | None) -> list[list[np.ndarray]]:
        return [self.parts[held]] if held is not None else [self.parts[False], self.parts[True]]

    def loss(self, weights: Weights, held: bool | None) -> float:
        """Mean over rows of ‖c(z) − c(Wx + b + s)‖²; held None: of all rows."""
        total, count = 0.0, 0
        for x, wanted, beside in self._chosen(held):
            gap = np.clip(wanted, self.low, self.high) - np.clip(_made(x, weights, beside), self.low, self.high)
            total += float(np.einsum("gno,gno->", gap, gap, dtype=np.float64))
            count += x.shape[1]
        return total / max(1, count)

    def spread(self) -> float:
        every = np.concatenate([np.clip(part[1], self.low, self.high) for part in self.parts.values()], axis=1)
        return float(every.var(axis=1, dtype=np.float64).sum())

    def shifted(self, moments: Moments, weights: Weights, held: bool | None) -> Moments:
        """The moments with targets that a cut-off prediction meets by itself."""
        y, yx = moments.y.copy(), moments.yx.copy()
        chosen = self._chosen(held)
        count = sum(x.shape[1] for x, _, _ in chosen)
        scale = moments.count / max(1, count)
        for x, wanted, beside in chosen:
            made = _made(x, weights, beside)
            target = np.where(wanted <= self.low, np.minimum(made, self.low), wanted)
            target = np.where(wanted >= self.high, np.maximum(made, self.high), target)
            change = (target - wanted).astype(np.float32)
            y += scale * change.sum(axis=1, dtype=np.float64)
            yx += scale * np.matmul(change.transpose(0, 2, 1), x)
        return replace(moments, y=y, yx=yx)


def _made(x: np.ndarray, weights: Weights, beside: np.ndarray) -> np.ndarray:
    matrix, bias = weights
    made: np.ndarray = np.matmul(x, matrix.astype(np.float32).transpose(0, 2, 1))
    made += bias.astype(np.float32)[:, None, :]
    made += beside
    return made


def _steps(
    moments: Moments, rows: _Rows, held: bool | None, weights: Weights, start: Weights, shrinkage: float, intercept: bool
) -> Iterator[Weights]:
    """The weights after 0, 1, … STEPS steps."""
    yield weights
    for _ in range(STEPS):
        weights = fit(rows.shifted(moments, weights, held), *start, shrinkage, intercept)
        yield weights

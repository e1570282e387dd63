"""Sums over rows: all that least squares needs to know of a layer's inputs and targets, however many samples there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Moments:
    """Running sums over rows x (features) and targets y (out), a block a convolution group.

    count: rows; x (groups, features), y (groups, out): Σx, Σy; xx (groups, features, features): Σxxᵀ; yx (groups, out, features):
    Σyxᵀ; yy (groups, out): Σy².  All float64; a batch is multiplied in float32.
    """

    count: int
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    yx: np.ndarray
    yy: np.ndarray

    @classmethod
    def zero(cls, groups: int, features: int, out: int) -> Moments:
        return cls(
            0,
            np.zeros((groups, features)),
            np.zeros((groups, out)),
            np.zeros((groups, features, features)),
            np.zeros((groups, out, features)),
            np.zeros((groups, out)),
        )

    def add(self, rows: np.ndarray, targets: np.ndarray) -> None:
        """rows (groups, n, features), targets (groups, n, out)."""
        rows, targets = np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(targets, np.float32)
        self.count += rows.shape[1]
        self.x += rows.sum(axis=1, dtype=np.float64)
        self.y += targets.sum(axis=1, dtype=np.float64)
        self.xx += np.matmul(rows.transpose(0, 2, 1), rows)
        self.yx += np.matmul(targets.transpose(0, 2, 1), rows)
        self.yy += np.einsum("gno,gno->go", targets, targets, dtype=np.float64)

    def __add__(self, other: Moments) -> Moments:
        mine, theirs = vars(self), vars(other)
        return Moments(**{key: mine[key] + theirs[key] for key in mine})

    def error(self, matrix: np.ndarray, bias: np.ndarray) -> float:
        """Mean over rows of ‖y − Wx − b‖², for W (groups, out, features) and b (groups, out)."""
        total = self.yy.sum() - 2 * np.einsum("gof,gof->", matrix, self.yx) + np.einsum("gof,gof->", matrix @ self.xx, matrix)
        total += 2 * (bias * (np.einsum("gof,gf->go", matrix, self.x) - self.y)).sum() + self.count * (bias**2).sum()
        return float(max(total, 0.0)) / max(1, self.count)

    def spread(self) -> float:
        """Mean over rows of ‖y − ȳ‖²: the error of a layer that only knows the mean."""
        return float(max((self.yy - self.y**2 / max(1, self.count)).sum(), 0.0)) / max(1, self.count)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Of x and y."""
        n = max(1, self.count)
        return self.x / n, self.y / n

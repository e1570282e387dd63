"""Optimal brain surgeon over whole units: the one whose loss the others make up for best goes first, and they do at once.

For a layer y = Wx + b with the covariance Σ of x (without a bias: its second moment), removing the features S and fitting the weights of
the others anew costs tr(W_S [(Σ⁻¹)_SS]⁻¹ W_Sᵀ) of the variance of y (Hassibi and Stork, 1993; for groups of weights: Optimal BERT
Surgeon, 2022, and OBSPA, arXiv:2403.18955).  After each removal W and Σ⁻¹ are those of the smaller problem, so the costs add up to the
error of the best weights for what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.evidence import Reading

DAMPING = 0.1  # of the mean variance of a feature
STEPS = 128  # that a group is eliminated in at most; larger groups lose several units a step


def eliminate(readings: Sequence[Reading], units: int) -> np.ndarray:
    """Error that each unit adds when it goes, in the best order, as a share of what the readers make; (units,), summed over readers.

    The scores rise in the order of removal, so that the lowest k are the k that go first, and their sum is what is lost.
    """
    problems = [_Problem(reading) for reading in readings]
    left = np.ones(units, bool)
    scores, floor = np.zeros(units), 0.0
    step = max(1, -(-units // STEPS))
    while left.any():
        alive = np.flatnonzero(left)
        costs = sum((problem.costs(alive) for problem in problems), np.zeros(len(alive)))
        chosen = np.argsort(costs, kind="stable")[:step]
        for unit, cost in zip(alive[chosen], costs[chosen], strict=True):
            floor = max(floor, float(cost))
            scores[unit] = floor
        left[alive[chosen]] = False
        for problem in problems:
            problem.remove(alive[chosen])
    return scores


class _Problem:
    """The least squares of one reader, with what has gone taken out."""

    def __init__(self, reading: Reading) -> None:
        sigma = reading.moment
        self.inverse = np.linalg.inv(sigma + DAMPING * reading.spread[:, None, None] * np.eye(sigma.shape[1]))
        self.matrix = reading.matrix.copy()
        self.features = reading.features
        self.power = max(reading.power, 1e-20)
        self.at = np.arange(sigma.shape[1])  # where a feature stands in the matrices, as they get smaller
        self.live = np.ones(sigma.shape[1], bool)

    def costs(self, units: np.ndarray) -> np.ndarray:
        """tr(W_S [(Σ⁻¹)_SS]⁻¹ W_Sᵀ) / power of each unit."""
        places = self.at[self.features[units]]
        blocks = self.inverse[:, places[:, :, None], places[:, None, :]]  # (groups, units, k, k)
        weights = self.matrix[:, :, places].transpose(0, 2, 3, 1)  # (groups, units, k, out)
        solved = weights / blocks if places.shape[1] == 1 else np.linalg.solve(blocks, weights)
        total: np.ndarray = np.einsum("guko,guko->u", weights, solved) / self.power
        return total

    def remove(self, units: np.ndarray) -> None:
        """Take units out, all at once."""
        places = self.at[np.unique(self.features[units])]
        for inverse, matrix in zip(self.inverse, self.matrix, strict=True):
            gain = np.linalg.solve(inverse[np.ix_(places, places)], inverse[places])  # (k, features)
            matrix -= matrix[:, places] @ gain
            inverse -= inverse[:, places] @ gain
            matrix[:, places] = 0
            inverse[places, :] = 0
            inverse[:, places] = 0
            inverse[places, places] = 1.0
        self.live[places] = False
        if self.live.mean() < 0.8:
            self._shrink()

    def _shrink(self) -> None:
        """Without the rows and columns of what has gone."""
        kept = np.flatnonzero(self.live)
        self.inverse, self.matrix = np.ascontiguousarray(self.inverse[:, kept][:, :, kept]), np.ascontiguousarray(self.matrix[:, :, kept])
        moved = np.zeros(len(self.live), np.int64)
        moved[kept] = np.arange(len(kept))
        self.at, self.live = moved[self.at], np.ones(len(kept), bool)

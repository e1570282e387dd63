"""Optimal brain surgeon over whole units: the one whose loss the others make up for best goes first, and they do at once.

For a layer y = Wx with the covariance Σ of x, removing the features S and fitting the weights of the others anew costs
tr(W_S [(Σ⁻¹)_SS]⁻¹ W_Sᵀ) of the variance of y (Hassibi and Stork, 1993; for groups of weights: Optimal BERT Surgeon, 2022, and
OBSPA, arXiv:2403.18955).  After each removal W and Σ⁻¹ are those of the smaller problem, so the costs add up to the error
of the best weights for what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.evidence import Reading

DAMPING = 1e-3  # of the mean variance of a feature
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
        for unit, cost in sorted(zip(alive, costs, strict=True), key=lambda pair: pair[1])[:step]:
            floor = max(floor, float(cost))
            scores[unit] = floor
            left[unit] = False
            for problem in problems:
                problem.remove(int(unit))
    return scores


class _Problem:
    """The least squares of one reader, with what has gone taken out."""

    def __init__(self, reading: Reading) -> None:
        sigma = reading.covariance
        damping = DAMPING * np.maximum(np.einsum("gff->gf", sigma).mean(axis=1), 1e-20)
        self.inverse = np.linalg.inv(sigma + damping[:, None, None] * np.eye(sigma.shape[1]))
        self.matrix = reading.matrix.copy()
        self.features = reading.features
        self.power = max(reading.power, 1e-20)

    def costs(self, units: np.ndarray) -> np.ndarray:
        """tr(W_S [(Σ⁻¹)_SS]⁻¹ W_Sᵀ) / power of each unit."""
        places = self.features[units]
        blocks = self.inverse[:, places[:, :, None], places[:, None, :]]  # (groups, units, k, k)
        weights = self.matrix[:, :, places].transpose(0, 2, 3, 1)  # (groups, units, k, out)
        solved = np.linalg.solve(blocks, weights)
        total: np.ndarray = np.einsum("guko,guko->u", weights, solved) / self.power
        return total

    def remove(self, unit: int) -> None:
        places = self.features[unit]
        for g in range(len(self.inverse)):
            inverse = self.inverse[g]
            gain = np.linalg.solve(inverse[np.ix_(places, places)], inverse[places])  # (k, features)
            self.matrix[g] -= self.matrix[g][:, places] @ gain
            inverse -= inverse[:, places] @ gain
            self.matrix[g][:, places] = 0
            inverse[places, :] = 0
            inverse[:, places] = 0
            inverse[places, places] = 1.0

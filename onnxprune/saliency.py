"""Step 4, with samples: criteria that look at what the model's layers read.

Such a criterion is a function (evidence, group, rng) -> array (units,), registered under a name; its scores are the share of the
readers' outputs that is lost, so that they compare between groups:

    @measured("peak")
    def peak(evidence, group, rng):
        return over_readings(evidence, group, lambda reading: np.abs(reading.mean))
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxprune.criteria import l2
from onnxprune.elimination import eliminate
from onnxprune.evidence import Evidence, Reading
from onnxprune.grouping import Group
from onnxprune.registry import Registry

Measured = Callable[[Evidence, Group, np.random.Generator], np.ndarray]
measured: Registry[Measured] = Registry("criterion", "onnxprune.measured_criteria")


def over_readings(evidence: Evidence, group: Group, of: Callable[[Reading], np.ndarray]) -> np.ndarray:
    """Σ over readers and over each unit's features of what `of` says of each feature (groups, features); (units,).

    A group that no layer sums over (queries and keys, what only norms read) is scored by its weights: shares of Σw².
    """
    readings = evidence.of(group)
    if not readings:
        return unread(evidence, group)
    total = np.zeros(group.units)
    for reading in readings:
        total += of(reading).sum(axis=0)[reading.features].sum(axis=1)
    return total


def unread(evidence: Evidence, group: Group) -> np.ndarray:
    """Each unit's share of the squared weights of the group."""
    squares = l2(evidence.model, group, np.random.default_rng(0)) ** 2
    return np.asarray(squares / max(float(squares.sum()), 1e-30))


def _norms(reading: Reading) -> np.ndarray:
    """‖W‖² of each feature's column, (groups, features)."""
    return np.asarray(np.einsum("gof,gof->gf", reading.matrix, reading.matrix))


@measured("obs")
def obs(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """What the readers lose once the other units have made up for it, greedily (OBS over units, as OBSPA does; `elimination`)."""
    readings = evidence.of(group)
    return eliminate(readings, group.units) if readings else unread(evidence, group)


@measured("fluctuation")
def fluctuation(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ Var(x)·‖W‖²: what is lost when the unit is replaced by its mean (An et al. 2024, FLAP, arXiv:2312.11983)."""
    return over_readings(evidence, group, lambda r: np.einsum("gff->gf", r.covariance) * _norms(r) / r.power)


@measured("wanda")
def wanda(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ|W|·‖x‖₂ (Sun et al. 2024, Wanda, arXiv:2306.11695), as a share of the root mean square of what the reader makes."""
    return over_readings(evidence, group, lambda r: np.abs(r.matrix).sum(axis=1) * r.rms / np.sqrt(r.power))


@measured("activation")
def activation(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """√mean(x²) of the unit where it is read, by its mean over the group (after Minitron, Muralidharan et al. 2024, arXiv:2407.14679)."""
    scores = over_readings(evidence, group, lambda r: r.rms / max(float(r.rms.mean()), 1e-30) / r.rms.size)
    return np.asarray(scores / max(float(scores.sum()), 1e-30))


@measured("energy")
def energy(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ mean(x²)·‖W‖²: what is lost when the unit is replaced by zero and nothing makes up for it."""
    return over_readings(evidence, group, lambda r: r.rms**2 * _norms(r) / r.power)

"""Step 4, with samples: criteria that look at what the model's layers read.

Such a criterion is a function (evidence, group, rng) -> array (units,), registered under a name; its scores are the share of the
readers' outputs that is lost, so that they compare between groups:

    @measured("peak")
    def peak(evidence, group, rng):
        return over_readings(evidence, group, lambda reading: np.abs(reading.mean))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune.cost import count_macs
from onnxprune.criteria import l2, normalized, weights
from onnxprune.elimination import eliminate
from onnxprune.equivalence import distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.evidence import Evidence, Reading
from onnxprune.grouping import Group, Member
from onnxprune.linear import makes_along
from onnxprune.masking import contractions, zeroed
from onnxprune.registry import Registry
from onnxprune.running import Runner

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
    """Σ Var(x)·‖W‖²: what is lost when the unit is replaced by its mean (An et al. 2024, FLAP, arXiv:2312.11983).

    The paper gives a reader without a bias one, which is another node; here the mean is lost there, and `energy` counts it.
    """
    return over_readings(evidence, group, lambda r: np.einsum("gff->gf", r.covariance) * _norms(r) / r.power)


@measured("wanda")
def wanda(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ|W|·‖x‖₂ (Sun et al. 2024, Wanda, arXiv:2306.11695), as a share of the root mean square of what the reader makes."""
    return over_readings(evidence, group, lambda r: np.abs(r.matrix).sum(axis=1) * r.rms / np.sqrt(r.power))


@measured("activation")
def activation(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """‖mean |x|‖₂: mean over a sample's places, L2 over samples; as shares (Minitron, Muralidharan et al. 2024, arXiv:2407.14679).

    The paper's aggregation for widths; taken where units are read, of a convolution over all places under its kernel.
    """
    scores = over_readings(evidence, group, lambda r: r.magnitude / max(float(r.magnitude.mean()), 1e-30) / r.magnitude.size)
    return np.asarray(scores / max(float(scores.sum()), 1e-30))


@measured("beta-rank")
def beta_rank(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ|w|·σ(out)/σ(in) of the filters that make the unit: what they do to the data counts (β-Rank, Homayounfar et al., arXiv:2304.07461).

    σ(out): deviation of what the filter makes, before its bias; σ(in): of all that its layer reads.  Summed over the layers that make
    the unit, each by its mean; deviations are over samples and places together, the paper's over samples place by place.
    """
    total = np.zeros(group.units)
    for member in weights(evidence.model, group):
        reading = evidence.layers.get(member.tensor)
        if reading is None or not _makes(evidence, member, reading):
            continue
        out = np.sqrt(np.maximum(np.einsum("gof,gfe,goe->go", reading.matrix, reading.covariance, reading.matrix), 0)).ravel()
        inner = math.sqrt(max(float((reading.rms**2).mean() - reading.mean.mean() ** 2), 1e-30))
        ranks = np.abs(reading.matrix).sum(axis=2).ravel() * out / inner
        total += normalized(ranks[member.indices].sum(axis=1))
    return normalized(total) if total.any() else unread(evidence, group)


def _makes(evidence: Evidence, member: Member, reading: Reading) -> bool:
    """Whether a member is the axis of what its layer makes."""
    layer, rank = reading.layer, len(evidence.model.tensors[member.tensor].dims)
    if layer is None:
        return False
    shape = layer.geometry(evidence.model.main[layer.node], rank)
    return member.axis == makes_along(shape) and (layer.op != "ConvTranspose" or shape.group == 1)


WORK = 2e13  # multiply-accumulates that the oracle may take
TRIALS = (8, 128)  # samples that it measures on: least and most


@measured("distortion")
def distorted(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """The oracle: how much the outputs change when the unit alone is masked, ‖y − y′‖² by the variance of y, over a few samples.

    A forward pass a unit; zeros where layers sum over the unit, which is the same as removing it, elsewhere in all its places.
    Raises OnnxPruneError where that is too much work, or where there are no samples.
    """
    grouping, model = evidence.grouping, evidence.model
    if evidence.trial is None:
        raise OnnxPruneError("--criterion distortion runs the model; give --calibration (samples, or 'noise')")
    units = sum(g.units for g in grouping.groups if g.branch is None)
    batch = max(1, next((shape[0] for shape in model.input_shapes.values() if shape), 1))
    most = int(WORK / max(1.0, units * count_macs(model) / batch))
    if most < TRIALS[0]:
        raise OnnxPruneError(f"{model.name}: the oracle would take {units} passes; choose --criterion obs, or a part by --scope")
    feeds = evidence.trial(min(most, TRIALS[1]))
    if evidence.progress:
        evidence.progress(f"masking the {group.units} units of group {group.id}, one by one")
    arrays = {m.tensor: model.array(m.tensor) for m in group.members}
    runner = Runner(model.proto, arrays)
    summing = contractions(model)

    def outputs(changed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs = [runner.run(one, changed) for one in feeds]
        return {name: _together([run[name] for run in runs]) for name in model.outputs}

    before = outputs({})
    without = (zeroed(arrays, [group], {group.id: np.array([unit])}, summing) for unit in range(group.units))
    return np.array([distortion(before, outputs(changed)) for changed in without])


def _together(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The batches of an output below each other; all numbers in a row where they are of several sizes, or sequences."""
    arrays = [np.atleast_1d(one) for part in parts for one in (part if isinstance(part, list) else [part])]
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return np.concatenate([array.ravel() for array in arrays])


@measured("energy")
def energy(evidence: Evidence, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ mean(x²)·‖W‖²: what is lost when the unit is replaced by zero and nothing makes up for it."""
    return over_readings(evidence, group, lambda r: r.rms**2 * _norms(r) / r.power)

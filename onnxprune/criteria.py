"""Step 4: one score per unit; the lowest go first.

A criterion is a function (model, group, rng) -> array (units,), registered under a name:

    @criterion("largest")
    def largest(model, group, rng):
        return reduce_members(model, group, lambda rows: np.abs(rows).max(axis=1), np.maximum)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxprune.grouping import Group, Member
from onnxprune.importer import FLOATS, Model
from onnxprune.quantized import dequantizer, meant
from onnxprune.registry import Registry

Criterion = Callable[[Model, Group, np.random.Generator], np.ndarray]
criterion: Registry[Criterion] = Registry("criterion", "onnxprune.criteria")


def weights(model: Model, group: Group) -> list[Member]:
    """The members that are layers' weights (more than one axis), floats or, where there are none, integers; else all floats.

    Integers behind a DequantizeLinear stand for floats.
    """
    floats = [m for m in group.members if model.tensors[m.tensor].data_type in FLOATS]
    layers = [m for m in group.members if len(model.tensors[m.tensor].dims) > 1 and max(model.tensors[m.tensor].dims) > 1]
    return [m for m in layers if model.tensors[m.tensor].data_type in FLOATS or dequantizer(model, m.tensor)] or layers or floats


def rows(model: Model, member: Member) -> np.ndarray:
    """The slices of one member, float32 (units, elements of a unit)."""
    array: np.ndarray = np.moveaxis(meant(model, member.tensor), member.axis, 0)
    return np.asarray(array[member.indices.ravel()].reshape(len(member.indices), -1), np.float32)


def _along(model: Model, member: Member, power: int) -> np.ndarray:
    """Σ|w|^power over each unit's places along the member's axis, (units,)."""
    key = (member.tensor, member.axis, power)
    if key not in model.sums:
        model.sums[key] = _sums(meant(model, member.tensor), member.axis, power)
    return np.asarray(model.sums[key][member.indices].sum(axis=1), np.float64)


def _sums(array: np.ndarray, axis: int, power: int) -> np.ndarray:
    """Σ|w|^power of every index along an axis."""
    array = array.astype(np.float32) if array.dtype != np.float32 else array
    flat = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
    sums: np.ndarray
    if power == 2:
        sums = np.einsum("ijk,ijk->j", flat, flat)
    else:
        sums = np.zeros(flat.shape[1], np.float64)
        for part in flat:
            sums += np.abs(part).sum(axis=1, dtype=np.float32)
    return sums


def normalized(scores: np.ndarray) -> np.ndarray:
    """Divided by the group's mean, so that groups compare (SPA, Structurally Prune Anything, arXiv:2403.18955)."""
    mean = float(scores.mean()) if scores.size else 0.0
    return scores / mean if mean > 0 else np.ones_like(scores)


@criterion("random")
def random(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise: the baseline of every comparison."""
    return rng.random(group.units)


@criterion("l1")
def l1(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ|w| over all slices where the unit lives (Li et al. 2017, arXiv:1608.08710), mean of the group 1."""
    return normalized(sum((normalized(_along(model, m, 1)) for m in weights(model, group)), np.zeros(group.units)))


@criterion("l2")
def l2(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """√Σw² a slice, summed over all slices where the unit lives, mean of the group 1."""
    total = sum((normalized(np.sqrt(_along(model, m, 2))) for m in weights(model, group)), np.zeros(group.units))
    return normalized(total)


@criterion("bn-scale")
def bn_scale(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """|γ| of the batch norms that the unit passes (network slimming, Liu et al. 2017, arXiv:1708.06519); l2 where there is none."""
    scales = {n.input[1] for n in model.nodes if n.op_type == "BatchNormalization"}
    found = [m for m in group.members if m.tensor in scales]
    if not found:
        return l2(model, group, rng)
    return normalized(sum((_along(model, m, 1) for m in found), np.zeros(group.units)))


@criterion("fpgm")
def fpgm(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Distance to all other units of the group: small near the geometric median (FPGM, He et al. 2019, arXiv:1811.00250)."""
    total = np.zeros(group.units)
    for member in weights(model, group):
        slices = rows(model, member)
        squares = np.einsum("ij,ij->i", slices, slices)
        gaps = squares[:, None] + squares[None, :] - 2 * (slices @ slices.T)
        total += normalized(np.sqrt(np.maximum(gaps, 0)).sum(axis=1).astype(np.float64))
    return normalized(total)


@criterion("lamp")
def lamp(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """w²ᵤ over the sum of w² of all units not smaller (layer-adaptive magnitude, Lee et al. 2021, arXiv:2010.07611)."""
    squares = sum((_along(model, m, 2) for m in weights(model, group)), np.zeros(group.units))
    order = np.argsort(squares, kind="stable")
    tail = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty(group.units)
    scores[order] = squares[order] / np.maximum(tail, np.finfo(np.float64).tiny)
    return scores


@criterion("dimap")
def dimap(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Σ over the unit's weights of w² / Σ{v² : v not smaller than w in its module} (DIMAP, He and Zhou 2024, arXiv:2404.13648).

    A module is all weights of the group together, so that its layers compete with each other and no module with another one (the paper's
    are the attention and the MLP parts of a Swin transformer).
    """
    slices = np.concatenate([rows(model, member) for member in weights(model, group)], axis=1)
    squares = slices.astype(np.float64).ravel() ** 2
    order = np.argsort(squares, kind="stable")
    tail = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.maximum(tail, np.finfo(np.float64).tiny)
    return np.asarray(scores.reshape(slices.shape).sum(axis=1))


@criterion("prunenet")
def prunenet(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """[(WWᵀ)^½]ᵤᵤ = Σₖ σₖ·Uᵤₖ²: how far the singular values of a weight (a row a unit) move as the unit fades, to first order.

    PruneNet (Sengupta et al. 2025, arXiv:2501.15296) trains a policy that keeps the distribution of singular values, by the
    Kolmogorov-Smirnov distance.  For one unit that distance is below 1/units whichever goes (interlacing), so what is in closed
    form is the shift itself; nothing is trained here, and the result is not PruneNet's.
    """
    total = np.zeros(group.units)
    for member in weights(model, group):
        slices = rows(model, member).astype(np.float64)
        values, vectors = np.linalg.eigh(slices @ slices.T)
        total += normalized((vectors**2) @ np.sqrt(np.maximum(values, 0)))
    return normalized(total)


@criterion("pq-index")
def pq_index(model: Model, group: Group, rng: np.random.Generator) -> np.ndarray:
    """d·(1 − I) = ‖w‖½ / ‖w‖₁ of the unit's d weights: as many as it has, were they equally large; a share of its group's mean.

    I = 1 − d^(1/q − 1/p)·‖w‖ₚ/‖w‖_q is the PQ index with p = ½, q = 1 (Diao et al. 2023, arXiv:2302.05601), and d·(1 − I) how many
    weights it would keep.  It says how compressible a unit is, not how large; the allocation `pq` is the paper's use.
    """
    total = np.zeros(group.units)
    for member in weights(model, group):
        sizes = np.abs(rows(model, member).astype(np.float64))
        total += normalized(np.sqrt(sizes).sum(axis=1) ** 2 / np.maximum(sizes.sum(axis=1), np.finfo(np.float64).tiny))
    return normalized(total)

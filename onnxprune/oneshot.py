"""Compensation in one shot: the readers' new weights in closed form from the original's own moments, without another pass.

W′ = W·Σ₍:,K₎(Σ_KK + δI)⁻¹ over the features K that stay, and b′ = b + Wμ − W′μ_K: optimal brain surgeon's update of all at once; Σ is
the covariance, or the second moment where the layer takes no bias.  Or only the bias: b′ = b + W_S μ_S, what the removed features S were
on average (FLAP, arXiv:2312.11983).
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, numpy_helper

from onnxprune.evidence import Evidence, Reading
from onnxprune.plans import Plan
from onnxprune.rewriter import Widths
from onnxprune.seats import Seat, bias_of, outputs_left, put, seats, tensors_of

DAMPING = 1e-2  # of the mean variance of a feature


def updated(plan: Plan, pruned: ModelProto, evidence: Evidence, weights: bool = True) -> ModelProto:
    """A copy of the pruned model whose layers that lost inputs make up for them: in weights and bias, or in the bias alone."""
    out = ModelProto()
    out.CopyFrom(pruned)
    gone: dict[str, np.ndarray] = {}
    readings: dict[str, Reading] = {}
    for group in plan.groups:
        units = plan.remove.get(group.id, ())
        for reading in evidence.of(group) if len(units) else ():
            if reading.layer is None:
                continue
            name = reading.layer.weight
            readings[name] = reading
            mask = gone.setdefault(name, np.zeros(reading.matrix.shape[2], bool))
            mask[reading.features[units].ravel()] = True
    widths = Widths(plan.grouping, plan.remove)
    tensors = tensors_of(out)
    for seat in seats(plan, out):
        if seat.weight in readings:
            _update(out, widths, seat, numpy_helper.to_array(tensors[seat.weight]), readings[seat.weight], ~gone[seat.weight], weights)
    return out


def _update(proto: ModelProto, widths: Widths, seat: Seat, weight: np.ndarray, reading: Reading, kept: np.ndarray, weights: bool) -> None:
    sliced = seat.shape.matrix(weight)
    groups = sliced.shape[0]
    if sliced.shape[2] != kept.sum() or groups != reading.matrix.shape[0]:
        return  # the layer has lost something else besides
    whole = rows_that_stay(widths, seat, reading.matrix, sliced)
    if whole is None:
        return
    matrix = sliced
    if weights:
        sigma = reading.moment
        damping = DAMPING * reading.spread[:, None, None]
        left = sigma[:, kept][:, :, kept] + damping * np.eye(int(kept.sum()))
        cross = whole @ sigma[:, :, kept] + damping * sliced
        matrix = np.linalg.solve(left, cross.transpose(0, 2, 1)).transpose(0, 2, 1)
    shift = np.einsum("gof,gf->go", whole, reading.mean) - np.einsum("gof,gf->go", matrix, reading.mean[:, kept])
    bias = bias_of(proto, seat, shift.size) + shift.ravel()
    put(proto, seat, matrix if weights else None, bias)


def rows_that_stay(widths: Widths, seat: Seat, matrix: np.ndarray, sliced: np.ndarray) -> np.ndarray | None:
    """The original weights of the outputs that stay, (groups, out that stay, all features); None where they are not clear."""
    mask = outputs_left(widths, seat)
    if mask is None:
        return matrix if matrix.shape[1] == sliced.shape[1] else None
    rows = mask.reshape(matrix.shape[0], -1)
    if mask.size != matrix.shape[0] * matrix.shape[1] or (rows.sum(axis=1) != sliced.shape[1]).any():
        return None
    return np.stack([block[keep] for block, keep in zip(matrix, rows, strict=True)])

"""Linear bottlenecks, turned so that their last units say least: values and outputs, queries and keys of every attention head.

Between a layer A and a layer B with nothing but linear maps along other axes in between, any invertible R may go into A and its
inverse into B: y = (xA)B = (xAR)(R⁻¹B).  Queries and keys are the same with (xA)(x'B)ᵀ.  Of all R those are wanted after which the
first k units hold the best approximation of rank k: with the second moments Σ of what A makes and Γ of the other side (of queries:
of the keys; of values: B Bᵀ), and the singular values Σ^½ Γ^½ = U S Vᵀ,

    R = Σ^-½ U S^½,    R^-ᵀ = Σ^½ U S^-½,

both sides have the second moment S then (the balanced truncation of Moore 1981; CORP does the like for ViTs).  Every head has an R
of its own, so that unit j is the j-th best of each head, where otherwise it is a dimension of one head and has to go in all.

Nothing is taken on trust: what was turned is run, and what does not compute the same stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import ModelProto

from onnxprune.bottlenecks import Block, bottleneck
from onnxprune.errors import OnnxPruneError
from onnxprune.evidence import Evidence, Reading
from onnxprune.grouping import Grouping
from onnxprune.importer import Model
from onnxprune.linear import Geometry, linears, makes_along
from onnxprune.plans import Plan
from onnxprune.products import products, summed
from onnxprune.running import Arrays, Runner, distance
from onnxprune.seats import tensors_of, write
from onnxprune.trunks import channels

TOLERANCE = 1e-2  # standard deviations of the outputs, far below what a wrong R does


@dataclass(frozen=True)
class Turned:
    """A grouping whose bottlenecks are turned; scores {group: (units,) falling, the squares that each unit adds} of those."""

    grouping: Grouping
    evidence: Evidence
    scores: Mapping[int, np.ndarray] = field(default_factory=dict)

    def plan(self, plan: Plan) -> Plan:
        """The plan on the turned model: of a bottleneck the last units go, as many as the plan removes."""
        groups = {g.id: g.units for g in self.grouping.groups}
        last = {g: np.arange(groups[g] - len(units), groups[g]) for g, units in plan.remove.items() if g in self.scores}
        return replace(plan, grouping=replace(plan.grouping, model=self.grouping.model), remove={**plan.remove, **last})


def turned(grouping: Grouping, evidence: Evidence, feeds: Arrays) -> Turned:
    """Turn every linear bottleneck of a model; feeds: what is run to see that it still computes the same."""
    model = grouping.model
    layers, where = {layer.weight: layer for layer in linears(model)}, channels(grouping)
    every = products(model)
    found: dict[int, list[Block]] = {}
    for group in grouping.groups:
        if group.branch is None and len(group.leaves) == 1 and group.units > 1:
            mine = [product for product in every if summed(grouping, product, group) is not None]
            blocks = bottleneck(grouping, evidence, group, layers, mine, where.get(group.leaves[0], {}), feeds)
            if blocks:
                found[group.id] = blocks
    made = _same(model, found, feeds)
    if made is None:
        found = {g: blocks for g, blocks in found.items() if _same(model, {g: blocks}, feeds) is not None}
        made = _same(model, found, feeds) if found else None
    if made is None or not found:
        return Turned(grouping, evidence)
    scores = {g: np.sum([block.rotation[2] ** 2 for block in blocks], axis=0) for g, blocks in found.items()}
    return Turned(replace(grouping, model=made), _seen(made, evidence, found), scores)


def _same(model: Model, found: Mapping[int, Sequence[Block]], feeds: Arrays) -> Model | None:
    """The model with these blocks turned; None where it does not compute what it did."""
    arrays: dict[str, np.ndarray] = {}
    for block in (block for blocks in found.values() for block in blocks):
        matrices = block.rotation
        for sides, matrix in zip((block.left, block.right), matrices, strict=False):
            for side in sides:
                array = arrays.setdefault(side.tensor, np.array(model.array(side.tensor), np.float64))
                along = np.moveaxis(array, side.axis, -1)
                along[..., side.places] = along[..., side.places] @ matrix
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    tensors = tensors_of(proto)
    for name, array in arrays.items():
        write(tensors[name], array.astype(model.array(name).dtype))
    try:
        gap = distance(Runner(model.proto).run(feeds), Runner(proto).run(feeds))
    except OnnxPruneError:
        return None
    if not gap < TOLERANCE:
        return None
    return replace(
        model, proto=proto, tensors={name: tensors.get(name, tensor) for name, tensor in model.tensors.items()}, _arrays={}, sums={}
    )


def _seen(model: Model, evidence: Evidence, found: Mapping[int, Sequence[Block]]) -> Evidence:
    """The evidence of the turned model: what its layers read has turned with it."""
    part = _seen(model, evidence.part, found) if evidence.part else None
    layers = dict(evidence.layers)
    for block in (block for blocks in found.values() for block in blocks):
        rotation = block.rotation[0]
        for side in block.right:
            reading = layers.get(side.tensor)
            if reading is None or reading.layer is None:
                continue
            weight = model.array(side.tensor)
            shape = reading.layer.geometry(model.main[reading.layer.node], weight.ndim)
            if side.axis % weight.ndim != makes_along(shape):
                layers[side.tensor] = _read_turned(reading, side.places, weight, shape, rotation)
    for name, reading in layers.items():
        if reading.layer is not None:
            weight = model.array(name)
            layers[name] = replace(reading, matrix=reading.layer.geometry(model.main[reading.layer.node], weight.ndim).matrix(weight))
    readings = {
        group: tuple(
            replace(layers[r.layer.weight], features=r.features) if r.layer is not None and r.layer.weight in layers else r for r in some
        )
        for group, some in evidence.readings.items()
    }
    return replace(evidence, grouping=replace(evidence.grouping, model=model), readings=readings, layers=layers, part=part)


def _read_turned(reading: Reading, channels: np.ndarray, weight: np.ndarray, shape: Geometry, rotation: np.ndarray) -> Reading:
    """A reading some of whose input channels are multiplied by a matrix."""
    kernel = int(np.prod(weight.shape[2:])) if shape.op.startswith("Conv") else 1
    mean, covariance = reading.mean.copy(), reading.covariance.copy()
    for place in range(kernel):
        at = channels * kernel + place
        mean[:, at] = mean[:, at] @ rotation
        covariance[:, at] = rotation.T @ covariance[:, at]
        covariance[:, :, at] = covariance[:, :, at] @ rotation
    rms = np.sqrt(np.maximum(np.einsum("gff->gf", covariance), 0) + mean**2)
    return replace(reading, mean=mean, covariance=covariance, rms=rms)

"""Any network: what the groups claim holds, and pruning it gives a model that works and is the one that was planned."""

from __future__ import annotations

import onnx
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from onnx import ModelProto
from outside import distance, feeds_of, following, macs, permuted, run, shrunk
from random_graphs import models

import onnxprune
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import group
from onnxprune.importer import load

TOLERANCE = 1e-3  # standard deviations of the output


@settings(max_examples=600, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(models(), st.sampled_from((0.2, 0.33, 0.5)), st.integers(0, 99))
def test_random_network(model: ModelProto, ratio: float, seed: int) -> None:
    note("\n".join(onnx.printer.to_text(node) for node in model.graph.node))
    feeds = feeds_of(model)
    reference = run(model, feeds)
    content = group(load(model)).to_json()
    gap = distance(reference, run(permuted(model, content), feeds))
    assert gap <= TOLERANCE, f"not invariant under permutation: {gap}"
    try:
        result = onnxprune.prune(model, ratio, seed=seed)
    except OnnxPruneError as error:
        if error.exit_code == 3:  # nothing can be pruned
            return
        raise
    assert result.proof is not None
    assert not result.proof.frozen
    plan = result.plan.to_json()
    onnx.checker.check_model(result.model, full_check=True)
    assert not shrunk(model, result.model, plan)
    assert result.model.graph.input == model.graph.input
    assert result.model.graph.output == model.graph.output
    left = run(result.model, feeds)
    assert left["y"].shape == reference["y"].shape
    counted = macs(model, feeds), macs(result.model, feeds)
    assert result.macs[0] == counted[0]
    assert abs(result.macs[1] - counted[1]) <= 0.02 * counted[0]
    other = onnxprune.apply(permuted(model, plan), following(plan)).model
    gap = distance(left, run(other, feeds))
    assert gap <= TOLERANCE, f"does not commute: {gap}"

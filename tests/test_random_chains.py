"""Random chains of reshapes, transposes, splits and gathers between layers: what the groups claim holds from outside."""

from __future__ import annotations

import os

import onnx
from hypothesis import HealthCheck, given, note, settings
from onnx import ModelProto
from outside import distance, feeds_of, following, permuted, run, shrunk
from random_chains import chains
from test_backend_nodes import one_each

import onnxprune

TOLERANCE = 1e-3  # standard deviations of the output
EXAMPLES = int(os.environ.get("ONNXPRUNE_CHAINS", "400"))


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_random_chain(model: ModelProto) -> None:
    note("\n".join(onnx.printer.to_text(node) for node in model.graph.node))
    feeds = feeds_of(model)
    reference = run(model, feeds)
    content = onnxprune.groups(model, verify=False).to_json()
    gap = distance(reference, run(permuted(model, content), feeds))
    assert gap <= TOLERANCE, f"not invariant under permutation: {gap}"
    if not content["groups"]:
        return
    plan = one_each(content, content["groups"])
    pruned = onnxprune.apply(model, plan).model
    onnx.checker.check_model(pruned, full_check=True)
    assert not shrunk(model, pruned, plan)
    left = run(pruned, feeds)
    assert left["y"].shape == reference["y"].shape
    gap = distance(left, run(onnxprune.apply(permuted(model, plan), following(plan)).model, feeds))
    assert gap <= TOLERANCE, f"does not commute: {gap}"

"""Every op rule, on a small graph of its own: what it couples is judged by running models, not by the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from op_cases import BUGS, CASES, Case, places
from outside import covered, distance, feeds_of, following, masked, permuted, run, shrunk, tensors

import onnxprune
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.plans import Plan

PARAMETERS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.xfail(strict=True, reason=BUGS[case.name])] if case.name in BUGS else [])
    for case in CASES
]


def third(content: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan that takes a third of each of these groups."""
    rng = np.random.default_rng(7)
    chosen = {g["id"]: sorted(rng.choice(g["units"], max(1, g["units"] // 3), replace=False).tolist()) for g in groups}
    return content | {"groups": [g | {"remove": chosen.get(g["id"], [])} for g in content["groups"]]}


def pruned_by(model: ModelProto, plan: dict[str, Any], valid: bool) -> ModelProto:
    pruned = onnxprune.apply(model, plan).model
    if valid:
        onnx.checker.check_model(pruned, full_check=True)
    assert not shrunk(model, pruned, plan)
    return pruned


def inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    return [v for v in model.graph.input if v.name not in tensors(model)]


@pytest.mark.parametrize("case", PARAMETERS)
def test_rule(case: Case) -> None:
    judge(case)


def judge(case: Case) -> None:
    """What must be prunable is, in groups that permuting, pruning and masking bear out."""
    model = case.model()
    grouping = group(load(model))
    content = grouping.to_json()
    found = covered(content)
    for place, units in places(case.covers).items():
        assert place in found, f"{place} is fixed: {[f for f in content['fixed'] if f['tensor'] == place[0]]}"
        assert not units or sorted(found[place]) == units, f"{place}: groups of {found[place]} units instead of {units}"
    assert not set(places(case.leaves)) & set(found)
    if case.statistics is not None:
        assert {g["statistics"] for g in content["groups"]} == {case.statistics}
    if not content["groups"]:
        return
    plan = third(Plan(grouping, {}).to_json(), content["groups"])
    pruned = pruned_by(model, plan, case.valid)
    assert inputs(pruned) == inputs(model)
    assert pruned.graph.output == model.graph.output
    if not case.runs:
        return
    feeds, other = feeds_of(model), permuted(model, content)
    reference, left = run(model, feeds), run(pruned, feeds)
    assert distance(reference, run(other, feeds)) <= case.tolerance, "not invariant under permutation"
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in reference.items()}
    assert distance(left, run(pruned_by(other, following(plan), case.valid), feeds)) <= case.tolerance, "does not commute"
    plain = [g for g in content["groups"] if not g["statistics"]]
    if plain and case.masks:
        plan = third(plan, plain)
        assert distance(run(masked(model, plan), feeds), run(pruned_by(model, plan, case.valid), feeds)) <= case.tolerance, (
            "not as if masked"
        )

"""Every operator of onnx's own backend tests between two layers: what its rule claims holds, or the axis is fixed."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from backend_nodes import NEWEST, WEIGHT, Place, network, places
from outside import changed, distance, duplicate, following, gone, masked, permuted, run, tensors

import onnxprune
from onnxprune.errors import OnnxPruneError

FULL = bool(os.environ.get("ONNXPRUNE_FULL"))  # every axis of every case, some ten minutes
SHARE = 8  # else one in so many, and two axes of every operator
TOLERANCE = 2e-3  # standard deviations of an output


class UnableError(Exception):
    """onnxruntime has no kernel for the case, or its data is not made of tensors."""


def sample() -> Iterator[Place]:
    """One axis in SHARE, chosen by its name, and two axes of every operator."""
    seen: collections.Counter[str] = collections.Counter()
    for place in places():
        operator = place.proto.graph.node[0].op_type if len(place.proto.graph.node) == 1 else "expanded"
        rare = operator != "expanded" and seen[operator] < 2
        seen[operator] += 1
        if FULL or rare or zlib.crc32(place.id.encode()) % SHARE == 0:
            yield place


def released(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at an opset that onnxruntime knows."""
    copy = duplicate(model)
    for opset in copy.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = min(opset.version, NEWEST)
    copy.ir_version = min(copy.ir_version, 11)
    return copy


def case_network(place: Place) -> tuple[onnx.ModelProto, dict[str, Any], dict[str, np.ndarray]]:
    """The case between layers, its feeds and its outputs; raises UnableError with onnxruntime's reason."""
    proto = released(place.proto)
    names = [v.name for v in proto.graph.input]
    try:
        alone = run(proto, dict(zip(names, place.arrays, strict=True)))
        if not all(isinstance(v, np.ndarray) and v.dtype.kind in "fiub" for v in alone.values()):
            raise UnableError("outputs that are no numbers")
        model, feeds = network(place, [alone[v.name] for v in proto.graph.output])
        model = released(model)
        reference = run(model, feeds)
    except UnableError:
        raise
    except Exception as error:
        raise UnableError(str(error).splitlines()[0][:160]) from error
    if not all(np.isfinite(v).all() for v in reference.values()):
        raise UnableError("outputs that are not finite")
    return model, feeds, reference


def one_each(content: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan that takes a unit of each of these groups, one of every block where it has blocks."""
    ids = {g["id"] for g in groups}
    rng = np.random.default_rng(3)

    def chosen(group: dict[str, Any]) -> list[int]:
        return sorted(int(rng.choice(block)) for block in group.get("blocks") or [range(group["units"])])

    return content | {"groups": [g | {"remove": chosen(g) if g["id"] in ids else []} for g in content["groups"]]}


def masks(model: onnx.ModelProto, plan: dict[str, Any]) -> Iterator[onnx.ModelProto]:
    """Zeros where layers read what goes, zeros wherever it lives."""
    arrays = {name: onnx.numpy_helper.to_array(t).copy() for name, t in tensors(model).items() if name.startswith("z_read")}
    for (name, axis), indices in gone(plan).items():
        if name in arrays:
            np.moveaxis(arrays[name], axis, 0)[sorted(indices)] = 0
    yield changed(model, arrays)
    yield masked(model, plan)


def as_masked(model: onnx.ModelProto, content: dict[str, Any], groups: list[dict[str, Any]], feeds: dict[str, Any]) -> float:
    """How far the model without a unit of each group is from the masked one."""
    plan = one_each(content, groups)
    left, gaps = run(onnxprune.apply(model, plan, feeds=feeds).model, feeds), [float("inf")]
    for mask in masks(model, plan):
        with contextlib.suppress(Exception):  # an integer division by the zeros
            gaps.append(distance(run(mask, feeds), left))
    return min(gaps)


def judged(place: Place) -> tuple[str, str]:
    """("prunable" | "fixed" | "refused" | "wrong", what is wrong)."""
    model, feeds, reference = case_network(place)
    try:
        content = json.loads(json.dumps(onnxprune.groups(model, feeds=feeds, verify=False).to_json()))
    except OnnxPruneError as error:
        return "refused", str(error)
    groups = content["groups"]
    if not groups:
        return "fixed", ""
    try:
        gap = distance(reference, run(permuted(model, content), feeds))
    except Exception as error:
        return "wrong", f"permuted, it does not run: {str(error)[:200]}"
    if not gap <= TOLERANCE:
        return "wrong", f"not invariant under permutation: {gap:.2g}"
    plan = one_each(content, groups)
    try:
        left = run(onnxprune.apply(model, plan, feeds=feeds).model, feeds)
        right = run(onnxprune.apply(permuted(model, plan), following(plan), feeds=feeds).model, feeds)
    except OnnxPruneError as error:
        return "refused", str(error)
    except Exception as error:
        return "wrong", f"pruned, it does not run: {str(error)[:200]}"
    if {k: v.shape for k, v in left.items()} != {k: v.shape for k, v in reference.items()}:
        return "wrong", "other shapes"
    if not distance(left, right) <= TOLERANCE:
        return "wrong", f"does not commute: {distance(left, right):.2g}"
    plain = [g for g in groups if not g["statistics"]]
    if plain and not (gap := as_masked(model, content, plain, feeds)) <= TOLERANCE:
        # a zero before an exponential, a quantized zero: the proof has to find and mark such groups
        proof = onnxprune.apply(model, one_each(content, plain), feeds=feeds, verify=True).proof
        plain = [g for g in plain if proof and g["id"] not in proof.statistics]
        if plain and not (gap := as_masked(model, content, plain, feeds)) <= TOLERANCE:
            return "wrong", f"not as if masked: {gap:.2g}"
    here = {(m["tensor"], m["axis"]) for g in groups for m in g["members"]}
    return ("prunable" if (WEIGHT, 1) in here else "fixed"), ""


def test_backend_nodes() -> None:
    states: dict[str, list[str]] = collections.defaultdict(list)
    operators: dict[str, set[str]] = collections.defaultdict(set)
    for place in sample():
        try:
            state, what = judged(place)
        except UnableError as error:
            state, what = "skipped", str(error)
        except Exception as error:
            state, what = "crashed", repr(error)
        states[state].append(f"{place.id}: {what}")
        operators[state].update(place.operators if len(place.proto.graph.node) == 1 else ())
    if FULL:
        path = os.environ["ONNXPRUNE_FULL"]
        with open(path, "w") as file:
            json.dump(states, file, indent=1)
    print({state: len(found) for state, found in states.items()})
    assert not states["crashed"]
    assert not states["wrong"]
    assert len(states["prunable"]) >= (2000 if FULL else 200)
    assert len(operators["prunable"]) >= 100

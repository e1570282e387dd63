"""Sizes that agree by chance, names that are taken, operators that look like their simpler kin, plans edited amiss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from outside import Weight, build, covered, distance, feeds_of, following, masked, permuted, run, shrunk, tensors

import onnxprune
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.shuffles import find_shuffles

SIZES = (1, 2, 3, 4, 6)
LAYERS: dict[str, Weight] = {"w1": (6, 8), "w2": (8, 4), "g": (8,)}


def shuffled(there: list[int], perm: list[int], back: list[int]) -> ModelProto:
    body = f"a = MatMul (x, w1) s = Reshape (a, there) t = Transpose <perm={perm}> (s) m = Reshape (t, back) "
    body += "n = LayerNormalization (m, g, g) y = MatMul (n, w2)"
    return build("float[B,6] x", body, "float y", {**LAYERS, "there": there, "back": back})


# name: target of the first Reshape, Transpose, target of the last, the batch of the proof
CHANCE = {
    "a batch of 2 is the first factor": ([2, -1, 4], [0, 2, 1], [-1, 8], 2),
    "a batch of 2 is the first axis": ([2, 2, -1], [0, 2, 1], [-1, 8], 2),
    "a batch of 1 goes among the channels": ([-1, 2, 4], [2, 0, 1], [-1, 8], 1),
}


@pytest.mark.parametrize(("there", "perm", "back", "batch"), CHANCE.values(), ids=CHANCE.keys())
def test_a_shuffle_at_one_batch_alone_is_none(there: list[int], perm: list[int], back: list[int], batch: int) -> None:
    model = shuffled(there, perm, back)
    shapes = {"x": (batch, 6)}
    assert not find_shuffles(load(model, input_shapes=shapes))
    content = onnxprune.groups(model, input_shapes=shapes).to_json()
    for size in SIZES:
        feeds = feeds_of(model, symbolic=size)
        assert distance(run(model, feeds), run(permuted(model, content), feeds)) < 1e-4
    if not content["groups"]:
        with pytest.raises(OnnxPruneError, match="permutation test fails"):
            onnxprune.prune(model, 0.4, input_shapes=shapes)
        return
    result = onnxprune.prune(model, 0.4, input_shapes=shapes)
    plan = result.plan.to_json()
    other = onnxprune.apply(permuted(model, plan), following(plan)).model
    for size in SIZES:
        feeds = feeds_of(model, symbolic=size)
        assert distance(run(result.model, feeds), run(other, feeds)) < 1e-4


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("there", "back"), [([-1, 2, 4], [-1, 8]), ([0, 2, 4], [0, -1]), ([0, -1, 4], [0, 8])])
def test_a_shuffle_at_every_batch_is_one(there: list[int], back: list[int], batch: int) -> None:
    model = shuffled(there, [0, 2, 1], back)
    shapes = {"x": (batch, 6)}
    assert len(find_shuffles(load(model, input_shapes=shapes))) == 1
    content = group(load(model, input_shapes=shapes)).to_json()
    assert [g["units"] for g in content["groups"]] == [8]
    pruned = onnxprune.prune(model, 0.4, input_shapes=shapes).model
    other = onnxprune.prune(model, 0.4, input_shapes={"x": (5, 6)}).model
    for size in SIZES:
        feeds = feeds_of(model, symbolic=size)
        assert distance(run(model, feeds), run(permuted(model, content), feeds)) < 1e-4
        assert distance(run(pruned, feeds), run(other, feeds)) < 1e-6


def test_a_shuffle_at_one_length_alone_is_none() -> None:
    body = "a = Conv (x, k1) s = Reshape (a, there) t = Transpose <perm=[0,2,1,3]> (s) m = Reshape (t, back) y = Conv (m, k2)"
    weights: dict[str, Weight] = {"k1": (8, 6, 1), "k2": (5, 8, 1), "there": [-1, 2, 4, 2], "back": [-1, 8, 2]}
    model = build("float[B,6,T] x", body, "float y", weights)
    assert not find_shuffles(load(model))
    assert find_shuffles(load(build("float[B,6,2] x", body, "float y", weights)))


@pytest.mark.parametrize("name", ["s", "s@0", "s@1"])
def test_copies_of_a_shared_tensor_take_no_name_of_a_body(name: str) -> None:
    body = "a = MatMul (x, w1) b = Add (a, s) c = Relu (b) d = MatMul (c, w2) e = Add (d, s) k = ReduceMean <keepdims=0> (e) "
    body += "g = Greater (k, zero) y = If (g) <then_branch = t () => (float[B,4] u) { v = MatMul (e, w3) u = Add (v, own) }, "
    body += "else_branch = f () => (float[B,4] w) { w = MatMul (e, w3) }>"
    weights: dict[str, Weight] = {"w1": (6, 8), "w2": (8, 8), "w3": (8, 4), "s": np.full(8, 0.5, np.float32)}
    model = build("float[B,6] x", body, "float y", {**weights, "zero": np.array(0, np.float32)}).SerializeToString()
    model = onnx.load_from_string(model)
    branch = next(a.g for n in model.graph.node for a in n.attribute if a.name == "then_branch")
    branch.initializer.append(numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), name))
    branch.node[1].input[1] = name
    plan = onnxprune.plan(model, 0.4).to_json()
    assert {("w1", 1), ("w2", 0), ("w2", 1), ("w3", 0)} <= set(covered(plan))
    pruned = onnxprune.apply(model, plan).model
    assert not shrunk(model, pruned, plan)
    for seed in range(4):
        feeds = feeds_of(model, seed)
        plain = {**plan, "groups": [g for g in plan["groups"] if not g["statistics"]]}
        if any(g["remove"] for g in plain["groups"]):
            assert distance(run(masked(model, plain), feeds), run(onnxprune.apply(model, plain).model, feeds)) < 1e-4
        assert run(pruned, feeds)["y"].shape == run(model, feeds)["y"].shape


TOKENS: dict[str, Weight] = {"t1": (5, 7), "t2": (7, 4)}


@pytest.mark.parametrize(
    ("inputs", "layer", "weights", "opset"),
    [
        ("float[B,6,5] x", "ConvTranspose <kernel_shape=[1], output_shape=[7]> (a, k)", {"k": (6, 6, 1)}, 17),
        ("float[2,6,3,5] x", "DeformConv <kernel_shape=[1,1]> (a, k, off)", {"k": (6, 6, 1, 1), "off": (2, 2, 3, 7)}, 19),
    ],
    ids=["output_shape", "offsets"],
)
def test_a_kernel_of_one_place_that_does_not_go_place_by_place(inputs: str, layer: str, weights: dict[str, Weight], opset: int) -> None:
    model = build(inputs, f"a = MatMul (x, t1) c = {layer} y = MatMul (c, t2)", "float y", {**TOKENS, **weights}, opset)
    assert not {("t1", 1), ("t2", 0)} & set(covered(group(load(model)).to_json()))


def test_a_branch_over_its_own_norm_is_not_zero() -> None:
    weights: dict[str, Weight] = {"w1": (8, 8), "w2": (8, 8), "v": (8,)}
    start = "h = MatMul (x, w1) r = Relu (h) p = MatMul (r, w2) "
    own = build("float[B,8] x", start + "n = ReduceL2 <axes=[1]> (p) q = Div (p, n) t = Add (x, q) y = Relu (t)", "float y", weights)
    constant = build("float[B,8] x", start + "q = Div (p, v) t = Add (x, q) y = Relu (t)", "float y", weights)
    other = build("float[B,8] x", start + "n = Softplus (h) q = Div (p, n) t = Add (x, q) y = Relu (t)", "float y", weights)
    kinds = [[g.kind for g in onnxprune.groups(model, verify=False).groups] for model in (own, constant, other)]
    assert ["block" in kind for kind in kinds] == [False, True, True]
    cut = onnxprune.prune(constant, 0.9, granularity="block")
    assert "w2" not in tensors(cut.model)


EDITS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a group twice": lambda plan: plan | {"groups": [*plan["groups"], plan["groups"][0] | {"remove": [7]}]},
    "units that are not its places": lambda plan: plan | {"groups": [g | {"units": 1, "remove": [0]} for g in plan["groups"]]},
    "options that are a list": lambda plan: plan | {"options": [1]},
    "shapes that are a list": lambda plan: plan | {"shapes": [1]},
    "a shape that is a number": lambda plan: plan | {"shapes": {"w1": 8}},
    "an input shape that is a number": lambda plan: plan | {"options": {"input_shapes": {"x": 3}}},
    "a size that is a text": lambda plan: plan | {"options": {"input_shapes": {"x": ["B", 6]}}},
    "allow_io that is a number": lambda plan: plan | {"options": {"allow_io": 3}},
    "reached that is a text": lambda plan: plan | {"reached": "half"},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_plans_edited_amiss_are_refused(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    model = build("float[B,6] x", "a = MatMul (x, w1) b = Relu (a) y = MatMul (b, w2)", "float y", {"w1": (6, 8), "w2": (8, 4)})
    plan = onnxprune.plan(model, 0.4).to_json()
    with pytest.raises(OnnxPruneError) as failure:
        onnxprune.apply(model, edit(plan))
    assert failure.value.exit_code == 2
    assert "\n" not in str(failure.value)

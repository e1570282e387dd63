"""A residual stream turned into its principal components computes the same, and what it does not need may be sliced off."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import EVAL, MODELS, SHARED, Command
from onnx import ModelProto
from outside import Weight, build, run

import onnxprune
from onnxprune.calibration import read_calibration
from onnxprune.criteria import criterion
from onnxprune.equivalence import distortion
from onnxprune.errors import OnnxPruneError
from onnxprune.fidelity import fidelity
from onnxprune.grouping import Grouping, group
from onnxprune.importer import load
from onnxprune.rewriter import rewrite
from onnxprune.rotation import Rotated, helmert, principal, rotate
from onnxprune.running import distance

WIDTH, VOCABULARY = 16, 11
EPSILON = 0.2  # large, so that a wrong one shows


def norm_text(kind: str, x: str, y: str, scale: str, shift: str) -> str:
    """A norm of x over its last axis as exporters write it."""
    texts = {
        "LayerNormalization": f"{y} = LayerNormalization <axis = -1, epsilon = {EPSILON}> ({x}, {scale}, {shift})",
        "SimplifiedLayerNormalization": f"{y} = SimplifiedLayerNormalization <axis = -1, epsilon = {EPSILON}> ({x}, {scale})",
        "torch LayerNorm": f"""
            {y}m = ReduceMean <axes = [-1]> ({x})
            {y}c = Sub({x}, {y}m)
            {y}s = Pow({y}c, two)
            {y}v = ReduceMean <axes = [-1]> ({y}s)
            {y}e = Add({y}v, epsilon)
            {y}r = Sqrt({y}e)
            {y}d = Div({y}c, {y}r)
            {y}g = Mul({y}d, {scale})
            {y} = Add({y}g, {shift})""",
        "torch RMSNorm": f"""
            {y}s = Pow({x}, two)
            {y}v = ReduceMean <axes = [-1]> ({y}s)
            {y}e = Add({y}v, epsilon)
            {y}q = Sqrt({y}e)
            {y}r = Reciprocal({y}q)
            {y}d = Mul({x}, {y}r)
            {y} = Mul({scale}, {y}d)""",
        "flax LayerNorm": f"""
            {y}m = ReduceMean <axes = [-1]> ({x})
            {y}k = Mul({x}, {x})
            {y}s = ReduceMean <axes = [-1]> ({y}k)
            {y}n = Mul({y}m, {y}m)
            {y}v = Sub({y}s, {y}n)
            {y}e = Add({y}v, epsilon)
            {y}q = Sqrt({y}e)
            {y}r = Reciprocal({y}q)
            {y}g = Mul({y}r, {scale})
            {y}c = Sub({x}, {y}m)
            {y}d = Mul({y}c, {y}g)
            {y} = Add({y}d, {shift})""",
        "keras LayerNormalization": f"""
            {y}m = ReduceMean <axes = [-1]> ({x})
            {y}c = Sub({x}, {y}m)
            {y}s = Mul({y}c, {y}c)
            {y}v = ReduceMean <axes = [-1]> ({y}s)
            {y}e = Add({y}v, epsilon)
            {y}q = Sqrt({y}e)
            {y}r = Reciprocal({y}q)
            {y}g = Mul({y}r, {scale})
            {y}d = Mul({x}, {y}g)
            {y}t = Mul({y}m, {y}g)
            {y}b = Sub({shift}, {y}t)
            {y} = Add({y}d, {y}b)""",
        "no scale": f"""
            {y}s = Mul({x}, {x})
            {y}v = ReduceMean <axes = [-1]> ({y}s)
            {y}e = Add({y}v, epsilon)
            {y}q = Sqrt({y}e)
            {y} = Div({x}, {y}q)""",
    }
    return texts[kind]


NORMS = [
    *("LayerNormalization", "SimplifiedLayerNormalization", "torch LayerNorm", "torch RMSNorm", "flax LayerNorm"),
    *("keras LayerNormalization", "no scale"),
]


def transformer(kind: str, rank: int = WIDTH, seed: int = 0) -> ModelProto:
    """Tokens -> embeddings and positions -> attention -> MLP, pre-norm, with LayerScale -> norm -> logits.

    All that is written to the stream lies in `rank` of its directions.  Keys and logits have no bias.
    """
    rng = np.random.default_rng(seed)
    inside = rng.standard_normal((rank, WIDTH)) / np.sqrt(rank)

    def written(rows: int) -> np.ndarray:
        return np.float32(rng.standard_normal((rows, rank)) @ inside)

    scale = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    weights: dict[str, Weight] = {
        "table": written(VOCABULARY),
        "positions": written(5)[None],
        "wo": written(8) / 2,
        "bo": written(1)[0],
        "w2": np.float32(written(12) / scale / 3),  # scaled again by `scale`
        "b2": np.float32(written(1)[0] / scale),
        "layerscale": scale,
        "two": np.array(2, np.float32),
        "epsilon": np.array(EPSILON, np.float32),
        **{name: rng.standard_normal((WIDTH, 8)).astype(np.float32) / 3 for name in ("wq", "wk", "wv")},
        **{name: rng.standard_normal(8).astype(np.float32) for name in ("bq", "bv")},
        "w1": rng.standard_normal((12, WIDTH)).astype(np.float32) / 3,
        "b1": (12,),
        "head": rng.standard_normal((WIDTH, VOCABULARY)).astype(np.float32) / 3,
        **{f"g{i}": (WIDTH,) for i in range(3)},
        **{f"s{i}": rng.standard_normal(WIDTH).astype(np.float32) for i in range(3)},
        "flat": [-1, WIDTH],
        "unflat": [-1, 5, WIDTH],
    }
    body = f"""
        e = Gather(table, tokens)
        x0 = Add(e, positions)
        {norm_text(kind, "x0", "n0", "g0", "s0")}
        q0 = MatMul(n0, wq)  q = Add(q0, bq)
        k = MatMul(n0, wk)
        v0 = MatMul(n0, wv)  v = Add(v0, bv)
        kt = Transpose <perm = [0, 2, 1]> (k)
        a0 = MatMul(q, kt)  a = Softmax <axis = -1> (a0)
        o0 = MatMul(a, v)  o1 = MatMul(o0, wo)  o = Add(o1, bo)
        x1 = Add(x0, o)
        {norm_text(kind, "x1", "n1", "g1", "s1")}
        f = Reshape(n1, flat)
        h0 = Gemm <transB = 1> (f, w1, b1)  h = Relu(h0)
        m0 = Gemm(h, w2, b2)
        m1 = Reshape(m0, unflat)
        m = Mul(layerscale, m1)
        x2 = Add(m, x1)
        {norm_text(kind, "x2", "n2", "g2", "s2")}
        logits = MatMul(n2, head)"""
    used = {name: w for name, w in weights.items() if name in body.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    return build("int64[N, 5] tokens", body, f"float[N, 5, {VOCABULARY}] logits", used)


def tokens(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(seed).integers(0, VOCABULARY, (count, 5))}


def turned(model: ModelProto, samples: Sequence[dict[str, np.ndarray]], tensor: str = "") -> tuple[Grouping, Rotated]:
    """All streams turned, or the one that has the tensor."""
    grouping = group(load(model, samples[0]))
    only = {g.id for g in grouping.groups if any(m.tensor == tensor for m in g.members)} if tensor else None
    return grouping, rotate(grouping, samples, only=only)


def sliced(rotated: Rotated, feeds: dict[str, np.ndarray], keep: int) -> ModelProto:
    """The rotated model with `keep` channels, those of the largest scores, in its only stream."""
    grouping = group(load(rotated.model, feeds))
    ((one, scores),) = rotated.scores_in(grouping).items()
    return rewrite(grouping, {one: np.sort(np.argsort(scores)[: len(scores) - keep])})


def off(model: ModelProto, other: ModelProto, feeds: dict[str, np.ndarray]) -> float:
    return distance(run(model, feeds), run(other, feeds))


@pytest.mark.parametrize("kind", NORMS)
def test_a_turned_stream_computes_the_same(kind: str) -> None:
    model = transformer(kind)
    grouping, rotated = turned(model, [tokens(8), tokens(8, 1)])
    stream, values = (next(g.id for g in grouping.groups if any(m.tensor == name for m in g.members)) for name in ("table", "bv"))
    assert sorted(rotated.scores) == sorted([stream, values])  # the values of a single head are only mixed and read as well
    assert off(model, rotated.model, tokens(3, 2)) < 1e-3
    tables = [onnx.numpy_helper.to_array(t) for m in (model, rotated.model) for t in m.graph.initializer if t.name == "table"]
    assert np.abs(tables[0] - tables[1]).max() > 0.1
    assert [v.name for v in rotated.model.graph.output] == ["logits"]


@pytest.mark.parametrize("kind", NORMS)
def test_what_the_stream_does_not_need_is_lost_without_trace(kind: str) -> None:
    model, samples = transformer(kind, rank=6), [tokens(16), tokens(16, 1)]
    _, rotated = turned(model, samples, "table")
    keep = 6 if kind in ("SimplifiedLayerNormalization", "torch RMSNorm", "no scale") else 7  # and the mean
    pruned = sliced(rotated, samples[0], keep)
    assert any(keep in t.dims for t in pruned.graph.initializer)
    assert off(model, rotated.rescaled(pruned), tokens(3, 2)) < 1e-3
    assert off(model, pruned, tokens(3, 2)) > 1e-2  # the norms divide by another number of channels
    assert off(model, rotated.rescaled(sliced(rotated, samples[0], keep - 1)), tokens(3, 2)) > 1e-2


def test_the_scores_fall_with_what_each_channel_carries() -> None:
    model, samples = transformer("torch RMSNorm", rank=6), [tokens(16), tokens(16, 1)]
    _, rotated = turned(model, samples, "table")
    (scores,) = rotated.scores.values()
    assert (np.diff(scores) < 0).all()
    assert scores[6:].sum() < 1e-5 * scores.sum() < scores[5]


def test_no_node_is_added_where_biases_exist_and_an_add_where_none_does() -> None:
    for kind, more in (("torch RMSNorm", 0), ("LayerNormalization", 2)):  # keys and logits
        model = transformer(kind)
        _, rotated = turned(model, [tokens(8)])
        assert len(rotated.model.graph.node) == len(model.graph.node) + more


def test_a_tied_embedding_is_two_tensors_if_the_scale_of_the_last_norm_has_to_go_into_one() -> None:
    body = f"""
        x = Gather(table, tokens)
        {norm_text("torch RMSNorm", "x", "n", "g", "")}
        turn = Transpose <perm = [1, 0]> (table)
        logits = MatMul(n, turn)"""
    for scale, apart in ((np.ones(WIDTH, np.float32), ()), (np.arange(1, WIDTH + 1, dtype=np.float32), ("table",))):
        weights: dict[str, Weight] = {
            "table": (VOCABULARY, WIDTH),
            "g": scale,
            "two": np.array(2, np.float32),
            "epsilon": np.array(EPSILON, np.float32),
        }
        model = build("int64[N, 5] tokens", body, f"float[N, 5, {VOCABULARY}] logits", weights)
        _, rotated = turned(model, [tokens(8)])
        assert rotated.apart == apart
        assert len(rotated.scores) == 1
        assert off(model, rotated.model, tokens(3, 2)) < 1e-3
        assert off(model, rotated.rescaled(rotated.model), tokens(3, 2)) < 1e-3


def image(body: str, weights: dict[str, Weight], shape: str = "N, 10") -> tuple[ModelProto, dict[str, np.ndarray]]:
    model = build("float[N, 3, 8, 8] x", body, f"float[{shape}] y", weights)
    return model, {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}


def test_patches_a_class_token_positions_and_a_mean_over_tokens() -> None:
    body = """
        p0 = Conv <strides = [4, 4]> (x, patch, patch_bias)
        p1 = Reshape(p0, flat)
        p2 = Transpose <perm = [0, 2, 1]> (p1)
        n = Shape <start = 0, end = 1> (x)
        size = Concat <axis = 0> (n, rest)
        c = Expand(token, size)
        p3 = Concat <axis = 1> (c, p2)
        s0 = Add(p3, positions)
        l0 = LayerNormalization <axis = -1> (s0, g0, b0)
        h0 = MatMul(l0, w1)  h1 = Add(h0, b1)  h2 = Gelu(h1)
        h3 = MatMul(h2, w2)  h4 = Add(h3, b2)
        s1 = Add(s0, h4)
        l1 = LayerNormalization <axis = -1> (s1, g1, b1n)
        m = ReduceMean <keepdims = 0> (l1, axis)
        y = Gemm <transB = 1> (m, head, bias)"""
    weights: dict[str, Weight] = {
        "patch": (12, 3, 4, 4),
        "patch_bias": (12,),
        "flat": [0, 12, 4],
        "rest": [1, 12],
        "token": (1, 1, 12),
        "positions": (1, 5, 12),
        "w1": (12, 20),
        "b1": (20,),
        "w2": (20, 12),
        "b2": (12,),
        "axis": [1],
        "head": (10, 12),
        "bias": (10,),
        **dict.fromkeys(("g0", "b0", "g1", "b1n"), (12,)),
    }
    model = build("float[N, 3, 8, 8] x", body, "float[N, 10] y", weights, opset=20)
    feeds = {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}
    _, rotated = turned(model, [feeds])
    assert [len(scores) for scores in rotated.scores.values()] == [12]
    assert off(model, rotated.model, feeds) < 1e-3
    assert len(rotated.model.graph.node) == len(model.graph.node)


def test_linear_bottlenecks_turn_without_a_norm() -> None:
    body = """
        a = Conv (x, w0, b0)
        h0 = Conv <pads = [1, 1, 1, 1]> (a, w1, b1)  h = Relu(h0)
        o = Conv (h, w2)
        s = Add(a, o)
        z0 = Conv (s, w3)  z = Relu(z0)
        y = Conv (z, w4)"""
    weights: dict[str, Weight] = {"w0": (6, 3, 1, 1), "b0": (6,), "w1": (9, 6, 3, 3), "b1": (9,), "w2": (6, 9, 1, 1), "w3": (7, 6, 1, 1)}
    model, feeds = image(body, weights | {"w4": (4, 7, 1, 1)}, "N, 4, 8, 8")
    _, rotated = turned(model, [feeds])
    assert [len(scores) for scores in rotated.scores.values()] == [6]
    assert off(model, rotated.model, feeds) < 1e-3


@pytest.mark.parametrize("bias", ["", ", b1"])
def test_batch_norms_behind_the_layers_go_into_them(bias: str) -> None:
    body = f"""
        a0 = Conv (x, w0{bias})  a = BatchNormalization <epsilon = 0.1> (a0, g0, s0, m0, v0)
        h0 = Conv (a, w1)  h = Relu(h0)
        o0 = Conv (h, w2)  o = BatchNormalization (o0, g1, s1, m1, v1)
        s = Add(a, o)
        z0 = Conv (s, w3)  z = Relu(z0)
        y = Conv (z, w4)"""
    weights: dict[str, Weight] = {"w0": (6, 3, 1, 1), "w1": (9, 6, 1, 1), "w2": (6, 9, 1, 1), "w3": (7, 6, 1, 1), "w4": (4, 7, 1, 1)}
    weights |= {f"{name}{i}": (6,) for name in "gsmv" for i in range(2)} | ({"b1": (6,)} if bias else {})
    model, feeds = image(body, weights, "N, 4, 8, 8")
    _, rotated = turned(model, [feeds])
    assert [len(scores) for scores in rotated.scores.values()] == [6]
    assert off(model, rotated.model, feeds) < 1e-3
    other = {"x": feeds["x"] * 3 + 1}
    assert off(model, rotated.model, other) < 1e-3


def test_layers_from_one_stream_to_another_and_back_into_their_own() -> None:
    """Their weights turn along both axes, and the shifts that they read become biases that turn as well."""
    body = f"""
        a0 = Gather(table, tokens)
        {norm_text("LayerNormalization", "a0", "n0", "g0", "s0")}
        o0 = MatMul(n0, own)  o1 = Mul(o0, layerscale)
        a1 = Add(a0, o1)
        {norm_text("LayerNormalization", "a1", "n1", "g1", "s1")}
        b0 = Gather(other, tokens)
        c = MatMul(n1, cross)
        b1 = Add(b0, c)
        {norm_text("torch RMSNorm", "b1", "n2", "g2", "")}
        logits = MatMul(n2, head)"""
    weights: dict[str, Weight] = {
        "table": (VOCABULARY, WIDTH),
        "other": (VOCABULARY, 12),
        "own": (WIDTH, WIDTH),
        "cross": (WIDTH, 12),
        "head": (12, VOCABULARY),
        **dict.fromkeys(("g0", "s0", "g1", "s1", "layerscale"), (WIDTH,)),
        "g2": (12,),
        "two": np.array(2, np.float32),
        "epsilon": np.array(EPSILON, np.float32),
    }
    model = build("int64[N, 5] tokens", body, f"float[N, 5, {VOCABULARY}] logits", weights)
    samples = [tokens(16), tokens(16, 1)]
    for tensor in ("table", "other", ""):
        _, rotated = turned(model, samples, tensor)
        assert {len(scores) for scores in rotated.scores.values()} >= {16 if tensor == "table" else 12}
        assert off(model, rotated.model, tokens(3, 2)) < 1e-3
    again = group(load(rotated.model, samples[0]))
    assert len(rotated.scores_in(again)) == 2


def test_a_turned_and_sliced_model_may_be_turned_again() -> None:
    model, samples = transformer("LayerNormalization", rank=6), [tokens(16), tokens(16, 1)]
    _, first = turned(model, samples, "table")
    smaller = first.rescaled(sliced(first, samples[0], 10))
    _, second = turned(smaller, samples, "table")
    smallest = second.rescaled(sliced(second, samples[0], 7))
    assert off(model, smallest, tokens(3, 2)) < 1e-3


def test_skip_layer_normalization_and_a_gemm_whose_bias_is_switched_off() -> None:
    body = f"""
        x0 = Gather(table, tokens)
        n0 = LayerNormalization <axis = -1, epsilon = {EPSILON}> (x0, g0, s0)
        h0 = MatMul(n0, w1)  h = Relu(h0)  o = MatMul(h, w2)
        n1 = Identity(o)
        f = Reshape(n1, flat)
        l = Gemm <beta = 0.0> (f, head)
        logits = Reshape(l, unflat)"""
    weights: dict[str, Weight] = {
        "table": (VOCABULARY, WIDTH),
        "w1": (WIDTH, 12),
        "w2": (12, WIDTH),
        "head": (WIDTH, VOCABULARY),
        **dict.fromkeys(("g0", "s0", "g1", "s1", "b"), (WIDTH,)),
        "flat": [-1, WIDTH],
        "unflat": [-1, 5, VOCABULARY],
    }
    model = build("int64[N, 5] tokens", body, f"float[N, 5, {VOCABULARY}] logits", weights)
    node = next(n for n in model.graph.node if n.output[0] == "n1")
    fused = onnx.helper.make_node(
        "SkipLayerNormalization", ["o", "x0", "g1", "s1", "b"], ["n1", "", "", "x1"], domain="com.microsoft", epsilon=EPSILON
    )
    node.CopyFrom(fused)
    samples = [tokens(16), tokens(16, 1)]
    _, rotated = turned(model, samples, "table")
    assert len(rotated.scores) == 1
    assert off(model, rotated.model, tokens(3, 2)) < 1e-3
    full = rotated.rescaled(sliced(rotated, samples[0], WIDTH - 1))
    assert 0 < off(model, full, tokens(3, 2)) < 1


def test_half_precision_turns_within_its_rounding() -> None:
    model = transformer("LayerNormalization")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    _, rotated = turned(model, [tokens(8), tokens(8, 1)], "table")
    assert len(rotated.scores) == 1
    assert {t.data_type for t in rotated.model.graph.initializer} == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert off(model, rotated.model, tokens(3, 2)) < 5e-2


def test_a_trained_network_keeps_more_of_its_outputs_than_by_the_size_of_weights() -> None:
    model = onnx.load(MODELS / "digits-mobilenet.onnx")
    images = np.load(MODELS / "digits-images.calibration.npz")["input"]
    feeds = {"input": np.load(MODELS / EVAL["digits-mobilenet"])["input"]}
    grouping, rotated = turned(model, [{"input": images[i : i + 64]} for i in range(0, 256, 64)])
    assert len(rotated.scores) == 2
    again = group(load(rotated.model, {"input": images[:8]}))
    sizes = {g.id: criterion.get("l2")(grouping.model, g, np.random.default_rng(0)) for g in grouping.groups if g.id in rotated.scores}
    lost = []
    for one, scores in ((grouping, sizes), (again, rotated.scores_in(again))):
        remove = {i: np.sort(np.argsort(s)[: int(0.3 * len(s))]) for i, s in scores.items()}
        pruned = rewrite(one, remove)
        lost.append(distortion(run(model, feeds), run(rotated.rescaled(pruned) if one is again else pruned, feeds)))
    assert lost[1] < 0.1 * lost[0]


POST_NORM = """
    h = MatMul(x0, w1)  r = Relu(h)  o = MatMul(r, w2)  s = Add(x0, o)
    n = LayerNormalization <axis = -1> (s, g, b)
    h2 = MatMul(n, w3)  r2 = Relu(h2)  o2 = MatMul(r2, w4)  s2 = Add(n, o2)
    z = LayerNormalization <axis = -1> (s2, g2, b2)
    y = MatMul(z, head)"""
PER_CHANNEL = "s = Mul(x0, g)  o = MatMul(s, w1)  r = Relu(o)  o2 = MatMul(r, w2)  t = Add(s, o2)  y = MatMul(t, head)"
NONLINEAR = "r = Relu(x0)  o = MatMul(r, w1)  o1 = Relu(o)  o2 = MatMul(o1, w2)  t = Add(r, o2)  y = MatMul(t, head)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [(POST_NORM, "post-norm"), (PER_CHANNEL.replace("x0, g", "r0, g"), "scaled a channel"), (NONLINEAR, "Relu")],
)
def test_streams_that_may_not_turn_say_why(body: str, reason: str) -> None:
    body = "e = MatMul(x, w0) r0 = Identity(e) x0 = Add(r0, r0)" + body
    weights: dict[str, Weight] = {"w0": (4, 8), "head": (8, 3), **{f"w{i}": ((8, 12), (12, 8))[1 - i % 2] for i in range(1, 5)}}
    weights |= dict.fromkeys(("g", "b", "g2", "b2"), (8,))
    used = {name: w for name, w in weights.items() if f" {name}" in body.replace(")", " )").replace("(", "( ")}
    model = build("float[N, 4] x", body, "float[N, 3] y", used)
    feeds = {"x": np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)}
    grouping, rotated = turned(model, [feeds])
    stream = next(g.id for g in grouping.groups if any(m.tensor == "head" and m.axis == 0 for m in g.members))
    assert reason in rotated.skipped[stream]
    assert stream not in rotated.scores


def test_samples_are_needed() -> None:
    grouping = group(load(transformer("torch RMSNorm"), tokens(2)))
    with pytest.raises(OnnxPruneError, match="--calibration"):
        rotate(grouping, [])


def test_the_rotation_of_a_layer_norm_keeps_the_mean() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 9)) * np.arange(1, 10) + 3
    rotation, scores = principal(rows.T @ rows, centred=True)
    assert np.allclose(rotation.T @ rotation, np.eye(9))
    assert np.allclose(rotation.sum(axis=0), 1)
    basis = helmert(9)
    assert np.allclose(basis.T @ basis, np.eye(8))
    assert np.allclose(basis.sum(axis=0), 0)
    turned_rows = (rows - rows.mean(axis=1, keepdims=True)) @ rotation @ basis
    assert np.allclose((turned_rows**2).sum(axis=0), scores[1:], rtol=1e-3)


def zoo_model(name: str) -> tuple[ModelProto, dict[str, np.ndarray]]:
    if not (SHARED / "zoo" / "zoo.py").is_file():
        pytest.skip("needs ../shared/zoo")
    sys.path.insert(0, str(SHARED / "zoo"))
    try:
        import zoo
    finally:
        sys.path.pop(0)
    return zoo.load(name, 0), zoo.feeds(name)


@pytest.mark.parametrize(
    "name",
    ["hf_gpt2", "hf_gpt2__nofold", "hf_vit", "hf_deit_distilled", "hf_llama", "hf_llama__dynamo", "hf_gemma", "hf_t5", "jax-nnx-vit"],
)
def test_exported_transformers_turn(name: str) -> None:
    model, feeds = zoo_model(name)
    _, rotated = turned(model, [feeds])
    assert [len(one.norms) > 4 for one in rotated.trunks if one.norms] == [True]
    assert off(model, rotated.model, feeds) < 1e-2


@pytest.mark.parametrize("name", ["hf_bert_cls", "hf_clip_vision"])
def test_exported_post_norm_transformers_do_not(name: str) -> None:
    model, feeds = zoo_model(name)
    grouping, rotated = turned(model, [feeds])
    stream = max(grouping.groups, key=lambda g: len(g.members))
    assert "post-norm" in rotated.skipped[stream.id]


def test_what_finishes_the_surgery_is_checked_without_compensation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"calibration": MODELS / "digits-images.calibration.npz", "samples": 64, "criterion": "pca"}
    right = Rotated.rescaled

    def wrong(self: Rotated, pruned: onnx.ModelProto) -> onnx.ModelProto:
        found = right(self, pruned)
        found.graph.node[-1].op_type = "NoSuchOperator"
        return found

    onnxprune.prune(MODELS / "digits-mobilenet.onnx", 0.25, compensation="none", **options)
    monkeypatch.setattr(Rotated, "rescaled", wrong)
    with pytest.raises(OnnxPruneError, match="not well-formed") as caught:
        onnxprune.prune(MODELS / "digits-mobilenet.onnx", 0.25, compensation="none", **options)
    assert caught.value.exit_code == 4


def test_a_plan_of_principal_components_is_not_written_and_not_carried_out(command: Command, tmp_path: Path) -> None:
    model, samples = MODELS / "digits-mobilenet.onnx", MODELS / "digits-images.calibration.npz"
    options = ["--criterion", "pca", "--allocation", "uniform", "--calibration", samples, "--samples", "32"]
    for arguments in ([model, "-r", "0.25", "-o", "out.onnx", "--plan-out", "p.json"], ["plan", model, "-r", "0.25", "-o", "p.json"]):
        found = command(*arguments, *options)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
        assert "principal components" in found.stderr
    assert list(tmp_path.iterdir()) == []
    result = onnxprune.prune(model, 0.25, criterion="pca", allocation="uniform", compensation="none", calibration=samples, samples=32)
    for carry_out in (onnxprune.apply, lambda model, plan: onnxprune.verify(model, plan=plan)):
        with pytest.raises(OnnxPruneError, match="principal components") as refused:
            carry_out(model, result.plan.to_json())
        assert refused.value.exit_code == 2


def test_pca_prunes_streams_and_says_where_there_are_none() -> None:
    samples = MODELS / "digits-images.calibration.npz"
    options = {"allocation": "uniform", "calibration": samples, "compensation": "update"}
    results = {name: onnxprune.prune(MODELS / "digits-mobilenet.onnx", 0.25, criterion=name, **options) for name in ("pca", "l2")}
    model = onnx.load(MODELS / "digits-mobilenet.onnx")
    held = read_calibration(MODELS / "digits-images.eval.npz", load(model))
    lost = {name: fidelity(model, result.model, held).loss for name, result in results.items()}
    assert lost["pca"] < lost["l2"]
    assert abs(results["pca"].reached - 0.25) < 0.01
    with pytest.raises(OnnxPruneError, match="principal components") as refused:
        onnxprune.prune(MODELS / "digits-mlp.onnx", 0.25, criterion="pca", calibration=MODELS / "digits-mlp.calibration.npz")
    assert refused.value.exit_code == 3

"""Recurrent layers, attention and norms that are one operator: the same checks as for every other rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import test_op_rules
from op_cases import Case, Weights, places
from outside import build, covered

import onnxprune

MS = "com.microsoft"
X = "float[2,5,6] x"
Y: dict[str, Any] = {"outputs": "float[2,5,4] y"}  # onnx infers no shapes of contributed operators


def recurrent() -> Iterator[Case]:
    """(T 5, N 2, 6) -> hidden 7 -> a layer."""
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        for direction, many in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            weights: Weights = {
                "w": (many, gates * 7, 6),
                "r": (many, gates * 7, 7),
                "b": (many, 2 * gates * 7),
                "back": [0, 0, -1],
                "w2": (many * 7, 4),
            }
            body = (
                f'h = {op} <hidden_size=7, direction="{direction}"> (x, w, r, b) '
                "t = Transpose <perm=[0,2,1,3]> (h) s = Reshape (t, back) y = MatMul (s, w2)"
            )
            covers = "w:1=7 r:1=7 r:2=7 b:1=7 w2:0=7"
            yield Case(f"{op}-{direction}", "float[5,2,6] x", body, weights, covers, "w:2 w2:1", statistics=False)
    states: Weights = {"w": (1, 28, 6), "r": (1, 28, 7), "b": (1, 56), "h0": (1, 2, 7), "c0": (1, 2, 7), "p": (1, 21), "w2": (7, 4)}
    body = "h, hn, cn = LSTM <hidden_size=7> (x, w, r, b, , h0, c0, p) y = MatMul (hn, w2) z = MatMul (cn, w3)"
    yield Case(
        "LSTM-states-and-peepholes",
        "float[5,2,6] x",
        body,
        states | {"w3": (7, 3)},
        "w:1=7 h0:2=7 c0:2=7 p:1=7 w2:0=7 w3:0=7",
        outputs="float y, float z",
    )
    two: Weights = {"w": (1, 21, 6), "r": (1, 21, 7), "v": (1, 15, 7), "q": (1, 15, 5), "one": [1], "w2": (5, 4)}
    body = "h = GRU <hidden_size=7> (x, w, r) s = Squeeze (h, one) k, l = GRU <hidden_size=5> (s, v, q) y = MatMul (l, w2)"
    yield Case("GRU-stacked", "float[5,2,6] x", body, two, "r:2=7 v:2=7 q:2=5 w2:0=5")
    lengths: Weights = {"w": (1, 7, 6), "r": (1, 7, 7), "n": np.array([5, 3], np.int32), "w2": (7, 4)}
    yield Case("RNN-lengths", "float[5,2,6] x", "h = RNN <hidden_size=7> (x, w, r, , n) y = MatMul (h, w2)", lengths, "r:2=7 w2:0=7")


QKV = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "


def attention() -> Iterator[Case]:
    """4 heads of 6 (or 4 heads over 2 key heads) between projections."""
    whole = "wq:1=4+6 wk:1=4+6 wv:1=4+6 wo:0=4+6"
    weights: Weights = {"wq": (6, 24), "wk": (6, 24), "wv": (6, 24), "wo": (24, 4)}
    for name, more in (("plain", ""), ("causal", ", is_causal=1"), ("scaled", ", scale=0.3")):
        body = f"{QKV} a = Attention <q_num_heads=4, kv_num_heads=4{more}> (q, k, v) y = MatMul (a, wo)"
        yield Case(f"Attention-{name}", X, body, weights, whole, "wq:0 wo:1", opset=23)
    grouped: Weights = {"wq": (6, 24), "wk": (6, 12), "wv": (6, 12), "wo": (24, 4)}
    body = f"{QKV} a = Attention <q_num_heads=4, kv_num_heads=2> (q, k, v) y = MatMul (a, wo)"
    yield Case("Attention-grouped-query", X, body, grouped, "wq:1 wk:1=2+6 wv:1=2+6 wo:0", opset=23)
    masked = weights | {"m": (1, 4, 5, 5)}
    body = f"{QKV} a = Attention <q_num_heads=4, kv_num_heads=4> (q, k, v, m) y = MatMul (a, wo)"
    yield Case("Attention-bias-a-head", X, body, masked, f"{whole} m:1=4", opset=23)
    body = f"{QKV} a = {MS}.MultiHeadAttention <num_heads=4> (q, k, v) y = MatMul (a, wo)"
    yield Case("MultiHeadAttention", X, body, weights, whole, **Y)
    body = f"{QKV} a = {MS}.MultiHeadAttention <num_heads=4> (q, k, v, b) y = MatMul (a, wo)"
    yield Case("MultiHeadAttention-bias", X, body, weights | {"b": (72,)}, f"{whole} b:0", **Y)
    packed: Weights = {"w": (6, 72), "b": (72,), "wo": (24, 4)}
    body = f"a = {MS}.Attention <num_heads=4> (x, w, b) y = MatMul (a, wo)"
    yield Case("packed-Attention", X, body, packed, "w:1 b:0 wo:0=4+6", "w:0", **Y)
    uneven: Weights = {"w": (6, 64), "b": (64,), "wo": (16, 4)}
    body = f"a = {MS}.Attention <num_heads=4, qkv_hidden_sizes=[24,24,16]> (x, w, b) y = MatMul (a, wo)"
    yield Case("packed-Attention-uneven", X, body, uneven, "w:1 b:0 wo:0=4+4", "w:0", **Y)


def rotary() -> Iterator[Case]:
    """Heads of 8, rotated by tables of 4 pairs."""
    weights: Weights = {"wq": (6, 32), "wk": (6, 32), "there": [0, 0, 4, 8], "cos": (5, 4), "sin": (5, 4)}
    weights |= {"at": np.tile(np.arange(5), (2, 1))}
    for interleaved in (0, 1):
        body = (
            "q = MatMul (x, wq) q4 = Reshape (q, there) qt = Transpose <perm=[0,2,1,3]> (q4) "
            f"qr = RotaryEmbedding <interleaved={interleaved}> (qt, cos, sin, at) "
            "k = MatMul (x, wk) k4 = Reshape (k, there) kt = Transpose <perm=[0,2,1,3]> (k4) "
            f"kr = RotaryEmbedding <interleaved={interleaved}> (kt, cos, sin, at) "
            "ks = Transpose <perm=[0,1,3,2]> (kr) s = MatMul (qr, ks) y = ReduceSum <keepdims=0> (s, one)"
        )
        covers = "wq:1=4+4 wk:1=4+4 cos:1=4 sin:1=4"
        yield Case(f"RotaryEmbedding-{interleaved}", X, body, weights | {"one": [1]}, covers, opset=23)
    fused = {k: v for k, v in weights.items() if k != "there"} | {"wo": (32, 4)}
    body = (
        f"q = MatMul (x, wq) r = {MS}.RotaryEmbedding <num_heads=4> (q, at, cos, sin) k = MatMul (x, wk) m = Mul (r, k) y = MatMul (m, wo)"
    )
    yield Case("RotaryEmbedding-three-axes", X, body, fused, "wq:1=4+4 cos:1=4 wo:0=4+4", **Y)


def fused() -> Iterator[Case]:
    """Norms, activations and products of onnxruntime's optimizer."""
    layers: Weights = {"w1": (6, 8), "w2": (8, 4), "g": (8,), "b": (8,)}
    for op, inputs in (("SkipLayerNormalization", "g, b"), ("SkipSimplifiedLayerNormalization", "g")):
        body = f"h = MatMul (x, w1) k = Sigmoid (h) z = {MS}.{op} (h, k, {inputs}) y = MatMul (z, w2)"
        yield Case(op, X, body, layers, "w1:1=8 g:0=8 w2:0=8", "w1:0", statistics=True, **Y)
    table: Weights = {"words": (10, 8), "places": (6, 8), "g": (8,), "b": (8,), "w2": (8, 4)}
    body = f"e, m = {MS}.EmbedLayerNormalization (ids, , words, places, , g, b) y = MatMul (e, w2)"
    yield Case("EmbedLayerNormalization", "int32[2,5] ids", body, table, "words:1=8 places:1=8 g:0=8 w2:0=8", "words:0 places:0", **Y)
    for op in ("Gelu", "FastGelu", "QuickGelu"):
        yield Case(op, X, f"h = MatMul (x, w1) z = {MS}.{op} (h) y = MatMul (z, w2)", {"w1": (6, 8), "w2": (8, 4)}, "w1:1=8 w2:0=8", **Y)
    for op in ("BiasGelu", "FastGelu"):
        body = f"h = MatMul (x, w1) z = {MS}.{op} (h, b) y = MatMul (z, w2)"
        yield Case(f"{op}-bias", X, body, {k: v for k, v in layers.items() if k != "g"}, "w1:1=8 b:0=8 w2:0=8", **Y)
    body = f"h = {MS}.FusedMatMul <transB=1, alpha=0.5> (x, w1) y = {MS}.FusedMatMul <transB=1> (h, w2)"
    yield Case("FusedMatMul", X, body, {"w1": (8, 6), "w2": (4, 8)}, "w1:0=8 w2:1=8", "w1:1 w2:0", **Y)
    body = f'h = {MS}.FusedConv <pads=[1,1,1,1], activation="Relu"> (x, w1, b1, s) y = Conv (h, w2)'
    kernel: Weights = {"w1": (8, 3, 3, 3), "b1": (8,), "s": (2, 8, 6, 6), "w2": (4, 8, 1, 1)}
    yield Case("FusedConv", "float[2,3,6,6] x", body, kernel, "w1:0=8 b1:0=8 s:1=8 w2:1=8", outputs="float[2,4,6,6] y")


def sequences() -> Iterator[Case]:
    """Attention whose tokens are made by a layer: a batch, queries and keys that are tied, and an order where it matters."""
    turned = "t = MatMul (w1, x) q = MatMul (t, wq) k = MatMul (t, wk) v = MatMul (t, wv) "
    weights: Weights = {"w1": (7, 5), "wq": (6, 24), "wk": (6, 24), "wv": (6, 24), "wo": (24, 4), "w2": (4, 7)}
    plain = "q_num_heads=4, kv_num_heads=4"
    body = f"{turned} a = Attention <{plain}> (q, k, v) o = MatMul (a, wo) y = MatMul (w2, o)"
    yield Case("Attention-tokens", X, body, weights, "w1:0=7 w2:1=7 wq:1=4+6", "w1:1 w2:0", opset=23, statistics=None)
    causal = body.replace(plain, f"{plain}, is_causal=1")
    yield Case("Attention-causal-tokens", X, causal, weights, "wq:1=4+6", "w1:0 w2:1", opset=23)
    masked = body.replace("(q, k, v)", "(q, k, v, m)")
    yield Case("Attention-masked-tokens", X, masked, weights | {"m": (7, 7)}, "w1:0=7 w2:1=7 m:0=7 m:1=7", opset=23)
    body = f"{QKV} a, pk, pv = Attention <{plain}> (q, k, v, , c, d) o = MatMul (a, wo) s = ReduceSum <keepdims=0> (pk, n) y = Add (o, s)"
    past: Weights = {k: v for k, v in weights.items() if k not in ("w1", "w2")} | {"c": (2, 4, 3, 6), "d": (2, 4, 3, 6), "n": [1, 2, 3]}
    body = body.replace("y = Add (o, s)", "r = Reshape (s, there) y = Add (o, r)")
    covers = "wq:1=4+6 wk:1=4+6 c:1=4 c:3=6 d:1=4 d:3=6 wo:0=4+6"
    yield Case("Attention-past", X, body, past | {"there": [2, 1, 1]}, covers, "c:0 d:0", opset=23)
    body = f"{turned} a = {MS}.MultiHeadAttention <num_heads=4> (q, k, v) o = MatMul (a, wo) y = MatMul (w2, o)"
    yield Case("MultiHeadAttention-tokens", X, body, weights, "w1:0=7 w2:1=7 wq:1=4+6", **Y | {"outputs": "float[2,4,4] y"})
    body = body.replace("num_heads=4", "num_heads=4, unidirectional=1")
    yield Case("MultiHeadAttention-causal-tokens", X, body, weights, "wq:1=4+6", "w1:0 w2:1", **Y | {"outputs": "float[2,4,4] y"})
    body = f"t = MatMul (w1, x) a = {MS}.Attention <num_heads=4> (t, w, b) o = MatMul (a, wo) y = MatMul (w2, o)"
    packed: Weights = {"w1": (7, 5), "w": (6, 72), "b": (72,), "wo": (24, 4), "w2": (4, 7)}
    yield Case("packed-Attention-tokens", X, body, packed, "w1:0=7 w2:1=7 w:1 b:0", "w:0", **Y | {"outputs": "float[2,4,4] y"})
    training = "m = Conv (x, w1) n, u, v = BatchNormalization <training_mode=1> (m, s, s, s, s) y = Conv (n, w2)"
    layers: Weights = {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1), "s": (8,)}
    yield Case("BatchNormalization-training", "float[2,3,6,6] x", training, layers, "w1:0=8 s:0=8 w2:1=8")


def more_fused() -> Iterator[Case]:
    body = f"h = MatMul (x, w1) z = {MS}.ScaledSiLU <alpha=1.5> (h) y = MatMul (z, w2)"
    yield Case("ScaledSiLU", X, body, {"w1": (6, 8), "w2": (8, 4)}, "w1:1=8 w2:0=8", **Y)
    body = f"h = MatMul (x, w1) z = {MS}.QuickGelu (h) y = MatMul (z, w2)"  # a shape that only a run in another type tells
    wide: Weights = {"w1": np.random.default_rng(0).standard_normal((6, 8)), "w2": np.random.default_rng(1).standard_normal((8, 4))}
    yield Case("QuickGelu-double", "double[2,5,6] x", body, wide, "w1:1=8 w2:0=8", outputs="double[2,5,4] y", runs=False)
    body = f"h = {MS}.TransposeMatMul <transB=1> (x, w1) y = MatMul (h, w2)"
    yield Case("TransposeMatMul", X, body, {"w1": (8, 6), "w2": (8, 4)}, "w1:0=8 w2:0=8", **Y)
    body = f"h = MatMul (x, w1) e = {MS}.ExpandDims (h, at) s = Squeeze (e, one) y = MatMul (s, w2)"
    yield Case("ExpandDims", X, body, {"w1": (6, 8), "w2": (8, 4), "at": np.array(1, np.int32), "one": [1]}, "w1:1=8 w2:0=8", **Y)
    body = f"h = Conv (x, w1) t = {MS}.Trilu (h) z = {MS}.GridSample (t, g) y = Conv (z, w2)"
    kernel: Weights = {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1), "g": (2, 4, 5, 2)}
    yield Case("Trilu-GridSample", "float[2,3,6,6] x", body, kernel, "w1:0=8 w2:1=8", "g:1 g:2", outputs="float[2,4,4,5] y")


def streaming() -> Iterator[Case]:
    """Layers of state-space models and experts."""
    turn = "h = MatMul (x, w1) t = Transpose <perm=[0,2,1]> (h)"
    back = "b = Transpose <perm=[0,2,1]> (c) y = MatMul (b, w2)"
    layers: Weights = {"w1": (6, 8), "w2": (8, 4), "k": (8, 1, 3), "e": (8,), "s": (2, 8, 2)}
    body = f'{turn} c, n = {MS}.CausalConvWithState <activation="silu"> (t, k, e, s) {back}'
    yield Case("CausalConvWithState", X, body, layers, "w1:1=8 k:0=8 e:0=8 s:1=8 w2:0=8", "w1:0 k:2", **Y)
    few: Weights = {"wq": (6, 24), "wk": (6, 12), "wv": (6, 16), "wo": (32, 4)}
    attributes = 'q_num_heads=4, kv_num_heads=2, update_rule="linear"'
    body = f"{QKV} a, n = {MS}.LinearAttention <{attributes}> (q, k, v) y = MatMul (a, wo)"
    yield Case("LinearAttention", X, body, few, "wq:1 wk:1=2+6 wv:1=2+8 wo:0", "wq:0 wo:1", **Y)
    whole: Weights = {"wq": (6, 24), "wk": (6, 24), "wv": (6, 32), "wo": (32, 4), "wd": (6, 4), "wb": (6, 4), "s": (2, 4, 6, 8)}
    whole |= {"dt": (4,), "da": -np.ones(4, np.float32)}
    gates = f"f = MatMul (x, wd) r = MatMul (x, wb) d, b = {MS}.LinearAttentionGate (f, dt, da, r)"
    attributes = 'q_num_heads=4, kv_num_heads=4, update_rule="gated_delta"'
    body = f"{QKV} {gates} a, n = {MS}.LinearAttention <{attributes}> (q, k, v, s, d, b) y = MatMul (a, wo)"
    covers = "wq:1=4+6 wk:1=4+6 wv:1=4+8 wo:0=4+8 wd:1=4 wb:1=4 s:1=4 s:2=6 s:3=8 dt:0=4 da:0=4"
    yield Case("LinearAttention-gated", X, body, whole, covers, "s:0", **Y)
    body = f"h = MatMul (x, w1) g = MatMul (x, v1) n = {MS}.GatedRMSNorm (h, s, g) y = MatMul (n, w2)"
    normed: Weights = {"w1": (6, 12), "v1": (6, 12), "s": (4,), "w2": (12, 4)}
    yield Case("GatedRMSNorm", X, body, normed, "w1:1=3+4 v1:1=3+4 s:0=4 w2:0=3+4", **Y)
    expert: Weights = {
        "w1": (6, 8),
        "wr": (6, 3),
        "f": (3, 12, 8),
        "fb": (3, 12),
        "g": (3, 8, 12),
        "gb": (3, 8),
        "w2": (8, 4),
        "flat": [10, 3],
    }
    routed = "h = MatMul (x, w1) p = MatMul (x, wr) r = Reshape (p, flat)"
    body = f'{routed} m = {MS}.MoE <k=2, activation_type="gelu", normalize_routing_weights=1> (h, r, f, fb, g, gb) y = MatMul (m, w2)'
    covers = "w1:1=8 f:1=12 fb:1=12 g:2=12 f:2=8 g:1=8 gb:1=8 w2:0=8"
    yield Case("MoE", X, body, expert, covers, "wr:1 f:0 g:0", **Y)
    attributes = 'k=2, activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=1'
    body = f"{routed} m = {MS}.MoE <{attributes}> (h, r, f, fb, g, gb) y = MatMul (m, w2)"
    yield Case("MoE-swiglu", X, body, expert | {"f": (3, 24, 8), "fb": (3, 24)}, covers, "wr:1", **Y)


NHWC = "float[2,6,6,3] x"
NO_KERNEL = {  # nodes, the shapes of their values, weights, what is covered
    "NhwcFusedConv": (
        f'h = {MS}.NhwcFusedConv <activation="Relu"> (x, w1, b1) y = {MS}.NhwcConv (h, w2)',
        "float[2,6,6,8] h",
        {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (4, 8, 1, 1)},
        "w1:0=8 b1:0=8 w2:1=8",
    ),
    "GroupNorm": (
        f"h = MatMul (x, w1) n = {MS}.GroupNorm <groups=2> (h, g, b) y = MatMul (n, w2)",
        "float[2,6,6,8] n",
        {"w1": (3, 8), "g": (8,), "b": (8,), "w2": (8, 4)},
        "w1:1=2+4 g:0=2+4 b:0=2+4 w2:0=2+4",
    ),
    "SkipGroupNorm": (
        f"h = MatMul (x, w1) k = MatMul (x, v1) n, s = {MS}.SkipGroupNorm <groups=2> (h, g, b, k, e) a = Add (n, s) y = MatMul (a, w2)",
        "float[2,6,6,8] n, float[2,6,6,8] s, float[2,6,6,8] a",
        {"w1": (3, 8), "v1": (3, 8), "g": (8,), "b": (8,), "e": (8,), "w2": (8, 4)},
        "w1:1=2+4 v1:1=2+4 g:0=2+4 e:0=2+4 w2:0=2+4",
    ),
    "BiasSplitGelu": (
        f"f = Reshape (x, rows) h = MatMul (f, w1) n = {MS}.BiasSplitGelu (h, b) z = MatMul (n, w2) y = {MS}.BiasAdd (z, c, z)",
        "float[2,36,8] n, float[2,36,4] z",
        {"rows": [2, 36, 3], "w1": (3, 16), "b": (16,), "w2": (8, 4), "c": (4,)},
        "w1:1=8 b:0=8 w2:0=8",
    ),
}


@pytest.mark.parametrize("name", NO_KERNEL)
def test_without_a_kernel_the_file_tells_the_shapes(name: str) -> None:
    body, values, weights, covers = NO_KERNEL[name]
    model = build(NHWC, body, "float[2,6,6,4] y" if name != "BiasSplitGelu" else "float[2,36,4] y", weights)
    model.graph.value_info.extend(onnx.parser.parse_graph(f"g ({values}) => (float y) {{ y = Relu (n) }}").input)
    found = covered(onnxprune.groups(model, verify=False).to_json())
    for place, units in places(covers).items():
        assert sorted(found.get(place, [])) == units, place


@pytest.mark.parametrize(
    "case", [*recurrent(), *attention(), *rotary(), *fused(), *sequences(), *more_fused(), *streaming()], ids=lambda case: case.name
)
def test_fused_rule(case: Case) -> None:
    test_op_rules.test_rule(case)

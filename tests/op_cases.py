"""Small graphs of one purpose each: an operator between layers, what must be prunable there and what must stay.

`covers` and `leaves` list places as "tensor:axis"; "tensor:axis=8" says the units there, "=2+4" those of two groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from onnx import ModelProto
from outside import Weight, as_constants, build

Weights = dict[str, Weight]
IMAGE, ROWS = "float[2,3,6,6] x", "float[2,5,6] x"


@dataclass(frozen=True)
class Case:
    """A model and what is known of it.

    runs: False where onnxruntime has no kernel; valid: False where onnx's checker refuses the model already; masks: False where
    the operator makes something of a zero that counts; statistics: whether the groups are marked so.
    """

    name: str
    inputs: str
    body: str
    weights: Weights
    covers: str
    leaves: str = ""
    outputs: str = "float y"
    opset: int = 17
    constants: bool = False
    statistics: bool | None = None
    runs: bool = True
    valid: bool = True
    masks: bool = True
    tolerance: float = 1e-4

    def model(self) -> ModelProto:
        made = build(self.inputs, self.body, self.outputs, self.weights, self.opset)
        return as_constants(made) if self.constants else made


def places(text: str) -> dict[tuple[str, int], list[int]]:
    """{(tensor, axis): units of its groups, [] where the number is not said}."""
    found = {}
    for word in text.split():
        place, _, units = word.partition("=")
        tensor, _, axis = place.rpartition(":")
        found[tensor, int(axis)] = sorted(int(n) for n in units.split("+")) if units else []
    return found


def image(name: str, body: str, weights: Mapping[str, Weight] | None = None, covers: str = "", leaves: str = "", **more: Any) -> Case:
    """Conv -> h -> body -> z -> Conv; `width` channels before and `out` after; `joined` False where the two are not tied."""
    width, out, joined = more.pop("width", 8), more.pop("out", 8), more.pop("joined", True)
    layers: Weights = {"w1": (width, 3, 3, 3), "b1": (width,), "w2": (4, out, 1, 1)}
    text = f"h = Conv <pads=[1,1,1,1]> (x, w1, b1) {body} y = Conv (z, w2)"
    ends = f"w1:0={width} b1:0={width} w2:1={width} " if joined else ""
    return Case(name, more.pop("inputs", IMAGE), text, {**layers, **(weights or {})}, ends + covers, f"w1:1 w2:0 {leaves}", **more)


def rows(name: str, body: str, weights: Mapping[str, Weight] | None = None, covers: str = "", leaves: str = "", **more: Any) -> Case:
    """MatMul -> h -> body -> z -> MatMul, over (batch, places, features)."""
    width, out, joined = more.pop("width", 8), more.pop("out", 8), more.pop("joined", True)
    layers: Weights = {"w1": (6, width), "w2": (out, 4)}
    text = f"h = MatMul (x, w1) {body} y = MatMul (z, w2)"
    ends = f"w1:1={width} w2:0={width} " if joined else ""
    return Case(name, more.pop("inputs", ROWS), text, {**layers, **(weights or {})}, ends + covers, f"w1:0 w2:1 {leaves}", **more)


def one(number: float) -> np.ndarray:
    return np.array(number, np.float32)


def unary() -> Iterator[Case]:
    plain = "Abs Acos Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Log Neg"
    plain += " Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"
    newer = {"Gelu": 20, "Mish": 18, "Swish": 24}
    for op in (*plain.split(), *newer):
        yield image(op, f"s = Sigmoid (h) z = {op} (s)", opset=newer.get(op, 17))
    yield image("Acosh", "s = Exp (h) t = Add (s, c) z = Acosh (t)", {"c": one(1)})
    yield image("IsNaN", "s = IsNaN (h) t = Cast <to=1> (s) z = Add (h, t)")
    yield image("IsInf", "s = IsInf (h) t = Cast <to=1> (s) z = Add (h, t)")
    yield image("Not", "s = Greater (h, c) t = Not (s) z = Cast <to=1> (t)", {"c": one(0)})
    yield image("BitwiseNot", "s = Mul (h, c) t = Cast <to=6> (s) u = BitwiseNot (t) z = Cast <to=1> (u)", {"c": one(9)}, opset=18)
    yield image("Cast", "s = Cast <to=11> (h) z = Cast <to=1> (s)")
    yield image("CastLike", "s = CastLike (h, c) z = CastLike (s, h)", {"c": np.zeros(2)})
    yield image("Clip-inputs", "z = Clip (h, low, high)", {"low": one(-0.5), "high": one(0.5)})
    yield image("Clip-one-side", 'z = Clip (h, "", high)', {"high": one(0.5)})
    yield image("Clip-attributes", "z = Clip <min=-0.5, max=0.5> (h)", opset=10)
    yield image("Dropout", "z = Dropout (h, ratio)", {"ratio": one(0.5)})
    yield image("Dropout-mask", "s, m = Dropout <ratio=0.5> (h) t = Cast <to=1> (m) z = Mul (s, t)", opset=11)


def binary() -> Iterator[Case]:
    shapes = {"channels": (8, 1, 1), "scalar": (), "one": (1,), "ranks": (1, 8, 1, 1), "pixels": (6, 6), "whole": (1, 8, 6, 6)}
    for op in "Add Sub Mul Div Pow Max Min Mean Sum PRelu".split():
        for form, shape in shapes.items():
            channel = {(8, 1, 1): " c:0=8", (1, 8, 1, 1): " c:1=8", (1, 8, 6, 6): " c:1=8"}.get(shape, "")
            fixed = {(6, 6): "c:0 c:1", (1, 8, 6, 6): "c:0 c:2 c:3"}.get(shape, "")
            yield image(f"{op}-{form}", f"s = Sigmoid (h) z = {op} (s, c)", {"c": _ramp(shape)}, channel, fixed, masks=op != "Div")
        two = "v = Conv (x, v1) s = Sigmoid (v) t = Sigmoid (h)"
        yield image(f"{op}-computed", f"{two} z = {op} (t, s)", {"v1": (8, 3, 1, 1)}, "v1:0=8")
    for op in "Add Mul".split():
        yield rows(f"{op}-last", f"z = {op} (h, c)", {"c": (8,)}, "c:0=8")
        yield rows(f"{op}-row", f"z = {op} (c, h)", {"c": (1, 8)}, "c:1=8")
        yield rows(f"{op}-places", f"z = {op} (h, c)", {"c": (5, 8)}, "c:1=8", "c:0")
        yield rows(f"{op}-higher-rank", f"z = {op} (h, c)", {"c": (2, 1, 8)}, "c:2=8", "c:0", inputs="float[5,6] x")
        yield image(f"{op}-three", f"z = {'Sum' if op == 'Add' else 'Max'} (c, h, d)", {"c": (8, 1, 1), "d": (1,)}, "c:0=8")
    yield image("Mod", "s = Sigmoid (h) z = Mod <fmod=1> (s, c)", {"c": np.full((8, 1, 1), 0.3, np.float32)}, "c:0=8", masks=False)
    for op in "Equal Greater GreaterOrEqual Less LessOrEqual".split():
        yield image(op, f"s = {op} (h, c) t = Cast <to=1> (s) z = Mul (h, t)", {"c": (8, 1, 1)}, "c:0=8")
    for op in "And Or Xor".split():
        yield image(
            op, f"s = Greater (h, c) t = Less (h, d) u = {op} (s, t) z = Cast <to=1> (u)", {"c": (8, 1, 1), "d": (8, 1, 1)}, "c:0=8 d:0=8"
        )
    for op in "BitwiseAnd BitwiseOr BitwiseXor".split():
        yield image(
            op,
            f"s = Mul (h, n) t = Cast <to=6> (s) u = {op} (t, c) z = Cast <to=1> (u)",
            {"n": one(9), "c": np.arange(8, dtype=np.int32).reshape(8, 1, 1)},
            "c:0=8",
            opset=18,
        )
    yield image(
        "BitShift",
        's = Abs (h) t = Cast <to=12> (s) u = BitShift <direction="LEFT"> (t, c) z = Cast <to=1> (u)',
        {"c": np.arange(8, dtype=np.uint32).reshape(8, 1, 1)},
        "c:0=8",
    )
    yield image("Where", "s = Greater (h, n) z = Where (s, h, c)", {"n": one(0), "c": (8, 1, 1)}, "c:0=8")
    yield image("Where-condition", "z = Where (c, h, n)", {"n": one(0), "c": (np.arange(8) % 3 > 0).reshape(8, 1, 1)}, "c:0=8")
    yield image("Add-axis-of-opset-6", "z = Add <broadcast=1, axis=1> (h, c)", {"c": (8,)}, "c:0=8", opset=6, runs=False)


def _ramp(shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(0.7 + np.arange(int(np.prod(shape))).reshape(shape) % 13 / 20, np.float32)


def convolutions() -> Iterator[Case]:
    for rank in (1, 2, 3):
        size, kernel = ",".join("6" * rank), (3,) * rank
        yield Case(
            f"Conv-{rank}D",
            f"float[2,3,{size}] x",
            "h = Conv (x, w1, b1) z = Relu (h) y = Conv (z, w2, b2)",
            {"w1": (8, 3, *kernel), "b1": (8,), "w2": (4, 8, *kernel), "b2": (4,)},
            "w1:0=8 b1:0=8 w2:1=8",
            "w1:1 w1:2 w2:0 w2:2 b2:0",
        )
        yield Case(
            f"ConvTranspose-{rank}D",
            f"float[2,3,{size}] x",
            "h = ConvTranspose (x, w1, b1) z = Relu (h) y = ConvTranspose (z, w2, b2)",
            {"w1": (3, 8, *kernel), "b1": (8,), "w2": (8, 4, *kernel), "b2": (4,)},
            "w1:1=8 b1:0=8 w2:0=8",
            "w1:0 w1:2 w2:1 b2:0",
        )
    yield image("depthwise", "z = Conv <group=8> (h, wd, bd)", {"wd": (8, 1, 3, 3), "bd": (8,)}, "wd:0=8 bd:0=8", "wd:1 wd:2")
    yield image(
        "depthwise-times-2",
        "z = Conv <group=8> (h, wd, bd)",
        {"wd": (16, 1, 3, 3), "bd": (16,)},
        "w1:0=8 wd:0=2+8 bd:0=2+8 w2:1=2+8",
        out=16,
        joined=False,
    )
    yield image(
        "grouped", "z = Conv <group=4> (h, wg, bg)", {"wg": (12, 2, 3, 3), "bg": (12,)}, "w1:0 wg:0 wg:1=2 bg:0 w2:1", out=12, joined=False
    )
    yield image(
        "grouped-single-inputs-of-two", "z = Conv <group=2> (h, wg)", {"wg": (6, 4, 1, 1)}, "w1:0 wg:0 wg:1=4 w2:1", out=6, joined=False
    )
    yield image(
        "grouped-relu-grouped",
        "s = Conv <group=4> (h, wg) r = Relu (s) z = Conv <group=4> (r, wh)",
        {"wg": (12, 2, 1, 1), "wh": (8, 3, 1, 1)},
        "w1:0 wg:0 wg:1=2 wh:0 wh:1=3 w2:1",
        joined=False,
    )
    yield image(
        "ConvTranspose-plain",
        "z = ConvTranspose <strides=[2,2]> (h, wt, bt)",
        {"wt": (8, 6, 2, 2), "bt": (6,)},
        "w1:0=8 wt:0=8 wt:1=6 bt:0=6 w2:1=6",
        "wt:2",
        out=6,
        joined=False,
    )
    yield image(
        "ConvTranspose-grouped",
        "z = ConvTranspose <group=2> (h, wt, bt)",
        {"wt": (8, 3, 2, 2), "bt": (6,)},
        "w1:0 wt:0 wt:1=3 bt:0 w2:1",
        out=6,
        joined=False,
    )
    yield image("ConvTranspose-depthwise", "z = ConvTranspose <group=8> (h, wt, bt)", {"wt": (8, 1, 2, 2), "bt": (8,)}, "wt:0=8 bt:0=8")
    yield image("shared-kernel", "s = Conv (h, wm) r = Relu (s) z = Conv (r, wm)", {"wm": (8, 8, 1, 1)}, "wm:0=8 wm:1=8")
    yield image(
        "shared-bias",
        "v = Conv (x, v1, b1) r = Relu (v) s = Conv (r, v2) u = Relu (h) z = Add (u, s)",
        {"v1": (8, 3, 1, 1), "v2": (8, 8, 1, 1)},
        "v1:0=8 v2:0=8 v2:1=8",
    )
    yield image("residual", "r = Relu (h) s = Conv (r, wm) z = Add (h, s)", {"wm": (8, 8, 1, 1)}, "wm:0=8 wm:1=8")
    yield image(
        "bottleneck",
        "r = Relu (h) s = Conv (r, wm) t = Relu (s) u = Conv (t, wn) z = Add (h, u)",
        {"wm": (6, 8, 1, 1), "wn": (8, 6, 1, 1)},
        "wm:0=6 wm:1=8 wn:0=8 wn:1=6",
    )
    gate = "p = GlobalAveragePool (h) q = Conv (p, wa, ba) r = Relu (q) s = Conv (r, wb) t = Sigmoid (s) z = Mul (h, t)"
    yield image("squeeze-and-excite", gate, {"wa": (4, 8, 1, 1), "ba": (4,), "wb": (8, 4, 1, 1)}, "wa:0=4 ba:0=4 wa:1=8 wb:0=8 wb:1=4")


def products() -> Iterator[Case]:
    biases: dict[str, tuple[Weight, str]] = {
        "no-bias": ((), ""),
        "vector": ((6,), "c:0=6"),
        "row": ((1, 6), "c:1=6"),
        "matrix": ((4, 6), "c:1=6"),
        "column": ((4, 1), ""),
        "one": ((1,), ""),
        "scalar": ((), ""),
    }
    for left, right, (form, (shape, place)) in product((0, 1), (0, 1), biases.items()):
        inputs = f"{'ht' if left else 'h'}, wm{'' if form == 'no-bias' else ', c'}"
        turned = "ht = Transpose (h)" if left else ""
        yield Case(
            f"Gemm-{left}{right}-{form}",
            "float[4,5] x",
            f"h = Gemm (x, w1) {turned} z = Gemm <transA={left}, transB={right}, alpha=0.5, beta=2.0> ({inputs}) y = MatMul (z, w2)",
            {"w1": (5, 8), "wm": (6, 8) if right else (8, 6), "w2": (6, 3), "c": shape},
            f"w1:1=8 wm:{right}=8 wm:{1 - right}=6 w2:0=6 {place}",
            f"w1:0 w2:1 {'c:0' if form in ('matrix', 'column') else ''}",
        )
    vector = "float[4,5] x"
    yield Case(
        "Gemm-residual",
        vector,
        "h = Gemm (x, w1) r = Relu (h) z = Gemm (r, wm, h) y = Gemm (z, w2)",
        {"w1": (5, 8), "wm": (8, 8), "w2": (8, 3)},
        "w1:1=8 wm:0=8 wm:1=8 w2:0=8",
        "w1:0 w2:1",
    )
    yield Case(
        "Gemm-constant-left",
        vector,
        "h = Gemm (w1, x) r = Relu (h) y = Gemm (w2, r)",
        {"w1": (8, 4), "w2": (3, 8)},
        "w1:0=8 w2:1=8",
        "w1:1 w2:0",
    )
    yield Case(
        "MatMul-constant-left",
        "float[2,4,5] x",
        "h = MatMul (w1, x) r = Relu (h) y = MatMul (w2, r)",
        {"w1": (8, 4), "w2": (3, 8)},
        "w1:0=8 w2:1=8",
        "w1:1 w2:0",
    )
    yield Case(
        "MatMul-batched",
        "float[2,4,5] x",
        "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)",
        {"w1": (2, 5, 8), "w2": (2, 8, 3)},
        "w1:2=8 w2:1=8",
        "w1:0 w1:1 w2:0 w2:2",
    )
    yield Case(
        "MatMul-batch-prunable",
        "float[1,4,5] x",
        "h = MatMul (x, w1) s = MatMul (h, w2) y = ReduceSum <keepdims=0> (s, axes)",
        {"w1": (6, 5, 8), "w2": (6, 8, 3), "axes": [0]},
        "w1:0=6 w1:2=8 w2:0=6 w2:1=8",
        "w1:1 w2:2",
    )
    yield Case(
        "MatMul-vector-right", ROWS, "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, v)", {"w1": (6, 8), "v": (8,)}, "w1:1=8 v:0=8", "w1:0"
    )
    yield Case(
        "MatMul-vector-left",
        "float[5,6] x",
        "h = MatMul (w1, x) r = Relu (h) y = MatMul (v, r)",
        {"w1": (8, 5), "v": (8,)},
        "w1:0=8 v:0=8",
        "w1:1",
    )
    yield Case(
        "MatMul-vectors",
        "float[6] x",
        "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, v)",
        {"w1": (6, 8), "v": (8,)},
        "w1:1=8 v:0=8",
        "w1:0",
    )
    scores = "q = MatMul (x, wq) k = MatMul (x, wk) kt = Transpose <perm=[0,2,1]> (k) s = MatMul (q, kt) p = Softmax (s)"
    attention: Weights = {"wq": (6, 8), "wk": (6, 8), "wv": (6, 6), "wo": (6, 4)}
    yield Case(
        "MatMul-computed",
        ROWS,
        f"{scores} v = MatMul (x, wv) o = MatMul (p, v) y = MatMul (o, wo)",
        attention,
        "wq:1=8 wk:1=8 wv:1=6 wo:0=6",
        "wq:0 wo:1",
    )
    einsums = {
        "matrices": ("float[2,5,6] x", 'z = Einsum <equation="bij,jk->bik"> (h, we)', (8, 5)),
        "ellipsis": ("float[2,5,6] x", 'z = Einsum <equation="...j,jk->...k"> (h, we)', (8, 5)),
        "implicit": ("float[5,6] x", 'z = Einsum <equation="ij, jk"> (h, we)', (8, 5)),
        "turned": ("float[2,5,6] x", 'z = Einsum <equation="bij,kj->bik"> (h, we)', (5, 8)),
    }
    for form, (inputs, body, shape) in einsums.items():
        k = shape.index(8)
        yield rows(f"Einsum-{form}", body, {"we": shape}, f"w1:1=8 we:{k}=8 we:{1 - k}=5 w2:0=5", inputs=inputs, out=5, joined=False)
    yield rows("Einsum-elementwise", 'z = Einsum <equation="bij,j->bij"> (h, c)', {"c": (8,)}, "c:0=8")
    yield image(
        "Einsum-image", 'z = Einsum <equation="nchw,oc->nohw"> (h, we)', {"we": (5, 8)}, "w1:0=8 we:1=8 we:0=5 w2:1=5", out=5, joined=False
    )
    yield rows("Einsum-sum", 's = Einsum <equation="bij->bi"> (h) t = Unsqueeze (s, last) z = Mul (h, t)', {"last": [-1]})
    yield Case(
        "Einsum-scores",
        ROWS,
        scores.replace("kt = Transpose <perm=[0,2,1]> (k) s = MatMul (q, kt)", 's = Einsum <equation="bqd,bkd->bqk"> (q, k)')
        + " y = MatMul (p, wv)",
        {"wq": (6, 8), "wk": (6, 8), "wv": (5, 3)},
        "wq:1=8 wk:1=8",
        "wq:0 wv:0",
    )


def norms() -> Iterator[Case]:
    four: Weights = {"g": (8,), "b": (8,), "m": (8,), "v": (8,)}
    for opset in (8, 13, 15):
        yield image(
            f"BatchNormalization-{opset}",
            "z = BatchNormalization (h, g, b, m, v)",
            four,
            "g:0=8 b:0=8 m:0=8 v:0=8",
            opset=opset,
            statistics=False,
        )
    yield image("InstanceNormalization", "z = InstanceNormalization (h, g, b)", {"g": (8,), "b": (8,)}, "g:0=8 b:0=8")
    yield rows("LayerNormalization", "z = LayerNormalization (h, g, b)", {"g": (8,), "b": (8,)}, "g:0=8 b:0=8", statistics=True)
    yield rows("LayerNormalization-no-bias", "z = LayerNormalization <axis=2> (h, g)", {"g": (8,)}, "g:0=8", statistics=True)
    yield image(
        "LayerNormalization-image",
        "z = LayerNormalization <axis=1> (h, g, b)",
        {"g": (8, 6, 6), "b": (8, 6, 6)},
        "g:0=8 b:0=8",
        "g:1 b:2",
        statistics=True,
    )
    yield rows("RMSNormalization", "z = RMSNormalization (h, g)", {"g": (8,)}, "g:0=8", opset=23, statistics=True)
    for opset in (17, 18):
        mean = "{} = ReduceMean <axes=[-1]> ({})" if opset < 18 else "{} = ReduceMean ({}, last)"
        moments = (
            f"{mean.format('m', 'h')} d = Sub (h, m) e = Pow (d, two) {mean.format('v', 'e')} f = Add (v, eps) s = Sqrt (f) n = Div (d, s)"
        )
        extra: Weights = {"last": [-1]} if opset == 18 else {}
        yield rows(
            f"layer-norm-decomposed-{opset}",
            f"{moments} t = Mul (n, g) z = Add (t, b)",
            {"two": one(2), "eps": one(1e-5), "g": (8,), "b": (8,), **extra},
            "g:0=8 b:0=8",
            opset=opset,
            statistics=True,
        )
    yield rows(
        "rms-norm-decomposed",
        "e = Mul (h, h) m = ReduceMean <axes=[-1]> (e) f = Add (m, eps) s = Sqrt (f) n = Div (h, s) z = Mul (g, n)",
        {"eps": one(1e-5), "g": (8,)},
        "g:0=8",
        statistics=True,
    )
    yield image(
        "GroupNormalization-groups",
        "z = GroupNormalization <num_groups=4> (h, g, b)",
        {"g": (4,), "b": (4,)},
        "w1:0 g:0 b:0 w2:1",
        outputs="float[2,4,6,6] y",
        opset=18,
        valid=False,
        joined=False,
    )
    yield image(
        "GroupNormalization-channels",
        "z = GroupNormalization <num_groups=4> (h, g, b)",
        {"g": (8,), "b": (8,)},
        "w1:0 g:0 b:0 w2:1",
        outputs="float[2,4,6,6] y",
        opset=21,
        joined=False,
    )
    for form, back in {"explicit": [2, 8, 6, 6], "free": [0, -1, 6, 6], "zeros": [0, 8, 6, -1]}.items():
        text = "r = Reshape (h, there) i = InstanceNormalization (r, s, t) q = Reshape (i, back) u = Mul (q, g) z = Add (u, b)"
        yield image(
            f"group-norm-decomposed-{form}",
            text,
            {"there": [0, 4, -1], "back": back, "s": (4,), "t": (4,), "g": (8, 1, 1), "b": (8, 1, 1)},
            "w1:0 g:0 b:0 w2:1",
            joined=False,
        )
    yield image("LRN", "z = LRN <size=3> (h)", None, "", "w1:0 b1:0 w2:1", joined=False)
    yield image("LpNormalization", "z = LpNormalization <axis=1, p=2> (h)")
    yield image("MeanVarianceNormalization", "z = MeanVarianceNormalization <axes=[0,2,3]> (h)", masks=False)
    yield image("MeanVarianceNormalization-channels", "z = MeanVarianceNormalization <axes=[1,2,3]> (h)", statistics=True)
    for op, opset in product(("Softmax", "LogSoftmax"), (11, 13)):
        yield rows(f"{op}-{opset}-features", f"z = {op} <axis=2> (h)", opset=opset, statistics=True)
        yield image(f"{op}-{opset}-channels", f"z = {op} <axis=1> (h)", opset=opset, statistics=True)
        yield image(f"{op}-{opset}-last", f"z = {op} <axis=3> (h)", opset=opset, statistics=False)
    yield rows("Hardmax", "z = Hardmax <axis=2> (h)", None, "", "w1:1 w2:0", joined=False)


def pools() -> Iterator[Case]:
    for op, more in {"MaxPool": "", "AveragePool": "count_include_pad=1,", "LpPool": ""}.items():
        yield image(op, f"z = {op} <{more} kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (h)", statistics=False)
    for op in "GlobalAveragePool GlobalMaxPool".split():
        yield image(op, f"z = {op} (h)")
    yield image("GlobalLpPool", "z = GlobalLpPool (h)")
    yield image(
        "MaxUnpool", "p, i = MaxPool <kernel_shape=[2,2], strides=[2,2]> (h) z = MaxUnpool <kernel_shape=[2,2], strides=[2,2]> (p, i)"
    )
    yield image("GridSample", "z = GridSample (h, grid)", {"grid": (2, 5, 5, 2)}, "", "grid:1 grid:2", opset=16)


def reductions() -> Iterator[Case]:
    neutral = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
    for op in (*neutral, "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp"):
        attribute = "axes=[{}], " if op != "ReduceSum" else ""
        positive = "s = Abs (h) e = Add (s, one)" if op == "ReduceLogSum" else "e = Identity (h)"
        some: Weights = {"one": one(0.1)} if op == "ReduceLogSum" else {}
        spatial, channel = attribute.format("2,3"), attribute.format("1")
        tail = ", axes" if op == "ReduceSum" else ""
        yield image(f"{op}-spatial", f"{positive} z = {op} <{spatial}keepdims=1> (e{tail})", some | {"axes": [2, 3]}, statistics=None)
        yield image(
            f"{op}-spatial-gone", f"{positive} p = {op} <{spatial}keepdims=0> (e{tail}) z = Unsqueeze (p, axes)", some | {"axes": [2, 3]}
        )
        yield image(
            f"{op}-channel",
            f"{positive} p = {op} <{channel}keepdims=1> (e{tail}) z = Mul (h, p)",
            some | {"axes": [1]},
            statistics=op not in neutral,
        )
        yield image(
            f"{op}-18",
            f"{positive} p = {op} <keepdims=0> (e, minus) q = Unsqueeze (p, minus) z = Add (h, q)",
            some | {"minus": [-3]},
            opset=18,
            statistics=op not in neutral,
        )
    yield image("ReduceSum-all", "p = ReduceSum (h) z = Mul (h, p)", statistics=False)
    yield image("ReduceMean-all", "p = ReduceMean <keepdims=0> (h) z = Mul (h, p)", statistics=True)
    yield image("ReduceSum-no-axes-no-op", "z = ReduceSum <noop_with_empty_axes=1> (h)", statistics=False)
    yield image("ArgMax-channels", "a = ArgMax <axis=1> (h) c = Cast <to=1> (a) z = Mul (h, c)", None, "", "w1:0 b1:0 w2:1", joined=False)
    yield image(
        "ArgMin-spatial", "a = ArgMin <axis=2, keepdims=0> (h) c = Cast <to=1> (a) u = Unsqueeze (c, two) z = Mul (h, u)", {"two": [2]}
    )
    yield image("ArgMax-spatial-kept", "a = ArgMax <axis=-1> (h) c = Cast <to=1> (a) z = Mul (h, c)")
    yield image("TopK-channels", "z, i = TopK <axis=1> (h, k)", {"k": [4]}, "", "w1:0 b1:0 w2:1", out=4, joined=False)
    yield image("TopK-spatial", "z, i = TopK <axis=3> (h, k)", {"k": [4]})
    yield image("CumSum-channels", "z = CumSum (h, axis)", {"axis": np.array(1)}, "", "w1:0 b1:0 w2:1", joined=False)
    yield image("CumSum-spatial", "z = CumSum (h, axis)", {"axis": np.array(2)})


def cuts() -> Iterator[Case]:
    two = "v = Conv <pads=[1,1,1,1]> (x, v1)"
    yield image("Concat", f"{two} z = Concat <axis=1> (h, v)", {"v1": (6, 3, 3, 3)}, "w1:0=8 b1:0=8 v1:0=6 w2:1=6+8", out=14, joined=False)
    yield image(
        "Concat-negative-axis", f"{two} z = Concat <axis=-3> (v, h)", {"v1": (6, 3, 3, 3)}, "w1:0=8 v1:0=6 w2:1=6+8", out=14, joined=False
    )
    yield image("Concat-twice", "r = Neg (h) z = Concat <axis=1> (h, r)", None, "", out=16)
    yield image(
        "Concat-constant", "z = Concat <axis=1> (h, c)", {"c": (2, 3, 6, 6)}, "w1:0=8 c:1=3 w2:1=3+8", "c:0 c:2", out=11, joined=False
    )
    yield image("Concat-spatial", "r = Relu (h) z = Concat <axis=2> (h, r)")
    dense = "r = Relu (h) s = Conv (r, d1) c = Concat <axis=1> (h, s) t = Conv (c, d2) z = Concat <axis=1> (c, t)"
    yield image(
        "Concat-dense",
        dense,
        {"d1": (4, 8, 1, 1), "d2": (5, 12, 1, 1)},
        "w1:0=8 d1:0=4 d1:1=8 d2:0=5 d2:1=4+8 w2:1=4+5+8",
        out=17,
        joined=False,
    )
    gated = "s = Sigmoid (q) z = Mul (p, s)"
    for opset, cut, extra in (
        (11, "<axis=1, split=[4,4]> (h)", {}),
        (13, "<axis=1> (h, sizes)", {"sizes": [4, 4]}),
        (18, "<axis=1, num_outputs=2> (h)", {}),
    ):
        yield image(f"Split-gate-{opset}", f"p, q = Split {cut} {gated}", extra, "w1:0=4 b1:0=4 w2:1=4", out=4, opset=opset, joined=False)
    yield image("Split-gate-default", f"p, q = Split <axis=1> (h) {gated}", {}, "w1:0=4 w2:1=4", out=4, opset=11, joined=False)
    swap = "r = Relu (q) z = Concat <axis=1> (r, p)"
    yield image(
        "Split-uneven-11", f"p, q = Split <axis=-3, split=[3,5]> (h) {swap}", {}, "w1:0=3+5 b1:0=3+5 w2:1=3+5", opset=11, joined=False
    )
    yield image("Split-uneven-13", f"p, q = Split <axis=1> (h, sizes) {swap}", {"sizes": [3, 5]}, "w1:0=3+5 w2:1=3+5", joined=False)
    yield image(
        "Split-uneven-18",
        "p, q, o = Split <axis=1, num_outputs=3> (h) r = Relu (q) z = Concat <axis=1> (r, p)",
        {},
        "w1:0 w2:1=3+3",
        out=6,
        opset=18,
        joined=False,
    )
    yield image("Split-spatial", "p, q = Split <axis=2> (h) z = Add (p, q)", opset=11)
    pick = "z = Slice (h, starts, ends, axes, steps)"
    for name, start, end, step, left, units in (
        ("half", 0, 4, 1, 4, "4+4"),
        ("middle", 2, 5, 1, 3, "3+5"),
        ("negative", -5, -1, 1, 4, "4+4"),
        ("to-the-end", 3, 2**62, 1, 5, "3+5"),
        ("stride", 1, 8, 2, 4, "4"),
        ("whole", 0, 8, 1, 8, "8"),
    ):
        yield image(
            f"Slice-{name}",
            pick,
            {"starts": [start], "ends": [end], "axes": [1], "steps": [step]},
            f"w1:0={units} w2:1={left}",
            out=left,
            joined=False,
        )
        both = f"{pick.replace('z =', 's =')} z = Concat <axis=1> (s, h)"
        yield image(
            f"Slice-{name}-and-whole",
            both,
            {"starts": [start], "ends": [end], "axes": [-3], "steps": [step]},
            "w1:0 w2:1",
            out=left + 8,
            joined=False,
        )
    yield image(
        "Slice-attributes",
        "p = Slice <axes=[1], starts=[0], ends=[4]> (h) q = Slice <axes=[1], starts=[-4], ends=[100]> (h) r = Relu (q) z = Mul (p, r)",
        {},
        "w1:0=4 w2:1=4",
        out=4,
        opset=9,
        joined=False,
    )
    yield image(
        "Slice-no-axes", "z = Slice (h, starts, ends)", {"starts": [0, 0, 1], "ends": [2, 4, 5]}, "w1:0=4+4 w2:1=4", out=4, joined=False
    )
    yield image("Slice-spatial", pick, {"starts": [1, 5], "ends": [5, -100], "axes": [2, 3], "steps": [2, -1]})
    yield image("Slice-reversed", pick, {"starts": [-1], "ends": [-100], "axes": [1], "steps": [-1]}, joined=False)
    yield image("Slice-odd-stride", pick, {"starts": [0], "ends": [8], "axes": [1], "steps": [3]}, "", out=3, joined=False)
    for name, picked, units in (
        ("permutation", [3, 1, 0, 2, 7, 6, 5, 4], ""),
        ("subset", [2, 3, 4, -1], "4+4"),
        ("swap", [4, 5, 6, 7, 0, 1, 2, 3], ""),
    ):
        covers = f"w1:0={units} w2:1" if units else "w1:0=8 w2:1=8"
        yield image(f"Gather-{name}", "z = Gather <axis=1> (h, i)", {"i": picked}, covers, out=len(picked), joined=False)
        yield image(
            f"Gather-{name}-add",
            "r = Gather <axis=1> (h, i) s = Relu (r) z = Concat <axis=1> (s, h)",
            {"i": picked},
            "",
            out=len(picked) + 8,
            joined=False,
        )
    yield image("Gather-twice", "z = Gather <axis=1> (h, i)", {"i": [0, 1, 1, 2]}, "", "w2:1", out=4, joined=False)
    yield image("Gather-spatial", "z = Gather <axis=2> (h, i)", {"i": [0, 0, 3]})
    yield image("Gather-one-place", "g = Gather <axis=3> (h, i) z = Unsqueeze (g, last)", {"i": np.array(2), "last": [3]})
    yield image(
        "Gather-grid",
        "g = Gather <axis=1> (h, i) q = Transpose <perm=[0,2,1,3,4]> (g) z = Reshape (q, back)",
        {"i": np.arange(8).reshape(2, 4), "back": [0, 8, 6, 6]},
        "w1:0=2+4 w2:1=2+4",
        joined=False,
    )
    yield Case(
        "Gather-embedding",
        "int64[2,5] x",
        "h = Gather (table, x) y = MatMul (h, w2)",
        {"table": (7, 8), "w2": (8, 3)},
        "table:1=8 w2:0=8",
        "table:0 w2:1",
    )
    yield image(
        "Pad-shortcut",
        f"{two} p = Pad (h, pads) z = Add (p, v)",
        {"v1": (12, 3, 3, 3), "pads": [0, 1, 0, 0, 0, 3, 0, 0]},
        "w1:0=8 b1:0=8 v1:0=4+8 w2:1=4+8",
        out=12,
        joined=False,
    )
    yield image(
        "Pad-shortcut-attribute",
        f"{two} p = Pad <pads=[0,0,0,0,0,4,0,0]> (h) z = Add (p, v)",
        {"v1": (12, 3, 3, 3)},
        "w1:0=8 v1:0=4+8 w2:1=4+8",
        out=12,
        opset=10,
        joined=False,
    )
    yield image(
        "Pad-shortcut-axes",
        f"{two} p = Pad (h, pads, value, axes) z = Add (p, v)",
        {"v1": (12, 3, 3, 3), "pads": [4, 0], "value": one(2), "axes": [-3]},
        "w1:0=8 v1:0=4+8 w2:1=4+8",
        out=12,
        opset=18,
        joined=False,
    )
    for mode in ("constant", "reflect", "edge"):
        yield image(f"Pad-spatial-{mode}", f'z = Pad <mode="{mode}"> (h, pads)', {"pads": [0, 0, 1, 2, 0, 0, 1, 0]})
    yield image(
        "Pad-reflect-channels", 'z = Pad <mode="reflect"> (h, pads)', {"pads": [0, 2, 0, 0, 0, 0, 0, 0]}, "", "w1:0", out=10, joined=False
    )
    yield rows("Pad-places", "z = Pad (h, pads, zero, axes)", {"pads": [1, 2], "zero": one(0), "axes": [1]}, opset=18)
    yield image("Pad-crop-channels", "z = Pad (h, pads)", {"pads": [0, -1, 0, 0, 0, 0, 0, 0]}, out=7, joined=False)


def movement() -> Iterator[Case]:
    flat = "w1:0=8 b1:0=8 w2:0=8"
    for name, shape in {"free": [0, -1], "free-batch": [-1, 288], "explicit": [2, 288]}.items():
        yield Case(
            f"Reshape-flatten-{name}",
            IMAGE,
            "h = Conv <pads=[1,1,1,1]> (x, w1, b1) r = Relu (h) f = Reshape (r, shape) y = Gemm (f, w2)",
            {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (288, 4), "shape": shape},
            flat,
            "w1:1 w2:1",
        )
    yield Case(
        "Reshape-attribute-of-opset-4",
        IMAGE,
        "h = Conv <pads=[1,1,1,1]> (x, w1, b1) f = Reshape <shape=[2,288]> (h) y = Gemm <transB=0, broadcast=1> (f, w2, b2)",
        {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (288, 4), "b2": (4,)},
        flat,
        "w2:1",
        opset=4,
        runs=False,
    )
    for name, axis in {"1": 1, "negative": -3, "default": None}.items():
        attribute = "" if axis is None else f"<axis={axis}>"
        yield Case(
            f"Flatten-{name}",
            IMAGE,
            f"h = Conv <pads=[1,1,1,1]> (x, w1, b1) f = Flatten {attribute} (h) y = Gemm <transB=1> (f, w2)",
            {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 288)},
            "w1:0=8 b1:0=8 w2:1=8",
            "w1:1 w2:0",
            opset=13,
        )
    yield Case(
        "Flatten-0",
        "float[1,3,6,6] x",
        "h = Conv <pads=[1,1,1,1]> (x, w1, b1) f = Flatten <axis=0> (h) y = Gemm (f, w2)",
        {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (288, 4)},
        flat,
        "w1:1 w2:1",
    )
    yield image("Flatten-2", "f = Flatten <axis=2> (h) m = MatMul (f, wm) z = Reshape (m, back)", {"wm": (36, 5), "back": [2, -1, 5, 1]})
    shuffle = "r = Reshape (h, there) t = Transpose <perm=[0,2,1,3,4]> (r) z = Reshape (t, back)"
    for name, there, back in (
        ("explicit", [2, 2, 4, 6, 6], [2, 8, 6, 6]),
        ("zeros", [0, 2, 4, 6, 6], [0, -1, 6, 6]),
        ("free", [2, 2, -1, 6, 6], [2, -1, 6, 6]),
    ):
        yield image(f"shuffle-{name}", shuffle, {"there": there, "back": back})
    last = "r = Reshape (h, there) t = Transpose <perm=[0,1,4,2,3]> (r) z = Reshape (t, back)"
    yield rows("shuffle-last", last, {"there": [2, 5, 2, 2, 2], "back": [2, 5, 8]})
    split = (
        "r = Reshape (h, there) t = Transpose <perm=[0,2,1,3]> (r) s = Softmax (t) u = Transpose <perm=[0,2,1,3]> (s) z = Reshape (u, back)"
    )
    for name, there, back in (
        ("explicit", [2, 5, 2, 4], [2, 5, 8]),
        ("zeros", [0, 0, 2, 4], [0, 0, -1]),
        ("free", [0, 0, -1, 4], [2, -1, 8]),
        ("free-batch", [-1, 5, 2, 4], [-1, 5, 8]),
    ):
        yield rows(f"heads-{name}", split, {"there": there, "back": back}, "w1:1 w2:0", joined=False)
    parts = " ".join(
        f"{a} = MatMul (x, w{a}) {a}r = Reshape ({a}, there) {a}t = Transpose <perm={'[0,2,3,1]' if a == 'k' else '[0,2,1,3]'}> ({a}r)"
        for a in "qkv"
    )
    attend = (
        "s = MatMul (qt, kt) p = Softmax (s) o = MatMul (p, vt) "
        "ot = Transpose <perm=[0,2,1,3]> (o) z = Reshape (ot, back) y = MatMul (z, wo)"
    )
    heads: Weights = {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "wo": (12, 4), "there": [0, 0, 3, 4], "back": [0, 0, -1]}
    yield Case("attention", ROWS, f"{parts} {attend}", heads, "wq:1 wk:1 wv:1 wo:0", "wq:0 wo:1")
    packed = (
        "h = MatMul (x, w1) hb = Add (h, b1) r = Reshape (hb, there) t = Transpose <perm=[2,0,3,1,4]> (r) "
        "q, k, v = Split <axis=0> (t, sizes) qs = Squeeze (q, zero) ks = Squeeze (k, zero) "
        "vt = Squeeze (v, zero) kt = Transpose <perm=[0,1,3,2]> (ks) qt = Identity (qs)"
    )
    yield Case(
        "attention-packed",
        ROWS,
        f"{packed} {attend}",
        {"w1": (6, 36), "b1": (36,), "wo": (12, 4), "there": [0, 0, 3, 3, 4], "sizes": [1, 1, 1], "zero": [0], "back": [0, 0, 12]},
        "w1:1 b1:0 wo:0",
        "w1:0 wo:1",
    )
    yield image(
        "Reshape-into-batch",
        "r = Reshape (h, there) c = Conv (r, wm) z = Reshape (c, back)",
        {"there": [-1, 4, 6, 6], "wm": (5, 4, 1, 1), "back": [2, -1, 6, 6]},
        "w1:0 wm:1=4 wm:0=5 w2:1",
        out=10,
        joined=False,
    )
    for opset, axes, extra in ((11, "<axes=[2]> ({0})", {}), (13, "({0}, axes)", {"axes": [2]})):
        text = f"u = Unsqueeze {axes.format('h')} s = Sigmoid (u) z = Squeeze {axes.format('s')}"
        yield image(f"Squeeze-{opset}", text, extra, opset=opset)
    yield image("Squeeze-no-axes", "p = GlobalAveragePool (h) s = Squeeze (p) z = Unsqueeze (s, axes)", {"axes": [2, 3]})
    yield image("Transpose", "t = Transpose <perm=[0,2,3,1]> (h) m = Mul (t, c) z = Transpose <perm=[0,3,1,2]> (m)", {"c": (8,)}, "c:0=8")
    yield Case(
        "Transpose-default",
        "float[4,5] x",
        "h = MatMul (x, w1) t = Transpose (h) y = MatMul (w2, t)",
        {"w1": (5, 8), "w2": (3, 8)},
        "w1:1=8 w2:1=8",
        "w1:0 w2:0",
    )
    for mode in ("DCR", "CRD"):
        yield image(
            f"DepthToSpace-{mode}",
            f'z = DepthToSpace <blocksize=2, mode="{mode}"> (h)',
            {},
            "w1:0=3 b1:0=3 w2:1=3",
            width=12,
            out=3,
            joined=False,
        )
    yield image("SpaceToDepth", "z = SpaceToDepth <blocksize=2> (h)", {}, "", out=32)
    scales: Weights = {"scales": np.array([1, 1, 2, 2], np.float32), "sizes": [2, 8, 12, 12], "roi": np.zeros(0, np.float32)}
    for mode in ("nearest", "linear"):
        yield image(f"Resize-scales-{mode}", f'z = Resize <mode="{mode}"> (h, roi, scales)', scales)
        yield image(f"Resize-sizes-{mode}", f'z = Resize <mode="{mode}"> (h, "", "", sizes)', scales)
    yield image("Resize-sizes-axes", 'z = Resize <axes=[2,3]> (h, "", "", sizes)', {"sizes": [9, 7]}, opset=18)
    yield image("Resize-10", "z = Resize (h, scales)", scales, opset=10)
    yield image("Upsample-9", "z = Upsample (h, scales)", scales, opset=9)
    yield image("Upsample-7", "z = Upsample <scales=[1.0,1.0,2.0,2.0]> (h)", opset=8)
    yield image("Expand-spatial", "p = GlobalAveragePool (h) z = Expand (p, shape)", {"shape": [2, 8, 6, 6]})
    yield image("Expand-lower-rank", "p = GlobalAveragePool (h) z = Expand (p, shape)", {"shape": [6, 6]})
    yield image("Expand-ones", "z = Expand (h, shape)", {"shape": [1, 1, 6, 6]})
    yield image(
        "Expand-channels", "m = ReduceMean <axes=[1]> (h) s = Expand (m, shape) z = Mul (s, h)", {"shape": [2, 8, 6, 6]}, statistics=True
    )
    yield image("Expand-constant", "c = Expand (v, shape) z = Mul (h, c)", {"v": (8, 1, 1), "shape": [2, 8, 6, 6]}, "v:0=8")
    yield image("Tile-channels", "z = Tile (h, repeats)", {"repeats": [1, 2, 1, 1]}, out=16)
    yield image("Tile-spatial", "z = Tile (h, repeats)", {"repeats": [1, 1, 2, 1]})
    yield image("Tile-ones", "m = ReduceMax <axes=[1]> (h) s = Tile (m, repeats) z = Mul (s, h)", {"repeats": [1, 8, 1, 1]})


def recurrent() -> Iterator[Case]:
    """(sequence, batch, features) into gates times hidden states; the directions share their states."""
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        for form, ways in (("forward", 1), ("bidirectional", 2)):
            weights: Weights = {"w": (ways, gates * 5, 8), "r": (ways, gates * 5, 5), "b": (ways, 2 * gates * 5), "order": [0, 0, -1]}
            layer = f'a = {op} <direction="{form}", hidden_size=5> (h, w, r, b) t = Transpose <perm=[0,2,1,3]> (a) z = Reshape (t, order)'
            covers = "w1:1=8 w:2=8 w:1=5 r:1=5 r:2=5 b:1=5 w2:0=5"
            yield rows(f"{op}-{form}", layer, weights, covers, "w:0 r:0 b:0", inputs="float[4,2,6] x", out=5 * ways, joined=False)
    stacked = (
        'a, last = GRU <hidden_size=5> (h, w, r) s = Squeeze (a, one) c, d = GRU <hidden_size=5> (s, v, q, "", "", last)'
        " z = Squeeze (c, one)"
    )
    layers: Weights = {"w": (1, 15, 8), "r": (1, 15, 5), "v": (1, 15, 5), "q": (1, 15, 5), "one": [1]}
    yield rows("GRU-stacked", stacked, layers, "w1:1=8 w:1=5 v:1=5 v:2=5 q:2=5 w2:0=5", inputs="float[4,2,6] x", out=5, joined=False)
    state = 'a, last = RNN <hidden_size=5> (h, w, r, b, "", start) z = Squeeze (last, zero)'
    layers = {"w": (1, 5, 8), "r": (1, 5, 5), "b": (1, 10), "start": (1, 2, 5), "zero": [0]}
    yield rows("RNN-state", state, layers, "w1:1=8 start:2=5 w:1=5 w2:0=5", "start:1", inputs="float[4,2,6] x", out=5, joined=False)


def pointwise() -> Iterator[Case]:
    """A window of one place passes the places one by one, a wider one does not."""
    yield rows("Conv-one-place", "z = Conv (h, wc, bc)", {"wc": (4, 5, 1), "bc": (4,)}, leaves="wc:0 wc:1")
    yield rows("ConvTranspose-one-place", "z = ConvTranspose (h, wc)", {"wc": (5, 4, 1)}, leaves="wc:0 wc:1")
    yield rows("AveragePool-one-place", "z = AveragePool <kernel_shape=[1]> (h)")
    yield rows("Conv-tall", "u = Unsqueeze (h, a) c = Conv <pads=[1,0,1,0]> (u, wc) z = Squeeze (c, a)", {"a": [1], "wc": (1, 1, 3, 1)})
    for name, text in (
        ("Conv-three-places", "z = Conv <pads=[1,1]> (h, wc)"),
        ("Conv-shifted", "z = Conv <pads=[1,-1]> (h, wd)"),
        ("MaxPool-three-places", "z = MaxPool <kernel_shape=[3], pads=[1,1]> (h)"),
    ):
        weights: Weights = {"wc": (4, 5, 3), "wd": (4, 5, 1)}
        used = {k: w for k, w in weights.items() if f" {k})" in text}
        yield rows(name, text, used, leaves="w1:1 w2:0", joined=False, runs=name != "Conv-shifted")


def idioms() -> Iterator[Case]:
    """What networks write with several operators, where one rule alone would not show a mistake."""
    yield image(
        "shuffle-added-square",
        "r = Reshape (h, there) t = Transpose <perm=[0,2,1,3,4]> (r) s = Reshape (t, back) z = Add (h, s)",
        {"there": [2, 3, 3, 6, 6], "back": [2, 9, 6, 6]},
        width=9,
        out=9,
        joined=False,
    )
    units = "w1:0 v1:0 v1:1 v2:0 v2:1 w2:1"  # halves of odd width: read as grids, the two shuffles tie all channels together
    yield image(
        "shuffled-halves",
        "".join(
            f"{k}a, {k}b = Split <axis=1> ({x}, halves) {k}c = Conv ({k}b, v{k[1]}) {k}d = Concat <axis=1> ({k}a, {k}c) "
            f"{k}r = Reshape ({k}d, there) {k}t = Transpose <perm=[0,2,1,3,4]> ({k}r) {out} = Reshape ({k}t, back) "
            for k, x, out in (("u1", "h", "n"), ("u2", "n", "z"))
        ),
        {"v1": (5, 5, 1, 1), "v2": (5, 5, 1, 1), "halves": [5, 5], "there": [2, 2, 5, 6, 6], "back": [2, 10, 6, 6]},
        units,
        width=10,
        out=10,
        joined=False,
    )
    padded: Weights = {"v": (14, 12, 1, 1), "pads": [0, 1, 0, 0, 0, 1, 0, 0], "wg": (12, 7, 1, 1)}
    text = "v0 = Conv (h, v) p = Pad (h, pads) s = Add (v0, p) z = Conv <group=2> (s, wg)"
    yield image("padded-into-groups", text, padded, "w2:1 wg:0 wg:1", width=12, out=12, joined=False)
    twice: Weights = {"v": (5, 12, 1, 1), "u": (4, 5, 1, 1), "pads": [0, 1, 0, 0, 0, 2, 0, 0]}
    text = "v0 = Conv (h, v) t = Conv (v0, u) c = Concat <axis=1> (t, t) p = Pad (v0, pads) z = Add (c, p)"
    yield image("padded-onto-twins", text, twice, "w1:0=12 v:1=12", width=12, joined=False)
    order = [8, 4, 2, 1, 15, 3, 6, 10, 0, 9, 12, 5, 13, 14, 11, 7]
    text = "g = Conv <group=4> (h, wg) z = Gather <axis=1> (g, i)"
    yield image("gather-after-grouped", text, {"wg": (16, 2, 1, 1), "i": order}, "w1:0 wg:1", out=16, joined=False)
    yield image(
        "grouped-added-to-padded",
        "g = Conv <group=4> (h, wg) p = Pad (h, pads) z = Add (g, p)",
        {"wg": (16, 1, 1, 1), "pads": [0, 0, 0, 0, 0, 12, 0, 0]},
        width=4,
        out=16,
        joined=False,
    )
    yield image(
        "spatial-attention",
        (
            "m = ReduceMean <axes=[1]> (h) n = ReduceMax <axes=[1]> (h) "
            "c = Concat <axis=1> (m, n) d = Conv <pads=[1,1,1,1]> (c, wm) s = Sigmoid (d) z = Mul (h, s)"
        ),
        {"wm": (1, 2, 3, 3)},
        "",
        "wm:0 wm:1",
        statistics=True,
    )
    yield image("outer-broadcast", "m = Conv (x, wm) p = GlobalAveragePool (h) z = Mul (m, p)", {"wm": (1, 3, 1, 1)}, "", "wm:0 wm:1")
    yield image("concat-with-mean", "m = ReduceMean <axes=[1]> (h) z = Concat <axis=1> (h, m)", {}, "w1:0=8 w2:1=8", out=9, joined=False)
    yield image("slice-of-one", "s = Slice (h, zero, one, one) z = Mul (h, s)", {"zero": [0], "one": [1]}, "w1:0=7 w2:1=7", joined=False)
    yield image(
        "pick-a-channel", "g = Gather <axis=1> (h, i) u = Unsqueeze (g, one) z = Mul (h, u)", {"i": np.array(3), "one": [1]}, joined=False
    )
    apart: Weights = {"there": [-1, 1, 6, 6], "wm": (1, 1, 3, 3), "back": [2, -1, 4, 4]}
    yield image("channels-as-batch", "r = Reshape (h, there) c = Conv (r, wm) z = Reshape (c, back)", apart, "", "wm:0 wm:1")
    yield image("single-concat", "c = Concat <axis=1> (h) z = Sum (c)")
    four = " ".join(f"{n} = Conv (x, v{n})" for n in "abcd")
    yield image(
        "concats-of-other-cuts",
        f"{four} e = Concat <axis=1> (a, b) f = Concat <axis=1> (c, d) z = Add (e, f)",
        {"va": (2, 3, 1, 1), "vb": (6, 3, 1, 1), "vc": (4, 3, 1, 1), "vd": (4, 3, 1, 1)},
        "va:0=2 vb:0=2+4 vc:0=2+2 vd:0=4 w2:1=2+2+4",
        joined=False,
    )
    yield image(
        "split-branches",
        "p, q = Split <axis=1> (h, sizes) r = Conv (p, wp) s = Conv (q, wq) z = Add (r, s)",
        {"sizes": [3, 5], "wp": (6, 3, 1, 1), "wq": (6, 5, 1, 1)},
        "w1:0=3+5 wp:1=3 wq:1=5 wp:0=6 wq:0=6 w2:1=6",
        out=6,
        joined=False,
    )
    quarters = " ".join(f"{n} = Slice (h, s{i}{j}, end, axes, two)" for n, i, j in (("p", 0, 0), ("q", 1, 0), ("r", 0, 1), ("s", 1, 1)))
    yield image(
        "patch-merging",
        f"{quarters} z = Concat <axis=1> (p, q, r, s)",
        {f"s{i}{j}": [i, j] for i in (0, 1) for j in (0, 1)} | {"end": [9, 9], "axes": [2, 3], "two": [2, 2]},
        out=32,
    )
    yield rows(
        "class-token",
        "c = Concat <axis=1> (cls, h) z = Add (c, position)",
        {"cls": (2, 1, 8), "position": (6, 8)},
        "cls:2=8 position:1=8",
        "position:0",
    )
    for form, halves in (
        ("Split", "p, q = Split <axis=2> (h, sizes)"),
        ("Slice", "p = Slice (h, zero, four, two) q = Slice (h, four, far, two)"),
    ):
        turn = f"{halves} n = Neg (q) t = Concat <axis=2> (n, p) u = Mul (h, cos) v = Mul (t, sin) z = Add (u, v)"
        yield rows(
            f"rotary-{form}",
            turn,
            {"sizes": [4, 4], "zero": [0], "four": [4], "far": [2**31], "two": [2], "cos": (5, 8), "sin": (5, 8)},
            "w1:1=4 cos:1=4 sin:1=4 w2:0=4",
            "cos:0",
            joined=False,
        )
    query = "q = MatMul (x, wq) qr = Reshape (q, six) qt = Transpose <perm=[0,2,1,3]> (qr)"
    keys = (
        "k = MatMul (x, wk) kr = Reshape (k, three) ku = Unsqueeze (kr, at) "
        "ke = Expand (ku, many) kf = Reshape (ke, six) kt = Transpose <perm=[0,2,3,1]> (kf)"
    )
    values = (
        "s = MatMul (qt, kt) a = Add (s, bias) p = Softmax (a) o = MatMul (p, qt) "
        "ot = Transpose <perm=[0,2,1,3]> (o) z = Reshape (ot, flat) y = MatMul (z, wo)"
    )
    bias = "taken = Gather (table, index) tr = Reshape (taken, square) bias = Transpose <perm=[2,0,1]> (tr)"
    tables: Weights = {"wq": (6, 24), "wk": (6, 12), "wo": (24, 4), "table": (9, 6), "index": (np.arange(25) * 4 % 9), "square": [5, 5, 6]}
    sizes: Weights = {"six": [2, 5, 6, 4], "three": [2, 5, 3, 4], "at": [3], "many": [2, 5, 3, 2, 4], "flat": [2, 5, 24]}
    yield Case(
        "grouped-query-with-bias-table",
        ROWS,
        f"{query} {keys} {bias} {values}",
        tables | sizes,
        "wq:1 wk:1 wo:0 table:1",
        "wq:0 wo:1 table:0",
    )
    yield Case(
        "BatchNormalization-rows",
        "float[4,5] x",
        "h = Gemm (x, w1) n = BatchNormalization (h, g, b, m, v) z = PRelu (n, slope) y = Gemm (z, w2)",
        {"w1": (5, 8), "w2": (8, 3), "g": (8,), "b": (8,), "m": (8,), "v": (8,), "slope": (8,)},
        "w1:1=8 g:0=8 b:0=8 m:0=8 v:0=8 slope:0=8 w2:0=8",
        "w1:0 w2:1",
    )
    yield image("weights-as-inputs", "z = Relu (h)", inputs=f"{IMAGE}, float[8,3,3,3] w1, float[8] b1, float[4,8,1,1] w2")


def run_time_shapes() -> Iterator[Case]:
    batch: dict[str, Any] = {"inputs": "float[N,3,6,6] x"}
    parts: Weights = {"zero": [0], "rest": [-1], "six": [6, 6], "there": [2, 4, 6, 6]}
    size = "s = Shape (h) n = Gather (s, zero)"
    yield image(
        "Shape-flatten",
        f"{size} t = Concat <axis=0> (n, rest) f = Reshape (h, t) z = Unsqueeze (f, two)",
        parts | {"two": [2, 3]},
        out=288,
        joined=False,
        covers="w1:0=8 w2:1=8",
        **batch,
    )
    shuffle = "t = Concat <axis=0> (n, there) r = Reshape (h, t) p = Transpose <perm=[0,2,1,3,4]> (r)"
    yield image(
        "Shape-shuffle",
        f"{size} {shuffle} u = Concat <axis=0> (n, rest, six) z = Reshape (p, u)",
        parts,
        "w1:0 w2:1",
        joined=False,
        **batch,
    )
    yield image("Shape-back", f"{size} {shuffle} z = Reshape (p, s)", parts, "w1:0 w2:1", joined=False, **batch)
    yield image(
        "Shape-slice",
        "s = Shape (h) e = Slice (s, zero, two) t = Concat <axis=0> (e, rest) f = Reshape (h, t) g = Sigmoid (f) z = Reshape (g, s)",
        {"zero": [0], "two": [2], "rest": [-1]},
        **batch,
    )
    yield image(
        "Shape-span",
        "t = Shape <start=0, end=2> (h) u = Concat <axis=0> (t, rest) f = Reshape (h, u) z = Unsqueeze (f, axes)",
        {"rest": [-1], "axes": [3]},
        **batch,
    )
    yield image("ConstantOfShape", "s = Shape (h) c = ConstantOfShape <value = float[1] {0.5}> (s) z = Add (h, c)", **batch)
    yield image(
        "ConstantOfShape-static",
        "s = Shape (h) c = ConstantOfShape (s) d = Add (c, v) z = Concat <axis=1> (h, d)",
        {"v": (8, 1, 1)},
        "v:0 w1:0 w2:1",
        out=16,
        joined=False,
    )
    yield image("Expand-run-time", "p = GlobalAveragePool (h) s = Shape (h) z = Expand (p, s)", **batch)
    yield image(
        "Resize-run-time",
        f'{size} c = Gather (s, one) t = Concat <axis=0> (n, c, big) z = Resize (h, "", "", t)',
        {"zero": [0], "one": [1], "big": [9, 9]},
        **batch,
    )
    yield image("Size", "s = Size (h) t = Size (x) u = Equal (s, t) v = Cast <to=1> (u) z = Add (h, v)", masks=False)
    scale = "s = Shape (h) d = Gather (s, two) f = Cast <to=1> (d) q = Sqrt (f) z = Div (h, q)"
    yield rows("Shape-to-data", scale, {"two": np.array(2)})
    yield image(
        "Slice-run-time",
        (
            "s = Shape (h) c = Gather (s, one) d = Div (c, two) "
            "p = Slice (h, zero, d, one) q = Slice (h, d, c, one) r = Relu (q) z = Mul (p, r)"
        ),
        {"zero": [0], "one": [1], "two": [2]},
        "w1:0=4 w2:1=4",
        out=4,
        joined=False,
    )
    yield image(
        "Split-run-time",
        "s = Shape (h) c = Gather (s, one) d = Div (c, two) e = Concat <axis=0> (d, d) p, q = Split <axis=1> (h, e) z = Mul (p, q)",
        {"one": [1], "two": [2]},
        "w1:0=4 w2:1=4",
        outputs="float[2,4,6,6] y",
        out=4,
        joined=False,
    )


def weights_on_their_way() -> Iterator[Case]:
    kernel: Weights = {"wm": (6, 8, 1, 1)}
    ends = "w1:0=8 w2:1=6"
    options: dict[str, Any] = {"out": 6, "joined": False}
    yield image(
        "weight-Transpose", "w = Transpose <perm=[1,0,2,3]> (wm) z = Conv (h, w)", {"wm": (8, 6, 1, 1)}, f"{ends} wm:0=8 wm:1=6", **options
    )
    yield image(
        "weight-Reshape",
        "w = Reshape (wm, shape) z = Conv (h, w)",
        {"wm": (6, 8), "shape": [6, 8, 1, 1]},
        f"{ends} wm:0=6 wm:1=8",
        **options,
    )
    yield image(
        "weight-Cast",
        "w = Cast <to=1> (wm) z = Conv (h, w)",
        {"wm": np.random.default_rng(1).standard_normal((6, 8, 1, 1)).astype(np.float16)},
        f"{ends} wm:0=6 wm:1=8",
        **options,
    )
    yield image("weight-Mul", "w = Mul (wm, c) z = Conv (h, w)", kernel | {"c": (6, 1, 1, 1)}, f"{ends} wm:0=6 wm:1=8 c:0=6", **options)
    yield image("weight-Identity", "w = Identity (wm) z = Conv (h, w)", kernel, f"{ends} wm:0=6 wm:1=8", **options)
    yield image(
        "weight-Concat",
        "w = Concat <axis=0> (wm, wn) z = Conv (h, w)",
        {"wm": (4, 8, 1, 1), "wn": (2, 8, 1, 1)},
        "w1:0=8 w2:1=2+4 wm:0=4 wn:0=2 wm:1=8 wn:1=8",
        **options,
    )
    yield image(
        "weight-Split",
        "wa, wb = Split <axis=0> (wm, sizes) s = Conv (h, wa) t = Conv (h, wb) z = Mul (s, t)",
        {"wm": (12, 8, 1, 1), "sizes": [6, 6]},
        "w1:0=8 w2:1=6 wm:0=6 wm:1=8",
        **options,
    )
    levels = np.random.default_rng(2).integers(-9, 9, (6, 8, 1, 1)).astype(np.int8)
    zeros: Weights = {"wm": levels, "scale": np.linspace(0.05, 0.2, 6, dtype=np.float32), "zero": np.arange(6, dtype=np.int8)}
    yield image(
        "weight-DequantizeLinear-channel",
        "w = DequantizeLinear <axis=0> (wm, scale, zero) z = Conv (h, w)",
        zeros,
        f"{ends} wm:0=6 wm:1=8 scale:0=6 zero:0=6",
        **options,
    )
    whole = "q = QuantizeLinear (h, s, o) d = DequantizeLinear (q, s, o) w = DequantizeLinear <axis=0> (wm, scale, zero) z = Conv (d, w)"
    yield image("QDQ", whole, zeros | {"s": one(0.05), "o": np.array(3, np.int8)}, f"{ends} wm:0=6 wm:1=8 scale:0=6 zero:0=6", **options)
    yield image(
        "QDQ-activation-channel",
        "q = QuantizeLinear <axis=1> (h, scale, zero) z = DequantizeLinear <axis=1> (q, scale, zero)",
        {"scale": np.linspace(0.05, 0.2, 8, dtype=np.float32), "zero": np.arange(8, dtype=np.int8)},
        "scale:0=8 zero:0=8",
        masks=False,
    )
    yield image(
        "constants",
        "r = Relu (h) c = Mul (r, s) z = Conv (c, wm)",
        {"wm": (6, 8, 1, 1), "s": (8, 1, 1)},
        f"{ends} wm:0=6 wm:1=8 s:0=8",
        constants=True,
        **options,
    )
    yield image(
        "constants-shapes",
        "r = Reshape (h, there) t = Transpose <perm=[0,2,1,3,4]> (r) z = Reshape (t, back)",
        {"there": [2, 2, 4, 6, 6], "back": [2, 8, 6, 6]},
        "w1:0 w2:1",
        constants=True,
        joined=False,
    )
    yield rows("shared-weight", "r = Relu (h) m = MatMul (r, wm) s = Relu (m) z = MatMul (s, wm)", {"wm": (8, 8)}, "wm:0=8 wm:1=8")
    yield Case(
        "shared-first-layer",
        "float[2,6] x, float[2,6] t",
        "h = MatMul (x, w1) g = MatMul (t, w1) m = Mul (h, g) y = MatMul (m, w2)",
        {"w1": (6, 8), "w2": (8, 3)},
        "w1:1=8 w2:0=8",
        "w1:0 w2:1",
    )
    yield Case(
        "tied-embedding",
        "int64[2,5] x",
        "h = Gather (table, x) m = MatMul (h, wm) t = Transpose (table) y = MatMul (m, t)",
        {"table": (7, 8), "wm": (8, 8)},
        "table:1=8 wm:0=8 wm:1=8",
        "table:0",
    )
    half = {"w1": np.random.default_rng(3).standard_normal((6, 8)), "w2": np.random.default_rng(4).standard_normal((8, 4))}
    for kind, dtype, limit in (("float16", np.float16, 2e-2), ("double", np.float64, 1e-6)):
        yield Case(
            kind,
            f"{kind}[2,5,6] x",
            "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)",
            {k: w.astype(dtype) for k, w in half.items()},
            "w1:1=8 w2:0=8",
            "w1:0 w2:1",
            outputs=f"{kind} y",
            tolerance=limit,
        )


def islands() -> Iterator[Case]:
    fixed: dict[str, Any] = {"covers": "", "leaves": "w1:0 b1:0", "joined": False}
    yield image("custom-operator", "z = test.custom.Mystery (h)", runs=False, covers="", leaves="w1:0 b1:0 w2:1", joined=False)
    yield image(
        "custom-operator-beside",
        "s = test.custom.Mystery (x) z = Relu (h) u = Identity (s)",
        runs=False,
        outputs="float y, float[2,3,6,6] u",
    )
    yield image(
        "If-captures",
        (
            "m = ReduceMean <keepdims=0> (x) c = Greater (m, zero) "
            "z = If (c) <then_branch = yes () => (float[2,8,6,6] a) { a = Relu (h) },"
            " else_branch = no () => (float[2,8,6,6] b) { b = Neg (h) }>"
        ),
        {"zero": one(0)},
    )
    yield image(
        "If-beside",
        (
            "m = ReduceMean <keepdims=0> (x) c = Greater (m, zero) "
            "k = If (c) <then_branch = yes () => (float[2,3,6,6] a) { a = Relu (x) },"
            " else_branch = no () => (float[2,3,6,6] b) { b = Neg (x) }>"
            " v = Conv <pads=[1,1,1,1]> (k, v1) z = Add (h, v)"
        ),
        {"zero": one(0), "v1": (8, 3, 3, 3)},
        "v1:0=8",
    )
    yield image("hidden-output", "z = Relu (h)", outputs="float y, float h", **fixed)
    yield image(
        "hidden-output-after",
        "r = Relu (h) z = Conv (r, wm)",
        {"wm": (5, 8, 1, 1)},
        "w1:0=8 wm:1=8",
        "wm:0 w2:1",
        outputs="float y, float z",
        out=5,
        joined=False,
    )
    yield image("input-meets-hidden", "z = Concat <axis=1> (h, x)", {}, "w1:0=8 w2:1=8", out=11, joined=False)
    yield image(
        "input-added",
        "v = Conv (h, v1) t = Add (v, x) z = Relu (t)",
        {"v1": (3, 8, 1, 1)},
        "w1:0=8 v1:1=8",
        "v1:0 w2:1",
        out=3,
        joined=False,
    )
    yield image("dead-branch", "r = Relu (h) unused = Conv (r, wm) z = Relu (h)", {"wm": (5, 8, 1, 1)}, "wm:1=8")


CASES = [
    case
    for family in (
        unary,
        binary,
        convolutions,
        products,
        norms,
        pools,
        reductions,
        cuts,
        movement,
        pointwise,
        idioms,
        run_time_shapes,
        weights_on_their_way,
        islands,
    )
    for case in family()
]

# What the package is known to leave fixed although it could go, and (from "padded" on) what it gets wrong.
BUGS = {
    "MaxUnpool": "the indices that MaxUnpool reads are fixed",
    "Reshape-attribute-of-opset-4": "onnx infers no shape of a Reshape whose target is an attribute",
}

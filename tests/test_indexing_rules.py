"""Operators along one axis, of regions and of signals, with more channels than onnx's own cases have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import test_op_rules
from op_cases import Case, Weights, image, rows

PICKED = np.random.default_rng(0).integers(0, 5, (2, 3, 8))  # places along axis 1, for every channel


def picking() -> Iterator[Case]:
    yield rows("GatherElements", "z = GatherElements <axis=1> (h, i)", {"i": PICKED}, "i:2=8", "i:1")
    few = PICKED[:, :, :6]
    yield rows("GatherElements-few", "z = GatherElements <axis=1> (h, i)", {"i": few}, "w1:1=6+2 i:2=6 w2:0=6", joined=False, out=6)
    for op, opset in (("ScatterElements", 17), ("Scatter", 10)):
        body = f"z = {op} <axis=1> (h, i, u)"
        places = np.stack([np.random.default_rng(i).permutation(5)[:3] for i in range(16)]).reshape(2, 8, 3).transpose(0, 2, 1)
        yield rows(op, body, {"i": places, "u": (2, 3, 8)}, "i:2=8 u:2=8", "i:1 u:1", opset=opset)
    body = "z = TensorScatter <axis=1> (c, h, i)"
    yield rows("TensorScatter", body, {"c": (2, 9, 8), "i": [0, 3]}, "c:2=8", "c:1", opset=24)
    keep = np.array([True, False, True, True, False])
    yield rows("Compress", "z = Compress <axis=1> (h, c)", {"c": keep})
    yield rows("Compress-channels", "z = Compress <axis=2> (h, c)", {"c": np.ones(8, bool)}, "", "w1:1 w2:0", joined=False)
    body = "t = ArgMax <axis=1, keepdims=0> (h) o = OneHot <axis=1> (t, d, v) z = Cast <to=1> (o)"
    yield rows("OneHot", body, {"d": np.array(5), "v": np.array([0, 1], np.float32)})
    yield rows("ReverseSequence", "z = ReverseSequence <batch_axis=0, time_axis=1> (h, n)", {"n": [3, 5]})
    yield image("Trilu", "z = Trilu (h)")
    yield rows("Trilu-channels", "z = Trilu (h)", {}, "", "w1:1 w2:0", joined=False)
    yield rows("CumProd", "z = CumProd (h, a)", {"a": [1]}, opset=26)
    yield image("Hardmax", "z = Hardmax <axis=-1> (h)")


def regions() -> Iterator[Case]:
    boxes = np.array([[0, 0, 3, 3], [1, 1, 5, 4], [0, 2, 4, 5]], np.float32)
    body = "z = RoiAlign <output_height=2, output_width=3> (h, r, b)"
    yield image("RoiAlign", body, {"r": boxes, "b": [0, 1, 0]}, "", "r:0 r:1", opset=16)
    numbered = np.concatenate([np.array([[0], [1], [0]], np.float32), boxes], 1)
    yield image("MaxRoiPool", "z = MaxRoiPool <pooled_shape=[2,2]> (h, r)", {"r": numbered}, "", "r:0 r:1")
    yield image("CenterCropPad", "z = CenterCropPad <axes=[2,3]> (h, s)", {"s": [4, 7]}, opset=18)
    yield image("CenterCropPad-all", "z = CenterCropPad (h, s)", {"s": [2, 8, 4, 7]}, opset=18)
    yield image("CenterCropPad-channels", "z = CenterCropPad <axes=[1]> (h, s)", {"s": [6]}, "", "w1:0 w2:1", opset=18, joined=False, out=6)
    sizes = 'z = Resize <axes=[2,3], keep_aspect_ratio_policy="not_larger"> (h, , , s)'
    yield image("Resize-aspect", sizes, {"s": [3, 9]}, opset=18)
    body = "g = AffineGrid (t, s) z = GridSample (h, g)"
    yield image("AffineGrid", body, {"t": (2, 2, 3), "s": [2, 3, 4, 4]}, "", "t:1 t:2", opset=20)


def columns() -> Iterator[Case]:
    body = "f = Reshape (h, flat) c = Col2Im (f, size, block) z = Conv (c, v)"
    weights: Weights = {"flat": [2, 8, 36], "size": [7, 6], "block": [2, 1], "v": (5, 4, 1, 1)}
    yield image("Col2Im", body, weights, "w1:0=4 v:1=4 v:0=5 w2:1=5", "", opset=18, joined=False, out=5)
    weights = {"wd": (6, 8, 3, 3), "o": (2, 18, 6, 6), "bd": (6,), "m": (2, 9, 6, 6)}
    body = "z = DeformConv <pads=[1,1,1,1]> (h, wd, o, bd, m)"
    covers = "w1:0=8 wd:1=8 wd:0=6 bd:0=6 w2:1=6"
    yield image("DeformConv", body, weights, covers, "o:1 m:1 wd:2", opset=19, joined=False, out=6)
    weights = {"wd": (6, 8, 3, 3), "o": (2, 36, 6, 6)}
    body = "z = DeformConv <pads=[1,1,1,1], offset_group=2> (h, wd, o)"
    yield image("DeformConv-offset-groups", body, weights, "w1:0=4 wd:1=4 wd:0=6 w2:1=6", "o:1", opset=19, joined=False, out=6)
    weights = {"wd": (6, 4, 3, 3), "o": (2, 18, 6, 6)}
    body = "z = DeformConv <pads=[1,1,1,1], group=2> (h, wd, o)"
    yield image("DeformConv-groups", body, weights, "w1:0 wd:1 wd:0 w2:1", "o:1", opset=19, joined=False, out=6)


def signals() -> Iterator[Case]:
    body = "t = Transpose <perm=[0,2,1]> (h) u = Unsqueeze (t, a) f = DFT (u, , n) s = ReduceSumSquare <keepdims=0> (f, a) "
    yield rows("DFT", body + "z = Transpose <perm=[0,2,1]> (s)", {"a": [-1], "n": np.array(-2)}, opset=20)
    square = "f = Reshape (t, s) m = MatMul (f, v) d = Det (m) e = Reshape (d, q)"
    body = f"t = Transpose <perm=[0,2,1]> (h) {square} z = Transpose <perm=[0,2,1]> (e)"
    yield rows("Det", body, {"s": [2, 8, 1, 5], "v": (2, 8, 5, 1), "q": [2, 8, 1]}, "v:1=8")
    frames = "m = STFT (f, n, , l) u = ReduceSumSquare <keepdims=0> (m, a)"
    body = f"t = Transpose <perm=[2,0,1]> (h) f = Reshape (t, s) {frames} z = Transpose <perm=[1,2,0]> (u)"
    weights: Weights = {"s": [8, 10, 1], "n": np.array(2), "l": np.array(4), "a": [-1]}
    yield rows("STFT", body, weights, opset=18)


@pytest.mark.parametrize("case", [*picking(), *regions(), *columns(), *signals()], ids=lambda case: case.name)
def test_indexing_rule(case: Case) -> None:
    test_op_rules.test_rule(case)

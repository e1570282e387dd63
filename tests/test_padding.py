"""Masks among the inputs: places that hold nothing have no say, whichever way round the mask is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxprune
from onnxprune.padding import kept_places
from onnxprune.running import session

LENGTHS = np.array([5, 3, 1, 4])
KEPT = np.arange(5) < LENGTHS[:, None]
ALL_PADDED = np.arange(5) < np.array([[2], [4], [3]])


@pytest.mark.parametrize("name", ["attention_mask", "mask", "src_mask", "key_padding_mask", "padding_mask"])
@pytest.mark.parametrize("kept", [KEPT, KEPT[:, ::-1], ALL_PADDED, np.ones((2, 3), bool)])
@pytest.mark.parametrize("kind", [bool, np.int64, np.float32])
def test_what_a_mask_keeps_is_kept_whichever_way_round_it_is(name: str, kept: np.ndarray, kind: type) -> None:
    pads = "pad" in name
    found = kept_places({name: (~kept if pads else kept).astype(kind)}, lambda shape: shape == kept.shape)
    assert found is not None
    assert found.tolist() == kept.tolist()


def test_sequences_padded_in_front_go_by_the_name() -> None:
    kept = ALL_PADDED[:, ::-1]
    for name, mask in (("attention_mask", kept), ("key_padding_mask", ~kept)):
        found = kept_places({name: mask}, lambda shape: True)
        assert found is not None
        assert found.tolist() == kept.tolist()


def test_masks_of_something_else_say_nothing() -> None:
    random = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]])
    first = np.array([[1, 0, 0, 0, 0]])
    for name, mask in (("mask", random), ("bool_masked_pos", random), ("global_attention_mask", first), ("mask", np.array([[0.5, 1]]))):
        assert kept_places({name: mask}, lambda shape: True) is None
    assert kept_places({"ids": KEPT, "mask": KEPT}, lambda shape: shape == (4, 6)) is None


@pytest.mark.parametrize("compensation", ["update", "reconstruct"])
def test_padding_is_not_what_layers_are_fitted_to(compensation: str) -> None:
    rng = np.random.default_rng(0)
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n,8,12] x, bool[n,8] key_padding_mask) => (float[n,8,5] y) {
        h = MatMul(x, a) b = Add(h, p) r = Relu(b) z = MatMul(r, c) o = Add(z, q)
        k = Unsqueeze(key_padding_mask, two) y = Where(k, zero, o) }"""
    tensors = {"a": rng.normal(size=(12, 48)) / 3, "p": rng.normal(size=48), "c": rng.normal(size=(48, 5)) / 5, "q": rng.normal(size=5)}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items())
    model.graph.initializer.extend([numpy_helper.from_array(np.array([2]), "two"), numpy_helper.from_array(np.float32(0), "zero")])
    x = rng.normal(size=(512, 8, 12)).astype(np.float32)
    pad = np.arange(8) >= rng.integers(3, 8, 512)[:, None]
    x[pad] = 0
    seen, held = ({"x": x[part], "key_padding_mask": pad[part]} for part in (slice(256), slice(256, None)))
    wanted = session(model).run(None, held)[0]

    def missed(name: str) -> float:
        given = {"calibration": seen, "criterion": "l2", "allocation": "uniform", "verify": False}
        made = onnxprune.prune(model, 0.4, compensation=name, **given).model
        return float(np.square(session(made).run(None, held)[0] - wanted)[~pad[256:]].mean())

    assert missed(compensation) < 0.4 * missed("none")

"""Models that onnxruntime's quantizer wrote, pruned in their own types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EVAL, MODELS
from onnxruntime import quantization
from outside import covered, distance, permuted, run

import onnxprune


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, arrays: Path) -> None:
        self.rows: Iterator[np.ndarray] = iter(np.load(arrays)["input"][:64].reshape(8, 8, *np.load(arrays)["input"].shape[1:]))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.rows, None)
        return None if batch is None else {"input": batch}


def quantized(name: str, how: str, per_channel: bool, folder: Path) -> onnx.ModelProto:
    source, target = folder / "model.onnx", folder / "quantized.onnx"
    source.write_bytes((MODELS / f"{name}.onnx").read_bytes())  # the quantizer writes beside it
    if how == "dynamic":
        quantization.quantize_dynamic(source, target, per_channel=per_channel)
    else:
        form = {"qdq": quantization.QuantFormat.QDQ, "operators": quantization.QuantFormat.QOperator}[how]
        arrays = MODELS / EVAL[name].replace("eval", "calibration")
        quantization.quantize_static(source, target, Samples(arrays), quant_format=form, per_channel=per_channel)
    return onnx.load(target)


ALL = [(n, h) for n in ("digits-resnet", "digits-mlp", "digits-mobilenet", "digits-densenet") for h in ("qdq", "operators", "dynamic")]
REFUSED = ("digits-densenet", "dynamic")  # the quantizer's own shape inference fails on it


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("name", "how"), [case for case in ALL if case != REFUSED])
def test_quantized_models(name: str, how: str, per_channel: bool, tmp_path: Path) -> None:
    model = quantized(name, how, per_channel, tmp_path)
    data = np.load(MODELS / EVAL[name])
    feeds = {"input": data["input"][:16]}
    result = onnxprune.prune(model, 0.3, feeds=feeds)
    content = result.plan.to_json()
    whole = onnxprune.groups(MODELS / f"{name}.onnx", verify=False)
    assert sum(g.units for g in result.plan.groups) >= 0.9 * sum(g.units for g in whole.groups)
    assert result.on_budget
    integers = {t.name for t in model.graph.initializer if t.data_type in (2, 3)}
    assert {tensor for tensor, axis in covered(content)} & integers
    gap = distance(run(model, feeds), run(permuted(model, content), feeds))
    assert gap <= (2e-3 if how == "operators" else 0.1)  # one rounding of an activation to 8 bits may fall the other way
    left = run(result.model, feeds)
    assert all(np.isfinite(v).all() for v in left.values())
    before = {t.name: t.data_type for t in model.graph.initializer}
    assert all(before.get(t.name, t.data_type) == t.data_type for t in result.model.graph.initializer)

"""What the tests share: the shipped models, and the way to run the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
SHARED = ROOT.parent / "shared"
EVAL = {
    "digits-resnet": "digits-images.eval.npz",
    "digits-mobilenet": "digits-images.eval.npz",
    "digits-densenet": "digits-images.eval.npz",
    "digits-mlp": "digits-mlp.eval.npz",
    "digits-conv1d": "digits-conv1d.eval.npz",
}

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `onnxprune` with the arguments, in an empty folder."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "onnxprune", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)

    return run


@pytest.fixture(params=sorted(EVAL))
def shipped(request: pytest.FixtureRequest) -> str:
    """The name of each model in models/."""
    return str(request.param)


def two_layers(hidden: int = 8, inputs: int = 4, outputs: int = 3, seed: int = 0) -> onnx.ModelProto:
    """x (N, inputs) -> MatMul -> Add -> Relu -> MatMul -> y (N, outputs)."""
    rng = np.random.default_rng(seed)
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        two_layers (float[N, {inputs}] x) => (float[N, {outputs}] y) {{
            h = MatMul(x, w1)
            b = Add(h, b1)
            r = Relu(b)
            y = MatMul(r, w2)
        }}"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("w1", (inputs, hidden)), ("b1", (hidden,)), ("w2", (hidden, outputs))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model

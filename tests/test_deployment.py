"""The recipe of docs/deployment.md, run as it stands on a shipped model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import EVAL, MODELS, ROOT

from onnxprune.evaluation import evaluate, read_arrays
from onnxprune.importer import load
from onnxprune.tensorrt import check

TEXT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_recipe_runs_from_the_model_to_the_quantized_one(tmp_path: Path) -> None:
    arrays = MODELS / EVAL["digits-resnet"]
    for source, name in (
        (MODELS / "digits-resnet.onnx", "model.onnx"),
        (arrays, "eval.npz"),
        (arrays.with_name(arrays.name.replace("eval", "calibration")), "calibration.npz"),
    ):
        (tmp_path / name).write_bytes(source.read_bytes())
    for block in blocks("python"):
        (tmp_path / block.partition("\n")[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    python = f'"{sys.executable}"'
    script = "\n".join(["set -e", f'onnxprune() {{ {python} -m onnxprune "$@"; }}', f'python() {{ {python} "$@"; }}', *blocks("bash")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ship it" in done.stdout
    quantized = onnx.load(tmp_path / "quantized.onnx")
    found = evaluate(onnx.load(tmp_path / "model.onnx"), quantized, read_arrays(tmp_path / "eval.npz"))
    assert f"-> {found.after:.2%}" in done.stdout
    assert found.before is not None
    assert found.after is not None
    assert found.after >= found.before - 0.02
    assert check(load(quantized)).refused == ()
    assert json.loads((tmp_path / "support.json").read_text())["support"]["refused"] == []
    macs = [m["macs"] for m in json.loads((tmp_path / "bench.json").read_text())]
    assert macs[1] == macs[2] == pytest.approx(0.6 * macs[0], rel=0.02)


def test_the_recipe_names_every_exit_code_and_figure() -> None:
    from onnxprune.gates import FIGURES, MISSED

    for figure in FIGURES:
        assert f"`{figure}`" in TEXT
    for code in (0, 2, 3, 4, MISSED, 130):
        assert f"\n| {code} |" in TEXT

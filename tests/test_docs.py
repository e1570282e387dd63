"""Every block of code in README and docs runs, in a folder with the files that it speaks of.

A block that cannot run here says so in a comment before it: `<!-- needs: torch -->`, or `<!-- not run: reason -->`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS
from outside import build

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- (needs|not run): ([^>]*?) -->\n)?^```(bash|python|toml|json)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {
    "fine-tuning.md": "test_handoff runs them, on models of each framework",
    "deployment.md": "test_deployment runs them in their order",
}
CLOSE = (0, 3)  # a measured latency may be missed
BEFORE = {  # what a reader has by then
    "calibration.md": """
import onnx, numpy as np
candidate_one = candidate_other = onnx.load("model.onnx")
""",
    "report.md": """
import onnxprune
result = onnxprune.prune("model.onnx", 0.4)
""",
}


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    language: str
    text: str
    needs: str = ""
    skipped: str = ""


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for number, (kind, words, language, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            needs, skipped = (words, "") if kind == "needs" else ("", words)
            found.append(Block(page.name, number, language, text, needs, skipped or ELSEWHERE.get(page.name, "")))
    return found


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a model, samples with and without labels, a plan, a pruned model and a checkpoint."""
    page = request.node.callspec.params["block"].page
    if page == "calibration.md":  # of pictures
        body = "h = Conv <pads=[1,1,1,1]> (input, a) r = Relu (h) p = GlobalAveragePool (r) f = Flatten (p) logits = Gemm (f, b, c)"
        onnx.save(
            build("float[N,3,224,224] input", body, "float logits", {"a": (10, 3, 3, 3), "b": (10, 10), "c": (10,)}),
            tmp_path / "model.onnx",
        )
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "pixels.npz", input=rng.integers(0, 256, (8, 3, 224, 224)).astype(np.uint8))
        image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
        (tmp_path / "photos").mkdir()
        for i in range(4):
            image.fromarray(rng.integers(0, 256, (300, 280, 3)).astype(np.uint8)).save(tmp_path / "photos" / f"{i}.png")
        return tmp_path
    shutil.copy(MODELS / "digits-resnet.onnx", tmp_path / "model.onnx")
    for name in ("fine-tuned.onnx", "digits-resnet.onnx", "decoder.onnx"):
        shutil.copy(MODELS / "digits-resnet.onnx", tmp_path / name)
    with np.load(MODELS / "digits-images.calibration.npz") as data:
        np.savez(tmp_path / "data.npz", **{k: data[k][:64] for k in data.files})
    with np.load(MODELS / "digits-images.eval.npz") as data:
        np.savez(tmp_path / "labelled.npz", **{k: data[k][:64] for k in data.files})
    shutil.copy(tmp_path / "labelled.npz", tmp_path / "test.npz")
    if page in ("README.md", "tutorial.md"):
        run(tmp_path, "-m", "onnxprune", "model.onnx", "-r", "0.3", "-o", "smaller.onnx", "--plan-out", "plan.json", "-q")
    if page == "README.md":
        tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
        safetensors(tmp_path / "model.safetensors", {t.name: onnx.numpy_helper.to_array(t) for t in tensors})
    return tmp_path


def safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """The format: the length of a JSON header in eight bytes, the header, the numbers."""
    header, place = {}, 0
    floats = {name: array.astype("<f4") for name, array in arrays.items()}
    for name, array in floats.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in floats.values()))


def run(folder: Path, *command: str) -> None:
    made = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode in (CLOSE if "latency" in command else (0,)), f"{shlex.join(command)}\n{made.stdout}{made.stderr}"


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page}-{block.number}")
def test_what_the_documentation_shows_runs(block: Block, folder: Path) -> None:
    if block.skipped:
        pytest.skip(block.skipped)
    for module in filter(None, block.needs.split(", ")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if block.language == "json":
        json.loads(re.sub(r",?\s*…|//.*", "", block.text))
    elif block.language == "toml":
        (folder / "onnxprune.toml").write_text(block.text)
        run(folder, "-m", "onnxprune", "model.onnx", "-o", "smaller.onnx", "-q")
    elif block.language == "python":
        run(folder, "-c", BEFORE.get(block.page, "") + block.text)
    else:
        lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
        for words in filter(None, lines):
            assert words[0] == "onnxprune", f"what is {words[0]}? a block of other commands says why it is not run"
            run(folder, "-m", "onnxprune", *words[1:])


def test_every_page_is_in_the_site_and_every_link_leads_somewhere() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name == "README.md" or page.name in site
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"

"""Tab: what the shells are told, and what they make of it where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from onnxprune.allocations import names
from onnxprune.compensation import compensation


@pytest.fixture
def script(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has `onnxprune`, as an installed package gives it."""
    path = tmp_path / "bin" / "onnxprune"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom onnxprune.cli import main\nmain()\n")
    path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{path.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HOME": str(tmp_path),
    }


def completed(script: dict[str, str], line: str, folder: Path) -> list[str]:
    """What bash is told for the last word of a line, as kind,text."""
    words = line.split(" ")
    asked = {"_ONNXPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    made = subprocess.run(["onnxprune"], env=script | asked, cwd=folder, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    return made.stdout.split()


def test_commands_files_options_and_names(script: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "onnxprune.toml").write_text("ratio = 0.3\n")  # says nothing while Tab is pressed
    for line, found in (
        ("onnxprune se", ["plain,sensitivity"]),
        ("onnxprune mod", ["file,mod"]),
        ("onnxprune groups mod", ["file,mod"]),
        ("onnxprune model.onnx --rat", ["plain,--ratio"]),
        ("onnxprune model.onnx --criterion ob", ["plain,obs"]),
        ("onnxprune model.onnx --of par", ["plain,params"]),
        ("onnxprune model.onnx --calibration n", ["plain,noise", "plain,none"]),
        ("onnxprune model.onnx --calibration data", ["file,data"]),
        ("onnxprune model.onnx --plan-out p", ["file,p"]),
        ("onnxprune apply model.onnx p", ["file,p"]),
        ("onnxprune sweep model.onnx -o sw", ["dir,sw"]),
        ("onnxprune sweep model.onnx --criteria obs,l", ["plain,obs,l1", "plain,obs,l2", "plain,obs,lamp"]),
        ("onnxprune plan model.onnx --allocation ", [f"plain,{name}" for name in sorted({*names(), "auto"})]),
        ("onnxprune plan model.onnx --compensation ", [f"plain,{name}" for name in compensation.names()]),
    ):
        assert completed(script, line, tmp_path) == found, line


def test_bash(script: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    text = """eval "$(_ONNXPRUNE_COMPLETE=bash_source onnxprune)"
        COMP_WORDS=(onnxprune model.onnx --criterion ob); COMP_CWORD=3; _onnxprune_completion onnxprune; echo "${COMPREPLY[*]}" """
    made = subprocess.run(["bash", "--norc", "-c", text], env=script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (made.stdout.strip(), made.stderr) == ("obs", "")


def test_zsh(script: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    text = 'autoload -U compinit; compinit -u; eval "$(_ONNXPRUNE_COMPLETE=zsh_source onnxprune)"; echo $_comps[onnxprune]'
    made = subprocess.run(["zsh", "-f", "-c", text], env=script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (made.stdout.strip(), made.stderr) == ("_onnxprune_completion", "")


def test_fish(script: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    text = 'env _ONNXPRUNE_COMPLETE=fish_source onnxprune | source; complete -C "onnxprune model.onnx --criterion ob"'
    made = subprocess.run(["fish", "--no-config", "-c", text], env=script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.stdout.split() == ["obs"], made.stderr

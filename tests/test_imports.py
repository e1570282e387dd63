"""The command line starts fast: what takes long to import is imported by what needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"joblib", "networkx", "numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "rich", "scipy", "torch"}


def imported(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has after the code."""
    line = f"import sys\n{code}\nprint('MODULES', *sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, timeout=60)
    return HEAVY & set(done.stderr.partition("MODULES")[2].split())


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert imported("import onnxprune") == set()
    assert "onnx" in imported("import onnxprune; onnxprune.prune")  # the check sees what is there


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["groups", "--help"], ["bench", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"from onnxprune.cli import main\ntry: main({words})\nexcept SystemExit as end: assert not end.code"
    assert imported(code) == set()


def test_wrong_usage_is_said_without_anything_heavy() -> None:
    code = "from onnxprune.cli import main\ntry: main(['nothing-of-the-kind'])\nexcept SystemExit as end: assert end.code == 2"
    assert imported(code) == set()

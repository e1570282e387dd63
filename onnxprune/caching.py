"""What takes long to measure is kept in the user's cache folder; a file there that is missing or spoilt is measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxprune.errors import OnnxPruneError
from onnxprune.writing import write_text

FORMAT = 2  # one more where what is measured, or how, is no longer the same


def folder() -> Path:
    """$XDG_CACHE_HOME/onnxprune, %LOCALAPPDATA%\\onnxprune, or ~/.cache/onnxprune."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "onnxprune"


def _path(key: Mapping[str, str | int]) -> Path:
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(key: Mapping[str, str | int]) -> dict[str, Any] | None:
    """What was written under this key; None where that is nothing that can be read."""
    try:
        content = json.loads(_path(key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(content, dict) and content.get("key") == dict(key) and isinstance(content.get("content"), dict)
    return dict(content["content"]) if same else None


def write(key: Mapping[str, str | int], content: Mapping[str, Any]) -> None:
    """Keep it under this key, if the folder takes it."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        write_text(json.dumps({"key": dict(key), "content": dict(content)}), _path(key))
    except (OSError, OnnxPruneError):
        pass  # it will be measured again

"""Functions of the user's own, named `module:function`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from onnxprune.errors import OnnxPruneError

ENDS = (Exception, SystemExit)  # how code of the user's may end
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function(text: str) -> bool:
    """Whether the text names a function, and no file does."""
    return _NAME.fullmatch(text) is not None and not os.path.exists(text)


def user_function(text: str) -> Callable[..., Any]:
    """The function; the working directory is searched first, as `python -m` does.

    Raises OnnxPruneError where there is none or its module does not load.
    """
    if not is_function(text):
        raise OnnxPruneError(f"'{text}': write it as module:function")
    module, _, name = text.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ENDS as error:  # whatever the user's module does
        raise OnnxPruneError(f"{text}: the module '{module}' does not load ({said(error)})") from error
    if not callable(found):
        raise OnnxPruneError(f"{text}: the module '{module}' has no function '{name}'")
    return found  # type: ignore[no-any-return]


def said(error: BaseException) -> str:
    """An exception of the user's code in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"

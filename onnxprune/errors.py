"""The one exception that onnxprune raises on purpose."""

from __future__ import annotations


class OnnxPruneError(Exception):
    """A clear, one-line message for the user, and the exit code that the command ends with (2: bad input or usage)."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code

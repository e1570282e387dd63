"""The one exception that onnxprune raises on purpose, and the one warning."""

from __future__ import annotations

from collections.abc import Mapping


class OnnxPruneError(Exception):
    """A clear, one-line message for the user, and the exit code that the command ends with (2: bad input or usage)."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OnnxPruneWarning(UserWarning):
    """What is likely not what the user means, in one line; the work goes on."""


class ProofError(OnnxPruneError):
    """The pruned model does not compute what it must (exit code 4); groups: why, for the id of each group that causes it."""

    def __init__(self, message: str, groups: Mapping[int, str]) -> None:
        super().__init__(message, 4)
        self.groups = groups

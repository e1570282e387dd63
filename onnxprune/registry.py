"""Functions registered under names, by a decorator or by an entry point of an installed package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from onnxprune.errors import OnnxPruneError

F = TypeVar("F")


class Registry(Generic[F]):
    """`@registry("name")` registers a function; `registry.get("name")` finds it, also among the group's entry points."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self.known: dict[str, F] = {}

    def __call__(self, name: str) -> Callable[[F], F]:
        def register(function: F) -> F:
            self.known[name] = function
            return function

        return register

    def names(self) -> list[str]:
        return sorted({*self.known, *(entry.name for entry in entry_points(group=self.group))})

    def get(self, name: str) -> F:
        """Raises OnnxPruneError where there is none of that name."""
        if name not in self.known:
            for entry in entry_points(group=self.group):
                if entry.name == name:
                    self.known[name] = entry.load()
        if name not in self.known:
            raise OnnxPruneError(f"no {self.kind} is named '{name}'; there are: {', '.join(self.names())}")
        return self.known[name]

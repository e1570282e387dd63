"""Functions registered under names, by a decorator or by an entry point of an installed package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from onnxprune.errors import OnnxPruneError
from onnxprune.userfunctions import ENDS, said

F = TypeVar("F", bound=Callable[..., Any])


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
                    try:
                        self.known[name] = entry.load()
                    except ENDS as error:  # whatever the package's module does
                        raise OnnxPruneError(f"the {self.kind} '{name}' ({entry.value}) does not load ({said(error)})") from error
        if name not in self.known:
            raise OnnxPruneError(f"no {self.kind} is named '{name}'; there are: {', '.join(self.names())}")
        return self.known[name]

    def foreign(self, name: str) -> bool:
        """Whether a function is not this package's own."""
        return not getattr(self.get(name), "__module__", "").startswith("onnxprune.")

    def call(self, name: str, *given: Any) -> Any:
        """What a function makes of these; raises OnnxPruneError where one that is not this package's own fails."""
        try:
            return self.get(name)(*given)
        except OnnxPruneError:
            raise
        except ENDS as error:
            if not self.foreign(name):
                raise
            raise OnnxPruneError(f"the {self.kind} '{name}' fails ({said(error)})") from error

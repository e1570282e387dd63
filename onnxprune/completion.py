"""What a shell completes after Tab: files, and the names of criteria, allocations, compensations, budgets and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

FILE = click.Path(readable=False)  # any text: what is wrong with it is said where it is read or written
Complete = Callable[[click.Context, click.Parameter, str], list[Any]]


def folder(context: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
    return [CompletionItem(typed, type="dir")]


def one_of(names: Callable[[], Iterable[str]], *, several: bool = False, files: bool = False) -> Complete:
    """Completes names, looked up when they are asked for.  several: with commas between them; files: where no name fits."""

    def complete(context: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
        before, comma, last = typed.rpartition(",") if several else ("", "", typed)
        found: list[Any] = [CompletionItem(before + comma + name) for name in sorted(set(names())) if name.startswith(last)]
        if files and not (typed and found):
            return [CompletionItem(typed, type="file")]
        return found

    return complete


def criteria() -> Iterable[str]:
    from onnxprune.criteria import criterion
    from onnxprune.saliency import measured
    from onnxprune.selection import AUTO, PCA

    return (*criterion.names(), *measured.names(), AUTO, PCA)


def allocations() -> Iterable[str]:
    from onnxprune.allocations import names

    return (*names(), "auto")


def compensations() -> Iterable[str]:
    from onnxprune.compensation import compensation

    return compensation.names()


def budgets() -> Iterable[str]:
    from onnxprune.allocations import BUDGETS

    return BUDGETS


def granularities() -> Iterable[str]:
    from onnxprune.depth import KINDS

    return KINDS


def targets() -> Iterable[str]:
    from onnxprune.tiles import TARGETS

    return TARGETS


def providers() -> Iterable[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def pixels() -> Iterable[str]:
    from onnxprune.images import PRESETS

    return PRESETS


def no_samples() -> Iterable[str]:
    return ("noise", "none")

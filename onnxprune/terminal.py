"""What all commands say and where: tables on standard output, progress and errors on standard error, JSON in files."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from onnxprune.errors import OnnxPruneWarning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EVERY = 30  # seconds between lines of progress in a log
NARROW = 80  # characters below which tables leave out what is said elsewhere too


def complain(text: str) -> None:
    """An error, in one line."""
    click.echo(f"error: {' '.join(text.split())}", err=True)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Every warning of the program's own is a line on standard error, once."""
    told: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if not issubclass(category, OnnxPruneWarning):
            others(message, category, *where, **more)
        elif text not in told:
            told.add(text)
            click.echo(f"warning: {text}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OnnxPruneWarning)
        others, warnings.showwarning = warnings.showwarning, tell
        yield


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def table(*columns: tuple[str, str]) -> Table:
    """A table of (title, side): those at the right are numbers, which are never split; words are, where the terminal is narrow."""
    from rich import box
    from rich.table import Table

    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, side in columns:
        number = side == "right"
        view.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return view


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is going on; where that is not a terminal a new one now and then, if it takes long."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda text: None
        return
    if not console.is_terminal:
        start = last = time.monotonic()

        def now_and_then(text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                click.echo(f"after {last - start:.0f} s: {text}", err=True)

        yield now_and_then
        return
    with console.status("starting") as status:
        yield lambda text: status.update(text)


def write_json(content: Any, path: str | None) -> None:
    from onnxprune.writing import write_text

    if path == "-":
        click.echo(json.dumps(content))
    elif path:
        write_text(json.dumps(content), path)

"""What all commands say and where: tables on standard output, progress and errors on standard error, JSON in files."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from onnxprune.errors import OnnxPruneWarning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
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


COUNTED = re.compile(r"(?:(\b\w+) )?(\d[\d,]*) of (\d[\d,]*)\b(?! [kMGT]?B\b)")  # `batch 3 of 20`, `7 of 40 points`
_LEFT = re.compile(r", about [^,]+ left$")
BEGUN = ("batch", "pass", "step")  # whose number is that of what begins, not of what is done


@dataclass
class Steps:
    """What is going on, as texts say it: a new step when the words change, and a part of the same where only a count goes on."""

    bars: Progress
    _counts: dict[str, TaskID] = field(default_factory=dict)  # of steps that count, which other words may interrupt
    _now: TaskID | None = None

    def __call__(self, text: str) -> None:
        done, total = done_of(text)
        words = COUNTED.split(text, maxsplit=1)[0] if total else ""
        task = self._counts.get(words) if total else None
        if task is None or any(one.id == task and one.completed > done for one in self.bars.tasks):  # a new one, or from the start again
            task = self.bars.add_task("", total=total)
            old = self._counts.pop(words, None) if total else None
            if old is not None and old != self._now:
                self.bars.remove_task(old)
        if self._now != task:
            self._leave()
            self._now = task
        if total:
            self._counts[words] = task
        said = _LEFT.sub("", text) if total else text  # the line says it itself
        self.bars.update(task, description=said.replace("[", r"\["), completed=done, visible=True)

    def _leave(self) -> None:
        """What went on until now is not shown any more; what counts may go on later."""
        if self._now is None:
            return
        if self._now in self._counts.values():
            self.bars.update(self._now, visible=False)
        else:
            self.bars.remove_task(self._now)


def done_of(text: str) -> tuple[int, int | None]:
    """How much of how much a text says is done: `pass 3 of 10` 2 of 10, `3 of 10 points` 3; (0, None) where it counts nothing."""
    found = COUNTED.search(text)
    if found is None:
        return 0, None
    done, total = (int(number.replace(",", "")) for number in found.groups()[1:])
    return (done - 1 if found[1] in BEGUN else done), total


def progress_bars(console: Console) -> Progress:
    """A line with what is going on, the time since the start, and how long this step still takes where that is known."""
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    start = time.monotonic()

    class Clock(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            seconds = task.time_remaining if task.total else None
            left = "" if seconds is None or task.finished else f", step about {_clock(seconds)} more"
            return Text(_clock(time.monotonic() - start) + left, style="cyan")

    what = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=what),
        Clock(table_column=Column(no_wrap=True, min_width=8)),
        console=console,
        transient=True,
        expand=True,
        speed_estimate_period=600,
    )


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


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
    with progress_bars(console) as bars:
        yield Steps(bars)


def write_json(content: Any, path: str | None) -> None:
    from onnxprune.writing import write_text

    if path == "-":
        click.echo(json.dumps(content))
    elif path:
        write_text(json.dumps(content), path)

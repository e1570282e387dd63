"""Long names in narrow tables: what many names share goes, what tells them apart stays.

Exporters write paths (`StatefulPartitionedCall/model/conv2d_12/Conv2D`).  Their steps that most names have say least, so these go
first, and the middle of a step only where nothing else is left.  ` and 3 more` behind a name is ` +3` then.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GONE = "…"
LEAST = 24  # characters that a name gets, however narrow the window
_STEP = re.compile(r"[^/.]*(?:[/.]\d+(?![^/.]))*[/.]?")  # a number belongs to the step before it: `blocks.3/`
_LEAD = re.compile(r"branch of \d+ layers? to ")  # words around a name, which stay
_MORE = re.compile(r"(?: and (\d+) more| \+\d+)$")
_TAIL = re.compile(r"(, (axis \d+|heads)( from \d+)?)?( \(\d+\))?( and \d+ more)?$")


def fitted(console: Console, names: Sequence[str], make: Callable[[Sequence[str]], Table]) -> Table:
    """The table that `make` makes of names, which are shortened where it is wider than the window."""
    from rich.measure import Measurement

    table = make(names)
    wide = Measurement.get(console, console.options.update_width(100_000), table).maximum
    if not names or wide <= console.width:
        return table
    longest = max(map(len, names))
    return make(shortened(names, max(LEAST, longest - (wide - console.width))))


def shortened(names: Sequence[str], room: int) -> list[str]:
    """The names in so many characters each, where they are not already; no two of them alike that were not before.

    Two that only more characters would tell apart stay as they are.
    """
    if all(len(name) <= room for name in names):
        return list(names)
    cores = {name: _core(name) for name in names}
    short = {name: "".join(core) for name, core in cores.items()}
    if max(map(len, short.values())) <= room:
        return [short[name] for name in names]
    steps = {name: _steps(core) for name, (_, core, _) in cores.items()}
    common = Counter(step for found in steps.values() for step in set(found))
    leads = {lead for lead, _, _ in cores.values()}
    shared = {one: _shared([steps[name] for name, (lead, _, _) in cores.items() if lead == one]) for one in leads}
    for name, (lead, _, tail) in cores.items():
        left = [GONE, *steps[name][shared[lead] :]] if shared[lead] else list(steps[name])
        short[name] = lead + _squeezed(left, common, room - len(lead) - len(tail)) + tail
    for alike in _alike(short):
        short |= _told_apart(alike, room)
    for alike in _alike(short):
        short |= {name: name for name in alike}
    return [short[name] for name in names]


def _alike(short: Mapping[str, str]) -> list[list[str]]:
    """Names that read the same, whatever number of more tensors is behind them."""
    found: dict[str, list[str]] = {}
    for name, made in short.items():
        found.setdefault(_MORE.sub("", made), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _core(name: str) -> tuple[str, str, str]:
    """The words before a name, the name, and the words behind it; the words in short."""
    lead, tail = _LEAD.match(name), _TAIL.search(name)
    start, end = lead.end() if lead else 0, tail.start() if tail else len(name)
    return "branch to " if lead else "", name[start:end], _MORE.sub(r" +\1", name[end:])


def _steps(core: str) -> list[str]:
    return [step for step in _STEP.findall(core) if step]


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many steps all paths begin with, one at least being left of each."""
    most = min(map(len, paths)) - 1 if len(paths) > 1 else 0
    return next((i for i in range(most) if len({path[i] for path in paths}) > 1), most)


def _squeezed(steps: list[str], common: Counter[str], room: int) -> str:
    """Steps joined: the most common of them go, the last of equals first, then the middle of what is left."""
    while len("".join(steps)) > room:
        again = [i for i, step in enumerate(steps) if common[step] > 1 and step != GONE]
        if not again:
            break
        place = max(again, key=lambda i: (common[steps[i]], i))
        steps[place] = GONE
        steps = [step for i, step in enumerate(steps) if not (step == GONE and i and steps[i - 1] == GONE)]
    return _cut("".join(steps), room)


def _cut(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    head = max(1, (room - 1) // 2)
    return text[:head] + GONE + text[len(text) - max(1, room - 1 - head) :]


def _told_apart(names: Sequence[str], room: int) -> dict[str, str]:
    """Names that came out alike, each from a little before the place where they begin to differ."""
    cores = {name: _core(name) for name in names}
    texts = [core for _, core, _ in cores.values()]
    begin = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), min(map(len, texts)))
    found = {}
    for name, (lead, core, tail) in cores.items():
        own = max(4, room - len(lead) - len(tail) - 2)
        start = max(0, min(begin - own // 3, len(core) - own))
        found[name] = lead + GONE * (start > 0) + core[start : start + own] + GONE * (start + own < len(core)) + tail
    return found

"""Which layers least squares fits in one pass over the samples: each alone where that is affordable, else several share a pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from onnxprune.cost import count, mac_terms
from onnxprune.frontier import ROOM
from onnxprune.importer import Model
from onnxprune.scopes import captured
from onnxprune.seats import Seat

FEWEST = 12  # passes
WORK = 3e13  # multiply-accumulates that all passes may take


def stages(model: Model, todo: list[Seat], samples: int) -> tuple[list[list[Seat]], bool]:
    """The layers of each pass: those that read the same, and more where that would be more work than WORK; and whether it would be.

    model: the original.
    """
    found = _alike(todo)
    scale = samples / max(1, next((shape[0] for shape in model.input_shapes.values() if shape), 1))
    along = scale * work(model, [stage[-1].layer.node for stage in found], ROOM / max(scale, 1e-9))
    if 2 * along <= WORK:
        return found, False
    found = _alike([seat for seat in todo if seat.narrowed] or todo)
    many = -(-len(found) // max(FEWEST, int(WORK * len(found) / (2 * along))))
    return [list(chain(*found[i : i + many])) for i in range(0, len(found), many)], True


def work(model: Model, places: Iterable[int], room: float) -> float:
    """Multiply-accumulates of runs to these nodes, at the model's own sizes, each from where the last one ended.

    Or from further back, where the values that nodes so far make for later ones take more bytes than there is room for.
    """
    made = {out: i for i, node in enumerate(model.main) for out in node.output if out}
    until = {name: i for i, node in enumerate(model.main) for name in (*node.input, *captured(node))}
    macs, sizes = np.zeros(len(model.main) + 1), np.zeros(len(model.main) + 2)
    for term in mac_terms(model):
        macs[made.get(term[2], 0) + 1] += count(model, [term])
    for name in made.keys() & until.keys() & model.shapes.keys():
        size = 4 * math.prod(model.shapes[name])
        sizes[made[name] + 1] += size
        sizes[until[name] + 1] -= size
    total, held = np.cumsum(macs), np.cumsum(sizes)
    begin, found = 0, 0.0
    for place in places:
        found += float(total[place + 1] - total[begin])
        begin = place if held[place] <= room else begin
    return found


def _alike(todo: Sequence[Seat]) -> list[list[Seat]]:
    """Layers after one another that read the same value, such as those of queries, keys and values, and are added to nothing."""
    found: list[list[Seat]] = []
    for seat in todo:
        if found and found[-1][-1].source == seat.source and not (found[-1][-1].other or seat.other):
            found[-1].append(seat)
        else:
            found.append([seat])
    return found

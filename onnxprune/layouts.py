"""The solver's algebra: what an axis is made of, and how two descriptions of one axis are made to agree.

A `Dim` is a run of `size` indices.  Until something is known of it, it is a leaf: its indices are units.  It may be bound
to a layout: segments end to end (concat), each a row-major product of Dims, outermost first.  `unify` makes two layouts of
equal size equal by the common refinement; where none exists it freezes the outer factor, which then merely repeats the
inner one.  Every binding is to strictly smaller Dims, so unification ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import gcd

import numpy as np

LIMIT = 4096  # segments of one axis; beyond it the axis is frozen
_numbers = count()


class Dim:
    """A run of indices; `reason` says why it is frozen, and is '' where it is not."""

    __slots__ = ("layout", "number", "reason", "same", "size")

    def __init__(self, size: int, reason: str = "") -> None:
        self.size = size
        self.reason = reason
        self.same: Dim | None = None
        self.layout: list[list[Dim]] | None = None
        self.number = next(_numbers)

    def __repr__(self) -> str:
        return f"Dim{self.number}({self.size}{', ' + self.reason if self.reason else ''})"


Segment = list[Dim]
Layout = list[Segment]


def find(dim: Dim) -> Dim:
    """The Dim that stands for this one."""
    while dim.same is not None:
        if dim.same.same is not None:
            dim.same = dim.same.same
        dim = dim.same
    return dim


def length(segment: Segment) -> int:
    size = 1
    for dim in segment:
        size *= dim.size
    return size


def freeze(dim: Dim, reason: str) -> None:
    """All units of the Dim stay."""
    dim = find(dim)
    if dim.layout is None:
        dim.reason = dim.reason or reason
        return
    for segment in dim.layout:
        for part in segment:
            freeze(part, reason)


def resolve(dim: Dim) -> Layout:
    """The Dim's segments, bindings followed; an inner factor that is itself a concat stays one Dim."""
    return _resolve_segment([dim])


def _resolve_segment(segment: Segment) -> Layout:
    flat: Segment = []
    for position, dim in enumerate(segment):
        dim = find(dim)
        if dim.size == 1 and len(segment) > 1:  # a cut may leave factors of 1
            freeze(dim, "an axis of size 1")
            if flat or position + 1 < len(segment):
                continue
        if dim.layout is None:
            flat.append(dim)
            continue
        inner = [s for part in dim.layout for s in _resolve_segment(part)]
        if len(inner) == 1:
            flat.extend(inner[0])
            continue
        if not flat:  # outermost: the concat shows
            rest = segment[position + 1 :]
            if not rest:
                return inner
            return [s for part in inner for s in _resolve_segment([*part, *rest])]
        flat.append(dim)
    return [flat]


def bind(dim: Dim, layout: Layout) -> None:
    """Say what a leaf is made of."""
    dim = find(dim)
    if len(layout) == 1 and len(layout[0]) == 1:
        other = find(layout[0][0])
        if other is dim:
            return
        circular = dim in leaves(layout)
        if dim.reason or circular:
            freeze(other, dim.reason or "it would be a part of itself")
        if circular:
            return
        dim.same = other
        return
    parts = leaves(layout)
    if dim.reason or dim in parts:
        for part in parts:
            freeze(part, dim.reason or "it would be a part of itself")
    elif all(part.reason for part in parts):  # nothing left to know: a frozen axis is not taken apart
        dim.reason = min(parts, key=lambda part: part.number).reason
    else:
        dim.layout = [list(segment) for segment in layout]


def unify(left: Layout, right: Layout, reason: str = "its parts do not fit together") -> None:
    """Make two layouts of equal total size the same."""
    a = [s for segment in left for s in _resolve_segment(segment)][::-1]
    b = [s for segment in right for s in _resolve_segment(segment)][::-1]
    steps = 0
    while a and b:
        steps += 1
        p = _resolve_segment(a.pop())
        q = _resolve_segment(b.pop())
        a.extend(p[:0:-1])
        b.extend(q[:0:-1])
        one, two = p[0], q[0]
        m, n = length(one), length(two)
        if steps > LIMIT:
            for segment in (*a, *b, one, two):
                for dim in segment:
                    freeze(dim, reason)
            return
        if m == n:
            again = _unify_segments(one, two, reason)
            if again is not None:
                a.extend(again[0][::-1])
                b.extend(again[1][::-1])
        elif _take_apart(one, two, a, b) or _take_apart(two, one, b, a):
            continue
        elif m < n:
            head, tail = _cut(two, m, reason)
            a.append(one)
            b.extend(tail[::-1])
            b.extend(head[::-1])
        else:
            head, tail = _cut(one, n, reason)
            b.append(two)
            a.extend(tail[::-1])
            a.extend(head[::-1])


def _take_apart(segment: Segment, first: Segment, own: list[Segment], other: list[Segment]) -> bool:
    """Bind a leaf to all the smaller leaves that stand against it at once: cutting off one by one would nest as deep as they are many."""
    leaf = find(segment[0])
    room, parts = leaf.size, []
    if len(segment) > 1 or leaf.layout is not None or leaf.reason:
        return False
    while len(first) == 1 and find(first[0]).layout is None and find(first[0]) is not leaf and first[0].size <= room:
        parts.append(first)
        room -= first[0].size
        if not room or not other:
            break
        first = other.pop()
    else:
        if parts:
            other.append(first)
    if len(parts) < 2:
        other.extend(parts[1:])
        return False
    if room:
        parts.append([Dim(room)])
        own.append(parts[-1])
    bind(leaf, parts)
    return True


def _cut(segment: Segment, position: int, reason: str) -> tuple[Layout, Layout]:
    """Two layouts: the segment's first `position` indices and the rest."""
    first, rest = segment[0], segment[1:]
    stride = length(rest)
    if position % stride == 0:
        head, tail = _split(first, position // stride)
        return [[head, *rest]], [[tail, *rest]]
    freeze(first, reason)
    whole, extra = divmod(position, stride)
    inner_head, inner_tail = _cut(rest, extra, reason)
    copies = first.size
    if copies > LIMIT:
        for dim in segment:
            freeze(dim, reason)
        why = reason
        return [[Dim(position, why)]], [[Dim(length(segment) - position, why)]]
    return (
        [list(rest) for _ in range(whole)] + inner_head,
        inner_tail + [list(rest) for _ in range(copies - whole - 1)],
    )


def _split(dim: Dim, position: int) -> tuple[Dim, Dim]:
    dim = find(dim)
    head, tail = Dim(position, dim.reason), Dim(dim.size - position, dim.reason)
    if dim.layout is not None:  # an inner concat: agree with what it already is
        unify([[head], [tail]], dim.layout)
        return head, tail
    if not dim.reason:
        dim.layout = [[head], [tail]]
    return head, tail


def _unify_segments(left: Segment, right: Segment, reason: str) -> tuple[Layout, Layout] | None:
    """Unify two products of equal size; or two layouts that say the same and are to be unified instead."""
    a, b = list(left), list(right)
    for one, other in ((a, b), (b, a)):
        if len(one) == 1 and len(other) > 1 and one[0] in other:  # the rest is factors of 1
            for dim in other:
                if dim is not one[0]:
                    freeze(dim, reason)
            return None
    if len(a) == 1 and find(a[0]).layout is None:
        bind(a[0], [b])
        return None
    if len(b) == 1 and find(b[0]).layout is None:
        bind(b[0], [a])
        return None
    while a and b:
        p, q = find(a[-1]), find(b[-1])
        if p is q:
            a.pop(), b.pop()
        elif p.size == q.size:
            a.pop(), b.pop()
            _unify_dims(p, q, reason)
        elif p.size == 1:
            freeze(a.pop(), reason)
        elif q.size == 1:
            freeze(b.pop(), reason)
        elif q.size % p.size == 0 and q.layout is None:
            inner = [Dim(q.size // p.size, q.reason), p]
            bind(q, [inner])
            b[-1:] = inner
        elif p.size % q.size == 0 and p.layout is None:
            inner = [Dim(p.size // q.size, p.reason), q]
            bind(p, [inner])
            a[-1:] = inner
        else:
            return _conflict(a, b, reason)
    for dim in (*a, *b):
        freeze(dim, reason)
    return None


def _conflict(a: Segment, b: Segment, reason: str) -> tuple[Layout, Layout] | None:
    """Products with no common refinement: freeze the outer factors that tie least, or what only divides in part."""
    p, q = find(a[-1]), find(b[-1])
    shared = gcd(p.size, q.size)
    if shared > 1 and p.layout is None and q.layout is None:
        inner = Dim(shared)
        for dim in (p, q):
            bind(dim, [[Dim(dim.size // shared, dim.reason or reason), inner]])
        for dim in (*a[:-1], *b[:-1]):
            freeze(dim, reason)
        return None
    small, large = (a, b) if length(a[:-1]) <= length(b[:-1]) else (b, a)
    copies = length(small[:-1])
    if copies > LIMIT or not small[:-1]:
        for dim in (*a, *b):
            freeze(dim, reason)
        return None
    for dim in small[:-1]:
        freeze(dim, reason)
    repeated = [[small[-1]] for _ in range(copies)]
    return (repeated, [large]) if small is a else ([large], repeated)


def _unify_dims(p: Dim, q: Dim, reason: str) -> None:
    if p.layout is None:
        if resolve(q) != [[p]]:
            bind(p, [[q]])
    elif q.layout is None:
        if resolve(p) != [[q]]:
            bind(q, [[p]])
    else:
        unify(resolve(p), resolve(q), reason)


def leaves(layout: Layout) -> set[Dim]:
    """Every leaf that a layout is made of."""
    found: set[Dim] = set()
    for segment in layout:
        for dim in segment:
            dim = find(dim)
            if dim.layout is None:
                found.add(dim)
            else:
                found |= leaves(dim.layout)
    return found


def positions(layout: Layout) -> dict[Dim, np.ndarray]:
    """For each leaf the indices where its units live, (units, places a unit), in the same order for every unit."""
    parts: dict[Dim, list[np.ndarray]] = {}
    start = 0
    for segment in layout:
        size = length(segment)
        if not size:
            continue
        grid = np.arange(start, start + size).reshape([d.size for d in segment])
        for axis, dim in enumerate(segment):
            rows = np.moveaxis(grid, axis, 0).reshape(dim.size, -1)
            dim = find(dim)
            if dim.layout is None:
                parts.setdefault(dim, []).append(rows)
            else:
                for leaf, inside in positions(dim.layout).items():
                    parts.setdefault(leaf, []).append(rows[inside].reshape(leaf.size, -1))
        start += size
    return {leaf: np.concatenate(rows, axis=1) if len(rows) > 1 else rows[0] for leaf, rows in parts.items()}


def alive(layout: Layout, kept: dict[Dim, np.ndarray]) -> np.ndarray:
    """Which indices stay, (size,) bool, where `kept` maps leaves to masks of their units; leaves not in it stay whole."""
    pieces = []
    for segment in layout:
        mask = np.ones((), bool)
        for dim in segment:
            dim = find(dim)
            own = alive(dim.layout, kept) if dim.layout is not None else kept[dim] if dim in kept else np.ones(dim.size, bool)
            mask = mask[..., None] & own
        pieces.append(mask.ravel())
    return np.concatenate(pieces) if pieces else np.ones(0, bool)


def width(layout: Layout, counts: dict[Dim, float]) -> float:
    """How many indices stay, where `counts` maps leaves to the number of units kept."""
    total = 0.0
    for segment in layout:
        size = 1.0
        for dim in segment:
            dim = find(dim)
            size *= width(dim.layout, counts) if dim.layout is not None else counts.get(dim, dim.size)
        total += size
    return total


def concat(whole: Dim, parts: Sequence[Dim]) -> None:
    """whole is the parts end to end."""
    unify(resolve(whole), [s for part in parts if part.size for s in resolve(part)])


def product(left: Sequence[Dim], right: Sequence[Dim], reason: str) -> None:
    """The row-major product of the left Dims is that of the right ones."""
    sides = []
    for dims in (left, right):
        kept = [d for d in dims if d.size != 1]
        for dim in dims:
            if dim.size == 1:
                freeze(dim, "an axis of size 1")
        sides.append(kept)
    if not sides[0] or not sides[1]:
        for dim in (*sides[0], *sides[1]):
            freeze(dim, reason)
        return
    unify([sides[0]], [sides[1]], reason)

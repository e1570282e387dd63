"""Sums over rows: all that least squares needs to know of a layer's inputs and targets, however many samples there are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxprune.emphasis import emphasis


@dataclass
class Moments:
    """Running sums over rows x (features) and targets y (out), a block a convolution group.

    count: rows; x (groups, features), y (groups, out): Σx, Σy; xx (groups, features, features): Σxxᵀ; yx (groups, out, features): Σyxᵀ;
    yy (groups, out): Σy²; all by the weights of the rows.  All float64; a batch is multiplied in float32, or in float64 where
    float32 would lose what varies (`far`).
    """

    count: float
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    yx: np.ndarray
    yy: np.ndarray

    @classmethod
    def zero(cls, groups: int, features: int, out: int) -> Moments:
        return cls(
            0,
            np.zeros((groups, features)),
            np.zeros((groups, out)),
            np.zeros((groups, features, features)),
            np.zeros((groups, out, features)),
            np.zeros((groups, out)),
        )

    def add(self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """rows (groups, n, features), targets (groups, n, out); weights (1, n, 1): how much each row counts, 1 on average."""
        exact = np.float64 if far(rows) or far(targets) else np.float32
        rows, targets = np.ascontiguousarray(rows, exact), np.ascontiguousarray(targets, exact)
        self.count += rows.shape[1] if weights is None else float(weights.sum())
        with np.errstate(over="ignore", invalid="ignore"):  # `finite` says so
            weighted = [a if weights is None else a * weights for a in (rows, targets)]
            self.x += weighted[0].sum(axis=1, dtype=np.float64)
            self.y += weighted[1].sum(axis=1, dtype=np.float64)
            self.xx += np.matmul(weighted[0].transpose(0, 2, 1), rows)
            self.yx += np.matmul(weighted[1].transpose(0, 2, 1), rows)
        self.yy += np.einsum("gno,gno->go", weighted[1], targets, dtype=np.float64)

    @property
    def finite(self) -> bool:
        """Whether the squares of what was seen are numbers, so that something can be fitted to it."""
        return all(bool(np.isfinite(array).all()) for array in (self.x, self.y, self.xx, self.yx, self.yy))

    def __add__(self, other: Moments) -> Moments:
        mine, theirs = vars(self), vars(other)
        return Moments(**{key: mine[key] + theirs[key] for key in mine})

    def error(self, matrix: np.ndarray, bias: np.ndarray) -> float:
        """Mean over rows of ‖y − Wx − b‖², for W (groups, out, features) and b (groups, out)."""
        total = self.yy.sum() - 2 * np.einsum("gof,gof->", matrix, self.yx) + np.einsum("gof,gof->", matrix @ self.xx, matrix)
        total += 2 * (bias * (np.einsum("gof,gf->go", matrix, self.x) - self.y)).sum() + self.count * (bias**2).sum()
        return float(max(total, 0.0)) / max(1, self.count)

    def spread(self) -> float:
        """Mean over rows of ‖y − ȳ‖²: the error of a layer that only knows the mean."""
        return float(max((self.yy - self.y**2 / max(1, self.count)).sum(), 0.0)) / max(1, self.count)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Of x and y."""
        n = max(1, self.count)
        return self.x / n, self.y / n


FAR = 100.0  # times its variance: the square of a mean from which on float32 is too coarse for sums of squares


def far(values: np.ndarray) -> bool:
    """Whether some feature hardly varies for how large it is; values (groups, n, features)."""
    if not values.size:
        return False
    with np.errstate(over="ignore", invalid="ignore"):  # `finite` says so
        mean = values.mean(axis=1, dtype=np.float64)
        square = np.einsum("gnf,gnf->gf", values, values, dtype=np.float64) / values.shape[1]
        return bool((mean**2 > FAR * np.maximum(square - mean**2, 0)).any())


ENOUGH = 1 / 8  # of the features: rows at which a product is no longer mostly the reading and writing of the sums


@dataclass
class Gathering:
    """Rows on their way into sums: those of small batches wait for more."""

    moments: Moments
    waiting: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """As of `Moments`; weights always or never."""
        arrays = (rows, targets) if weights is None else (rows, targets, weights)
        self.waiting.append(tuple(np.ascontiguousarray(array, np.float32) for array in arrays))
        if sum(one[0].shape[1] for one in self.waiting) >= ENOUGH * rows.shape[2]:
            self.done()

    def done(self) -> Moments:
        """The sums of all that was added."""
        if self.waiting:
            self.moments.add(*(np.concatenate(arrays, axis=1) for arrays in zip(*self.waiting, strict=True)))
            self.waiting.clear()
        return self.moments


ROOM = 2**26  # numbers that are kept of the rows themselves


@dataclass(frozen=True)
class Window:
    """Some rows of a batch: arrays are rows (groups, n, features), the values wanted and what is beside (groups, n, out)."""

    arrays: tuple[np.ndarray, ...]
    held: bool


@dataclass
class Observed:
    """What was seen of one layer: sums over the rows to fit to (`seen`) and over those to choose by (`held`).

    bounds: what an activation behind the layer lets through; then some rows are kept as they are, in `window`.  normed: a norm reads
    what is wanted, so that rows count by their `emphasis`.  gathering: {whether held: rows that
    are not in the sums yet}, until `done`.
    """

    seen: Moments
    held: Moments
    bounds: tuple[float, float] | None = None
    window: list[Window] = field(default_factory=list)
    normed: bool = False
    gathering: dict[bool, Gathering] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: tuple[int, ...], bounds: tuple[float, float] | None = None, normed: bool = False) -> Observed:
        """shape: of the layer's matrix, (groups, out, features)."""
        groups, out, features = shape
        return cls(Moments.zero(groups, features, out), Moments.zero(groups, features, out), bounds, normed=normed)

    def add(self, rows: np.ndarray, wanted: np.ndarray, beside: np.ndarray, held: bool, batches: int) -> None:
        """A batch of `batches`: what is wanted less what is beside it is the layer's target.  `done` after the last one."""
        if not all(np.isfinite(np.sum(array)) for array in (rows, wanted, beside)):
            good = np.logical_and.reduce([np.isfinite(array).all(axis=(0, 2)) for array in (rows, wanted, beside)])
            rows, wanted, beside = (array[:, good] for array in (rows, wanted, beside))
        mine = self.gathering.setdefault(held, Gathering(self.held if held else self.seen))
        mine.add(rows, wanted - beside, emphasis(wanted) if self.normed else None)
        if self.bounds is not None:
            most = max(1, ROOM // max(1, batches * rows.shape[0] * (rows.shape[2] + 2 * wanted.shape[2])))
            kept = slice(0, None, -(-rows.shape[1] // most))
            self.window.append(Window(tuple(np.ascontiguousarray(a[:, kept], np.float32) for a in (rows, wanted, beside)), held))

    def done(self) -> Observed:
        for mine in self.gathering.values():
            mine.done()
        return self

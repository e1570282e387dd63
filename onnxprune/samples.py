"""Samples for a model, drawn batch by batch from any source that finds them by number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from onnxprune.errors import OnnxPruneError
from onnxprune.inputs import Layout

Arrays = Mapping[str, np.ndarray]
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Piece:
    """Arrays that belong together, of one sample or of many; extras: what is there besides the inputs, such as `labels`; where: it is."""

    arrays: Arrays
    extras: Arrays
    layout: Layout
    where: str

    def sample(self, number: int) -> Feeds:
        """One sample: 1 along the axis that counts; the arrays as they are where none does."""
        found = {}
        for name, array in self.arrays.items():
            axis = self.layout.axes.get(name)
            if axis is None:
                found[name] = array
            elif self.layout.bare:
                found[name] = np.expand_dims(array, axis)
            else:
                found[name] = array[(slice(None),) * axis + (slice(number, number + 1),)]
        return found

    @property
    def labels(self) -> np.ndarray | None:
        """One a sample, along axis 0; None where there are none.  Raises OnnxPruneError where there are not as many as samples."""
        labels = self.extras.get("labels")
        if labels is None or not self.layout.axes:
            return labels
        if self.layout.bare:
            return labels[None]
        self._check_count(labels)
        return labels

    def _check_count(self, labels: np.ndarray) -> None:
        if labels.shape[:1] != (self.layout.count,):
            shape = list(labels.shape)
            raise OnnxPruneError(
                f"{self.where}: has labels of the shape {shape} for {self.layout.count} samples; there must be one a sample"
            )

    def beside(self, number: int) -> Feeds:
        """The extras of one sample, 1 along axis 0; whole arrays where the sample is the whole piece.

        Arrays with another number of samples are left out; raises OnnxPruneError where that is the `labels`.
        """
        if not self.layout.axes:
            return dict(self.extras)
        if self.layout.bare:
            return {name: array[None] for name, array in self.extras.items()}
        if "labels" in self.extras:
            self._check_count(self.extras["labels"])
        return {n: a[number : number + 1] for n, a in self.extras.items() if a.shape[:1] == (self.layout.count,)}


class Source(Protocol):
    """Where samples come from: how many, and for the number of each the piece that holds it and its place there."""

    def __len__(self) -> int: ...

    def find(self, number: int) -> tuple[Piece, int]: ...


@dataclass(frozen=True, eq=False)
class Samples:
    """Feeds for a model, drawn batch by batch.

    count: samples; source: what to call them in messages (a path, `noise`, …); at_once: how many the model takes at once, None for
    any number.  A batch holds samples of the same sizes; an array without an axis of samples goes along with every batch.
    """

    count: int
    source: str
    at_once: int | None
    _source: Source = field(repr=False)
    _chosen: np.ndarray = field(repr=False)

    def batches(self, size: int) -> Iterator[Feeds]:
        """{input: array (size, …)}, the last of them smaller; of the model's own size where that is fixed, a rest left out."""
        return (feeds for feeds, _ in self.counted(size))

    def counted(self, size: int) -> Iterator[tuple[Feeds, int]]:
        """The same, each with the number of samples."""
        return ((feeds, count) for feeds, _, count in self._joined(size, lambda piece, place: {}))

    def pairs(self, size: int) -> Iterator[tuple[Feeds, Feeds]]:
        """The same, each beside what the source holds for these samples that is no input, such as `labels`."""
        return ((feeds, extras) for feeds, extras, _ in self.counted_pairs(size))

    def counted_pairs(self, size: int) -> Iterator[tuple[Feeds, Feeds, int]]:
        """The same again, with the number of samples."""
        return self._joined(size, Piece.beside)

    def _joined(self, size: int, beside: Callable[[Piece, int], Feeds]) -> Iterator[tuple[Feeds, Feeds, int]]:
        for waiting, axes in self._groups(self.at_once or max(size, 1), beside):
            first = waiting[0][0]
            feeds = {n: np.concatenate([s[n] for s, _ in waiting], axes[n]) if n in axes else first[n] for n in first}
            extras = {n: np.concatenate([s[n] for _, s in waiting]) if axes else a for n, a in waiting[0][1].items()}
            yield feeds, extras, len(waiting)

    def _groups(self, size: int, beside: Callable[[Piece, int], Feeds]) -> Iterator[tuple[list[tuple[Feeds, Feeds]], Mapping[str, int]]]:
        """Samples that go into one batch, with the axes that count them ({}: one that is fed as it is)."""
        waiting: list[tuple[Feeds, Feeds]] = []
        axes: Mapping[str, int] = {}
        for number in self._chosen:
            piece, place = self._source.find(int(number))
            sample = piece.sample(place), beside(piece, place)
            if waiting and (axes != piece.layout.axes or not _alike(waiting[0], sample, axes)):
                if self.at_once is None:
                    yield waiting, axes
                waiting = []
            axes = piece.layout.axes
            waiting.append(sample)
            if len(waiting) == size or not axes:
                yield waiting, axes
                waiting = []
        if waiting and self.at_once is None:
            yield waiting, axes

    @property
    def first(self) -> Piece:
        """The piece that holds the first sample."""
        return self._source.find(int(self._chosen[0]))[0]

    def part(self, start: int, stop: int) -> Samples:
        """The samples from `start` up to `stop`, negative numbers from the end, as in a slice."""
        chosen = self._chosen[start:stop]
        return replace(self, count=len(chosen), _chosen=chosen)

    def shuffled(self, seed: int) -> Samples:
        """The same in another order."""
        return replace(self, _chosen=np.random.default_rng(seed).permutation(self._chosen))

    def split(self, share: float, seed: int = 0) -> tuple[Samples, Samples]:
        """Two parts, each in order: about `share` of the samples to fit on, and the others, spread over the set, held out.

        Both get at least one where there are two.
        """
        held = round(self.count * (1 - share))
        held = min(max(held, 1), self.count - 1) if self.count > 1 and 0 < share < 1 else held
        apart = spread(self.count, held, seed)
        fit = np.setdiff1d(np.arange(self.count), apart)
        first, second = (replace(self, count=len(places), _chosen=self._chosen[places]) for places in (fit, apart))
        return first, second


def _alike(one: tuple[Feeds, Feeds], other: tuple[Feeds, Feeds], axes: Mapping[str, int]) -> bool:
    """Whether two samples go into one batch: the same sizes, and the same numbers in what is not counted."""
    for left, right in zip(one, other, strict=True):
        if left.keys() != right.keys() or any(left[n].shape != right[n].shape for n in left):
            return False
    return all(array is other[0][n] or np.array_equal(array, other[0][n]) for n, array in one[0].items() if n not in axes)


def spread(count: int, wanted: int, seed: int) -> np.ndarray:
    """So many places of 0 … count − 1, in order: one at a random place in each of as many equal stretches."""
    if wanted >= count:
        return np.arange(count)
    rng = np.random.default_rng(seed)
    stretches: Sequence[np.ndarray] = np.array_split(np.arange(count), wanted) if wanted > 0 else []
    return np.array([rng.choice(stretch) for stretch in stretches], dtype=np.int64)

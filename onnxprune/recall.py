"""What a model makes of samples, kept sample by sample: in other batches, in another order, they come to it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxprune.running import Arrays, widened

ROOM = 2**29  # bytes to keep, at most
CHECKS = 2  # batches put together of samples that all stand elsewhere, beside others, and are compared with a run
SAME = 1e-4  # of the norm: as far as rounding may be apart
Batch = tuple[bytes, ...]


class Runs(Protocol):
    """What is asked, such as a `Tap`."""

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Kept:
    """The values of a sample, in which batch they were made, and its place there."""

    values: Mapping[str, np.ndarray]
    batch: Batch
    place: int


class Recall:
    """A model run once for each sample, where its values depend neither on its place nor on the samples beside it.

    Samples are told by their bytes, along axis 0 of all feeds; where that is no axis of samples, their values differ in shape, or what is
    put together is not what a run makes, every batch is run.  So is one of floats alone, which `distillation.mixed` makes anew each
    time, and one of strings.

        original = Recall(Tap(proto, ["logits"]))
        original.run({"ids": ids[[0, 1]]})
        original.run({"ids": ids[[2, 3]]})
        original.run({"ids": ids[[3, 0]]})  # no further run, after the first CHECKS of such batches
    """

    def __init__(self, model: Runs, room: int = ROOM) -> None:
        self._model, self._room, self._checks = model, room, CHECKS
        self._samples: dict[bytes, Kept] = {}

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """{value: array} on one batch."""
        batch = _told(feeds) if self._room else None
        kept = [self._samples[sample] for sample in batch if sample in self._samples] if batch else []
        if batch is None or len(kept) < len(batch):
            found = self._model.run(feeds)
            if batch is not None:
                self._keep(batch, found)
            return found
        joined = {name: np.concatenate([each.values[name] for each in kept]) for name in kept[0].values}
        again = all(each.batch == batch and each.place == place for place, each in enumerate(kept))
        if again or not self._checks:
            return joined
        found = self._model.run(feeds)
        if not _same(joined, found):
            self._forget()
        elif all(each.place != place and set(each.batch) != set(batch) for place, each in enumerate(kept)):
            self._checks -= 1
        return found

    def _keep(self, batch: Batch, found: Mapping[str, np.ndarray]) -> None:
        whole = all(array.ndim > 0 and len(array) > 0 and len(array) % len(batch) == 0 for array in found.values())
        parts = {name: np.split(array, len(batch)) for name, array in found.items()} if whole else {}
        first = next(iter(self._samples.values()), None)
        if not whole or (first and any(first.values[name].shape != parts[name][0].shape for name in parts)):
            self._forget()
            return
        size = sum(array.nbytes for array in found.values())
        if size <= self._room:
            self._room -= size
            for place, sample in enumerate(batch):
                self._samples.setdefault(sample, Kept({name: parts[name][place] for name in parts}, batch, place))

    def _forget(self) -> None:
        self._room = 0
        self._samples.clear()


def _told(feeds: Arrays) -> Batch | None:
    """Each sample's bytes; None where there is no axis of samples, all feeds are of floats, or one is of strings."""
    arrays = [widened(np.asarray(array)) for _, array in sorted(feeds.items())]
    counts = {array.shape[:1] for array in arrays}
    mixed, texts = all(array.dtype == np.float32 for array in arrays), any(array.dtype.kind == "O" for array in arrays)
    if len(counts) != 1 or counts <= {(), (0,)} or mixed or texts:
        return None
    shape = repr([(array.shape[1:], str(array.dtype)) for array in arrays]).encode()
    ((count,),) = counts
    return tuple(b"".join([shape, *(array[i].tobytes() for array in arrays)]) for i in range(count))


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return False
    norms = ((float(np.linalg.norm(one[n] - other[n])), float(np.linalg.norm(other[n]))) for n in one)
    return all(apart <= SAME * norm for apart, norm in norms)

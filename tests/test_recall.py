"""What a model makes of samples that come again in other batches: the same as a run makes, with fewer runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.recall import CHECKS, Recall

Arrays = dict[str, np.ndarray]
TABLE = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)


class Counted:
    """A function of feeds as a model, and how often it was run."""

    def __init__(self, function: Callable[[Arrays], Arrays]) -> None:
        self.function, self.runs = function, 0

    def run(self, feeds: Arrays) -> Arrays:
        self.runs += 1
        return self.function(feeds)


def looked_up(feeds: Arrays) -> Arrays:
    """A value of each sample, one of all its places below each other, and one of a mask."""
    rows = TABLE[feeds["ids"]]
    return {"rows": rows, "flat": rows.reshape(-1, 3) * 2, "masked": rows.sum(axis=2) * feeds["mask"]}


def of_the_batch(feeds: Arrays) -> Arrays:
    """Less the mean of the batch, as a norm in training mode."""
    rows = TABLE[feeds["ids"]]
    return {"rows": rows - rows.mean(axis=0)}


def of_places(feeds: Arrays) -> Arrays:
    """Other numbers for each place in the batch."""
    return {"rows": TABLE[feeds["ids"]] + np.arange(len(feeds["ids"]), dtype=np.float32).reshape(-1, 1, 1)}


def places_first(feeds: Arrays) -> Arrays:
    """Samples along axis 1."""
    return {"rows": TABLE[feeds["ids"]].transpose(1, 0, 2).copy()}


def together(feeds: Arrays) -> Arrays:
    """One number for the batch."""
    return {"sum": np.asarray(TABLE[feeds["ids"]].sum(), np.float32), "rows": TABLE[feeds["ids"]]}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([looked_up, of_the_batch, of_places, places_first, together]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 900, 2**20]),
)
def test_what_is_kept_is_what_a_run_makes(function: Callable[[Arrays], Arrays], seed: int, room: int) -> None:
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 50, (12, 4)), rng.integers(0, 2, (12, 4)).astype(np.float32)
    recall = Recall(Counted(function), room)
    batches = [rng.integers(0, 12, rng.integers(1, 5)) for _ in range(12)]
    for number in rng.integers(0, 12, 40):  # some batches again, and samples in several
        feeds = {"ids": ids[batches[number]], "mask": mask[batches[number]]}
        wanted, found = function(feeds), recall.run(feeds)
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def runs(function: Callable[[Arrays], Arrays], feeds: Callable[[np.ndarray], Arrays], passes: int = 10) -> int:
    """How often a model is run for so many passes of four samples in two batches, each pass in another order."""
    model, rng = Counted(function), np.random.default_rng(0)
    recall = Recall(model)
    for _ in range(passes):
        for chosen in rng.permutation(4).reshape(2, 2):
            recall.run(feeds(chosen))
    return model.runs


def test_samples_are_run_once_and_a_few_batches_of_them_as_a_check() -> None:
    ids = np.arange(16).reshape(4, 4)
    mask = np.ones((4, 4), np.float32)
    assert 2 + CHECKS <= runs(looked_up, lambda chosen: {"ids": ids[chosen], "mask": mask[chosen]}, 40) < 40
    assert runs(lambda feeds: {"y": TABLE[feeds["ids"]][:, : feeds["ids"][:, 0].max() // 4]}, lambda chosen: {"ids": 4 + ids[chosen]}) == 20
    assert runs(of_places, lambda chosen: {"ids": ids[chosen]}) == 20


@pytest.mark.parametrize("kind", [np.float32, object])
def test_feeds_that_do_not_come_again_or_have_no_bytes_are_run_each_time(kind: type) -> None:
    arrays = np.arange(16).reshape(4, 4).astype(kind)
    assert runs(lambda feeds: {"y": feeds["x"].astype(np.float32)}, lambda chosen: {"x": arrays[chosen]}) == 20

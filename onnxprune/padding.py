"""Which places of a batch of sequences hold something: what an input named a mask says, whether its ones keep or pad."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxprune.running import Arrays

KEEPING = ("attention", "attn", "input")
OTHER = ("global", "masked", "head", "special")  # masks that tell something else of places


def kept_places(feeds: Arrays, fits: Callable[[tuple[int, ...]], bool]) -> np.ndarray | None:
    """bool (batch, length): True where there is something; None where no input of zeros and ones named a mask says it.

    fits: whether a mask of this shape is one of the places in question.

    A sequence is padded at one end, so its other end holds something.  Where all samples have a one there, ones are what counts
    (`attention_mask`), where all have a zero, zeros are (`key_padding_mask`); where that does not tell, the name does, or the first end.

    >>> import numpy as np
    >>> padding = np.array([[0, 0, 1], [0, 0, 0]])
    >>> kept_places({"key_padding_mask": padding}, lambda shape: shape == (2, 3)).astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    for name, array in feeds.items():
        low = name.lower()
        if "mask" not in low or any(word in low for word in OTHER) or array.ndim != 2 or not fits(array.shape):
            continue
        if not array.size or not np.isin(array, (0, 1)).all():
            continue
        ones = np.asarray(array != 0)
        kept = _which(low, ones)
        if kept is not None and kept.any():
            return kept
    return None


def _which(name: str, ones: np.ndarray) -> np.ndarray | None:
    """The ones or the zeros of a mask; of one whose name says neither only what stands at one end of each sequence, rather the first."""
    keeps, pads = (bool(kept[:, 0].all() or kept[:, -1].all()) for kept in (ones, ~ones))
    named = "pad" if "pad" in name else "keep" if any(word in name for word in KEEPING) else ""
    if keeps == pads and named:
        return ones if named == "keep" else ~ones
    if not keeps and not pads:
        return None
    kept = ones if keeps and (not pads or ones[:, 0].all()) else ~ones
    runs = np.count_nonzero(kept[:, 1:] != kept[:, :-1], axis=1)
    return kept if named or (runs <= 1).all() else None

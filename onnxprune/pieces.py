"""Parameters that the model holds cut up or packed with others: equal blocks of them are blocks of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from onnxprune.alignments import Link, elements, fitting, whole

Masks = tuple[np.ndarray | None, ...]
BLOCKS = (1, 2, 3, 4)  # a whole in a larger tensor; key and value; query, key and value; the gates of an LSTM
PARTS = 16  # at most, of a tensor: two directions, two biases, four gates


def assembled(
    parameter: np.ndarray, tensors: Mapping[str, np.ndarray], masks: Callable[[str], Masks]
) -> tuple[Masks, tuple[str, ...]] | None:
    """What stays of each axis of a parameter, and the tensors that say so; None where its blocks are not found.

    A block that is found in several places counts where all of them lose the same.
    """
    for axis in range(parameter.ndim):
        for count in BLOCKS:
            if parameter.shape[axis] % count or parameter.shape[axis] == count or (count == 1 and axis):
                continue
            alive, names = [], []
            for block in np.split(parameter, count, axis):
                found = list(_found(block, tensors, masks))
                if not found or any(not np.array_equal(found[0][0], other) for other, _ in found[1:]):
                    break
                alive.append(found[0][0])
                names += [name for _, name in found]
            if len(alive) == count:
                kept = whole(np.concatenate(alive, axis))
                return (kept, tuple(dict.fromkeys(names))) if kept is not None else None
    return None


def _found(block: np.ndarray, tensors: Mapping[str, np.ndarray], masks: Callable[[str], Masks]) -> Iterator[tuple[np.ndarray, str]]:
    """(which elements of the block stay, tensor) for each place where it is; a block of one number is nowhere."""
    if block.size < 2 or np.all(block == block.flat[0]):
        return
    for name, tensor in tensors.items():
        parts, rest = divmod(tensor.size, block.size)
        if rest or not 1 <= parts <= PARTS or tensor.dtype.kind not in "fV":
            continue
        # the directions and gates of a recurrent layer are two axes of one weight, or three of its biases
        flat = tensor if parts == 1 else tensor.reshape((-1, tensor.shape[-1])[: 1 if block.ndim == 1 else 2])
        for axis in range(flat.ndim):
            if flat.shape[axis] % parts or (parts == 1 and axis):
                continue
            for number, part in enumerate(np.split(flat, parts, axis)):
                for link in fitting(name, block, part):
                    alive = _alive(tensor, masks(name)).reshape(flat.shape)
                    piece = np.split(alive, parts, axis)[number]
                    yield piece.reshape(link.view).transpose(link.order).reshape(block.shape), name


def _alive(tensor: np.ndarray, masks: Masks) -> np.ndarray:
    shape = tensor.shape
    return elements(Link("", shape, tuple(range(len(shape)))), shape, shape, masks)

"""Sizes that a file leaves open and that its nodes take for granted all the same, as exporters write what they traced.

A torch transformer with `dynamic_axes` may reshape to the very length that it was traced with: it loads at any length and runs at one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, numpy_helper

from onnxprune.errors import OnnxPruneError

Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]
CHANGES: tuple[Callable[[int], int], ...] = (lambda n: n + 1, lambda n: n + 32, lambda n: 2 * n, lambda n: n // 2, lambda n: n - 1)
FEW, MOST, TRIES = 8, 4096, 12  # numbers of a tensor that may be a shape, the largest of them, how many are tried


def written_sizes(nodes: Iterable[NodeProto], tensors: Mapping[str, TensorProto]) -> list[int]:
    """The sizes that a graph's small integer constants hold, the most frequent first."""
    inner = (a.t for node in nodes if node.op_type == "Constant" for a in node.attribute if a.name == "value")
    small = (t for t in (*tensors.values(), *inner) if t.data_type == TensorProto.INT64 and np.prod(t.dims) <= FEW)
    counts: Counter[int] = Counter()
    for tensor in small:
        if tensor.data_location != TensorProto.EXTERNAL:
            counts.update(int(n) for n in numpy_helper.to_array(tensor).ravel() if 2 < n <= MOST)
    return [size for size, _ in counts.most_common(TRIES)]


def other_sizes(
    inputs: Iterable[ValueInfoProto], feeds: Arrays, run: Callable[[Arrays], object], seed: int
) -> tuple[Arrays | None, list[str]]:
    """Inputs of other sizes on which a model runs, None where it runs on none, and the open axes that take no other size.

    All open sizes change at once where that runs, else one of them alone.  An axis is named as people read it:
    `x, axis 1 (seq), is 16`.  run: raises OnnxPruneError where the model does not run.
    """
    places: dict[str, list[tuple[str, int]]] = {}  # one symbol is one size
    for value in inputs:
        for i, dim in enumerate(value.type.tensor_type.shape.dim if value.name in feeds else ()):
            if not dim.dim_value:
                places.setdefault(dim.dim_param or f"{value.name}:{i}", []).append((value.name, i))

    def at_others(symbols: Sequence[str]) -> Arrays | None:
        for change in CHANGES:
            shapes = {name: list(np.shape(array)) for name, array in feeds.items()}
            for symbol in symbols:
                batch = any(axis == 0 for _, axis in places[symbol])
                for name, axis in places[symbol]:
                    shapes[name][axis] = CHANGES[0](shapes[name][axis]) if batch else max(1, change(shapes[name][axis]))
            other = {name: resized(np.asarray(array), shapes[name], seed) for name, array in feeds.items()}
            try:
                run(other)
            except OnnxPruneError:
                continue
            return other
        return None

    if not places:
        return None, []
    together = at_others(list(places))
    if together is not None:
        return together, []
    alone = {symbol: at_others([symbol]) if len(places) > 1 else None for symbol in places}
    found = next((other for other in alone.values() if other is not None), None)
    return found, [_said(symbol, places[symbol][0], feeds) for symbol, other in alone.items() if other is None]


def _said(symbol: str, place: tuple[str, int], feeds: Arrays) -> str:
    name, axis = place
    known = f" ({symbol})" if symbol != f"{name}:{axis}" else ""
    return f"{name}, axis {axis}{known}, is {np.shape(feeds[name])[axis]}"


def resized(array: np.ndarray, shape: Sequence[int], seed: int) -> np.ndarray:
    """Values of the array, drawn into another shape."""
    if array.shape == tuple(shape) or not array.size:
        return array
    return np.random.default_rng(seed).choice(array.ravel(), tuple(shape))

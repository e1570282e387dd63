"""Two layers and the activation between them, fitted together by damped Gauss-Newton steps.

minimize  Σ ‖c(z) − c(y + s)‖²,  y = B(φ(A(x)))    (z: wanted; s: what is beside; c: clips to the bounds that follow)

over the weights and biases of A and B.  With gates g = φ'(A(x)) and m = 1 where c does not cut off both z and y + s, a change d
of the four changes y by J d = m·(B(g·A_d(x)) + B_d(φ)), and one step solves (JᵀJ + damping) d = Jᵀ r, r = m·(c(z) − y − s), by
conjugate gradients, preconditioned with what A and B read (Kronecker factors, as in Martens and Grosse 2015, arXiv:1503.05671).
No labels, and no learning rate: a step counts only if it lowers the loss on batches that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.linear import Geometry
from onnxprune.operators import Operator

STEPS, ITERATIONS = 3, 6
LENGTHS = (1.0, 0.5, 0.25)
GAIN = 0.01  # a step that gains less is the last
DAMPING = 1e-2  # of a feature's mean square
NUDGE = 1e-3  # of what the activation reads, for its derivative


@dataclass(frozen=True)
class Weights:
    """Weights and biases of A and B, or changes of them: float32, shaped as the nodes', biases (out,)."""

    parts: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    def plus(self, other: Weights, scale: float = 1.0) -> Weights:
        a, b, c, d = ((one + np.float32(scale) * two).astype(np.float32) for one, two in zip(self.parts, other.parts, strict=True))
        return Weights((a, b, c, d))

    def times(self, scale: float) -> Weights:
        a, b, c, d = (np.float32(scale) * part for part in self.parts)
        return Weights((a, b, c, d))

    def dot(self, other: Weights) -> float:
        return sum(float(np.sum(one * two, dtype=np.float64)) for one, two in zip(self.parts, other.parts, strict=True))

    def zeros(self) -> Weights:
        a, b, c, d = (np.zeros_like(part) for part in self.parts)
        return Weights((a, b, c, d))


@dataclass(frozen=True)
class Batch:
    """x: what A reads; wanted: the value that the original has behind B; beside: what is added to B's output now, None: nothing;
    weights: how much each of its positions counts, float32 with an axis of 1 for the channels, None: all alike."""

    x: np.ndarray
    wanted: np.ndarray
    beside: np.ndarray | None
    held: bool
    weights: np.ndarray | None = None

    @property
    def roots(self) -> np.ndarray | None:
        return None if self.weights is None else np.sqrt(self.weights)


@dataclass(frozen=True)
class Pair:
    """A, the activation, B; free: whether A and B have biases that can change; bounds: what is let through behind B."""

    first: Operator
    second: Operator
    shapes: tuple[Geometry, Geometry]
    activation: Callable[[np.ndarray], np.ndarray]
    free: tuple[bool, bool] = (True, True)
    bounds: tuple[float, float] | None = None

    def between(self, x: np.ndarray, weights: Weights) -> np.ndarray:
        """What A makes."""
        return _biased(self.first, self.first.forward(x, weights.parts[0]), weights.parts[1])

    def made(self, batch: Batch, weights: Weights, hidden: np.ndarray) -> np.ndarray:
        """What B makes, and what is beside it."""
        y = _biased(self.second, self.second.forward(hidden, weights.parts[2]), weights.parts[3])
        return y if batch.beside is None else y + batch.beside

    def clipped(self, y: np.ndarray) -> np.ndarray:
        return y if self.bounds is None else np.clip(y, *self.bounds)

    def loss(self, batches: Sequence[Batch], weights: Weights) -> float:
        """Σ ‖c(z) − c(y + s)‖²."""
        total = 0.0
        for batch in batches:
            y = self.made(batch, weights, self.activation(self.between(batch.x, weights)))
            missed = _masked(batch.roots, self.clipped(batch.wanted) - self.clipped(y))
            total += float(np.sum(np.square(missed), dtype=np.float64))
        return total


@dataclass(frozen=True)
class Linearized:
    """A batch where it is: what A and B read, the gates, the mask (times the roots of the weights; None: all ones), what is missed."""

    x: np.ndarray
    hidden: np.ndarray
    gates: np.ndarray
    mask: np.ndarray | None
    missed: np.ndarray


def linearized(pair: Pair, batch: Batch, weights: Weights) -> Linearized:
    between = pair.between(batch.x, weights)
    nudge = np.float32(NUDGE * max(float(np.sqrt(np.mean(np.square(between)))), 1e-6))
    up, down = between + nudge, between - nudge
    gates = (pair.activation(up) - pair.activation(down)) / (up - down)
    hidden = pair.activation(between)
    y = pair.made(batch, weights, hidden)
    mask = batch.roots
    if pair.bounds is not None:
        low, high = pair.bounds
        mask = _masked(mask, ~(((y <= low) & (batch.wanted <= low)) | ((y >= high) & (batch.wanted >= high))))
    return Linearized(batch.x, hidden, gates, mask, _masked(mask, pair.clipped(batch.wanted) - y))


def forward(pair: Pair, at: Linearized, weights: Weights, change: Weights) -> np.ndarray:
    """J d: how what B makes changes with the weights."""
    first, bias, second, other = change.parts
    moved = _biased(pair.first, pair.first.forward(at.x, first), bias) * at.gates
    made = pair.second.forward(moved, weights.parts[2])
    made += _biased(pair.second, pair.second.forward(at.hidden, second), other)
    return _masked(at.mask, made)


def adjoint(pair: Pair, at: Linearized, weights: Weights, error: np.ndarray) -> Weights:
    """Jᵀ e; of biases that cannot change nothing."""
    error = _masked(at.mask, error)
    back = pair.second.back(error, weights.parts[2]) * at.gates
    biases = [
        _summed(one, array) if free else np.zeros_like(bias)
        for one, array, free, bias in zip((pair.first, pair.second), (back, error), pair.free, weights.parts[1::2], strict=True)
    ]
    return Weights((pair.first.weigh(at.x, back), biases[0], pair.second.weigh(at.hidden, error), biases[1]))


@dataclass(frozen=True)
class Factor:
    """What one layer reads, Σ x xᵀ damped and inverted (groups, features, features); with a bias the last feature is 1.

    scale (groups, out): how strongly what is behind the layer answers to each of its outputs; damping: that of the weights.
    """

    inverse: np.ndarray
    damping: np.ndarray
    shape: Geometry
    free: bool

    def solved(self, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        matrix = self.shape.matrix(weight)
        groups, out, features = matrix.shape
        if self.free:
            matrix = np.concatenate([matrix, bias.reshape(groups, out, 1)], axis=2)
        matrix = matrix @ self.inverse / scale[:, :, None]
        bias = matrix[:, :, features].reshape(bias.shape).astype(np.float32) if self.free else bias
        return self.shape.weight(matrix[:, :, :features], weight), bias

    def damped(self, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
        matrix = self.shape.matrix(weight) * scale[:, :, None] * self.damping[:, None, None]
        return self.shape.weight(matrix, weight)


def factor(shape: Geometry, free: bool, rows: Iterator[tuple[np.ndarray, np.ndarray | None]], count: int) -> Factor:
    """rows: (groups, n, features) each and their weights (1, n, 1), of about equal parts of all; count: how many there are in all."""
    gram, seen = np.zeros((1, 1, 1)), 0
    for part, weights in rows:
        whole = np.concatenate([part, np.ones((*part.shape[:2], 1), np.float32)], axis=2) if free else part
        gram = gram + np.matmul(whole.transpose(0, 2, 1), whole if weights is None else whole * weights)
        seen += part.shape[1]
    gram = gram * (count / max(1, seen))
    features = gram.shape[1] - free
    damping = DAMPING * np.maximum(np.einsum("gff->gf", gram)[:, :features].mean(axis=1), 1e-12)
    for one, pull in zip(gram, damping, strict=True):
        one[np.diag_indices(features)] += pull
        if free:
            one[features, features] *= 1 + 1e-6
    return Factor(np.linalg.inv(gram), damping, shape, free)


def refined(pair: Pair, weights: Weights, batches: Sequence[Batch], factors: tuple[Factor, Factor]) -> Weights | None:
    """The weights after Gauss-Newton steps to the batches that are not held out; None where no step does better on those that are."""
    seen, held = [b for b in batches if not b.held], [b for b in batches if b.held]
    start = pair.loss(seen, weights) + pair.loss(held, weights)
    found, best = weights, pair.loss(held, weights)
    for _ in range(STEPS):
        whole = _step(pair, found, seen, factors)
        change, loss = _nearest(pair, held, found, [whole.times(length) for length in LENGTHS])
        if not loss < best:
            break
        gain = 1 - loss / best
        found, best = found.plus(change), loss
        if gain < GAIN:
            break
    if found is weights or not pair.loss(seen, found) + best < start:
        return None
    return found


def _nearest(pair: Pair, held: Sequence[Batch], weights: Weights, changes: Sequence[Weights]) -> tuple[Weights, float]:
    """The change after which least is missed, and its loss; none at all where no loss is finite."""
    found, least = weights.zeros(), float("inf")
    for change in changes:
        loss = pair.loss(held, weights.plus(change))
        if loss < least:
            found, least = change, loss
    return found, least


def _step(pair: Pair, weights: Weights, batches: Sequence[Batch], factors: tuple[Factor, Factor]) -> Weights:
    """The change that a few conjugate gradients find."""
    at = [linearized(pair, batch, weights) for batch in batches]
    scales = _scales(pair, weights, at)

    def summed(errors: Iterator[np.ndarray]) -> Weights:
        total = weights.zeros()
        for one, error in zip(at, errors, strict=True):
            total = total.plus(adjoint(pair, one, weights, error))
        return total

    def curved(change: Weights) -> Weights:
        first, bias, second, other = summed(forward(pair, one, weights, change) for one in at).parts
        first = first + factors[0].damped(change.parts[0], scales[0])
        second = second + factors[1].damped(change.parts[2], scales[1])
        return Weights((first, bias, second, other))

    def solved(left: Weights) -> Weights:
        first, bias, second, other = left.parts
        return Weights((*factors[0].solved(first, bias, scales[0]), *factors[1].solved(second, other, scales[1])))

    change = weights.zeros()
    left = summed(one.missed for one in at)
    towards = near = solved(left)
    size = left.dot(near)
    for _ in range(ITERATIONS):
        bent = curved(towards)
        curvature = towards.dot(bent)
        if not (np.isfinite(curvature) and curvature > 0 and size > 0):
            break
        change, left = change.plus(towards, size / curvature), left.plus(bent, -size / curvature)
        near = solved(left)
        size, before = left.dot(near), size
        towards = near.plus(towards, size / before)
    return change


def _scales(pair: Pair, weights: Weights, at: Sequence[Linearized]) -> tuple[np.ndarray, np.ndarray]:
    """How strongly B's output answers to each output of A (mean g² times the squares of B's weights on it), and to each of B's: 1."""
    first, second = (shape.matrix(weights.parts[2 * i]) for i, shape in enumerate(pair.shapes))
    hidden = at[0].hidden.shape
    axis = pair.first.axis % len(hidden)
    rest = tuple(i for i in range(len(hidden)) if i != axis)
    open_ = np.mean([np.mean(np.square(one.gates), axis=rest, dtype=np.float64) for one in at], axis=0)
    squares = np.square(second).reshape(len(second), second.shape[1], hidden[axis] // len(second), -1).sum(axis=(1, 3)).ravel()
    if pair.shapes[1].op == "Conv":
        squares = squares / np.prod(pair.shapes[1].strides)
    answer = squares * open_
    answer = np.maximum(answer, max(1e-6 * float(answer.max(initial=0.0)), 1e-12))
    return answer.reshape(first.shape[:2]), np.ones(second.shape[:2])


def _biased(layer: Operator, y: np.ndarray, bias: np.ndarray) -> np.ndarray:
    y += bias.reshape(-1, *[1] * (y.ndim - 2)) if layer.axis == 1 else bias
    return y


def _summed(layer: Operator, y: np.ndarray) -> np.ndarray:
    axis = layer.axis % y.ndim
    return np.asarray(np.sum(y, axis=tuple(i for i in range(y.ndim) if i != axis), dtype=np.float64)).astype(np.float32)


def _masked(mask: np.ndarray | None, y: np.ndarray) -> np.ndarray:
    return y if mask is None else y * mask

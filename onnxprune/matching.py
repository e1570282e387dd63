"""Queries and keys that have lost dimensions: a matrix a head that brings their products back to the original's.

minimize  Σ ‖Q Kᵀ − [Q_S, a] M K_Sᵀ‖² + λ·s·‖M − M₀‖²      (M₀: the identity, and zeros for the constant a)

over samples, with Q and K of the original and Q_S and K_S of the pruned model; M is folded into the layer that makes the queries (the
constant's row into its bias), or the keys.  Of logits the mean of each row is left out, as Softmax does not see it.  The normal
equations Σ (Q_SᵀQ_S) M (K_SᵀK_S) = Σ Q_SᵀQ KᵀK_S (CORP, closed-form ridge compensation of attention logits) are solved by
conjugate gradients from M₀ on, preconditioned by the mean of each factor; every step lowers the sum, so that no head is worse than
it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, numpy_helper

from onnxprune.capture import Tap
from onnxprune.carriers import Carrier, carrier
from onnxprune.linear import made_by
from onnxprune.moments import ROOM
from onnxprune.plans import Plan
from onnxprune.products import Product, products
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays
from onnxprune.seats import give_bias, tensors_of, write

Batches = Callable[[], Iterable[Arrays]]
SHRINKAGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = 60  # of conjugate gradients, at most


@dataclass(frozen=True)
class Matched:
    """before, after: the share of the products' squares that is missed; shrinkage: infinite where nothing was changed."""

    before: float
    after: float
    shrinkage: float


def narrowed(plan: Plan, pruned: ModelProto) -> list[Product]:
    """The products of two activations that sum over fewer terms than they did."""
    model, widths = plan.grouping.model, Widths(plan.grouping, plan.remove)
    made = made_by(pruned.graph.node)
    there = [p for p in products(model) if (node := made.get(model.main[p.node].output[0])) is not None and node.op_type == "MatMul"]
    return [p for p in there if widths.mask((p.left, len(model.shapes[p.left]) - 1)) is not None]


def match(plan: Plan, pruned: ModelProto, product: Product, batches: Batches, held: float = 0.25) -> Matched | None:
    """Fit one product and write it into the pruned model's weights; None where it cannot go there without another node.

    That is where a norm, a rotary embedding or the like stands between both layers and the product, or where the same columns
    are read elsewhere.
    """
    model = plan.grouping.model
    node = made_by(pruned.graph.node)[model.main[product.node].output[0]]
    seat = _seat(plan, pruned, node.input[0], node.input[1], next(iter(batches())))
    if seat is None:
        return None
    affine = seat.carrier.seat.layer.takes_bias and not (seat.right and product.logits)
    problem = _Problem(seat, affine)
    widths = Widths(plan.grouping, plan.remove)
    mine = Tap(pruned, [node.input[0], node.input[1]])
    original = Tap(model.proto, [product.left, product.right])
    total, every = sum(1 for _ in batches()), max(2, round(1 / held))
    for number, feeds in enumerate(batches()):
        now, then = mine.run(feeds), original.run(feeds)
        whole = [_kept(then[name], widths, name) for name in (product.left, product.right)]
        problem.add(product, whole, [now[node.input[0]], now[node.input[1]]], feeds, number % every == every - 1, total)
    fitted, found = problem.solve()
    if np.isfinite(found.shrinkage):
        _fold(pruned, seat, fitted, problem.constant)
    return found


@dataclass(frozen=True)
class _Seat:
    """The layer behind one side; right: which side; heads (*leading axes): the head of each place; columns (heads, d): the layer's."""

    carrier: Carrier
    right: bool
    heads: np.ndarray
    columns: np.ndarray

    def places(self, lead: tuple[int, ...]) -> np.ndarray | None:
        """The head of each position of a batch, of any number of samples where they do not count."""
        heads = self.heads
        if heads.ndim and (heads == heads[:1]).all():
            heads = heads[:1]
        try:
            return np.broadcast_to(heads, lead).ravel()
        except ValueError:
            return None


def _seat(plan: Plan, pruned: ModelProto, left: str, right: str, feeds: Arrays) -> _Seat | None:
    for is_right, value in enumerate((left, right)):
        found = carrier(plan.grouping.model, pruned, value, feeds)
        if found is None:
            continue
        columns = np.swapaxes(found.columns, -1, -2) if is_right else found.columns
        first = columns[..., 0, :]
        heads, places = np.unique(first.reshape(-1, first.shape[-1]), axis=0, return_inverse=True)
        if (columns == first[..., None, :]).all() and np.unique(heads).size == heads.size:
            return _Seat(found, bool(is_right), places.reshape(first.shape[:-1]), heads)
    return None


def _kept(array: np.ndarray, widths: Widths, name: str) -> np.ndarray:
    """A side of the original's product without the removed heads, but with all dimensions."""
    for axis in range(array.ndim - 2):
        mask = widths.mask((name, axis))
        if mask is not None:
            array = np.compress(mask, array, axis=axis)
    return array


@dataclass
class _Factors:
    """Of positions end to end: their head; first (p, f, f) and second (p, d, d): the sides' Grams; cross (p, f, d); power (p,)."""

    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def joined(self, *others: _Factors) -> list[np.ndarray]:
        parts = [part for factors in (self, *others) for part in factors.parts]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


class _Problem:
    """The least squares of one product, all heads beside one another."""

    def __init__(self, seat: _Seat, affine: bool) -> None:
        self.seat, self.affine = seat, affine
        self.constant = 0.0  # what stands in the constant's column
        self.seen, self.held = _Factors(), _Factors()

    def add(self, product: Product, whole: list[np.ndarray], now: list[np.ndarray], feeds: Arrays, held: bool, batches: int) -> None:
        """whole, now: both sides of the original's product and of the pruned one's."""
        lead = np.broadcast_shapes(now[0].shape[:-2], now[1].shape[:-2])
        heads = self.seat.places(lead)
        if heads is None:
            return
        mine, axis = int(self.seat.right), -2 if self.seat.right else -1
        if self.affine:
            self.constant = self.constant or float(np.sqrt(np.mean(now[mine] ** 2))) or 1.0
            edge = list(now[mine].shape)
            edge[axis] = 1
            now = list(now)
            now[mine] = np.concatenate([now[mine], np.full(edge, self.constant, now[mine].dtype)], axis=axis)
        one, two = product.sides(now[0], now[1], feeds), product.sides(whole[0], whole[1], feeds)
        width = one[mine].shape[-1]
        most = max(self.seat.columns.shape[0], ROOM // (batches * 2 * width**2))
        kept = slice(0, None, -(-len(heads) // most) | 1)  # odd, so that no head is left out
        first, second = (np.ascontiguousarray(one[i][kept], np.float32) for i in (mine, 1 - mine))
        goal, other = (np.ascontiguousarray(two[i][kept], np.float32) for i in (mine, 1 - mine))
        cross = (first.transpose(0, 2, 1) @ goal) @ (other.transpose(0, 2, 1) @ second)
        power = np.einsum("pab,pab->p", goal.transpose(0, 2, 1) @ goal, other.transpose(0, 2, 1) @ other, dtype=np.float64)
        part = (heads[kept], first.transpose(0, 2, 1) @ first, second.transpose(0, 2, 1) @ second, cross, power)
        (self.held if held else self.seen).parts.append(part)

    def solve(self) -> tuple[np.ndarray, Matched]:
        """The matrices (heads, f, d), with the shrinkage that does best on held-out samples; the identity where none helps."""
        many, d = self.seat.columns.shape
        start = np.broadcast_to(np.eye(d + self.affine, d), (many, d + self.affine, d))
        both = self.seen.joined(self.held)
        best = np.inf
        if self.seen.parts and self.held.parts:
            seen, held = self.seen.joined(), self.held.joined()
            error = _missed(held, start)
            for shrinkage in SHRINKAGES:
                missed = _missed(held, _solved(seen, start, shrinkage))
                if missed < error:
                    best, error = shrinkage, missed
        fitted = _solved(both, start, best) if np.isfinite(best) else start
        power = max(float(both[-1].sum()), 1e-30)
        return fitted, Matched(_missed(both, start) / power, _missed(both, fitted) / power, best)


def _each(factors: list[np.ndarray], many: int) -> list[list[np.ndarray]]:
    return [[array[factors[0] == head] for array in factors[1:]] for head in range(many)]


def _missed(factors: list[np.ndarray], matrices: np.ndarray) -> float:
    """Σ ‖goal − first M secondᵀ‖² over all positions."""
    total = 0.0
    for (first, second, cross, power), matrix in zip(_each(factors, len(matrices)), matrices, strict=True):
        made = _applied(first, second, matrix)
        total += float(power.sum()) + float((matrix * (made - 2 * cross.sum(axis=0, dtype=np.float64))).sum())
    return max(total, 0.0)


def _applied(first: np.ndarray, second: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Σ first M second over positions, float64."""
    return np.asarray(np.einsum("pab,pbc->ac", first, matrix.astype(np.float32) @ second, dtype=np.float64, optimize=True))


def _solved(factors: list[np.ndarray], start: np.ndarray, shrinkage: float) -> np.ndarray:
    fitted = []
    for (first, second, cross, _), matrix in zip(_each(factors, len(start)), start, strict=True):
        fitted.append(_descended(first, second, cross.sum(axis=0, dtype=np.float64), matrix, shrinkage) if len(first) else matrix)
    return np.stack(fitted)


def _descended(first: np.ndarray, second: np.ndarray, cross: np.ndarray, start: np.ndarray, shrinkage: float) -> np.ndarray:
    """Preconditioned conjugate gradients on Σ first M second + pull·(M − start) = cross."""
    diagonals = np.einsum("paa,pbb->", first, second, dtype=np.float64) / start.size
    pull = shrinkage * max(float(diagonals), 1e-30)
    one, two = first.mean(axis=0, dtype=np.float64), second.mean(axis=0, dtype=np.float64)
    count, root = len(first), np.sqrt(pull / len(first))
    # of (one ⊗ two) and the pull, both diagonal in the eigenvectors of the two means
    (a, u), (b, v) = np.linalg.eigh(one), np.linalg.eigh(two)
    weights = 1 / (count * np.maximum(a, 0)[:, None] * np.maximum(b, 0) + pull + 1e-9 * count * root)
    matrix = start.copy()
    left = cross - _applied(first, second, matrix)
    goal = float(np.abs(left).max()) * 1e-6
    turned = u @ (weights * (u.T @ left @ v)) @ v.T
    step, size = turned, float((left * turned).sum())
    for _ in range(STEPS):
        if np.abs(left).max() <= goal or size <= 0:
            break
        made = _applied(first, second, step) + pull * step
        length = size / max(float((step * made).sum()), 1e-300)
        matrix = matrix + length * step
        left = left - length * made
        turned = u @ (weights * (u.T @ left @ v)) @ v.T
        size, last = float((left * turned).sum()), size
        step = turned + size / last * step
    return np.asarray(matrix)


def _fold(pruned: ModelProto, seat: _Seat, matrices: np.ndarray, constant: float) -> None:
    """Write each head's matrix into the rows of the layer's weight that make it, and into its bias."""
    found = seat.carrier.seat
    tensors = tensors_of(pruned)
    weight = numpy_helper.to_array(tensors[found.weight])
    rows = found.shape.matrix(weight)[0].copy()
    given = numpy_helper.to_array(tensors[found.bias]) if found.bias else None
    bias = np.zeros(len(rows)) if given is None else np.asarray(given, np.float64).ravel().copy()
    d = seat.columns.shape[1]
    for columns, matrix in zip(seat.columns, matrices, strict=True):
        rows[columns] = matrix[:d].T @ rows[columns]
        bias[columns] = matrix[:d].T @ bias[columns]
        if len(matrix) > d:
            bias[columns] += constant / seat.carrier.scale * matrix[d]
    write(tensors[found.weight], found.shape.weight(rows[None], weight))
    if found.layer.takes_bias:
        shape, kind = (given.shape, given.dtype) if given is not None else ((bias.size,), weight.dtype)
        give_bias(pruned, found, bias.reshape(shape).astype(kind))

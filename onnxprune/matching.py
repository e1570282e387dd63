"""Queries and keys that have lost dimensions: a matrix a head that brings their products back to the original's.

minimize  Σ ‖Q Kᵀ − [Q_S, a] M K_Sᵀ‖² + λ·s·‖M − M₀‖²      (M₀: the identity, and zeros for the constant a)

over samples, with Q and K of the original and Q_S and K_S of the pruned model; M is folded into the layer that makes the queries (the
constant's row into its bias), or the keys.  Of logits the mean of each row is left out, as Softmax does not see it.  The normal
equations Σ (Q_SᵀQ_S) M (K_SᵀK_S) = Σ Q_SᵀQ KᵀK_S (CORP, closed-form ridge compensation of attention logits) are solved by
conjugate gradients from M₀ on, preconditioned by the mean of each factor; every step lowers the sum, so that no head is worse than
it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, numpy_helper

from onnxprune.carriers import Carrier, carrier
from onnxprune.frontier import Frontier
from onnxprune.linear import made_by
from onnxprune.moments import ROOM
from onnxprune.plans import Plan
from onnxprune.products import Product, products
from onnxprune.rewriter import Widths
from onnxprune.running import Arrays
from onnxprune.seats import bias_of, put, tensors_of

Batches = Callable[[], Iterable[Arrays]]
SHRINKAGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = 60  # of conjugate gradients, at most
TOLERANCE = 1e-3  # of the residual at the start, where they end


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
    there = [p for p in products(model) if model.main[p.node].output[0] in made]
    alike = [p for p in there if made[model.main[p.node].output[0]].op_type == model.main[p.node].op_type]
    return [p for p in alike if widths.mask((p.left, p.axis)) is not None]


def match(
    plan: Plan,
    pruned: ModelProto,
    product: Product,
    batches: Batches,
    held: float = 0.25,
    known: tuple[Frontier, Frontier] | None = None,
    changing: Collection[str] = (),
) -> Matched | None:
    """Fit one product and write it into the pruned model's weights; None where it cannot go there without another node.

    That is where a norm, a rotary embedding or the like stands between both layers and the product, or where the same columns
    are read elsewhere.  known: how far the pruned model and the original have been run; changing: of the pruned one what will change
    beside this product.
    """
    model = plan.grouping.model
    node = made_by(pruned.graph.node)[model.main[product.node].output[0]]
    total = sum(1 for _ in batches())
    mine, whole = known or (Frontier(total, 0), Frontier(total, 0))
    seat = _seat(plan, pruned, product, node.input[0], node.input[1], {**next(iter(batches())), **mine.kept(0)})
    if seat is None:
        return None
    mine.change(seat.carrier.seat.node)
    affine = seat.carrier.seat.layer.takes_bias and not (seat.right and product.logits)
    problem = _Problem(seat, affine)
    widths = Widths(plan.grouping, plan.remove)
    ahead = mine.tap(pruned, [node.input[0], node.input[1]], {*changing, *seat.carrier.seat.node.output})
    goals = whole.tap(model.proto, [product.left, product.right])
    every = max(2, min(round(1 / held), total))  # one batch is held out where there are two
    for number, feeds in enumerate(batches()):
        now, then = ahead(number, feeds), goals(number, feeds)
        wide = {name: _kept(then[name], widths, product, name) for name in (product.left, product.right)}
        sides = product.turned(wide, product.left, product.right), product.turned(now, node.input[0], node.input[1])
        problem.add(product, *sides, feeds, number % every == every - 1, total)
    if not (problem.seen or problem.held):
        return None
    fitted, found = problem.solve()
    if np.isfinite(found.shrinkage) and not _fold(pruned, seat, fitted, problem.constant):
        return Matched(found.before, found.before, np.inf)
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


def _seat(plan: Plan, pruned: ModelProto, product: Product, left: str, right: str, feeds: Arrays) -> _Seat | None:
    for is_right, value in enumerate((left, right)):
        found = carrier(plan.grouping.model, pruned, value, feeds)
        if found is None:
            continue
        columns = found.columns.transpose(product.order[is_right])
        columns = np.swapaxes(columns, -1, -2) if is_right else columns
        first = columns[..., 0, :]
        heads, places = np.unique(first.reshape(-1, first.shape[-1]), axis=0, return_inverse=True)
        if (columns == first[..., None, :]).all() and np.unique(heads).size == heads.size:
            return _Seat(found, bool(is_right), places.reshape(first.shape[:-1]), heads)
    return None


def _kept(array: np.ndarray, widths: Widths, product: Product, name: str) -> np.ndarray:
    """A side of the original's product without the removed heads, but with all dimensions."""
    order = product.order[name != product.left]
    for axis in order[:-2]:
        mask = widths.mask((name, axis))
        if mask is not None:
            array = np.compress(mask, array, axis=axis)
    return array


Sides = tuple[np.ndarray, np.ndarray]
Part = tuple[np.ndarray, ...]  # of positions: their head, the Grams of both sides, the right-hand side, the squares of the goal


def _heads(parts: list[Part], many: int) -> list[_Head]:
    """The positions of all batches, head by head."""
    owners, *arrays = (np.concatenate(column) for column in zip(*parts, strict=True))
    return [_Head(*(array[owners == head] for array in arrays)) for head in range(many)]


class _Problem:
    """The least squares of one product, all heads beside one another."""

    def __init__(self, seat: _Seat, affine: bool) -> None:
        self.seat, self.affine = seat, affine
        self.constant = 0.0  # what stands in the constant's column
        self.seen: list[Part] = []
        self.held: list[Part] = []

    def add(self, product: Product, whole: Sides, now: Sides, feeds: Arrays, held: bool, batches: int) -> None:
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
            wider = np.concatenate([now[mine], np.full(edge, self.constant, now[mine].dtype)], axis=axis)
            now = (now[0], wider) if mine else (wider, now[1])
        one, two = product.sides(now[0], now[1], feeds), product.sides(whole[0], whole[1], feeds)
        width = one[mine].shape[-1]
        most = max(self.seat.columns.shape[0], ROOM // (batches * 2 * width**2))
        kept = slice(0, None, -(-len(heads) // most) | 1)  # odd, so that no head is left out
        first, second = (np.ascontiguousarray(one[i][kept], np.float32) for i in (mine, 1 - mine))
        goal, other = (np.ascontiguousarray(two[i][kept], np.float32) for i in (mine, 1 - mine))
        good = np.logical_and.reduce([np.isfinite(side).all(axis=(1, 2)) for side in (first, second, goal, other)])
        first, second, goal, other, owners = (side[good] for side in (first, second, goal, other, heads[kept]))
        cross = (first.transpose(0, 2, 1) @ goal) @ (other.transpose(0, 2, 1) @ second)
        power = np.einsum("pab,pab->p", goal.transpose(0, 2, 1) @ goal, other.transpose(0, 2, 1) @ other, dtype=np.float64)
        part = (owners, first.transpose(0, 2, 1) @ first, second.transpose(0, 2, 1) @ second, cross, power)
        (self.held if held else self.seen).append(part)

    def solve(self) -> tuple[np.ndarray, Matched]:
        """The matrices (heads, f, d), with the shrinkage that does best on held-out samples; the identity where none helps."""
        many, d = self.seat.columns.shape
        start = np.eye(d + self.affine, d)
        both = _heads([*self.seen, *self.held], many)
        best = np.inf
        if self.seen and self.held:
            seen, held = _heads(self.seen, many), _heads(self.held, many)
            error = sum(head.missed(start) for head in held)
            for shrinkage in SHRINKAGES:
                missed = sum(other.missed(head.solved(start, shrinkage)) for head, other in zip(seen, held, strict=True))
                if missed < error:
                    best, error = shrinkage, missed
        fitted = np.stack([head.solved(start, best) if np.isfinite(best) else start for head in both])
        power = max(sum(head.power for head in both), 1e-30)
        after = sum(head.missed(matrix) for head, matrix in zip(both, fitted, strict=True))
        return fitted, Matched(sum(head.missed(start) for head in both) / power, after / power, best)


class _Head:
    """The sums of one head's normal equations: Σ first·M·second over positions, with cross = Σ firstᵀ goal otherᵀ second."""

    def __init__(self, first: np.ndarray, second: np.ndarray, cross: np.ndarray, power: np.ndarray) -> None:
        self.count, f, d = len(first), first.shape[1], second.shape[1]
        self.cross = cross.sum(axis=0, dtype=np.float64)
        self.power = float(power.sum())
        self.means = first.mean(axis=0, dtype=np.float64), second.mean(axis=0, dtype=np.float64)
        self.scale = float(np.einsum("paa,pbb->", first, second, dtype=np.float64)) / (f * d)
        # both are symmetric: laid out so that all positions are one matrix product
        self._first = np.ascontiguousarray(first.transpose(1, 0, 2)).reshape(-1, f)
        self._second = second.reshape(-1, d)

    def applied(self, matrix: np.ndarray) -> np.ndarray:
        made = (self._first @ matrix.astype(np.float32)).reshape(len(matrix), -1) @ self._second
        return np.asarray(made, np.float64)

    def missed(self, matrix: np.ndarray) -> float:
        """Σ ‖goal − first M secondᵀ‖² over all positions."""
        return max(self.power + float((matrix * (self.applied(matrix) - 2 * self.cross)).sum()), 0.0)

    def solved(self, start: np.ndarray, shrinkage: float) -> np.ndarray:
        """Preconditioned conjugate gradients on Σ first M second + pull·(M − start) = cross."""
        if not self.count:
            return start
        pull = shrinkage * max(self.scale, 1e-30)
        # of the means' own product and the pull, both diagonal in the eigenvectors of the two means
        (a, u), (b, v) = (np.linalg.eigh(mean) for mean in self.means)
        weights = 1 / (self.count * np.maximum(a, 0)[:, None] * np.maximum(b, 0) + pull)
        matrix = np.array(start)
        left = self.cross - self.applied(matrix)
        turned = u @ (weights * (u.T @ left @ v)) @ v.T
        step, size = turned, float((left * turned).sum())
        goal = TOLERANCE**2 * size
        for _ in range(STEPS):
            if size <= goal:
                break
            made = self.applied(step) + pull * step
            length = size / max(float((step * made).sum()), 1e-300)
            matrix += length * step
            left -= length * made
            turned = u @ (weights * (u.T @ left @ v)) @ v.T
            size, last = float((left * turned).sum()), size
            step = turned + size / last * step
        return matrix


def _fold(pruned: ModelProto, seat: _Seat, matrices: np.ndarray, constant: float) -> bool:
    """Write each head's matrix into the rows of the layer's weight that make it, and into its bias, if its type holds them."""
    found = seat.carrier.seat
    rows = found.shape.matrix(numpy_helper.to_array(tensors_of(pruned)[found.weight]))[0].copy()
    bias = bias_of(pruned, found, len(rows)).copy()
    d = seat.columns.shape[1]
    for columns, matrix in zip(seat.columns, matrices, strict=True):
        rows[columns] = matrix[:d].T @ rows[columns]
        bias[columns] = matrix[:d].T @ bias[columns]
        if len(matrix) > d:
            bias[columns] += constant / seat.carrier.scale * matrix[d]
    return put(pruned, found, rows[None], bias)

"""All layers of a pruned model together, fitted to what the original makes of the samples: distillation, without labels.

Adam (Kingma and Ba 2015, arXiv:1412.6980) on the loss of `lessons`, each tensor's step in proportion to its own size, over some passes
of the samples with a rate that falls to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983).  Where all inputs are floating-point numbers,
samples are mixed in pairs, which the original can be asked about just as well (Zhang et al. 2018, arXiv:1710.09412; Beyer et al. 2022,
arXiv:2106.05237).

The gradient is compared with a finite difference on the model itself before it is used, and what comes out counts only where it does
better on samples that were held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, numpy_helper

from onnxprune.cost import count_macs
from onnxprune.errors import OnnxPruneError
from onnxprune.lessons import Lesson, lesson, trainable, with_initializers
from onnxprune.plans import Plan
from onnxprune.running import Arrays, widened
from onnxprune.samples import Samples
from onnxprune.seats import held_by, tensors_of, write

Changes = dict[str, np.ndarray]
RATE = 4e-3  # of a tensor's root mean square, a step
SLOWER = (1, 8, 64)  # times, the next where nothing better was found
PATIENCE = 8  # after a course in vain that was not lost, the part of the passes (1 / 8) by which a slower one must do better
STEADY = (
    4  # the part of the passes (1 / 4), and how many at the least, with each worse than the one before: it learns these samples by heart
)
LOST = 4  # times the loss at the start, after a pass: a course that ends there
LEAST = 1e-2  # the root mean square of tensors that are smaller
WORK = 5e13  # multiply-accumulates that all passes may take
PASSES = 40
MOST = 3 * 10**8  # numbers of all weights, of which five copies are held
WARM = 20  # steps until the rate is reached
DECAY = (0.9, 0.99)
MIXED = 0.5  # of a sample, at the most, is another one
OFF = 0.03  # of a tensor's root mean square
ENDS = (1e-2, 1e-3, 1e-1)  # of the loss: what a finite difference is taken over
AGREES = 0.1  # how far the gradient and the finite difference may be apart


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what grows without bounds does no better on held-out samples
def distilled(
    plan: Plan,
    pruned: ModelProto,
    seen: Samples,
    held: Samples,
    batch: int,
    progress: Callable[[str], None] | None = None,
    seed: int = 0,
) -> ModelProto:
    """A copy of the pruned model with other weights, nearer to the original on held-out samples.

    seen, held: samples to fit to, and to choose by; batches of another size than the first are left out.  The model as it is
    where no weight's gradient is known or nothing better is found; `progress` is told why.
    """
    say = progress or (lambda text: None)
    batch, some = seen.at_once or batch, seen.part(0, 4 * max(batch, seen.at_once or 1))
    lifted = with_initializers(pruned, next(iter(seen.batches(1)), {}))
    names = set(trainable(lifted))
    weights = {t.name: numpy_helper.to_array(t) for t in lifted.graph.initializer if t.name in names}
    batches = [list(_alike(part, batch, seen)) for part in (some, held)]
    passes, many = _passes(plan, seen), sum(1 for _ in _alike(seen.shuffled(seed), batch, seen))
    few = "there are too few samples to hold some out" if not all(batches) else ""
    sample, first = next(seen.counted(batch), ({}, 0))
    blends = all(np.shape(array)[:1] == (first,) for array in sample.values())  # else axis 0 is not that of samples
    few = "most samples are of other sizes than the first; pad them to one" if 2 * many * first < seen.count else few
    large = "the model or the calibration set is too large" if passes < 1 or sum(w.size for w in weights.values()) > MOST else ""
    if few or large or not weights:
        say(f"the model is not distilled: {few or large or 'it has no weights to change'}")
        return pruned
    shown, tests = batches
    try:
        found = lesson(plan, lifted, weights, shown)
        if found is None or not _agrees(found, shown[0], weights):
            reason = "how its outputs change with its weights is not known" if found is None else "its gradient fails a finite difference"
            say(f"the model is not distilled: {reason}")
            return pruned
        start, patience = found.losses(tests, weights), passes
        for times in SLOWER:
            course = Course(RATE / times, passes, passes * many, seed, patience, blends)
            best, lost = _course(found, course, weights, start, seen, batch, tests, say)
            if best is not weights:
                break
            if not lost:
                patience = max(2, math.ceil(passes / PATIENCE))
    except OnnxPruneError as error:
        say(f"the model is not distilled: {error}")
        return pruned
    if best is weights:
        say("the model is not distilled: nothing does better on samples that were held out")
        return pruned
    out = ModelProto()
    out.CopyFrom(pruned)
    tensors = tensors_of(out)
    for name in found.graph.weights:
        kind = numpy_helper.to_array(tensors[name]).dtype
        if not held_by(kind, best[name]):
            say("the model is not distilled: half precision does not hold what was found")
            return pruned
        write(tensors[name], best[name].astype(kind))
    return out


@dataclass(frozen=True)
class Course:
    """How fast, how often through the samples, and how many steps that are; patience: passes after which it ends with nothing better.

    blends: samples may be mixed.
    """

    rate: float
    passes: int
    steps: int
    seed: int
    patience: int
    blends: bool = True


def _passes(plan: Plan, seen: Samples) -> int:
    model = plan.grouping.model
    together = next((shape[0] for shape in model.input_shapes.values() if shape), 1)
    once = 4 * count_macs(model) / max(1, together) * seen.count  # the original forward, the pruned one forward and back
    return min(PASSES, int(WORK / max(once, 1.0)))


def _alike(some: Samples, batch: int, seen: Samples) -> Iterator[Arrays]:
    """Batches of the sizes of the first one of those to fit to."""
    first = next(iter(seen.batches(batch)), None)
    sizes = {name: np.shape(array) for name, array in (first or {}).items()}
    return (feeds for feeds in some.batches(batch) if {name: np.shape(array) for name, array in feeds.items()} == sizes)


def _course(
    found: Lesson,
    course: Course,
    start: Changes,
    losses: dict[str, float],
    seen: Samples,
    batch: int,
    tests: Sequence[Arrays],
    say: Callable[[str], None],
) -> tuple[Changes, bool]:
    """The weights after the pass that does best on the tests, its outputs no worse than at the start, and whether the course was lost.

    `start` itself where none does better.  At a high rate that may come late, when the rate has fallen; until then the loss goes up and
    down.  What goes only up will not, and a course that is slow, after one that was not lost, shows early what it is worth.
    """
    best, least, mine = start, losses, start
    adam, step, worse, last = Adam(), 0, 0, sum(losses.values())
    for number in range(course.passes):
        for feeds in _alike(seen.shuffled(course.seed + number), batch, seen):
            step += 1
            rate = course.rate * min(1, step / WARM) * 0.5 * (1 + math.cos(math.pi * min(1, step / course.steps)))
            given = mixed(feeds, np.random.default_rng([course.seed, step])) if course.blends else feeds
            _, change = found.gradient(given, mine)
            if all(np.isfinite(array).all() for array in change.values()):
                mine = adam.stepped(mine, change, rate)
        now = found.losses(tests, mine)
        missed, before = (sum(each[t.name] for t in found.wanted if t.final) for each in (now, losses))
        say(f"distilling, pass {number + 1} of {course.passes}: on held-out samples the outputs miss {missed:.4f}, {before:.4f} at first")
        total = sum(now.values())
        if missed < before and total < sum(least.values()):
            best, least = mine, now
        if not total < LOST * sum(losses.values()):
            return best, True
        worse, last = worse + 1 if total > last else 0, total
        if worse >= max(STEADY, course.passes / STEADY) or (best is start and number + 1 >= course.patience):
            break
    return best, False


def mixed(feeds: Arrays, rng: np.random.Generator) -> Arrays:
    """Every sample mixed with another of its batch, by as much as MIXED; as they are where an input is not of floats."""
    arrays = {name: widened(np.asarray(array)) for name, array in feeds.items()}
    counts = {array.shape[:1] for array in arrays.values()}
    if len(counts) != 1 or counts <= {(), (1,)} or any(array.dtype != np.float32 for array in arrays.values()):
        return feeds
    ((count,),) = counts
    share, order = np.asarray(rng.uniform(0, MIXED, count), np.float32), rng.permutation(count)
    shares = {name: share.reshape(-1, *[1] * (array.ndim - 1)) for name, array in arrays.items()}
    return {name: array + shares[name] * (array[order] - array) for name, array in arrays.items()}


@dataclass
class Adam:
    """Running means of the gradient and of its square, of each tensor."""

    means: Changes = field(default_factory=dict)
    squares: Changes = field(default_factory=dict)
    steps: int = 0

    def stepped(self, weights: Changes, change: Changes, rate: float) -> Changes:
        """All weights after one step of those that change: `rate` of a tensor's root mean square for a number of it, or so."""
        self.steps += 1
        found = dict(weights)
        first, second = DECAY
        for name, moved in change.items():
            array = weights[name]
            mean = self.means.setdefault(name, np.zeros_like(array))
            square = self.squares.setdefault(name, np.zeros_like(array))
            mean += (1 - first) * (moved - mean)
            square += (1 - second) * (np.square(moved) - square)
            scale = np.float32(rate * _size(array) / (1 - first**self.steps))
            found[name] = array - scale * mean / (np.sqrt(square / (1 - second**self.steps)) + np.float32(1e-12))
        return found


def _agrees(found: Lesson, feeds: Arrays, weights: Changes) -> bool:
    """Whether the loss changes along the gradient, each number of it taken more or less, as the gradient says.

    At weights a little off: where they are the best there are, least squares having found them, there is no gradient to see.
    """
    rng = np.random.default_rng(0)
    noise = {n: np.asarray(rng.standard_normal(weights[n].shape), np.float32) for n in found.graph.weights}
    here = weights | {n: weights[n] + np.float32(OFF * _size(weights[n])) * array for n, array in noise.items()}
    loss, change = found.gradient(feeds, here)
    if not all(np.isfinite(array).all() for array in change.values()):
        return False
    along = {name: array * np.asarray(rng.uniform(0.5, 1.5, array.shape), np.float32) for name, array in change.items()}
    slope = sum(float(np.sum(array * along[name], dtype=np.float64)) for name, array in change.items())
    if not (0 < slope < math.inf and 0 < loss < math.inf):
        return False
    for size in ENDS:
        length = size * loss / slope
        moved = ({n: w + np.float32(s * length) * along[n] if n in along else w for n, w in here.items()} for s in (1, -1))
        up, down = (sum(found.losses([feeds], ends).values()) for ends in moved)
        if abs((up - down) / (2 * length) - slope) < AGREES * slope:
            return True
    return False


def _size(array: np.ndarray) -> float:
    return max(float(np.sqrt(np.mean(np.square(array)))), LEAST)

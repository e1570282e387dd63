"""What the calibration samples say of each group: moments of the features through which the layers read its units.

A unit counts by what the layers that sum over it make of it, so a group's evidence is that of its readers: for each the features
(an input channel of a convolution is as many features as its kernel has places) of every unit, their moments on the original
model, and the layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxprune.capture import Tap
from onnxprune.emphasis import emphasis
from onnxprune.grouping import Group, Grouping
from onnxprune.importer import Model
from onnxprune.linear import CONVOLUTIONS, Geometry, Linear, geometry, linears
from onnxprune.moments import Gathering, Moments
from onnxprune.products import Terms, gathered
from onnxprune.recurrences import recurrences, spelled_out
from onnxprune.ridge import CONSTANT
from onnxprune.running import Arrays

Batches = Callable[[], Iterable[Arrays]]
WIDEST = 8192  # features; of layers that read more no Gram matrix is kept


@dataclass(frozen=True)
class Reading:
    """How one layer, or one product of two activations, reads a group.

    layer: None of a product (`products`), whose matrix is all ones: it sums its terms, and the covariance is theirs.
    features (units, places): the features of each unit; matrix (groups, out, features): the layer's weights; mean and rms (groups,
    features), covariance (groups, features, features): of what it reads; magnitude (groups, features): root mean square over samples of the
    mean |x| of each; power: mean square, summed over channels, of what its output goes
    into: the residual stream behind an Add, else the output itself, behind an activation if there is one.
    """

    layer: Linear | None
    features: np.ndarray
    matrix: np.ndarray
    mean: np.ndarray
    rms: np.ndarray
    covariance: np.ndarray
    power: float
    magnitude: np.ndarray = field(default_factory=lambda: np.zeros((1, 1)))

    @property
    def spread(self) -> np.ndarray:
        """(groups,): the mean variance of a feature, at least what rounding makes of constants."""
        varies = np.einsum("gff->gf", self.covariance).mean(axis=1)
        return np.asarray(np.maximum(np.maximum(varies, CONSTANT * np.square(self.rms).mean(axis=1)), 1e-20))


@dataclass(frozen=True)
class Evidence:
    """readings: for each group id how layers read it; samples: how many samples were seen.

    layers: the reading of each layer that was looked at, by its weight; trial: feeds of at most so many samples, for criteria that run
    the model itself, and None where there are no samples.
    """

    grouping: Grouping
    readings: Mapping[int, tuple[Reading, ...]]
    samples: int
    layers: Mapping[str, Reading] = field(default_factory=dict)
    trial: Callable[[int], Sequence[Arrays]] | None = None
    progress: Callable[[str], None] | None = None

    @property
    def model(self) -> Model:
        return self.grouping.model

    def of(self, group: Group) -> tuple[Reading, ...]:
        return self.readings.get(group.id, ())


def features(layer: Linear, shape: Geometry, weight: np.ndarray, group: Group) -> np.ndarray | None:
    """(units, places) features of each unit in what a layer reads; None where it does not sum over the group's units."""
    axis = {"Conv": 1, "ConvTranspose": 0}.get(layer.op, weight.ndim - 1 if shape.left or shape.flipped else 0)
    for member in group.members:
        if member.tensor == layer.weight and member.axis == axis:
            break
    else:
        return None
    if layer.op not in CONVOLUTIONS:
        return member.indices
    places = member.indices
    if layer.op == "ConvTranspose" and shape.group > 1:  # axis 0 holds the channels of all convolution groups, end to end
        owners, places = np.divmod(places, weight.shape[0] // shape.group)
        if owners.shape[1] != shape.group or (np.sort(owners, axis=1) != np.arange(shape.group)).any() or (places != places[:, :1]).any():
            return None  # a unit that not every convolution group reads at the same place, such as a whole group
        places = places[:, :1]
    kernel = int(np.prod(weight.shape[2:]))
    found: np.ndarray = (places[:, :, None] * kernel + np.arange(kernel)).reshape(group.units, -1)
    return found


def gather(grouping: Grouping, batches: Batches, rows: int = 65536, progress: Callable[[str], None] | None = None) -> Evidence:
    """Run the original over the samples, once, and sum up what the layers read."""
    model = grouping.model
    owned = {m.tensor for g in grouping.groups for m in g.members}
    layers = []
    for layer in (*linears(model), *recurrences(model)):
        weight = model.array(layer.weight)
        shape = geometry(model.main[layer.node], layer.weight, weight.ndim)
        if layer.weight not in owned:
            continue
        readers = {g.id: f for g in grouping.groups if g.branch is None and (f := features(layer, shape, weight, g)) is not None}
        wide = shape.matrix(weight).shape
        if wide[2] <= WIDEST:
            layers.append((layer, shape, weight, readers, Gathering(Moments.zero(wide[0], wide[2], 0))))
    goals = [passed_on(model, layer) for layer, *_ in layers]
    pairs = gathered(grouping)
    sides = [name for pair in pairs for name in (pair.product.left, pair.product.right)]
    tap = Tap(spelled_out(model, (layer for layer, *_ in layers)), [*goals, *(layer.source for layer, *_ in layers), *sides])
    squares, seen = [0.0] * len(layers), [0] * len(layers)
    sizes = [np.zeros(sums.moments.x.shape) for *_, sums in layers]
    samples = 0
    total = sum(1 for _ in batches()) if layers or pairs else 0
    for number, feeds in enumerate(batches()):
        if progress:
            progress(f"reading activations, batch {number + 1} of {total}")
        values = tap.run(feeds)
        samples += max((len(v) for v in feeds.values() if np.ndim(v)), default=1)
        for position, (layer, shape, weight, _, sums) in enumerate(layers):
            x = values[layer.source]
            out = shape.out(x.shape, weight.shape)
            rng = np.random.default_rng([position, number])
            places = shape.choose(out, max(rows, 16 * sums.moments.x.shape[1]) // total, feeds, rng)
            kernel = weight.shape[2:] if layer.op in CONVOLUTIONS else ()
            found = shape.rows(x, out, kernel, places)
            made = shape.targets(values[goals[position]], places)
            weights = emphasis(made) if layer.normed else None
            sums.add(found, np.zeros((*found.shape[:2], 0), np.float32), weights)
            sizes[position] += _by_sample(found, shape.owners(out, places), out[0])
            made = made if weights is None else made * np.sqrt(weights)
            squares[position] += float(np.einsum("gno,gno->", made, made, dtype=np.float64))
            seen[position] += made.shape[1]
        for pair in pairs:
            pair.add(*pair.product.turned(values, pair.product.left, pair.product.right), feeds)
    readings: dict[int, list[Reading]] = {}
    by_weight: dict[str, Reading] = {}
    for (layer, shape, weight, readers, sums), square, count, size in zip(layers, squares, seen, sizes, strict=True):
        moments = sums.done()
        if not (moments.finite and np.isfinite(square)):
            continue  # its squares are no numbers
        mean, _ = moments.means()
        second = moments.xx / max(1, moments.count)
        covariance = second - mean[:, :, None] * mean[:, None, :]
        matrix = shape.matrix(weight)
        rms = np.sqrt(np.maximum(np.einsum("gff->gf", second), 0))
        power = max(square / max(1, count), 1e-20)
        magnitude = np.sqrt(size / max(1, samples))
        by_weight[layer.weight] = Reading(layer, np.zeros((0, 0), np.int64), matrix, mean, rms, covariance, power, magnitude)
        for owner, places in readers.items():
            readings.setdefault(owner, []).append(replace(by_weight[layer.weight], features=places))
    for pair in pairs:
        for owner, places in pair.readers.items():
            readings.setdefault(owner, []).append(_of_terms(pair, places))
    return Evidence(grouping, {g: tuple(r) for g, r in readings.items()}, samples, by_weight, progress=progress)


def _by_sample(rows: np.ndarray, owners: np.ndarray, samples: int) -> np.ndarray:
    """Σ over samples of the squared mean |x| over a sample's rows; rows (groups, n, features), owners (n,): the sample of each."""
    belongs = np.zeros((samples, len(owners)), np.float32)
    belongs[owners, np.arange(len(owners))] = 1
    belongs /= np.maximum(belongs.sum(axis=1, keepdims=True), 1)
    means: np.ndarray = np.matmul(belongs, np.abs(rows))
    return np.asarray(np.einsum("gsf,gsf->gf", means, means, dtype=np.float64))


def _of_terms(pair: Terms, places: np.ndarray) -> Reading:
    """A product as a layer that sums its terms; its power is that of the product."""
    second = pair.gram / max(1, pair.count) if pair.gram is not None else np.zeros((1, places.size, places.size))
    rms = np.sqrt(np.maximum(np.einsum("gff->gf", second), 0))
    return Reading(None, places, np.ones((len(second), 1, second.shape[1])), np.zeros_like(rms), rms, second, float(second.sum()), rms)


ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Gelu", "Elu", "Selu", "Mish", "Softplus", "Sigmoid", "Tanh")


def passed_on(model: Model, layer: Linear) -> str:
    """The value that carries a layer's output on: behind its residual Add and an activation."""
    value = layer.added[0] if layer.added else layer.output
    readers = [node for node in model.nodes if value in node.input]
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS and model.shapes.get(readers[0].output[0]) == model.shapes[value]:
        return str(readers[0].output[0])
    return value

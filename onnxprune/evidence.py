"""What the calibration samples say of each group: moments of the features through which the layers read its units.

A unit counts by what the layers that sum over it make of it, so a group's evidence is that of its readers: for each the features
(an input channel of a convolution is as many features as its kernel has places) of every unit, their moments on the original
model, and the layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from onnxprune.capture import Tap
from onnxprune.emphasis import emphasis
from onnxprune.grouping import Group, Grouping
from onnxprune.importer import Model
from onnxprune.linear import CONVOLUTIONS, Geometry, Linear, linears
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
    def moment(self) -> np.ndarray:
        """(groups, features, features): what counts once features go: the covariance where a bias takes up what they were on average,
        else the second moment.
        """
        if self.layer is None or self.layer.takes_bias:
            return self.covariance
        return np.asarray(self.covariance + self.mean[:, :, None] * self.mean[:, None, :])

    @property
    def spread(self) -> np.ndarray:
        """(groups,): the mean variance of a feature, at least what rounding makes of constants."""
        varies = np.einsum("gff->gf", self.covariance).mean(axis=1)
        return np.asarray(np.maximum(np.maximum(varies, CONSTANT * np.square(self.rms).mean(axis=1)), 1e-20))


@dataclass(frozen=True)
class Evidence:
    """readings: for each group id how layers read it; samples: how many samples were seen.

    layers: the reading of each layer that was looked at, by its weight; trial: feeds of at most so many samples, for criteria that run
    the model itself, and None where there are no samples.  part: without the samples that are held out, for what is judged by those.
    """

    grouping: Grouping
    readings: Mapping[int, tuple[Reading, ...]]
    samples: int
    layers: Mapping[str, Reading] = field(default_factory=dict)
    trial: Callable[[int], Sequence[Arrays]] | None = None
    progress: Callable[[str], None] | None = None
    part: Evidence | None = None

    @property
    def model(self) -> Model:
        return self.grouping.model

    def of(self, group: Group) -> tuple[Reading, ...]:
        return self.readings.get(group.id, ())


def features(layer: Linear, shape: Geometry, weight: np.ndarray, group: Group) -> np.ndarray | None:
    """(units, places) features of each unit in what a layer reads; None where it does not sum over the group's units."""
    axis = {"Conv": 1, "ConvTranspose": 0}.get(layer.op, weight.ndim - 1 if shape.out_first else 0)
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


@dataclass
class _Sums:
    """One layer, which groups it reads by which features, and what was seen of it."""

    layer: Linear
    shape: Geometry
    weight: np.ndarray
    readers: Mapping[int, np.ndarray]
    rows: Gathering
    goal: str
    sizes: np.ndarray
    squares: float = 0.0
    seen: int = 0

    def add(self, values: Arrays, feeds: Arrays, most: int, rng: np.random.Generator) -> None:
        """A batch: at most about so many rows of it."""
        shape, x = self.shape, values[self.layer.source]
        out = shape.out(x.shape, self.weight.shape)
        places = shape.choose(out, most, feeds, rng)
        kernel = self.weight.shape[2:] if self.layer.op in CONVOLUTIONS else ()
        found, made, owners = shape.rows(x, out, kernel, places), shape.targets(values[self.goal], places), shape.owners(out, places)
        if not (np.isfinite(np.sum(found)) and np.isfinite(np.sum(made))):
            good = np.isfinite(found).all(axis=(0, 2)) & np.isfinite(made).all(axis=(0, 2))
            found, made, owners = found[:, good], made[:, good], owners[good]
        weights = emphasis(made) if self.layer.normed else None
        self.rows.add(found, np.zeros((*found.shape[:2], 0), np.float32), weights)
        self.sizes += _by_sample(found, owners, out[0])
        made = made if weights is None else made * np.sqrt(weights)
        self.squares += float(np.einsum("gno,gno->", made, made, dtype=np.float64))
        self.seen += made.shape[1]

    def reading(self, samples: int) -> Reading | None:
        """None where its squares are no numbers."""
        moments = self.rows.done()
        if not (moments.finite and np.isfinite(self.squares)):
            return None
        mean, _ = moments.means()
        second = moments.xx / max(1, moments.count)
        covariance = second - mean[:, :, None] * mean[:, None, :]
        rms = np.sqrt(np.maximum(np.einsum("gff->gf", second), 0))
        power, magnitude = max(self.squares / max(1, self.seen), 1e-20), np.sqrt(self.sizes / max(1, samples))
        return Reading(self.layer, np.zeros((0, 0), np.int64), self.shape.matrix(self.weight), mean, rms, covariance, power, magnitude)


def gather(
    grouping: Grouping, batches: Batches, held: Batches | None = None, rows: int = 65536, progress: Callable[[str], None] | None = None
) -> Evidence:
    """Run the original over the samples, once, and sum up what the layers read; held: more of them, without which `part` is."""
    model = grouping.model
    owned = {m.tensor for g in grouping.groups for m in g.members}
    layers: list[_Sums] = []
    for layer in (*linears(model), *recurrences(model)):
        weight = model.array(layer.weight)
        shape = layer.geometry(model.main[layer.node], weight.ndim)
        if layer.weight not in owned:
            continue
        readers = {g.id: f for g in grouping.groups if g.branch is None and (f := features(layer, shape, weight, g)) is not None}
        blocks, _, wide = shape.matrix(weight).shape
        if wide <= WIDEST:
            sums = Gathering(Moments.zero(blocks, wide, 0))
            layers.append(_Sums(layer, shape, weight, readers, sums, passed_on(model, layer), np.zeros((blocks, wide))))
    pairs = gathered(grouping)
    sides = [name for pair in pairs for name in (pair.product.left, pair.product.right)]
    tap = Tap(
        spelled_out(model, (one.layer for one in layers)), [*(name for one in layers for name in (one.goal, one.layer.source)), *sides]
    )
    parts = [batches] if held is None else [batches, held]
    counts = [sum(1 for _ in some()) if layers or pairs else 0 for some in parts]
    total, samples, part = sum(counts), 0, None
    for number, feeds in enumerate(chain.from_iterable(some() for some in parts)):
        if held is not None and number == counts[0]:
            part = _rounded(_evidence(grouping, layers, pairs, samples))
        if progress:
            progress(f"reading activations, batch {number + 1} of {total}")
        values = tap.run(feeds)
        samples += max((len(v) for v in feeds.values() if np.ndim(v)), default=1)
        for position, one in enumerate(layers):
            most = max(rows, 16 * one.sizes.shape[1]) // total
            one.add(values, feeds, most, np.random.default_rng([position, number]))
        for pair in pairs:
            pair.add(*pair.product.turned(values, pair.product.left, pair.product.right), feeds)
    return replace(_evidence(grouping, layers, pairs, samples), part=part, progress=progress)


def _evidence(grouping: Grouping, layers: Iterable[_Sums], pairs: Iterable[Terms], samples: int) -> Evidence:
    """What was seen so far."""
    readings: dict[int, list[Reading]] = {}
    by_weight: dict[str, Reading] = {}
    for one in layers:
        reading = one.reading(samples)
        if reading is not None:
            by_weight[one.layer.weight] = reading
            for owner, places in one.readers.items():
                readings.setdefault(owner, []).append(replace(reading, features=places))
    for pair in pairs:
        for owner, places in pair.readers.items():
            readings.setdefault(owner, []).append(_of_terms(pair, places))
    return Evidence(grouping, {g: tuple(r) for g, r in readings.items()}, samples, by_weight)


def _rounded(evidence: Evidence) -> Evidence:
    """In half of the room."""
    by_weight = {name: replace(r, covariance=r.covariance.astype(np.float32)) for name, r in evidence.layers.items()}

    def one(reading: Reading) -> Reading:
        return reading if reading.layer is None else replace(by_weight[reading.layer.weight], features=reading.features)

    return replace(evidence, readings={g: tuple(map(one, some)) for g, some in evidence.readings.items()}, layers=by_weight)


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

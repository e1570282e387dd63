"""Inputs of the program's own making, for models without any data (SPA, arXiv 2403.18955, prunes with such)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from onnxprune.images import Frame, Preprocess, frame, scaled
from onnxprune.importer import Model
from onnxprune.inputs import Inputs
from onnxprune.shapes import seeded_feeds

COUNT, SMALL = 256, 2**14  # samples, where no number is asked for; four times as many of inputs with fewer elements
ROOM = 2**25  # numbers of samples that are kept
_PIXEL = 127.5, 58.0  # mean and standard deviation of the pixels of photographs, about


@dataclass(frozen=True)
class Noise:
    """Seeded samples, each made when it is asked for.

    Pictures (inputs of four axes with 1, 3 or 4 channels) are dead leaves (`picture`): mean 0 and variance 1 over the set, or, with a
    preprocess, pixels that it is applied to.
    Integers that index a table are its rows, evenly; everything else is as in the package's seeded feeds.
    """

    model: Model
    inputs: Inputs
    preprocess: Preprocess | None
    seed: int
    _kept: dict[int, dict[str, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """How many samples there are where no number is asked for."""
        elements = sum(math.prod(shape[1:]) for shape in self.model.input_shapes.values())
        return COUNT * (4 if elements < SMALL else 1)

    def feed(self, number: int) -> dict[str, np.ndarray]:
        """The sample of that number, one along the axis that counts samples; kept while there is room, as many passes ask for it."""
        if number not in self._kept:
            feeds = self._made(number)
            if (len(self._kept) + 1) * sum(array.size for array in feeds.values()) > ROOM:
                return feeds
            self._kept[number] = feeds
        return dict(self._kept[number])

    def _made(self, number: int) -> dict[str, np.ndarray]:
        wanted = {i.name: i for i in self.inputs.needed}
        shapes = {}
        for name, shape in self.model.input_shapes.items():
            if name in wanted:
                axis = self.inputs.axes.get(name)
                shapes[name] = tuple(1 if k == axis else size for k, size in enumerate(shape))
        feeds = seeded_feeds(self.model.proto, shapes, self.seed * 1_000_003 + number)
        feeds |= seeded_feeds(self.model.proto, {n: s for n, s in shapes.items() if n not in self.inputs.axes}, self.seed)
        rng = np.random.default_rng((self.seed, number))
        for name, entry in wanted.items():
            view, rows = frame(entry, self.preprocess), self._rows(name)
            if view is not None and (entry.real or entry.dtype == np.uint8):
                feeds[name] = self._picture(shapes[name], view, entry.real, rng).astype(entry.dtype)
            elif rows:
                feeds[name] = rng.integers(0, rows, shapes[name]).astype(entry.dtype)
        return feeds

    def _picture(self, shape: tuple[int, ...], view: Frame, real: bool, rng: np.random.Generator) -> np.ndarray:
        values = picture(shape if view.first else (shape[0], shape[3], *shape[1:3]), rng)
        values = values if view.first else np.moveaxis(values, 1, -1)
        if real and self.preprocess is None:
            return values
        pixels = np.clip(_PIXEL[0] + _PIXEL[1] * values, 0, 255)
        return scaled(pixels, view, self.preprocess) if real and self.preprocess else pixels

    def _rows(self, name: str) -> int:
        """How many rows the smallest table has that an integer input indexes directly; 0 where it indexes none."""
        found, names = [], {name}
        for node in self.model.main:
            if node.op_type in ("Cast", "Identity") and node.input[0] in names:
                names.add(node.output[0])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if node.op_type == "Gather" and node.input[1] in names and axis == 0 and node.input[0] in self.model.tensors:
                found += list(self.model.tensors[node.input[0]].dims[:1])
        return min(found, default=0)


def picture(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Dead leaves (samples, channels, height, width): flat ellipses and rectangles that hide each other, before pink noise.

    They have the edges, the flat parts and the 1/f spectrum of photographs, and train networks nearly as well as simple pictures
    (Baradad et al. 2021, arXiv:2106.05963).  Mean 0, variance about 1 over many.
    """
    flat: np.ndarray = _background((math.prod(shape[:-3]), *shape[-3:]), rng)
    high, wide = shape[-2:]
    y, x = np.mgrid[:high, :wide]
    for one in flat:
        for _ in range(rng.integers(4, 30)):
            radius = 0.06 * max(high, wide) / rng.uniform(0.1, 1)
            angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.3, 1)
            down, across = y - rng.uniform(0, high), x - rng.uniform(0, wide)
            u = (down * np.cos(angle) + across * np.sin(angle)) / radius
            v = (across * np.cos(angle) - down * np.sin(angle)) / (radius * aspect)
            inside = u**2 + v**2 < 1 if rng.random() < 0.5 else np.maximum(np.abs(u), np.abs(v)) < 1
            one[:, inside] = 0.9 * rng.standard_normal() + 0.45 * rng.standard_normal((len(one), 1))
    return np.asarray(flat.reshape(shape), np.float32)


def _background(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Pink noise, in part the same in all channels, of a contrast and an offset of its own."""
    alike = rng.uniform(0.3, 0.95)
    values = np.sqrt(alike) * _pink((shape[0], 1, *shape[2:]), rng) + np.sqrt(1 - alike) * _pink(shape, rng)
    offset = 0.6 * rng.standard_normal((shape[0], 1, 1, 1)) + 0.3 * rng.standard_normal((*shape[:2], 1, 1))
    return np.asarray(rng.uniform(0.4, 1.3, (shape[0], 1, 1, 1)) * values + offset)


def _pink(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise over the last two axes whose amplitude falls as 1/f, variance 1; white where there is one pixel."""
    white = rng.standard_normal(shape)
    down, across = np.fft.fftfreq(shape[-2]), np.fft.rfftfreq(shape[-1])
    frequency = np.hypot(down[:, None], across[None, :])
    if not frequency.any():
        return white
    weight = np.where(frequency > 0, 1 / np.maximum(frequency, 1 / max(shape[-2:])), 0.0)
    found = np.fft.irfft2(np.fft.rfft2(white) * weight, s=shape[-2:])
    full = np.fft.irfft2(weight, s=shape[-2:])  # its squares sum to the variance that white noise of variance 1 gets
    return np.asarray(found / np.sqrt((full**2).sum()))

"""Grouped, depthwise and transposed convolutions as readers of a group, and as layers that are fitted anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, numpy_helper
from outside import Weight, build

from onnxprune.evidence import gather
from onnxprune.grouping import Group, Grouping, group
from onnxprune.importer import load
from onnxprune.plans import Plan
from onnxprune.reconstruction import reconstruct
from onnxprune.rewriter import rewrite
from onnxprune.saliency import obs

Feeds = dict[str, np.ndarray]
Weights = dict[str, Weight]


def batches(shape: tuple[int, ...], many: int = 8) -> Callable[[], Iterator[Feeds]]:
    rng = np.random.default_rng(5)
    made = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(many)]
    return lambda: iter(made)


def output(model: ModelProto, feeds: Feeds) -> np.ndarray:
    return np.asarray(ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0])


def at(found: Grouping, tensor: str, axis: int, units: int) -> Group:
    return next(g for g in found.groups if g.units == units and any((m.tensor, m.axis) == (tensor, axis) for m in g.members))


def copied(model: ModelProto, names: Mapping[str, int], pairs: list[tuple[int, int]]) -> None:
    """Along an axis of each tensor, make one index the copy of another."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            array = np.moveaxis(numpy_helper.to_array(tensor).copy(), names[tensor.name], 0)
            for source, target in pairs:
                array[target] = array[source]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.moveaxis(array, 0, names[tensor.name])), tensor.name))


FIRST: Weights = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 6, 1, 1), "b2": (4,)}
READERS = {
    "grouped": ("z = Conv <group=2, pads=[1,1,1,1]> (r, wm, bm)", (6, 4, 3, 3)),
    "transposed": ("z = ConvTranspose <group=2, strides=[2,2]> (r, wm, bm)", (8, 3, 2, 2)),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_unit_that_repeats_another_in_every_convolution_group_costs_nothing(kind: str) -> None:
    """Channels 0–3 and 4–7 are the two convolution groups; unit 2 is channels 2 and 6, here copies of 0 and 4."""
    layer, shape = READERS[kind]
    text = f"h = Conv <pads=[1,1,1,1]> (x, w1, b1) r = Relu (h) {layer} y = Conv (z, w2, b2)"
    model = build("float[4,3,6,6] x", text, "float y", {**FIRST, "wm": shape, "bm": (6,)})
    copied(model, {"w1": 0, "b1": 0}, [(0, 2), (4, 6)])
    found = group(load(model))
    mine = at(found, "wm", 1 if kind == "grouped" else 0, 4)
    feeds = batches((4, 3, 6, 6))
    evidence = gather(found, feeds)
    [reading] = evidence.of(mine)
    assert reading.layer is not None
    assert reading.layer.weight == "wm"
    scores = obs(evidence, mine, np.random.default_rng(0))
    assert scores.argmin() in (0, 2)
    assert scores.min() < 0.3 * np.sort(scores)[1]
    plan = Plan(found, {mine.id: np.array([2])})
    pruned = rewrite(found, plan.remove)
    fitted, _ = reconstruct(plan, pruned, feeds)
    wanted = output(model, next(feeds()))
    assert np.abs(output(fitted, next(feeds())) - wanted).max() < 1e-3 * wanted.std()
    assert np.abs(output(pruned, next(feeds())) - wanted).max() > 0.1 * wanted.std()


def test_behind_a_depthwise_layer_the_pointwise_one_reads_and_both_are_fitted() -> None:
    text = """a = Conv <pads=[1,1,1,1]> (x, w0, b0) s = Relu (a) h = Conv (s, w1, b1) r = Relu (h)
        d = Conv <group=8, pads=[1,1,1,1]> (r, wd, bd) z = Relu (d) y = Conv (z, w2, b2)"""
    weights: Weights = {"w0": (6, 3, 3, 3), "b0": (6,), "w1": (8, 6, 1, 1), "b1": (8,), "wd": (8, 1, 3, 3), "bd": (8,)}
    model = build("float[4,3,6,6] x", text, "float y", {**weights, "w2": (4, 8, 1, 1), "b2": (4,)})
    found = group(load(model))
    feeds = batches((4, 3, 6, 6))
    wide, narrow = at(found, "wd", 0, 8), at(found, "w0", 0, 6)
    evidence = gather(found, feeds)
    [reading] = evidence.of(wide)
    assert reading.layer is not None
    assert (reading.layer.weight, reading.features.tolist()) == ("w2", [[i] for i in range(8)])
    plan = Plan(found, {wide.id: np.array([1, 5]), narrow.id: np.array([0, 3])})
    pruned = rewrite(found, plan.remove)
    fitted, refits = reconstruct(plan, pruned, feeds)
    assert len(refits) == 3
    assert all(refit.after <= refit.before for refit in refits)
    tensors = {t.name: numpy_helper.to_array(t) for t in fitted.graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    assert tensors["wd"].shape == (6, 1, 3, 3)
    assert np.abs(tensors["wd"] - before["wd"]).max() > 1e-3
    gap = [np.mean([np.mean((output(m, f) - output(model, f)) ** 2) for f in feeds()]) for m in (pruned, fitted)]
    assert gap[1] < 0.7 * gap[0]

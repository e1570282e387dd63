"""frontier: a model run further and further gives what fresh runs give, and runs each node about once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import ROOT
from onnx import ModelProto, numpy_helper
from outside import build
from test_attention_compensation import ATTEND, LAYERS, PARTED, ROWS, SEPARATE, SPREAD, made

import onnxprune
from onnxprune import curves, frontier
from onnxprune import passes as passes_of
from onnxprune.calibration import read_calibration
from onnxprune.capture import Tap, towards
from onnxprune.carriers import carrier
from onnxprune.cost import count_macs
from onnxprune.frontier import Frontier
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.running import Arrays
from onnxprune.selection import measured_losses, scored
from onnxprune.study import Study

WEIGHTED = ("Conv", "Gemm", "MatMul")


def stepped(proto: ModelProto, feeds: list[Arrays], stages: list[list[str]], changing: Callable[[int], list[str]], room: int) -> None:
    """Tap each stage's values along a frontier and by a fresh run, on every batch; then change what is said to change."""
    known, rng = Frontier(len(feeds), room), np.random.default_rng(0)
    for number, values in enumerate(stages):
        run, fresh = known.tap(proto, values, changing(number)), Tap(proto, values)
        for batch, given in enumerate(feeds):
            found, expected = run(batch, given), fresh.run(given)
            for name in values:
                rounding = 1e-4 * float(np.abs(expected[name]).max())
                np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=rounding, err_msg=f"{name} of stage {number}")
        for tensor in proto.graph.initializer:
            if tensor.name in changing(number):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(array + rng.normal(0, 0.02, array.shape).astype(array.dtype), tensor.name))


def nodes_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of nodes that each session along a frontier has."""
    counts: list[int] = []

    class Counted(Tap):
        def __init__(self, proto: ModelProto, values: Any, **known: Any) -> None:
            super().__init__(proto, values, **known)
            from onnxprune.capture import towards

            counts.append(len(towards(proto, values, **known).graph.node))

    monkeypatch.setattr(frontier, "Tap", Counted)
    return counts


@pytest.mark.parametrize("room", [0, 200_000, 2**29])
@pytest.mark.parametrize("name", ["digits-resnet", "digits-densenet", "digits-mobilenet", "digits-mlp", "digits-conv1d"])
def test_layers_that_are_changed_one_after_another(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.load(ROOT / "models" / f"{name}.onnx")
    data = {"digits-mlp": "digits-mlp", "digits-conv1d": "digits-conv1d"}.get(name, "digits-images")
    with np.load(ROOT / "models" / f"{data}.calibration.npz") as content:
        arrays = {key: content[key][:24].astype(np.float32) for key in content.files}
    inputs = [v.name for v in proto.graph.input]
    arrays = {key: arrays[key] for key in inputs}
    feeds = [{key: array[i : i + 8] for key, array in arrays.items()} for i in (0, 8, 16)]
    layers = [node for node in proto.graph.node if node.op_type in WEIGHTED]
    counts = nodes_run(monkeypatch)
    stepped(proto, feeds, [[node.input[0]] for node in layers], lambda i: [n.input[1] for n in layers[i:]], room)
    assert len(layers) > 2
    if room == 2**29:
        assert sum(counts) <= len(proto.graph.node)
    if room == 0:
        assert sum(counts) > len(proto.graph.node)


def parsed(body: str, outputs: str = "float[N,4] out", **tensors: np.ndarray) -> ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => ({outputs}) {{ {body} }}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    return proto


def batches(count: int = 3) -> list[Arrays]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(5, 4)).astype(np.float32)} for _ in range(count)]


def weight(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)


def test_a_weight_that_two_layers_share_makes_neither_of_them_settled() -> None:
    proto = parsed("a = MatMul(x, w)\n b = Relu(a)\n c = MatMul(b, v)\n d = MatMul(c, w)\n out = Add(d, b)", w=weight(0), v=weight(1))
    tied = [["v", "w"], ["w"], []]
    stepped(proto, batches(), [["b"], ["c", "b"], ["out"]], lambda i: tied[i], 2**29)


def test_what_was_run_is_run_again_when_it_has_changed_after_all() -> None:
    proto = parsed("a = MatMul(x, w)\n b = Relu(a)\n out = MatMul(b, v)", w=weight(0), v=weight(1))
    known, feeds = Frontier(1), batches(1)
    known.tap(proto, ["b"])(0, feeds[0])
    known.change(proto.graph.node[2])
    assert known.kept(0)  # that node has not run
    known.change(proto.graph.node[0])
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight(2), "w"))
    expected = Tap(proto, ["out"]).run(feeds[0])["out"]
    np.testing.assert_allclose(known.tap(proto, ["out"])(0, feeds[0])["out"], expected, rtol=1e-5)


BODY = "a = MatMul(x, w)\n b = Relu(a)\n c = MatMul(b, v)\n out = Tanh(c)"


@pytest.mark.parametrize("changed", ["w", "v", "node", "attribute"])
def test_another_model_begins_where_this_one_ended_if_it_is_the_same_up_to_there(changed: str) -> None:
    proto = parsed(BODY.replace("b = Relu(a)", "b = LeakyRelu<alpha = 0.1>(a)"), w=weight(0), v=weight(1))
    other, known, feeds = ModelProto(), Frontier(2), batches(2)
    other.CopyFrom(proto)
    known.advance(proto, ["v"], feeds)
    assert known.kept(1).keys() == {"b"}
    if changed == "node":
        other.graph.node[1].input[0] = "x"
    elif changed == "attribute":
        other.graph.node[1].attribute[0].f = 0.5
    else:
        [tensor] = [t for t in other.graph.initializer if t.name == changed]
        tensor.CopyFrom(numpy_helper.from_array(weight(2), changed))
    there = known.on(proto, other)
    assert bool(there.kept(0)) == (changed == "v")
    run = there.tap(other, ["out"])
    for number, given in enumerate(feeds):
        np.testing.assert_allclose(run(number, given)["out"], Tap(other, ["out"]).run(given)["out"], rtol=1e-5)
    assert known.kept(1).keys() == {"b"}


def test_another_function_is_another_model() -> None:
    node = onnx.helper.make_node("Scaled", ["x"], ["a"], domain="own")
    last = onnx.helper.make_node("Mul", ["a", "v"], ["out"])
    protos = []
    for factor in (2.0, 3.0):
        inner = [
            onnx.helper.make_node("Constant", [], ["k"], value_float=factor),
            onnx.helper.make_node("Mul", ["x", "k"], ["y"]),
        ]
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
        function = onnx.helper.make_function("own", "Scaled", ["x"], ["y"], inner, opsets[:1])
        inputs, outputs = ([onnx.helper.make_tensor_value_info(name, 1, ["N", 4])] for name in ("x", "out"))
        graph = onnx.helper.make_graph([node, last], "g", inputs, outputs, [numpy_helper.from_array(weight(0)[0], "v")])
        protos.append(onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8))
    known = Frontier(1)
    known.advance(protos[0], ["v"], batches(1))
    assert known.on(protos[0], protos[0]).kept(0)
    assert not known.on(*protos).kept(0)


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet", "attention"])
def test_losses_are_those_of_runs_from_the_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Counted(Tap):
        def __init__(self, proto: ModelProto, values: Any, threads: int = 0, known: Any = None) -> None:
            super().__init__(proto, values, threads, known)
            counts.append(len(known or {}))

    monkeypatch.setattr(curves, "Tap", Counted)
    monkeypatch.setattr(curves, "TRIALS", 1)
    monkeypatch.setattr(curves.os, "cpu_count", lambda: 1)
    if name.startswith("digits"):
        model = load(str(ROOT / "models" / f"{name}.onnx"))
        with np.load(ROOT / "models" / "digits-images.calibration.npz") as content:
            samples = {key: content[key][:48] for key in content.files}
    else:
        body = f"h = MatMul (a, u) r = Relu (h) x = MatMul (r, t) {LAYERS} {PARTED} {ATTEND} y = MatMul (z, wo)"
        weights = {**SPREAD, **SEPARATE, "u": (8, 12), "t": (12, 8)}
        model = load(build(ROWS.replace("x", "a"), body, "float y", weights, opset=13, seed=3))
        samples = {"a": np.random.default_rng(0).normal(size=(48, 5, 8)).astype(np.float32)}
    found = []
    for room in (0, 2**29):
        counts.clear()
        monkeypatch.setattr(Frontier.__init__, "__defaults__", (room,))
        study = Study(group(model), read_calibration(samples, model))
        chosen = {g.id for g in study.grouping.groups}
        found.append(measured_losses(study.grouping, scored(study.grouping, chosen, "energy", 0, study), study))
    assert any(counts)  # some begin further on
    for owner, losses in found[0].items():
        np.testing.assert_allclose(found[1][owner], losses, rtol=1e-3, atol=1e-7)


def spelled(proto: ModelProto, how: str) -> ModelProto:
    """The same, with a tensor that is a Constant node and fields that are written though they say nothing."""
    found = ModelProto()
    found.CopyFrom(proto)
    node = onnx.helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(0), "w"))
    node.name, node.domain, node.doc_string = ("", "ai.onnx", "") if how == "fields" else ("w", "", "as it was")
    found.graph.node.insert(0, node)
    del found.graph.initializer[0]
    return found


def test_nodes_that_are_written_otherwise_are_the_same() -> None:
    proto = parsed(BODY, w=weight(0), v=weight(1))
    one, other = spelled(proto, "fields"), spelled(proto, "names")
    known = Frontier(1)
    known.advance(one, ["v"], batches(1))
    assert known.on(one, other).kept(0).keys() == {"b"}
    value = other.graph.node[0].attribute[0].t
    value.CopyFrom(numpy_helper.from_array(weight(2), "w"))
    assert not known.on(one, other).kept(0)


def test_what_there_is_no_room_for_is_not_run_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, runs = parsed(BODY, w=weight(0), v=weight(1)), []
    real = Tap.run
    monkeypatch.setattr(Tap, "run", lambda self, feeds: runs.append(1) or real(self, feeds))  # type: ignore[func-returns-value]
    known = Frontier(5, room=10)
    known.advance(proto, ["v"], batches(5))
    assert len(runs) == 1
    assert not known.kept(0)


def test_one_of_two_outputs_is_known() -> None:
    body = "l, r = Split<axis = 1>(x)\n a = Relu(l)\n b = Exp(r)\n out = Concat<axis = 1>(a, b)"
    stepped(parsed(body), batches(), [["a"], ["b", "r"], ["out"]], lambda i: [], 2**29)


def test_the_other_output_of_what_is_known_can_be_asked_for_later() -> None:
    proto = parsed("l, r = Split<axis = 1>(x)\n a = Relu(l)\n out = Concat<axis = 1>(a, l)", "float[N,4] out, float[N,2] r")
    stepped(proto, batches(), [["l"], ["r"], ["out"]], lambda i: [], 2**29)


def test_values_that_are_no_tensors_are_made_again() -> None:
    body = """
        parts = SplitToSequence<axis = 1>(x, two)
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        l = SequenceAt(parts, zero)
        a = MatMul(l, u)
        r = SequenceAt(parts, one)
        out = Concat<axis = 1>(a, r)"""
    proto = parsed(body, two=np.array([2, 2]), u=weight(3)[:2, :2])
    stepped(proto, batches(), [["l"], ["a"], ["r"], ["out"]], lambda i: ["u"] if i == 0 else [], 2**29)


def test_bodies_read_what_is_known_outside() -> None:
    body = """
        a = MatMul(x, w)
        b = Relu(a)
        total = ReduceSum<keepdims = 0>(b)
        flag = Greater(total, limit)
        c = If(flag) <then_branch = yes () => (float[N,4] t) { t = MatMul(b, v) }, else_branch = no () => (float[N,4] e) { e = Neg(b) }>
        out = Add(c, a)"""
    for limit in (-1e9, 1e9):
        proto = parsed(body, w=weight(0), v=weight(1), limit=np.float32(limit))
        stepped(proto, batches(), [["b"], ["c"], ["out"]], lambda i: ["v"] if i == 0 else [], 2**29)


def test_a_quantized_activation_is_not_cut_between_integers_and_floats() -> None:
    body = """
        a = MatMul(x, w)
        q = QuantizeLinear(a, s, z)
        d = DequantizeLinear(q, s, z)
        b = MatMul(d, v)
        out = Add(b, d)"""
    proto = parsed(body, w=weight(0), v=weight(1), s=np.float32(0.05), z=np.uint8(128))
    stepped(proto, batches(), [["a"], ["d"], ["b"], ["out"]], lambda i: ["v"] if i == 1 else [], 2**29)


def test_too_much_to_keep_is_not_kept() -> None:
    proto = parsed("a = MatMul(x, w)\n b = Relu(a)\n out = MatMul(b, v)", w=weight(0), v=weight(1))
    known, feeds = Frontier(3, room=3 * 5 * 4 * 4 - 1), batches()
    run = known.tap(proto, ["b"])
    for number, given in enumerate(feeds):
        run(number, given)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight(2), "w"))  # shows: from the inputs on it is another model
    expected = Tap(proto, ["out"]).run(feeds[0])["out"]
    np.testing.assert_allclose(known.tap(proto, ["out"])(0, feeds[0])["out"], expected, rtol=1e-5)


def test_layers_behind_a_product_of_queries_and_keys_begin_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, many = nodes_run(monkeypatch), 60
    chain = " ".join(f"x{i + 1} = Tanh (x{i})" for i in range(many))
    body = f"x0 = Identity (a) {chain} x = Mul (x{many}, ten) {LAYERS} {PARTED} {ATTEND} y = MatMul (z, wo)"
    weights = {**SPREAD, **SEPARATE, "ten": np.array(10, np.float32)}
    model = build(ROWS.replace("x", "a"), body, "float y", weights, opset=13, seed=3)
    samples = {"a": np.random.default_rng(0).normal(size=(48, 5, 8)).astype(np.float32)}
    result = onnxprune.prune(
        model, 0.4, calibration=samples, allocation="uniform", criterion="l2", compensation="reconstruct", verify=False
    )
    assert [refit.node for refit in result.refits] == ["s", "y"]
    assert sum(counts) < 3 * many  # once for each of the two models, and what comes after


def test_what_is_made_of_the_layer_itself_does_not_hide_it_from_the_probe() -> None:
    model = load(made("separate"))
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)}
    plain = carrier(model, model.proto, "qt", feeds)
    later = Tap(model.proto, ["qm", "qr", "kt"]).run(feeds)
    known = carrier(model, model.proto, "qt", {**feeds, **later})
    assert plain is not None
    assert known is not None
    np.testing.assert_array_equal(known.columns, plain.columns)


@pytest.mark.parametrize("passes", [0, 2, 1000])
@pytest.mark.parametrize("name", ["digits-resnet", "digits-densenet", "separate", "packed-split", "tied", "beside"])
def test_layers_are_fitted_as_by_runs_from_the_inputs(name: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, or several a pass, where what a layer reads is made by another of the same pass."""
    if passes:
        monkeypatch.setattr(passes_of, "FEWEST", passes)
    monkeypatch.setattr(passes_of, "WORK", 3e13 if passes != 2 else 0)
    if name.startswith("digits"):
        model: Any = str(ROOT / "models" / f"{name}.onnx")
        with np.load(ROOT / "models" / "digits-images.calibration.npz") as content:
            samples = {key: content[key][:48] for key in content.files}
    elif name == "tied":
        body = "h = MatMul(x, u) r = Relu(h) i = MatMul(r, w) j = Relu(i) k = MatMul(j, w) l = Relu(k) m = MatMul(l, v) y = Tanh(m)"
        model = build("float[N, 6] x", body, "float[N, 6] y", {"u": (6, 16), "w": (16, 16), "v": (16, 6)})
        samples = {"x": np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)}
    elif name == "beside":  # a pass that begins before the product of queries and keys, and reads what is made of it
        body = f"{LAYERS} {PARTED} a = MatMul (x, s1) b = Relu (a) c = MatMul (b, s2) {ATTEND} "
        body += "d = MatMul (z, wo) f = Add (d, c) g = MatMul (f, w3) h = Relu (g) y = MatMul (h, w4)"
        weights = {**SPREAD, **SEPARATE, "s1": (8, 10), "s2": (10, 5), "w3": (5, 9), "w4": (9, 4)}
        model = build(ROWS, body, "float y", weights, opset=13, seed=3)
        samples = {"x": np.random.default_rng(0).normal(size=(48, 5, 8)).astype(np.float32)}
    else:
        model = made(name)
        samples = {"x": np.random.default_rng(0).normal(size=(48, 5, 8)).astype(np.float32)}
    found = []
    for room in (0, 2**29):
        monkeypatch.setattr(Frontier.__init__, "__defaults__", (room,))
        result = onnxprune.prune(model, 0.4, calibration=samples, allocation="uniform", criterion="l2", compensation="reconstruct")
        assert result.refits
        found.append({t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer})
    for tensor, array in found[0].items():
        np.testing.assert_allclose(found[1][tensor], array, rtol=0, atol=1e-4 * float(np.abs(array).max(initial=0)), err_msg=tensor)


CHAIN = "h = MatMul(x, u) r = Relu(h) i = MatMul(r, w) j = Tanh(i) k = MatMul(j, v) l = Relu(k) y = MatMul(l, t)"


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet", "chain"])
def test_layers_are_refined_as_by_runs_from_the_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer changes once more when the next one is fitted, in a chain each of them: what it makes is not to be kept till then."""
    if name == "chain":
        model: Any = build("float[N, 6] x", CHAIN, "float[N, 6] y", {"u": (6, 16), "w": (16, 16), "v": (16, 16), "t": (16, 6)})
        samples = {"x": np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)}
    else:
        model = str(ROOT / "models" / f"{name}.onnx")
        with np.load(ROOT / "models" / "digits-images.calibration.npz") as content:
            samples = {key: content[key][:64] for key in content.files}
    counts, found = nodes_run(monkeypatch), []
    for room in (0, 2**29):
        monkeypatch.setattr(Frontier.__init__, "__defaults__", (room,))
        before = sum(counts)
        result = onnxprune.prune(model, 0.4, calibration=samples, allocation="uniform", criterion="l2", compensation="refine", verify=False)
        assert sum(bool(refit.partner) for refit in result.refits) > (name == "chain")
        found.append(({t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}, sum(counts) - before))
    assert found[1][1] < found[0][1]
    for tensor, array in found[0][0].items():
        atol = 1e-3 * float(np.abs(array).max(initial=0))
        np.testing.assert_allclose(found[1][0][tensor], array, rtol=0, atol=atol, err_msg=tensor)


def test_the_work_of_passes_is_that_of_the_runs_they_take() -> None:
    """From the inputs: what each layer's part of the model takes, counted on that part; with all kept: no layer more than twice."""
    model = load(str(ROOT / "models" / "digits-resnet.onnx"))
    places = [i for i, node in enumerate(model.main) if node.op_type in WEIGHTED]
    parts = [load(towards(model.proto, [model.main[place].output[0]])) for place in places]
    counted = sum(count_macs(part) for part in parts)
    assert counted <= passes_of.work(model, places, 0) < 1.05 * counted  # shortcuts that come first and are not needed yet
    assert count_macs(model) < passes_of.work(model, places, np.inf) <= 2 * count_macs(model)
    widest = max(int(np.prod(model.shapes[node.output[0]])) for node in model.main)
    assert passes_of.work(model, places, np.inf) < passes_of.work(model, places, 4 * widest) < passes_of.work(model, places, 0)


@pytest.mark.parametrize(("room", "alone"), [(2**29, True), (0, False)])
def test_layers_have_a_pass_of_their_own_where_runs_begin_at_the_last(room: int, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = load(str(ROOT / "models" / "digits-resnet.onnx")), list[str]()
    with np.load(ROOT / "models" / "digits-images.calibration.npz") as content:
        samples = {key: content[key][:48] for key in content.files}
    per_sample = count_macs(model) / next(iter(model.input_shapes.values()))[0]
    monkeypatch.setattr(passes_of, "WORK", 5 * 48 * per_sample)
    monkeypatch.setattr(passes_of, "FEWEST", 3)
    monkeypatch.setattr(passes_of, "ROOM", room)
    onnxprune.prune(
        str(ROOT / "models" / "digits-resnet.onnx"),
        0.4,
        calibration=samples,
        compensation="reconstruct",
        progress=said.append,
        verify=False,
    )
    [many] = {int(text.split()[-1]) for text in said if text.startswith("fitting the layers that stay, pass")}
    assert (many > 12) == alone


def test_values_that_are_sequences_are_arrays_where_their_parts_are_alike() -> None:
    proto = parsed(
        "parts = SplitToSequence<axis = 1>(x, sizes)\n zero = Constant<value_int = 0>()\n out = SequenceAt(parts, zero)",
        sizes=np.array([2, 2]),
    )
    feeds = batches(1)[0]
    assert Tap(proto, ["parts"]).run(feeds)["parts"].shape == (2, 5, 2)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, 3]), "sizes"))
    assert Tap(proto, ["parts", "out"]).run(feeds).keys() == {"out"}

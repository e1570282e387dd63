"""Importer, criteria, allocation, budgets and the Python interface, on the shipped models and on small ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import EVAL, MODELS, two_layers
from onnx import ModelProto, TensorProto, helper, numpy_helper
from outside import build

import onnxprune
from onnxprune import allocations, certificate, criteria
from onnxprune.cost import count_macs
from onnxprune.grouping import group
from onnxprune.importer import load

RESNET = MODELS / "digits-resnet.onnx"


def run(model: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(o) for o in session.run(None, feeds)]


def sizes(model: ModelProto) -> dict[str, list[int]]:
    return {t.name: list(t.dims) for t in model.graph.initializer}


# --- budgets and allocation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_budgets_are_hit_within_a_point(shipped: str, of: str, ratio: float) -> None:
    result = onnxprune.prune(MODELS / f"{shipped}.onnx", ratio, of=of, verify=False)
    before, after = load(MODELS / f"{shipped}.onnx"), load(result.model)
    if of == "macs":
        counts = [count_macs(before), count_macs(after)]
        assert counts == list(result.macs)
    elif of == "params":
        counts = [sum(int(np.prod(t.dims)) for t in m.tensors.values() if t.data_type == 1) for m in (before, after)]
        assert counts == list(result.parameters)
    else:
        units = sum(g.units for g in result.plan.groups)
        counts = [units, units - sum(len(r) for r in result.plan.remove.values())]
    assert abs(1 - counts[1] / counts[0] - ratio) <= 0.01
    assert result.on_budget


def test_macs_by_hand() -> None:
    assert count_macs(load(two_layers(8, 4, 3), {"x": np.zeros((5, 4), np.float32)})) == 5 * (4 * 8 + 8 * 3)
    resnet = load(RESNET, {"input": np.zeros((1, 1, 8, 8), np.float32)})
    total = 0
    for node in resnet.nodes:
        if node.op_type in ("Conv", "Gemm"):
            weight, out = resnet.shapes[node.input[1]], resnet.shapes[node.output[0]]
            total += int(np.prod(out)) * int(np.prod(weight[1:] if node.op_type == "Conv" else weight[1:2]))
    assert count_macs(resnet) == total


def test_uniform_takes_the_same_share_and_global_the_lowest_scores() -> None:
    uniform = onnxprune.prune(RESNET, 0.5, of="channels", verify=False).plan
    shares = [len(uniform.remove[g.id]) / g.units for g in uniform.groups]
    assert max(shares) - min(shares) < 0.05
    spread = onnxprune.prune(RESNET, 0.5, of="channels", allocation="global", verify=False).plan
    kept, gone = [], []
    for g in spread.groups:
        scores = criteria.criterion.get("l2")(spread.grouping.model, g, np.random.default_rng(0))
        lost = spread.remove.get(g.id, np.zeros(0, int))
        gone += scores[lost].tolist()
        if len(lost) < 0.89 * g.units:  # not stopped by the floor
            kept += np.delete(scores, lost).tolist()
    assert np.quantile(gone, 0.98) <= np.quantile(kept, 0.05)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_floor_and_alignment(allocation: str) -> None:
    result = onnxprune.prune(RESNET, 0.6, allocation=allocation, min_keep=0.25, align=8, verify=False)
    for g in result.plan.groups:
        kept = g.units - len(result.plan.remove.get(g.id, ()))
        assert kept >= 0.25 * g.units
        assert kept % 8 == 0 or kept == g.units
    counted = onnxprune.prune(RESNET, 0.95, min_keep=12, verify=False)
    assert all(g.units - len(counted.plan.remove.get(g.id, ())) >= 12 for g in counted.plan.groups)
    assert not counted.on_budget


def test_scope_exclude_and_layer_ratios() -> None:
    whole = sizes(onnx.load(RESNET))
    scoped = sizes(onnxprune.prune(RESNET, 0.1, scope=["blocks.1.*"], exclude=["stem*"], verify=False).model)
    changed = {name for name in whole if whole[name] != scoped.get(name)}
    assert changed
    assert all(name.startswith("blocks.1.") for name in changed)
    spared = sizes(onnxprune.prune(RESNET, 0.3, exclude=["blocks.0.conv1*"], verify=False).model)
    assert spared["blocks.0.conv1.weight"][0] == whole["blocks.0.conv1.weight"][0]
    fixed = onnxprune.prune(RESNET, 0.4, layer_ratios={"blocks.0.conv1.weight": 0.5}, verify=False)
    assert sizes(fixed.model)["blocks.0.conv1.weight"][0] == whole["blocks.0.conv1.weight"][0] // 2
    assert fixed.on_budget


@pytest.mark.parametrize(
    "layer", ["{0} = MatMul({1}, {2})", "t{2} = Transpose<perm=[1,0]>({2}) {0} = MatMul({1}, t{2})", "{0} = Gemm<transB=1>({1}, {2})"]
)
def test_a_layer_ratio_is_of_what_the_layer_makes(layer: str) -> None:
    body = f"{layer.format('h', 'x', 'u')} r = Relu(h) {layer.format('i', 'r', 'v')} s = Relu(i) {layer.format('y', 's', 'w')}"
    shapes = {"u": (4, 20), "v": (20, 30), "w": (30, 2)}
    axis = 1 if layer.startswith("{0} = MatMul") else 0
    model = build("float[N, 4] x", body, "float[N, 2] y", {n: shape if axis else shape[::-1] for n, shape in shapes.items()})
    for name, wanted in (("u", (10, 30)), ("v", (20, 15)), ("w", (20, 15))):  # nothing that w makes can go, so what it reads
        left = sizes(onnxprune.prune(model, 0.4, layer_ratios={name: 0.5}).model)
        assert (left["u"][axis], left["v"][axis]) == wanted


def test_the_same_seed_gives_the_same_file_and_another_seed_another() -> None:
    first, second, other = (onnxprune.prune(RESNET, 0.4, criterion="random", seed=s, verify=False).model for s in (1, 1, 2))
    assert first.SerializeToString() == second.SerializeToString()
    assert first.SerializeToString() != other.SerializeToString()


# --- criteria -------------------------------------------------------------------------------------------------------


def units_of(model: ModelProto, name: str) -> np.ndarray:
    grouping = group(load(model))
    assert len(grouping.groups) == 1
    return criteria.criterion.get(name)(grouping.model, grouping.groups[0], np.random.default_rng(0))


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "lamp", "random", "bn-scale"])
def test_criteria_score_every_unit(name: str) -> None:
    scores = units_of(two_layers(), name)
    assert scores.shape == (8,)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("name", ["l1", "l2", "lamp"])
def test_magnitudes_count_both_sides_of_a_unit(name: str) -> None:
    model = two_layers()
    w1, w2 = (numpy_helper.to_array(model.graph.initializer[i]).copy() for i in (0, 2))
    w1[:, 3] *= 0.01
    w2[3] *= 0.01
    w1[:, 5] *= 0.01  # small on one side only
    for i, (key, array) in {0: ("w1", w1), 2: ("w2", w2)}.items():
        model.graph.initializer[i].CopyFrom(numpy_helper.from_array(array, key))
    order = np.argsort(units_of(model, name))
    assert order[0] == 3
    assert units_of(model, name)[5] > 2 * units_of(model, name)[3]


def test_l1_and_l2_by_hand() -> None:
    model = two_layers()
    w1, w2 = (numpy_helper.to_array(model.graph.initializer[i]) for i in (0, 2))
    one, two = np.abs(w1).sum(axis=0), np.abs(w2).sum(axis=1)
    expected = one / one.mean() + two / two.mean()
    np.testing.assert_allclose(units_of(model, "l1"), expected / expected.mean(), rtol=1e-5)
    one, two = np.linalg.norm(w1, axis=0), np.linalg.norm(w2, axis=1)
    expected = one / one.mean() + two / two.mean()
    np.testing.assert_allclose(units_of(model, "l2"), expected / expected.mean(), rtol=1e-5)


def test_geometric_median_goes_first_by_fpgm() -> None:
    model = two_layers()
    w1, w2 = (numpy_helper.to_array(model.graph.initializer[i]).copy() for i in (0, 2))
    w1[:, 2], w2[2] = np.median(w1, axis=1), np.median(w2, axis=0)
    for i, (key, array) in {0: ("w1", w1), 2: ("w2", w2)}.items():
        model.graph.initializer[i].CopyFrom(numpy_helper.from_array(array, key))
    assert np.argmin(units_of(model, "fpgm")) == 2


def test_bn_scale_follows_gamma() -> None:
    result = onnxprune.prune(RESNET, 0.3, criterion="bn-scale", verify=False)
    model = result.plan.grouping.model
    scales = {n.input[1] for n in model.nodes if n.op_type == "BatchNormalization"}
    checked = 0
    for g in result.plan.groups:
        gammas = [m for m in g.members if m.tensor in scales]
        if len(gammas) == 1:
            size = np.abs(model.array(gammas[0].tensor))[gammas[0].indices[:, 0]]
            gone = result.plan.remove[g.id]
            assert size[gone].max() <= np.delete(size, gone).min()
            checked += 1
    assert checked


def test_a_criterion_and_an_allocation_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (criteria.criterion, allocations.allocation):
        monkeypatch.setattr(registry, "known", dict(registry.known))

    @onnxprune.criterion("last-first")
    def last_first(model: object, group: criteria.Group, rng: np.random.Generator) -> np.ndarray:
        return -np.arange(group.units, dtype=float)

    @onnxprune.allocation("second-only")
    def second_only(scores: allocations.Scores, strength: float) -> dict[int, float]:
        return {g: strength if g == 1 else 0.0 for g in scores}

    plan = onnxprune.plan(MODELS / "digits-mlp.onnx", 0.2, criterion="last-first", allocation="second-only", verify=False)
    assert set(plan.remove) == {1}
    units = plan.groups[1].units
    assert plan.remove[1].tolist() == list(range(units - len(plan.remove[1]), units))


# --- the importer ---------------------------------------------------------------------------------------------------


def as_constants(model: ModelProto) -> ModelProto:
    """Initializers as Constant nodes."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    del model.graph.initializer[:]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    return model


def listed_as_inputs(model: ModelProto) -> ModelProto:
    """Initializers among the graph inputs, as old exporters write them."""
    model.ir_version = 3
    model.opset_import[0].version = 9
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return model


def with_a_function(model: ModelProto) -> ModelProto:
    """Add and Relu inside a local function."""
    body = [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Relu", ["s"], ["r"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "AddRelu", ["a", "b"], ["r"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    call = helper.make_node("AddRelu", ["h", "b1"], ["r"], domain="local")
    nodes = [model.graph.node[0], call, model.graph.node[3]]
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def out_of_order(model: ModelProto) -> ModelProto:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node][::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def with_clutter(model: ModelProto) -> ModelProto:
    """Nodes of one name, unused tensors, stale shapes, metadata."""
    for node in model.graph.node:
        node.name = "same"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(5, np.float32), "unused"))
    model.graph.initializer.insert(0, numpy_helper.from_array(np.zeros((9, 9), np.float32), "w1"))
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 99]))
    model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 8]))
    model.graph.doc_string = "a doc string"
    model.producer_name = "someone"
    model.metadata_props.append(onnx.StringStringEntryProto(key="classes", value="3"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("form", [as_constants, listed_as_inputs, with_a_function, with_clutter])
def test_any_form_of_a_model_prunes_to_the_same_function(form: Callable[[ModelProto], ModelProto]) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    expected = run(onnxprune.prune(two_layers(), 0.5).model, x=x)
    result = onnxprune.prune(form(two_layers()), 0.5)
    np.testing.assert_allclose(run(result.model, x=x)[0], expected[0], rtol=1e-5)
    assert {m.tensor for g in result.plan.groups for m in g.members} == {"w1", "b1", "w2"}


def test_nodes_in_any_order_are_read() -> None:
    assert [g.units for g in group(load(out_of_order(two_layers()))).groups] == [8]


def test_what_is_around_the_weights_is_kept() -> None:
    model = onnxprune.prune(with_clutter(two_layers()), 0.5).model
    assert (model.graph.doc_string, model.producer_name) == ("a doc string", "someone")
    assert model.metadata_props[0].value == "3"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17), ("com.microsoft", 1)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert "unused" not in sizes(model)
    shapes = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in model.graph.value_info}
    assert shapes == {"r": 4}  # the stale one is gone, the right one follows


def test_external_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(RESNET), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    inside, outside = onnxprune.prune(RESNET, 0.4).model, onnxprune.prune(path, 0.4).model
    assert not any(t.external_data for t in outside.graph.initializer)
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(outside, input=x)[0], run(inside, input=x)[0])


def test_the_input_is_not_changed() -> None:
    model = two_layers()
    before = model.SerializeToString()
    onnxprune.prune(model, 0.5)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_other_float_types_are_proven_as_float32_and_written_as_they_are(kind: int) -> None:
    model = two_layers(hidden=16)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    result = onnxprune.prune(model, 0.5)
    assert {t.data_type for t in result.model.graph.initializer} == {kind}
    assert sizes(result.model)["w1"] == [4, 8]
    assert result.proof is not None
    assert result.proof.proven == (0,)
    assert result.proof.masked is not None
    assert result.proof.masked < 1e-3


@pytest.mark.parametrize(
    ("inputs", "code", "words"),
    [("float[N,4] x, seq(float[N,2]) q", 4, "input 'q' is not a tensor"), ("float x", 2, "input 'x' has no shape")],
)
def test_inputs_that_cannot_be_made_up(inputs: str, code: int, words: str) -> None:
    model = two_layers()
    other = onnx.parser.parse_graph(f"g ({inputs}) => (float[N, 3] y) {{ y = Relu(x) }}")
    del model.graph.input[:]
    model.graph.input.extend(other.input)
    if code == 2:
        model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(onnxprune.OnnxPruneError, match=words) as caught:
        onnxprune.prune(model, 0.5, of="channels")
    assert caught.value.exit_code == code
    if code == 4:
        assert onnxprune.prune(model, 0.5, of="channels", verify=False).on_budget
    else:
        assert onnxprune.prune(model, 0.5, of="channels", input_shapes={"x": (2, 4)}).on_budget


TABLES = {
    "slice": "p = Slice (table, zero, n, zero)",
    "gather": "z = Squeeze (zero) e = Squeeze (n) o = Squeeze (one) r = Range (z, e, o) p = Gather <axis=0> (table, r)",
}


@pytest.mark.parametrize("how", sorted(TABLES))
def test_rows_that_other_input_sizes_read_stay(how: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[N, T, 4] x) => (float[N, T, 3] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}>
        {{ n = Shape <start=1, end=2> (x) {TABLES[how]} h = MatMul (x, w1) a = Add (h, p) r1 = Relu (a) y = MatMul (r1, w2) }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 8)), ("table", (64, 8)), ("w2", (8, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    claimed = {(m.tensor, m.axis) for g in onnxprune.groups(model, verify=False).groups for m in g.members}
    assert claimed == {("w1", 1), ("table", 1), ("w2", 0)}
    pruned = onnxprune.prune(model, 0.5).model
    assert run(pruned, x=np.zeros((3, 50, 4), np.float32))[0].shape == (3, 50, 3)


def test_a_rule_that_only_holds_at_one_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that takes the rows which a run-time bound leaves out for rows that nobody reads."""
    from onnxprune import relations

    def careless(site: relations.Site) -> None:
        rest = site.new(site.size(site.x[0][0]) - site.size(site.y[0][0]))
        site.concat(site.x[0][0], [site.y[0][0], rest])
        site.same(site.x[0][1], site.y[0][1])

    monkeypatch.setitem(relations._RULES, "Slice", careless)
    monkeypatch.setattr(certificate, "_exercised", lambda bench, grouping, *rest: (tuple(g.id for g in grouping.groups), (), ()))
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[N, T, 4] x) => (float[N, T, 3] y) <int64[1] zero = {{0}}>
        {{ n = Shape <start=1, end=2> (x) {TABLES["slice"]} h = MatMul (x, w1) a = Add (h, p) r1 = Relu (a) y = MatMul (r1, w2) }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 8)), ("table", (64, 8)), ("w2", (8, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    claimed = onnxprune.plan(model, 0.9, of="channels", min_keep=1, verify=False)
    wrong = {g.id for g in claimed.groups if any((m.tensor, m.axis) == ("table", 0) for m in g.members)}
    assert wrong
    with pytest.raises(onnxprune.OnnxPruneError, match="'table'") as caught:
        onnxprune.apply(model, claimed, verify=True)
    assert caught.value.exit_code == 4
    result = onnxprune.prune(model, 0.4, of="channels", min_keep=1)
    assert sizes(result.model)["table"] == [64, sizes(result.model)["w1"][1]]
    assert sizes(result.model)["w1"][1] < 8
    assert result.proof is not None
    assert set(result.proof.frozen) == wrong
    assert run(result.model, x=np.zeros((3, 50, 4), np.float32))[0].shape == (3, 50, 3)


# --- the proof ------------------------------------------------------------------------------------------------------


def test_a_wrong_rule_is_caught_and_its_groups_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that says that CumSum keeps its axis's units apart, which is false."""
    from onnxprune import relations

    monkeypatch.setitem(relations._RULES, "CumSum", lambda site: site.same_all(site.x[0], site.y[0]))
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 3] y)
        <int64[1] axis = {1}> { h = MatMul(x, w1) c = CumSum(h, axis) r = Relu(c) k = MatMul(r, w2) s = Relu(k) y = MatMul(s, w3) }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 8)), ("w2", (8, 6)), ("w3", (6, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    claimed = onnxprune.groups(model, verify=False)
    assert sorted(g.units for g in claimed.groups) == [6, 8]
    certified = onnxprune.groups(model)
    assert [g.units for g in certified.groups] == [6]
    assert any("permutation test fails" in reason for _, _, reason in certified.fixed)
    result = onnxprune.prune(model, 0.2, min_keep=1)
    assert sizes(result.model)["w1"] == [4, 8]
    assert sizes(result.model)["w3"][0] < 6


def test_a_rule_that_leaves_out_an_axis_of_its_result_fixes_the_whole_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that ties the batch and forgets where the channels go: they must not be taken for free on either side."""
    from onnxprune import relations

    def forgetful(site: relations.Site) -> None:
        site.same(site.x[0][0], site.y[0][0])
        site.product([site.x[0][1]], [site.x[0][1]])

    monkeypatch.setitem(relations._RULES, "CumSum", forgetful)
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 3] y)
        <int64[1] axis = {1}> { h = MatMul(x, w1) c = CumSum(h, axis) r = Relu(c) k = MatMul(r, w2) s = Relu(k) y = MatMul(s, w3) }"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("w1", (4, 8)), ("w2", (8, 6)), ("w3", (6, 3))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    claimed = onnxprune.groups(model, verify=False)
    assert {(m.tensor, m.axis) for g in claimed.groups for m in g.members} == {("w2", 1), ("w3", 0)}
    assert {(t, a) for t, a, reason in claimed.fixed if "CumSum leaves out" in reason} == {("w1", 1), ("w2", 0)}


def test_a_branch_that_does_not_reach_the_output_is_not_exercised() -> None:
    model = two_layers()
    zero = numpy_helper.from_array(np.zeros((8, 3), np.float32), "w2")
    model.graph.initializer[2].CopyFrom(zero)
    proof = onnxprune.verify(model)
    assert (proof.proven, proof.unexercised) == ((), (0,))


def test_verify_with_a_model_that_is_not_the_plans() -> None:
    model = two_layers()
    result = onnxprune.prune(model, 0.5)
    assert onnxprune.verify(model, result.model, result.plan).matches == 0
    tuned = ModelProto.FromString(result.model.SerializeToString())
    tuned.graph.initializer[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tuned.graph.initializer[0]) * 2, "w1"))
    matches = onnxprune.verify(model, tuned, result.plan).matches
    assert matches is not None
    assert matches > 0.1
    with pytest.raises(onnxprune.OnnxPruneError, match="the plan leaves"):
        onnxprune.verify(model, model, result.plan)


def test_dependency_graph_is_networkx_and_can_be_exported(tmp_path: Path) -> None:
    graph = onnxprune.dependency_graph(two_layers())
    assert isinstance(graph, nx.MultiDiGraph)
    assert graph.nodes["w1:1"]["size"] == 8
    assert graph.nodes["w2:1"].get("fixed") or graph.nodes["y:1"]["fixed"] == "graph output 'y'"
    undirected = graph.to_undirected()
    assert nx.has_path(undirected, "w1:1", "w2:0")
    assert not nx.has_path(undirected, "w1:0", "w1:1")
    nx.write_graphml(graph, tmp_path / "graph.graphml")
    assert nx.read_graphml(tmp_path / "graph.graphml").number_of_nodes() == graph.number_of_nodes()


def test_allow_io_lets_an_output_shrink() -> None:
    model = two_layers()
    with pytest.raises(onnxprune.OnnxPruneError) as caught:
        onnxprune.prune(onnx.compose.add_prefix(model, "a_"), 0.5, exclude=["*b1"])
    assert caught.value.exit_code == 3
    grouping = onnxprune.groups(model, allow_io=["y"], verify=False)
    assert ("w2", 1) in {(m.tensor, m.axis) for g in grouping.groups for m in g.members}
    with pytest.raises(onnxprune.OnnxPruneError, match="no input or output matches --allow-io 'z\\*'; it has x, y"):
        onnxprune.groups(model, allow_io=["y", "z*"], verify=False)


def test_groups_of_shipped_models_reach_every_inner_channel(shipped: str) -> None:
    grouping = onnxprune.groups(MODELS / f"{shipped}.onnx")
    reached = {(m.tensor, m.axis) for g in grouping.groups for m in g.members}
    missed = {(t, a) for t, a, _ in grouping.fixed} - reached
    reasons = {reason for t, a, reason in grouping.fixed if (t, a) in missed}
    assert reasons <= {"graph input 'input'", "graph output 'logits'", "kernel axis"}
    assert EVAL[shipped]

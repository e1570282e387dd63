"""Residual branches and attention heads as units: which are offered, that a cut is what zeros are, and what of it people see."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS, SHARED, Command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from outside import Weight, as_constants, build, distance, duplicate, feeds_of, macs, masked, run, tensors

import onnxprune
from onnxprune.errors import OnnxPruneError

RESNET = MODELS / "digits-resnet.onnx"
EXACT = 1e-6

MLP = {"w1": (6, 10), "b1": (10,), "w2": (10, 6), "b2": (6,)}
CONV = {"k1": (6, 6, 3, 3), "c1": (6,), "k2": (6, 6, 3, 3), "c2": (6,), "scale": (6,), "shift": (6,), "mean": (6,), "var": (6,)}
ROWS = "float[N,5,6] x"
IMAGE = "float[N,6,5,5] x"
HIDDEN = "h0 = MatMul(x, w1)  h1 = Add(h0, b1)  h = Relu(h1)  p0 = MatMul(h, w2)  p = Add(b2, p0)"
CONVS = "h0 = Conv<pads=[1,1,1,1]>(x, k1, c1)  h = Relu(h0)  p0 = Conv<pads=[1,1,1,1]>(h, k2, c2)"

# name: inputs, body, outputs, weights, {the Add's output: the tensors whose zeros make its branch zero}
Case = tuple[str, str, str, Mapping[str, Weight], Mapping[str, set[str]]]
CASES: dict[str, Case] = {
    "an MLP": (ROWS, f"{HIDDEN}  y = Add(x, p)", "float y", MLP, {"y": {"w2", "b2"}}),
    "a sum of two": (ROWS, f"{HIDDEN}  y = Sum(p, x)", "float y", MLP, {"y": {"w2", "b2"}}),
    "a sum of three": (ROWS, f"{HIDDEN}  y = Sum(p, x, x)", "float y", MLP, {}),
    "pre-norm": (
        ROWS,
        f"n = LayerNormalization(z, g, e)  {HIDDEN.replace('MatMul(x', 'MatMul(n')}  y = Add(z, p)".replace("n = ", "z = Relu(x)  n = "),
        "float y",
        MLP | {"g": (6,), "e": (6,)},
        {"y": {"w2", "b2"}},
    ),
    "post-norm": (
        ROWS,
        f"{HIDDEN}  s = Add(p, x)  y = LayerNormalization(s, g, e)",
        "float y",
        MLP | {"g": (6,), "e": (6,)},
        {"s": {"w2", "b2"}},
    ),
    "LayerScale": (ROWS, f"{HIDDEN}  l = Mul(gamma, p)  y = Add(x, l)", "float y", MLP | {"gamma": (6,)}, {"y": {"w2", "b2"}}),
    "a norm at the end": (
        ROWS,
        f"{HIDDEN}  l = LayerNormalization(p, g, e)  y = Add(x, l)",
        "float y",
        MLP | {"g": (6,), "e": (6,)},
        {"y": {"w2", "b2", "g", "e"}},
    ),
    "a transposed weight": (
        ROWS,
        f"t = Transpose<perm=[1,0]>(wt)  {HIDDEN.replace('MatMul(h, w2)', 'MatMul(h, t)')}  y = Add(x, p)",
        "float y",
        MLP | {"wt": (6, 10)},
        {"y": {"wt", "b2"}},
    ),
    "a normalized weight": (
        ROWS,
        f"l = ReduceL2<axes=[0]>(w2)  d = Div(w2, l)  w = Mul(d, g)  {HIDDEN.replace('MatMul(h, w2)', 'MatMul(h, w)')}  y = Add(x, p)",
        "float y",
        MLP | {"g": (6,)},
        {"y": {"g", "b2"}},
    ),
    "a weight by its gain over its norm": (
        ROWS,
        f"l = ReduceL2<axes=[0]>(w2)  d = Div(g, l)  w = Mul(w2, d)  {HIDDEN.replace('MatMul(h, w2)', 'MatMul(h, w)')}  y = Add(x, p)",
        "float y",
        MLP | {"g": (6,)},
        {"y": {"g", "b2"}},
    ),
    "rows and back": (
        ROWS,
        "r = Reshape(x, flat)  h = Gemm<transB=1>(r, w1, b1)  a = Tanh(h)  p = Gemm(a, w2, b2)  s = Reshape(p, back)  y = Add(s, x)",
        "float y",
        {"w1": (10, 6), "b1": (10,), "w2": (10, 6), "b2": (6,), "flat": [-1, 6], "back": [-1, 5, 6]},
        {"y": {"w2", "b2"}},
    ),
    "an identity shortcut": (
        IMAGE,
        f"{CONVS}  p = BatchNormalization(p0, scale, shift, mean, var)  s = Add(p, x)  y = Relu(s)",
        "float y",
        CONV,
        {"s": {"k2", "c2", "scale", "shift"}},
    ),
    "a projection shortcut": (
        IMAGE,
        f"{CONVS}  q = Conv(x, k3)  s = Add(q, p0)  y = Relu(s)",
        "float y",
        CONV | {"k3": (6, 6, 1, 1)},
        {"s": {"k2", "c2"}},
    ),
    "squeeze and excitation at the end": (
        IMAGE,
        f"{CONVS}  m = GlobalAveragePool(p0)  e0 = Conv(m, k3)  e = Sigmoid(e0)  p = Mul(e, p0)  y = Add(p, x)",
        "float y",
        CONV | {"k3": (6, 6, 1, 1)},
        {"y": {"k2", "c2"}},
    ),
    "nested": (
        IMAGE,
        """d = MaxPool<kernel_shape=[5,5]>(x)  i0 = Conv(d, k4)  i = Relu(i0)  j0 = Conv(i, k5)  j = Add(i, j0)
        u = Expand(j, full)  p = Conv(u, k3, c2)  y = Add(p, x)""",
        "float y",
        CONV | {"k3": (6, 6, 1, 1), "k4": (6, 6, 1, 1), "k5": (6, 6, 1, 1), "full": [1, 6, 5, 5]},
        {"j": {"k5"}, "y": {"k3", "c2"}},
    ),
    "branches that share a layer": (
        ROWS,
        "h = MatMul(x, w1)  p = MatMul(h, w2)  s = Add(x, p)  q = MatMul(h, w3)  y = Add(q, s)",
        "float y",
        {"w1": (6, 10), "w2": (10, 6), "w3": (10, 6)},
        {"s": {"w2"}, "y": {"w3"}},
    ),
    "parallel branches": (
        ROWS,
        f"{HIDDEN}  q = MatMul(x, w3)  s = Add(q, p)  y = Add(s, x)",
        "float y",
        MLP | {"w3": (6, 6)},
        {"s": {"w2", "b2"}, "y": {"w2", "b2", "w3"}},
    ),
    "a shared first layer": (
        ROWS,
        f"{HIDDEN}  y = Add(x, p)  v = MatMul(y, w1)",
        "float y, float v",
        MLP,
        {"y": {"w2", "b2"}},
    ),
    "a projection that others read": (ROWS, f"{HIDDEN}  y = Add(x, p)  v = MatMul(h, w2)", "float y, float v", MLP, {}),
    "a bias that others read": (ROWS, f"{HIDDEN}  y0 = Add(x, p)  y = Add(y0, b2)", "float y", MLP, {}),
    "a branch that is an output": (ROWS, f"{HIDDEN}  y = Add(x, p)", "float y, float p", MLP, {}),
    "a hidden value that is an output": (ROWS, f"{HIDDEN}  y = Add(x, p)", "float y, float h", MLP, {"y": {"w2", "b2"}}),
    "broadcasting": (ROWS, f"m = ReduceMean<axes=[1]>(x)  {HIDDEN.replace('(x', '(m')}  y = Add(x, p)", "float y", MLP, {}),
    "two towers": (f"{ROWS}, float[N,5,6] z", f"{HIDDEN.replace('(x', '(z')}  y = Add(x, p)", "float y", MLP, {}),
    "a softmax at the end": (ROWS, f"{HIDDEN}  q = Softmax(p)  y = Add(x, q)", "float y", MLP, {}),
    "no layer": (ROWS, "p = Mul(x, g)  q = Relu(p)  y = Add(x, q)", "float y", {"g": (6,)}, {}),
    "read in a body": (
        ROWS,
        f"{HIDDEN}  y = Add(x, p)  v = If (t) <then_branch = a () => (float[N,5,6] o) {{ o = Neg(p) }},"
        "else_branch = b () => (float[N,5,6] o2) { o2 = Abs(p) }>",
        "float y, float v",
        MLP | {"t": np.array(True)},
        {},
    ),
}


def blocks(model: ModelProto, **options: Any) -> list[dict[str, Any]]:
    content = json.loads(json.dumps(onnxprune.groups(model, **options).to_json()))
    return [g for g in content["groups"] if g["kind"] == "block"]


def plan_of(content: Mapping[str, Any], remove: list[int]) -> dict[str, Any]:
    return {**content, "groups": [g | {"remove": [0] if g["id"] in remove else []} for g in content["groups"]]}


@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "constants"])
@pytest.mark.parametrize("name", CASES)
def test_the_branches_of_a_graph_and_their_cuts(name: str, constants: bool) -> None:
    inputs, body, outputs, weights, expected = CASES[name]
    model = build(inputs, body, outputs, {k: w for k, w in weights.items() if re.search(rf"\b{k}\b", body)})
    model = as_constants(model) if constants else model
    found = {b["add"]: b for b in blocks(model)}
    assert {add: {m["tensor"] for m in b["members"]} for add, b in found.items()} == expected
    sizes = {name: t.dims for name, t in tensors(model).items()}
    content = onnxprune.groups(model).to_json()
    feeds = feeds_of(model, symbolic=3)
    whole = run(model, feeds)
    for block in found.values():
        assert (block["units"], block["statistics"]) == (1, False)
        assert all(m["indices"] == [list(range(sizes[m["tensor"]][m["axis"]]))] for m in block["members"])
    for cut in ([[b["id"]] for b in found.values()] + [[b["id"] for b in found.values()]]) if found else []:
        plan = plan_of(content, cut)
        pruned = onnxprune.apply(model, plan, verify=True)
        left = run(pruned.model, feeds)
        assert distance(run(masked(model, plan), feeds), left) <= EXACT
        assert distance(whole, left) > EXACT
        assert not {m["tensor"] for b in found.values() if b["id"] in cut for m in b["members"]} & set(tensors(pruned.model))
        onnx.checker.check_model(pruned.model, full_check=True)
        given = {k: v[:2] for k, v in feeds.items()}
        counted = onnxprune.apply(model, plan, feeds=given)
        assert counted.macs == (macs(model, given), macs(pruned.model, given))
        floats = [sum(int(np.prod(t.dims)) for t in tensors(m).values() if t.data_type == 1) for m in (model, pruned.model)]
        assert counted.parameters == tuple(floats)


ATTENTION = """
    n = LayerNormalization(x, g, e)
    q0 = MatMul(n, wq)  q1 = Reshape(q0, split)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(n, wk)  k1 = Reshape(k0, split)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(n, wv)  v1 = Reshape(v0, split)  v = Transpose<perm=[0,2,1,3]>(v1)
    l = MatMul(q, k)  s = Softmax(l)  c0 = MatMul(s, v)  c1 = Transpose<perm=[0,2,1,3]>(c0)
    c = Reshape(c1, merge)  o0 = MatMul(c, wo)  o = Add(o0, bo)  r = Add(x, o)
    n2 = LayerNormalization(r, g2, e2)  h0 = MatMul(n2, w1)  h = Gelu(h0)  p0 = MatMul(h, w2)  p = Add(p0, b2)  t = Add(r, p)
    y = MatMul(t, head)
"""


def transformer() -> ModelProto:
    """A pre-norm block: 4 heads of 3, an MLP of 20."""
    square = dict.fromkeys(("wq", "wk", "wv", "wo"), (12, 12))
    vectors = dict.fromkeys(("g", "e", "g2", "e2", "bo", "b2"), (12,))
    rest = {"w1": (12, 20), "w2": (20, 12), "head": (12, 5), "split": [0, 0, -1, 3], "merge": [0, 0, 12]}
    return build("float[N,7,12] x", ATTENTION, "float y", {**square, **vectors, **rest}, opset=20)


def test_heads_are_named_and_go_alone() -> None:
    model = transformer()
    content = onnxprune.groups(model).to_json()
    kinds = {g["kind"]: g for g in content["groups"]}
    assert set(kinds) == {"channel", "head", "block"}
    heads = [g for g in content["groups"] if g["kind"] == "head"]
    assert [g["units"] for g in heads] == [4]
    assert {(m["tensor"], m["axis"], len(m["indices"][0])) for m in heads[0]["members"]} >= {
        ("wq", 1, 3),
        ("wk", 1, 3),
        ("wv", 1, 3),
        ("wo", 0, 3),
    }
    result = onnxprune.prune(model, 0.5, of="channels", granularity="head")
    gone = {g.kind for g in result.plan.groups if len(result.plan.remove.get(g.id, ()))}
    assert gone == {"head"}
    assert tensors(result.model)["wo"].dims == [6, 12]
    assert tensors(result.model)["w1"].dims == [12, 20]


def test_blocks_of_a_transformer_are_attention_and_mlp() -> None:
    result = onnxprune.prune(transformer(), 0.4, granularity="block")
    assert {b["add"]: {m["tensor"] for m in b["members"]} for b in result.plan.to_json()["groups"]} == {
        "r": {"wo", "bo"},
        "t": {"w2", "b2"},
    }
    assert result.on_budget == (abs(result.reached - 0.4) <= 0.01)
    assert result.proof is not None
    assert set(result.proof.proven) == {g.id for g in result.plan.groups}
    assert result.proof.masked is not None
    assert result.proof.masked <= EXACT


def test_the_branch_that_matters_less_goes_first() -> None:
    """Two branches of one cost, one of them all but zero."""
    weights = {f"{k}{i}": (8, 8) for k in "ab" for i in (1, 2)} | {"head": (8, 3)}
    body = """h = MatMul(x, a1)  r = Relu(h)  p = MatMul(r, a2)  m = Add(x, p)
        h2 = MatMul(m, b1)  r2 = Relu(h2)  p2 = MatMul(r2, b2)  n = Add(m, p2)  y = MatMul(n, head)"""
    for small, kept in (("a2", "b2"), ("b2", "a2")):
        model = build("float[N,8] x", body, "float y", weights)
        tensor = tensors(model)[small]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1e-3, small))
        result = onnxprune.prune(model, 0.45, granularity="block")
        left = set(tensors(result.model))
        assert kept in left
        assert small not in left
        influence = result.proof.influence if result.proof else {}
        first, second = (next(g.id for g in result.plan.groups if g.members[0].tensor == name) for name in (small, kept))
        assert influence[first] < influence[second]


def test_a_branch_that_the_inputs_do_not_exercise_stays() -> None:
    inputs, body, outputs, weights, _ = CASES["an MLP"]
    dead = {**weights, "w2": np.zeros((10, 6), np.float32), "b2": np.zeros(6, np.float32)}
    with pytest.raises(OnnxPruneError, match="changes the outputs, so nothing is proven") as caught:
        onnxprune.prune(build(inputs, body, outputs, dead), 0.9, granularity="block")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("granularity", ["block", "all"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_budgets_on_a_shipped_model(granularity: str, of: str, ratio: float) -> None:
    model = onnx.load(RESNET)
    feeds = feeds_of(model)
    result = onnxprune.prune(RESNET, ratio, of=of, granularity=granularity, feeds=feeds)
    before, after = (
        (macs(m, feeds) if of == "macs" else sum(int(np.prod(t.dims)) for t in tensors(m).values() if t.data_type == 1))
        for m in (model, result.model)
    )
    assert abs(1 - after / before - result.reached) <= 1e-6
    assert result.on_budget == (abs(result.reached - ratio) <= 0.01)
    assert result.on_budget or granularity == "block"
    plan = result.plan.to_json()
    assert plan["options"]["granularity"] == granularity
    assert distance(run(masked(model, plan), feeds), run(result.model, feeds)) <= 1e-4
    again = onnxprune.apply(RESNET, json.loads(json.dumps(plan)))
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert any(g["remove"] for g in plan["groups"] if g["kind"] == "block") or granularity == "all"
    kinds = {g["kind"] for g in plan["groups"]}
    assert kinds == ({"block"} if granularity == "block" else {"block", "channel"})


def test_channels_alone_are_the_default_and_are_as_ever() -> None:
    plan = onnxprune.plan(RESNET, 0.3, verify=False)
    assert {g.kind for g in plan.groups} == {"channel"}
    assert plan.options["granularity"] == "channel"


def test_scope_exclude_and_ratios_speak_of_what_is_inside() -> None:
    def cut(**options: Any) -> set[str]:
        plan = onnxprune.plan(RESNET, 0.25, granularity="block", **options).to_json()
        return {g["add"] for g in plan["groups"] if g["remove"]}

    assert cut(scope=["*blocks.1*conv1*"]) == {"/blocks/blocks.1/Add_output_0"}
    assert not cut(exclude=["blocks.5.conv1.weight"]) & {"/blocks/blocks.5/Add_output_0"}
    assert cut(layer_ratios={"*blocks.0*": 0.9}) >= {"/blocks/blocks.0/Add_output_0"}
    assert not cut(layer_ratios={"*blocks.3*": 0.1}) & {"/blocks/blocks.3/Add_output_0"}


def test_the_command_line(command: Command, tmp_path: Path) -> None:
    for options, code, words in (
        (["--granularity", "layer"], 2, "no granularity is named 'layer'"),
        (["--granularity", "head"], 3, "no attention heads"),
    ):
        done = command("prune", RESNET, "--ratio", "0.3", *options, "-o", "no.onnx")
        assert done.returncode == code
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "no.onnx").exists()
    done = command("prune", MODELS / "digits-mlp.onnx", "--ratio", "0.3", "--granularity", "block", "-o", "no.onnx")
    assert done.returncode == 3
    assert "no residual branches" in done.stderr
    done = command(RESNET, "--ratio", "0.27", "--granularity", "block", "-o", "out.onnx", "--plan-out", "plan.json")
    assert done.returncode == 0, done.stderr
    assert "/blocks/blocks.5/Add_output_0" in done.stdout.replace("\n", "")
    done = command("apply", RESNET, "plan.json", "-o", "again.onnx", "--verify", "-q")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert command("verify", RESNET, "out.onnx", "--plan", "plan.json", "-q").returncode == 0
    done = command("groups", RESNET, "--json", "groups.json")
    assert done.returncode == 0
    assert "4 residual branches" in done.stdout
    ids = [g["id"] for g in json.loads((tmp_path / "groups.json").read_text())["groups"]]
    assert ids == list(range(len(ids)))


def test_a_plan_for_branches_fits_no_other_model() -> None:
    plan = onnxprune.plan(RESNET, 0.25, granularity="block").to_json()
    for group in plan["groups"]:
        group["members"] = group["members"][:1]
    with pytest.raises(OnnxPruneError, match="made for another model") as caught:
        onnxprune.apply(RESNET, plan)
    assert caught.value.exit_code == 2


# --- any residual network -------------------------------------------------------------------------------------------


@st.composite
def residual_nets(draw: st.DrawFn) -> ModelProto:
    """Stages of branches that hold branches, cut short, shared and read elsewhere by chance."""
    lines: list[str] = []
    weights: dict[str, Weight] = {"head": (4, 3)}
    count = iter(range(1000))

    def new(line: str) -> str:
        name = f"v{next(count)}"
        lines.append(f"{name} = {line}")
        return name

    def layer(source: str) -> str:
        if weights.keys() - {"head"} and draw(st.integers(0, 7)) == 0:
            weight = draw(st.sampled_from(sorted(w for w in weights if w.startswith("w")) or ["head4"]))
        else:
            weight = f"w{next(count)}"
        weights.setdefault(weight, (4, 4))
        out = new(f"MatMul({source}, {weight})")
        if draw(st.booleans()):
            bias = f"b{next(count)}"
            weights[bias] = (4,)
            out = new(f"Add({out}, {bias})")
        return out

    def residual(source: str, depth: int) -> str:
        value = source
        for _ in range(draw(st.integers(1, 2))):
            value = new(f"{draw(st.sampled_from(['Relu', 'Tanh', 'Sigmoid']))}({layer(value)})")
            if depth and draw(st.booleans()):
                value = residual(value, depth - 1)
        value = layer(value)
        after = draw(st.sampled_from(["", "Tanh", "Sigmoid", "Mul", "Identity", "Neg"]))
        if after == "Mul":
            weights["gamma" + value] = (4,)
            value = new(f"Mul({value}, gamma{value})")
        elif after:
            value = new(f"{after}({value})")
        shortcut = layer(source) if draw(st.integers(0, 3)) == 0 else source
        pair = [value, shortcut][:: draw(st.sampled_from([1, -1]))]
        return new(f"Add({', '.join(pair)})")

    value = "x"
    for _ in range(draw(st.integers(1, 4))):
        value = residual(value, 2)
        if draw(st.booleans()):
            value = new(f"Relu({value})")
    outputs = ["y", *draw(st.lists(st.sampled_from([line.split(" = ")[0] for line in lines]), max_size=1))]
    lines.append(f"y = MatMul({value}, head)")
    return build("float[2,5,4] x", "  ".join(lines), ", ".join(f"float {o}" for o in outputs), weights, seed=draw(st.integers(0, 9)))


@settings(max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(residual_nets(), st.integers(0, 2**16))
def test_any_cut_of_any_residual_network_is_what_zeros_are(model: ModelProto, chosen: int) -> None:
    content = onnxprune.groups(duplicate(model)).to_json()
    some = [b["id"] for i, b in enumerate(b for b in content["groups"] if b["kind"] == "block") if chosen >> i & 1]
    if not some:
        return
    plan = plan_of(content, some)
    feeds = feeds_of(model)
    result = onnxprune.apply(model, plan)
    assert distance(run(masked(model, plan), feeds), run(result.model, feeds)) <= EXACT
    assert result.macs == (macs(model, feeds), macs(result.model, feeds))
    try:
        both = onnxprune.prune(model, 0.5, granularity="all", feeds=feeds)
    except OnnxPruneError as error:
        if error.exit_code == 3:
            return
        raise
    assert both.macs[1] == macs(both.model, feeds)
    assert distance(run(masked(model, both.plan.to_json()), feeds), run(both.model, feeds)) <= 1e-3


# --- exported graphs ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "zoo").is_dir(), reason=f"{SHARED} is not there: the graphs are not part of the repository")
@pytest.mark.parametrize("name", ["hf_bert_cls", "hf_vit", "hf_gpt2__dynamic", "jax-nnx-vit-native-norm", "mobilenet_v3_small__dynamo"])
def test_exported_graphs_lose_branches(name: str) -> None:
    from test_shared import zoo

    model, feeds = zoo().load(name, 0), dict(zoo().feeds(name, 0))
    result = onnxprune.prune(model, 0.4, granularity="block", feeds=feeds)
    assert result.proof is not None
    assert not result.proof.frozen
    assert abs(result.reached - 0.4) <= 0.15  # there are so many branches that some are near
    source = result.plan.grouping.model.proto
    assert distance(run(masked(source, result.plan.to_json()), feeds), run(result.model, feeds)) <= EXACT

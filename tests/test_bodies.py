"""If, Loop and Scan: bodies are pruned with the values outside, and left alone where they cannot be understood."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto
from op_cases import CASES as OPERATORS
from op_cases import Case
from outside import covered, distance, duplicate, feeds_of, masked, permuted, run
from test_op_rules import judge, third

import onnxprune
from onnxprune.cost import count_macs
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.plans import Plan

X = "float[2,5,6] x"
FIVE = {"five": np.array(5), "go": np.array(True), "h0": (2, 8)}
CELL = {"w": (6, 8), "u": (8, 8), "b": (8,)}
STEP = "g = MatMul (xi, w) r = MatMul (s, u) p = Add (g, r) q = Add (p, b) t = Tanh (q)"
HIDDEN = "w:1=8 u:0=8 u:1=8 b:0=8 v:0=8"


@dataclass(frozen=True)
class Bodied(Case):
    """inside: "graph: tensors" of the weights that bodies hold themselves; bare: without the shapes of inner values."""

    inside: str = ""
    bare: bool = False

    def model(self) -> ModelProto:
        model = super().model()
        bodies = {g.name: g for g in graphs(model.graph)}
        for line in filter(None, self.inside.split(";")):
            name, _, held = line.partition(":")
            for tensor in [t for t in model.graph.initializer if t.name in held.split()]:
                bodies[name.strip()].initializer.append(tensor)
                model.graph.initializer.remove(tensor)
        for body in bodies.values() if self.bare else ():
            del body.value_info[:]
        for value in model.graph.output if self.runs else ():  # onnx does not infer it behind a Loop
            shape = run(model, feeds_of(model))[value.name].shape
            dims = [None if "N" in self.inputs and i == 0 else size for i, size in enumerate(shape)]
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, 1, dims))
        return model


def graphs(graph: GraphProto) -> list[GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph] + [g for one in inner for g in graphs(one)]


def loop(body: str = f"xi = Gather <axis=1> (x, i) {STEP} d = Identity (c)", after: str = "y = MatMul (last, v)") -> str:
    return f"last = Loop (five, go, h0) <body = step (int64 i, bool c, float[2,8] s) => (bool d, float[2,8] t) {{ {body} }}> {after}"


def scan(attributes: str, shape: str, batch: str = "xt") -> str:
    return (
        "xt = Transpose <perm=[1,0,2]> (x) "
        f"last, ys = Scan <num_scan_inputs=1{attributes}, body = step (float[2,8] s, float[2,6] xi) => (float[2,8] t, float[2,8] o) "
        f"{{ {STEP} o = Relu (t) }}> (h0, {batch}) z = MatMul (ys, v) e = MatMul (last, v) m = ReduceSum <keepdims=0> (e) y = Add (z, m)"
    )


V = {"v": (8, 4)}
RNN = Bodied("Loop-captures", X, loop(), {**FIVE, **CELL, **V}, HIDDEN + " h0:1=8", "w:0 v:1 h0:0", statistics=False)
SCAN = Bodied("Scan", X, scan("", ""), {"h0": (2, 8), **CELL, **V}, HIDDEN + " h0:1=8", "w:0 v:1")
COND = "k = ReduceMean <keepdims=0> (x) c = Greater (k, zero) "
MLP = "{n} () => (float[2,5,4] {n}y) {{ {n}h = MatMul (x, {n}1) {n}r = Relu ({n}h) {n}y = MatMul ({n}r, {n}2) }}"
ZERO = {"zero": np.array(0, np.float32)}

CASES = [
    RNN,
    replace(RNN, name="Loop-holds", inside="step: w u b"),
    replace(RNN, name="Loop-holds-bare", inside="step: w u b", bare=True),
    replace(
        RNN,
        name="Loop-of-a-symbolic-batch",
        inputs="float[N,5,6] x",
        weights={**{k: v for k, v in RNN.weights.items() if k != "h0"}, "eight": [8], "l0": [0], "l1": [1]},
        body="sh = Shape (x) n = Slice (sh, l0, l1) hs = Concat <axis=0> (n, eight) h0 = ConstantOfShape (hs) "
        + loop().replace("float[2,8]", "float[N,8]"),
        covers=HIDDEN,
        leaves="w:0 v:1",
    ),
    Bodied(
        "Loop-as-long-as-the-input",
        "float[2,T,6] x",
        "sh = Shape (x) five = Gather (sh, i1) " + loop(),
        {k: v for k, v in {**FIVE, **CELL, **V, "i1": np.array(1)}.items() if k != "five"},
        HIDDEN + " h0:1=8",
        "w:0 v:1",
    ),
    Bodied(
        "Loop-scan-output",
        X,
        loop(after="z = MatMul (ys, v) e = MatMul (last, v) y = Add (z, e)")
        .replace("last =", "last, ys =")
        .replace("float[2,8] t) {", "float[2,8] t, float[2,8] o) {")
        .replace("d = Identity", "o = Sigmoid (t) d = Identity"),
        {**FIVE, **CELL, **V},
        HIDDEN + " h0:1=8",
        "w:0 v:1",
    ),
    Bodied(
        "Loop-weights-as-states",
        X,
        "last, w_, u_ = Loop (five, go, h0, w, u) <body = step (int64 i, bool c, float[2,8] s, float[6,8] wi, float[8,8] ui) => "
        "(bool d, float[2,8] t, float[6,8] wo, float[8,8] uo) { xi = Gather <axis=1> (x, i) g = MatMul (xi, wi) r = MatMul (s, ui) "
        "p = Add (g, r) q = Add (p, b) t = Tanh (q) wo = Identity (wi) uo = Identity (ui) d = Identity (c) }> y = MatMul (last, v)",
        {**FIVE, **CELL, **V},
        HIDDEN + " h0:1=8",
        "w:0 v:1",
    ),
    Bodied(
        "Loop-states-change-places",
        X,
        "one, two = Loop (five, go, h0, h1) <body = step (int64 i, bool c, float[2,8] s, float[2,8] o) => "
        "(bool d, float[2,8] f, float[2,8] t) { xi = Gather <axis=1> (x, i) g = MatMul (xi, w) p = Add (g, s) t = Tanh (p) "
        "f = Sigmoid (o) d = Identity (c) }> y1 = MatMul (one, v) y2 = MatMul (two, v2) y = Add (y1, y2)",
        {**FIVE, "h1": (2, 8), "w": (6, 8), **V, "v2": (8, 4)},
        "w:1=8 h0:1=8 h1:1=8 v:0=8 v2:0=8",
        "w:0 v:1",
    ),
    Bodied(
        "Loop-reshapes-inside",
        X,
        loop(
            f"xi = Gather <axis=1> (x, i) {STEP.replace('t = Tanh (q)', 'a = Reshape (q, heads) f = Tanh (a)')} "
            "t = Reshape (f, back) d = Identity (c)"
        ),
        {**FIVE, **CELL, **V, "heads": [2, 2, 4], "back": [2, 8]},
        "w:1 u:0 u:1 b:0 v:0 h0:1",
        "w:0 v:1",
        inside="step: heads w",
    ),
    SCAN,
    replace(SCAN, name="Scan-holds", inside="step: w u b", bare=True),
    replace(SCAN, name="Scan-axes", body=scan(", scan_input_axes=[1], scan_output_axes=[1], scan_input_directions=[1]", "", "x")),
    replace(SCAN, name="Scan-last-axis", body=scan(", scan_input_axes=[-2], scan_output_axes=[-2]", "", "x")),
    Bodied(
        "Scan-along-the-last-axis",
        "float[2,6,8] x",
        "h = Conv (x, w1) last, ys = Scan <num_scan_inputs=1, scan_input_axes=[2], scan_output_axes=[-1], "
        "body = step (float[2,8] s, float[2,8] e)"
        " => (float[2,8] t, float[2,8] o) { t = Add (s, e) o = Tanh (t) }> (h0, h) a = Add (ys, h) y = Conv (a, w2)",
        {"w1": (8, 6, 1), "w2": (4, 8, 1), "h0": (2, 8)},
        "w1:0=8 w2:1=8 h0:1=8",
        "w1:1 w2:0",
    ),
    Bodied(
        "If-known-behind-a-Loop",
        X,
        loop(after="sh = Shape (last) n = Gather (sh, i1) k = Equal (n, i1) ")
        + "z = If (k) <then_branch = p () => (o) { o = Squeeze (last, l1) }, else_branch = q () => (o2) { o2 = Relu (last) }>"
        " y = MatMul (z, v)",
        {**FIVE, **CELL, **V, "i1": np.array(1), "l1": [1]},
        HIDDEN + " h0:1=8",
        "w:0 v:1",
    ),
    Bodied(
        "If-known-in-a-Loop",
        X,
        loop(
            f"xi = Gather <axis=1> (x, i) {STEP.replace('t = Tanh (q)', '')} e = Unsqueeze (q, l1) si = Shape (e) n = Gather (si, i1) "
            "k = Equal (n, i1) z = If (k) <then_branch = p () => (o) { o = Squeeze (e, l1) }, else_branch = q () => (o2) { o2 = Relu (e) }>"
            " t = Tanh (z) d = Identity (c)"
        ),
        {**FIVE, **CELL, **V, "i1": np.array(1), "l1": [1]},
        HIDDEN + " h0:1=8",
        "w:0 v:1",
    ),
    Bodied(
        "Loop-after-Loop",
        X,
        loop(after="last2 = Loop (five, go, h0) <body = next (int64 j, bool c2, float[2,8] s2) => (bool d2, float[2,8] t2) { ")
        .replace("last =", "last, ys =")
        .replace("float[2,8] t) {", "float[2,8] t, float[2,8] o) {")
        .replace("d = Identity (c)", "o = Sigmoid (t) m = ReduceMax <keepdims=0> (t) d = Less (m, big)")
        + "yj = Gather (ys, j) a2 = MatMul (yj, w2) p2 = Add (a2, s2) t2 = Tanh (p2) d2 = Identity (c2) }> y = MatMul (last2, v)",
        {**FIVE, **CELL, **V, "big": np.array(9, np.float32), "w2": (8, 8)},
        "w:1=8 u:0=8 u:1=8 b:0=8 w2:0=8 w2:1=8 v:0=8 h0:1=8",
        "w:0 v:1",
    ),
    Bodied(
        "If-inner-sizes",
        X,
        COND + f"y = If (c) <then_branch = {MLP.format(n='p')}, else_branch = {MLP.format(n='q')}>",
        {**ZERO, "p1": (6, 12), "p2": (12, 4), "q1": (6, 7), "q2": (7, 4)},
        "p1:1=12 p2:0=12 q1:1=7 q2:0=7",
        "p1:0 p2:1 q1:0 q2:1",
        inside="p: p1 p2; q: q1",
    ),
    Bodied(
        "If-shares-its-output",
        X,
        COND + "z = If (c) <then_branch = p () => (float[2,5,8] py) { py = MatMul (x, p1) },"
        " else_branch = q () => (float[2,5,8] qy) { qh = MatMul (x, q1) qy = Relu (qh) }> y = MatMul (z, v)",
        {**ZERO, "p1": (6, 8), "q1": (6, 8), **V},
        "p1:1=8 q1:1=8 v:0=8",
        "p1:0 q1:0 v:1",
        inside="p: p1; q: q1",
    ),
    Bodied(
        "If-names-used-twice",
        X,
        COND + "z = If (c) <then_branch = p () => (float[2,5,8] o) { h = MatMul (x, p1) m = Constant <value_float=2.0> () o = Mul (h, m) },"
        " else_branch = q () => (float[2,5,8] o) { h = MatMul (x, q1) m = Constant <value_float=3.0> () o = Mul (h, m) }>"
        " y = MatMul (z, v)",
        {**ZERO, "p1": (6, 8), "q1": (6, 8), **V},
        "p1:1=8 q1:1=8 v:0=8",
        "p1:0 q1:0 v:1",
        inside="p: p1",
    ),
    Bodied(
        "If-known-beforehand",
        X,
        "g = MatMul (x, w1) h = Unsqueeze (g, l1) sh = Shape (h) n = Gather (sh, i1) c = Equal (n, i1) "
        "z = If (c) <then_branch = p () => (o) { o = Squeeze (h, l1) }, else_branch = q () => (o2) { o2 = Relu (h) }> y = MatMul (z, v)",
        {"i1": np.array(1), "l1": [1], "w1": (6, 8), **V},
        "w1:1=8 v:0=8",
        "w1:0 v:1",
    ),
    Bodied(
        "Loop-in-If",
        X,
        COND + "y = If (c) <then_branch = p () => (float[2,4] py) {" + loop(after="py = MatMul (last, v)") + "},"
        " else_branch = q () => (float[2,4] qy) { qm = ReduceMean <axes=[1], keepdims=0> (x) qh = MatMul (qm, q1) qy = MatMul (qh, q2) }>",
        {**ZERO, **FIVE, **CELL, **V, "q1": (6, 3), "q2": (3, 4)},
        HIDDEN + " h0:1=8 q1:1=3 q2:0=3",
        "w:0 v:1 q1:0 q2:1",
        inside="step: u; p: w v h0; q: q1",
    ),
    Bodied(
        "Scan-in-Loop",
        X,
        "xt = Transpose <perm=[1,0,2]> (x) first = MatMul (xt, w0) "
        "out = Loop (three, go, first) <body = layer (int64 i, bool c, float[5,2,8] f) => (bool d, float[5,2,8] ys) {"
        " wi = Gather (w, i) ui = Gather (u, i) last, ys = Scan <num_scan_inputs=1, body = step (float[2,8] s, float[2,8] e) => "
        "(float[2,8] t, float[2,8] o) { g = MatMul (e, wi) r = MatMul (s, ui) p = Add (g, r) q = Add (p, b) t = Tanh (q) o = Identity (t) }"
        "> (h0, f) d = Identity (c) }> y = MatMul (out, v)",
        {"three": np.array(3), "go": np.array(True), "h0": (2, 8), "w0": (6, 8), "w": (3, 8, 8), "u": (3, 8, 8), "b": (8,), **V},
        "w0:1=8 w:1=8 w:2=8 u:1=8 u:2=8 b:0=8 v:0=8 h0:1=8",
        "w0:0 v:1 w:0 u:0",
        inside="step: b; layer: h0",
    ),
    Bodied(
        "Loop-grows",
        X,
        "hh = MatMul (x, w1) l = Loop (five, go, hh) <body = step (int64 i, bool c, float[a,e,f] s) => (bool d, float[g,j,k] t) "
        "{ t = Concat <axis=1> (s, hh) d = Identity (c) }> r = ReduceSum <keepdims=0> (l, l1) y = MatMul (r, v)",
        {"five": np.array(5), "go": np.array(True), "l1": [1], "w1": (6, 8), **V},
        "",
        "w1:0 w1:1 v:0 v:1",
    ),
    Bodied(
        "Loop-fills-a-list",
        X,
        "empty = SequenceEmpty () "
        + loop(after="r = ConcatFromSequence <axis=1, new_axis=1> (l) z = MatMul (r, v) e = MatMul (last, v2) o = Unsqueeze (e, l1) ")
        .replace("last =", "last, l =")
        .replace("(five, go, h0)", "(five, go, h0, empty)")
        .replace("float[2,8] s)", "float[2,8] s, seq(float[2,8]) p0)")
        .replace("float[2,8] t)", "float[2,8] t, seq(float[2,8]) p1)")
        .replace("d = Identity", "p1 = SequenceInsert (p0, t) d = Identity")
        + "y = Add (z, o)",
        {**FIVE, **CELL, **V, "v2": (8, 4), "l1": [1]},
        HIDDEN + " h0:1=8 v2:0=8",
        "w:0 v:1",
    ),
    Bodied(
        "Loop-reads-a-list",
        X,
        "hh = MatMul (x, w1) l = SplitToSequence <axis=1, keepdims=0> (hh) " + loop(f"xi = SequenceAt (l, i) {STEP} d = Identity (c)"),
        {**FIVE, **CELL, **V, "w1": (6, 8), "w": (8, 8)},
        HIDDEN + " h0:1=8 w:0=8 w1:1=8",
        "w1:0 v:1",
    ),
    Bodied(
        "list-of-two-sizes",
        X,
        "h1 = MatMul (x, w1) h2 = MatMul (x, w2) l = SequenceConstruct (h1, h2) y = ConcatFromSequence <axis=2> (l)",
        {"w1": (6, 8), "w2": (6, 7)},
        "",
        "w1:0 w1:1 w2:0 w2:1",
    ),
    Bodied(
        "list-from-outside",
        X,
        "h1 = MatMul (x, w1) h2 = MatMul (x, w2) l = SequenceConstruct (h1) o = Optional (l) e = OptionalGetElement (o) "
        "l2 = SequenceInsert (e, h2) a = SequenceAt (l2, n) y = MatMul (a, v)",
        {"w1": (6, 8), "w2": (6, 8), **V, "n": np.array(0)},
        "",
        "w1:0 w1:1 w2:0 w2:1 v:0 v:1",
    ),
    Bodied(
        "custom-operator-with-a-body",
        X,
        "hh = MatMul (x, w1) z = test.custom.Mystery <body = g () => (float[2,5,8] o) { o = Mul (hh, k) }> (x) y = MatMul (z, v)",
        {"w1": (6, 8), "k": (8,), **V},
        "",
        "w1:1 v:0 k:0",
        runs=False,
    ),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_bodies(case: Bodied) -> None:
    judge(case)


SAME = (
    X,
    COND + "z = If (c) <then_branch = p () => (float[2,5,8] o) { h = MatMul (x, p1) o = Mul (h, one) },"
    " else_branch = q () => (float[2,5,8] o) { h = MatMul (x, q1) o = Mul (h, two) }> y = MatMul (z, v)",
    {**ZERO, "p1": (6, 8), "q1": (6, 8), "one": (8,), "two": (8,), **V},
)


def test_tensors_of_one_name_are_left_alone() -> None:
    case = Bodied("", *SAME, "p1:1 v:0", inside="p: one; q: two")
    judge(replace(case, covers="p1:1=8 one:0=8 two:0=8 q1:1=8 v:0=8"))
    model = case.model()
    for body in graphs(model.graph)[1:]:
        body.initializer[0].name = "k"
        body.node[1].input[1] = "k"
    content = group(load(model)).to_json()
    assert not covered(content)
    assert "its name is not unique in the file" in {f["reason"] for f in content["fixed"]}


def test_a_file_keeps_its_own_names() -> None:
    model = Bodied("", *SAME, "", inside="p: one; q: two").model()
    result = onnxprune.prune(model, 0.4)
    assert result.proof is not None
    assert result.proof.proven
    assert distance(run(masked(model, result.plan.to_json()), feeds_of(model)), run(result.model, feeds_of(model))) < 1e-4
    again = onnxprune.apply(model, result.plan.to_json()).model
    assert {g.name for g in graphs(again.graph)} == {g.name for g in graphs(model.graph)}


def macs(case: Bodied) -> int:
    return count_macs(load(case.model()))


def test_macs_of_bodies() -> None:
    step, head = 2 * 8 * (6 + 8), 2 * 8 * 4
    assert macs(RNN) == macs(replace(RNN, inside="step: w u")) == 5 * step + head
    assert macs(SCAN) == 5 * step + 6 * head
    stops = loop().replace("d = Identity (c)", "n = ReduceMax <keepdims=0> (t) d = Less (n, big)")
    assert macs(replace(RNN, body=stops, weights={**RNN.weights, "big": np.array(9, np.float32)})) == step + head
    both = next(c for c in CASES if c.name == "If-inner-sizes")
    assert macs(both) == 2 * 5 * (12 + 7) * (6 + 4)
    nested = next(c for c in CASES if c.name == "Scan-in-Loop")
    assert macs(nested) == 5 * 2 * 6 * 8 + 3 * 5 * 2 * 8 * (8 + 8) + 5 * head


@pytest.mark.parametrize(
    "name",
    ["Loop-holds", "Loop-of-a-symbolic-batch", "Loop-as-long-as-the-input", "Scan-axes", "If-inner-sizes", "Scan-in-Loop", "Loop-in-If"],
)
def test_the_proof_reaches_into_bodies(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    model = case.model()
    result = onnxprune.prune(model, 0.4, of="channels")
    assert result.proof is not None
    assert not result.proof.frozen
    taken = {g.id for g in result.plan.groups}
    untaken = set(result.proof.unexercised)
    assert set(result.proof.proven) | untaken == taken
    assert result.proof.proven
    assert not untaken or COND in case.body
    before, after = np.array(result.macs)
    assert after < before == count_macs(load(model))
    assert count_macs(load(result.model)) == after
    plan = result.plan.to_json()
    feeds = feeds_of(model, seed=3)
    assert distance(run(masked(model, plan), feeds), run(result.model, feeds)) < 1e-4


def test_a_wrong_loop_is_found_out() -> None:
    """The certificate permutes what bodies hold: a group that forgets one of their weights fails it."""
    model = replace(RNN, inside="step: w u b").model()
    content = group(load(model)).to_json()
    feeds = feeds_of(model)
    for i in range(len(content["groups"][0]["members"])):
        members = [m for k, m in enumerate(content["groups"][0]["members"]) if k != i]
        wrong = content | {"groups": [content["groups"][0] | {"members": members}]}
        assert distance(run(model, feeds), run(permuted(model, wrong), feeds)) > 1e-3


def test_sizes_in_bodies_keep_their_numbers() -> None:
    step = (
        f"xi = Gather <axis=1> (x, i) {STEP} si = Shape (s) n = Gather (si, i1) f = Cast <to=1> (n) k = Mul (f, ol) "
        "e = Div (q, k) d = Identity (c)"
    ).replace("t = Tanh (q)", "")
    body = "os = Shape (h0) on = Gather (os, i1) of = Cast <to=1> (on) ol = Sqrt (of) " + loop(step.replace("e = Div", "t = Div"))
    weights = {**FIVE, **CELL, **V, "i1": np.array(1)}
    judge(Bodied("", X, body, weights, HIDDEN + " h0:1=8", inside="step: u"))
    symbolic = next(c for c in CASES if c.name == "Loop-of-a-symbolic-batch")
    start = symbolic.body[: symbolic.body.index("last =")].replace("n = ", "nb = ").replace("(n, ", "(nb, ")
    case = replace(symbolic, body=start + body.replace("float[2,8]", "float[N,8]"), weights={**symbolic.weights, "i1": np.array(1)})
    judge(case)
    model = case.model()
    result = onnxprune.prune(model, 0.4, of="channels")
    for batch in (1, 3):
        feeds = {"x": np.random.default_rng(batch).standard_normal((batch, 5, 6)).astype(np.float32)}
        assert distance(run(masked(model, result.plan.to_json()), feeds), run(result.model, feeds)) < 1e-4


def test_scan_with_a_batch_axis_is_left_alone() -> None:
    step = "step (float[8] s, float[8] e) => (float[8] t, float[8] o) { t = Add (s, e) o = Tanh (t) }"
    body = f'h = MatMul (x, w1) last, ys = Scan <num_scan_inputs=1, body = {step}> ("", h0, h) y = MatMul (ys, v)'
    judge(Bodied("", X, body, {"w1": (6, 8), "h0": (2, 8), **V}, "", "w1:0 w1:1 v:0 v:1", opset=8))


def test_a_loop_can_be_left_out_by_its_name() -> None:
    model = replace(RNN, inside="step: w u b").model()
    model.graph.node[0].name = "cell"
    with pytest.raises(onnxprune.OnnxPruneError, match="no group is left") as error:
        onnxprune.prune(model, 0.4, exclude=["cell"])
    assert error.value.exit_code == 3


@pytest.mark.parametrize("grows", ["t = Concat <axis=1> (s, hh)", "t = Compress <axis=1> (s, keep)", "n = NonZero (s) t = Cast <to=1> (n)"])
def test_a_state_that_changes_its_size_has_no_shape(grows: str) -> None:
    body = (
        "hh = MatMul (x, w1) l = Loop (five, go, hh) <body = step (int64 i, bool c, float[a,e,f] s) => (bool d, float[g,j,k] t) "
        f"{{ {grows} d = Identity (c) }}> y = ReduceSum <keepdims=0> (l)"
    )
    weights = {"five": np.array(5), "go": np.array(True), "w1": (6, 8), "keep": np.array([True, False])}
    case = Bodied("", X, body, {k: w for k, w in weights.items() if k in body}, "", "w1:0 w1:1", runs="NonZero" not in grows)
    judge(case)
    assert not {"s", "t"} & set(load(case.model()).shapes)


def test_control_flow_that_breaks_the_specification_is_left_alone() -> None:
    broken = []
    for case in (RNN, SCAN, next(c for c in CASES if c.name == "If-shares-its-output")):
        count = sum(len(n.attribute) for n in case.model().graph.node if n.op_type in ("If", "Loop", "Scan"))
        for kind in ("input", "output", "node"):
            model = case.model()
            del getattr(graphs(model.graph)[1], kind)[-1:]
            broken.append(model)
        for position in range(count):
            for change in ("gone", "number"):
                model = case.model()
                [node] = [n for n in model.graph.node if n.op_type in ("If", "Loop", "Scan")]
                attribute = node.attribute[position]
                other = [] if change == "gone" else [onnx.helper.make_attribute(attribute.name, 7)]
                node.attribute.remove(attribute)
                node.attribute.extend(other)
                broken.append(model)
    for axis in (5, -5):
        broken.append(replace(SCAN, body=scan(f", scan_input_axes=[{axis}], scan_output_axes=[{axis}]", ""), runs=False).model())
    for model in broken:
        with contextlib.suppress(onnxprune.OnnxPruneError):
            group(load(model))


def enclosed(model: ModelProto, kind: str, held: bool) -> ModelProto:
    """The same layers in the body of a Loop that runs once, or in both branches of an If; held: the weights too, in the first."""
    copy, names, bodies = duplicate(model), [v.name for v in model.graph.output], []
    for suffix in ("", "_else")[: 1 if kind == "Loop" else 2]:
        body = GraphProto(name=f"body{suffix}")
        made = {o for n in model.graph.node for o in n.output if o}
        for node in model.graph.node:
            inner = body.node.add()
            inner.CopyFrom(node)
            inner.input[:] = [x + suffix if x in made else x for x in node.input]
            inner.output[:] = [x + suffix if x else x for x in node.output]
        for value in model.graph.output:
            body.node.append(onnx.helper.make_node("Identity", [value.name + suffix], [f"{value.name}_of{suffix}"]))
            body.output.append(onnx.helper.make_tensor_value_info(f"{value.name}_of{suffix}", value.type.tensor_type.elem_type, None))
        bodies.append(body)
    graph = copy.graph
    del graph.node[:], graph.value_info[:]
    if held:
        bodies[0].initializer.extend(graph.initializer)
        del graph.initializer[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    if kind == "Loop":
        bodies[0].input.append(onnx.helper.make_tensor_value_info("turn", 7, []))
        bodies[0].input.append(onnx.helper.make_tensor_value_info("was", 9, []))
        bodies[0].output.insert(0, onnx.helper.make_tensor_value_info("goes", 9, []))
        bodies[0].node.append(onnx.helper.make_node("Identity", ["was"], ["goes"]))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "once"))
        graph.input.append(onnx.helper.make_tensor_value_info("which", 9, []))
        graph.node.append(onnx.helper.make_node("Loop", ["once", "which"], names, body=bodies[0]))
    else:
        graph.input.append(onnx.helper.make_tensor_value_info("which", 9, []))
        graph.node.append(onnx.helper.make_node("If", ["which"], names, then_branch=bodies[0], else_branch=bodies[1]))
    return copy


MODES = [("Loop", "held"), ("If", "captured"), ("Loop", "captured")]
ENCLOSED = [
    pytest.param(case, *MODES[i // 4 % 3], id=f"{case.name}-{'-'.join(MODES[i // 4 % 3])}")
    for i, case in enumerate(OPERATORS)
    if i % 4 == 0 and case.opset > 10 and "_branch" not in case.body  # whose own bodies take values from outside
]


@pytest.mark.parametrize(("case", "kind", "weights"), ENCLOSED)
def test_layers_in_a_body_are_pruned_as_outside(case: Case, kind: str, weights: str) -> None:
    model = case.model()
    kind = "Loop" if any(n.op_type == "Constant" for n in model.graph.node) else kind  # a second branch would have its own
    defaults = {v.name for v in model.graph.input} & {t.name for t in model.graph.initializer}
    other = enclosed(model, kind, weights == "held" and not defaults)
    outside, inside = group(load(model)), group(load(other))

    def places(groups: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {str(sorted((m["tensor"], m["axis"], str(m["indices"])) for m in g["members"])): g for g in groups}

    plan = third(Plan(inside, {}).to_json(), inside.to_json()["groups"])
    chosen, content = places(plan["groups"]), Plan(outside, {}).to_json()
    assert set(places(content["groups"])) == set(chosen)
    for key, one in places(content["groups"]).items():
        one["remove"] = chosen[key]["remove"]
    if not chosen or not case.runs:
        return
    feeds, pruned = feeds_of(model), onnxprune.apply(other, plan).model
    reference = run(onnxprune.apply(model, content).model, feeds)
    for which in (True, False)[: 1 if kind == "Loop" else 2]:
        outputs = run(pruned, {**feeds, "which": np.array(which)})
        assert distance(reference, {k: v[0] if kind == "Loop" else v for k, v in outputs.items()}) <= case.tolerance

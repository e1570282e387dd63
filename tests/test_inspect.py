"""`inspect`: the figures add up and agree with other commands, what is fixed is said, and drawings show what is coupled."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
import pytest
from conftest import MODELS, Command, two_layers
from test_cli import failing

import onnxprune

needs_dot = pytest.mark.skipif(
    importlib.util.find_spec("graphviz") is None or shutil.which("dot") is None,
    reason="graphviz (the extra draw) and its dot are not there",
)
RESNET = MODELS / "digits-resnet.onnx"


def test_layers_add_up_to_the_model(shipped: str) -> None:
    found = onnxprune.inspect(MODELS / f"{shipped}.onnx", verify=False)
    pruned = onnxprune.prune(MODELS / f"{shipped}.onnx", 0.3, verify=False)
    assert (found.macs, found.parameters) == (pruned.macs[0], pruned.parameters[0])
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.parameters for layer in found.layers) == found.parameters


def test_the_largest_reduction_is_what_prune_reaches() -> None:
    found = onnxprune.inspect(RESNET, min_keep=0.25)
    result = onnxprune.prune(RESNET, 0.999, min_keep=0.25)
    assert not result.on_budget
    assert found.reach["min_keep"].macs == pytest.approx(result.reached, abs=1e-9)
    assert found.reach["min_keep"].parameters == pytest.approx(1 - result.parameters[1] / result.parameters[0], abs=1e-9)
    assert found.reach["min_keep"].macs < found.reach["one_unit"].macs < found.reach["branches"].macs < 1


def test_a_group_alone_is_worth_what_prune_takes_from_it() -> None:
    found = onnxprune.inspect(MODELS / "digits-mlp.onnx", min_keep=64)
    result = onnxprune.prune(MODELS / "digits-mlp.onnx", 0.999, scope=["layers.4.weight"], exclude=["layers.0.weight"], min_keep=64)
    assert list(result.plan.remove) == [1]
    assert found.alone[1].macs == pytest.approx(result.reached, abs=1e-9)


def test_weights_belong_to_the_layer_that_they_reach() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        through (float[2, 4] x, bool[1] c) => (float[2, 3] y) {
            t = Transpose<perm = [1, 0]>(w1)
            h = MatMul(x, t)
            r = Relu(h)
            y = If(c) <
                then_branch = yes () => (float[2, 3] a) { a = MatMul(r, w2) },
                else_branch = no () => (float[2, 3] b) { b = MatMul(r, w3) }>
        }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (8, 4)), ("w2", (8, 3)), ("w3", (8, 3))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    found = onnxprune.inspect(model, verify=False)
    assert [(layer.op, layer.parameters, layer.macs) for layer in found.layers] == [("MatMul", 32, 64), ("If", 48, 96)]
    assert found.layers[0].weights == (("w1", (8, 4)),)


def test_command_says_what_is_there_and_what_is_fixed(command: Command, tmp_path: Path) -> None:
    result = command("inspect", MODELS / "digits-mlp.onnx", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    for words in ("94,282 parameters", "layers.4.weight", "the model's output 'logits'", "the most that can go"):
        assert words in result.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert [(g["id"], g["units"], g["exercised"]) for g in content["groups"]] == [(0, 256, True), (1, 192, True), (2, 128, True)]
    assert {"tensor": "layers.12.weight", "axis": 0, "reason": "graph output 'logits'"} in content["fixed"]


def test_layers_without_a_group_say_why(tmp_path: Path) -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        one (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w"))
    found = onnxprune.inspect(model)
    assert [(layer.groups, layer.fixed) for layer in found.layers] == [((), "graph input 'x'")]
    assert found.reach["one_unit"].macs == 0


# --- drawings ---------------------------------------------------------------------------------------------------------


def test_around_a_group_are_its_places(command: Command, tmp_path: Path) -> None:
    result = command("inspect", RESNET, "--around", "group:1", "--depth", "0", "-o", "group.graphml", "-q")
    assert result.returncode == 0, result.stderr
    graph = nx.read_graphml(tmp_path / "group.graphml")
    group = onnxprune.groups(RESNET).groups[1]
    tensors = {(about["value"], about["axis"]) for _, about in graph.nodes(data=True) if about["op"] == "tensor"}
    assert tensors == {(member.tensor, member.axis) for member in group.members}
    assert {about["groups"] for _, about in graph.nodes(data=True)} == {"1"}
    assert {about["size"] for _, about in graph.nodes(data=True)} == {group.units}


def test_depth_reaches_further(command: Command, tmp_path: Path) -> None:
    sizes = []
    for depth in ("0", "1", "3"):
        assert command("inspect", RESNET, "--around", "blocks.0.conv1.weight", "--depth", depth, "-o", "a.graphml", "-q").returncode == 0
        sizes.append(set(nx.read_graphml(tmp_path / "a.graphml")))
    assert sizes[0] == {f"blocks.0.conv1.weight:{axis}" for axis in range(4)}
    assert sizes[0] < sizes[1] < sizes[2]


@needs_dot
@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("dot", b"digraph")])
def test_drawings_are_what_their_ending_says(command: Command, tmp_path: Path, ending: str, start: bytes) -> None:
    model = two_layers()
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = 'h<&"\\l>'  # names that a drawing must not take for its own words
    onnx.save(model, tmp_path / "odd.onnx")
    result = command("inspect", "odd.onnx", "--around", "w1", "-o", f"out.{ending}")
    assert result.returncode == 0, result.stderr
    content = (tmp_path / f"out.{ending}").read_bytes()
    assert content.startswith(start)
    if ending == "svg":
        assert b"h&lt;&amp;&quot;\\l&gt;" in content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--around", "stem.0.weigth", "-o", "a.graphml"), ["stem.0.weigth", "stem.0.weight"]),
        (("--around", "group:99", "-o", "a.graphml"), ["group:99"]),
        (("--around", "stem.0.weight"), ["-o"]),
        (("-o", "a.jpg"), ["a.jpg", ".svg"]),
    ],
)
def test_drawings_that_cannot_be(command: Command, tmp_path: Path, options: tuple[str, ...], words: list[str]) -> None:
    failing(command("inspect", RESNET, *options), 2, *words)
    assert not list(tmp_path.iterdir())


def test_missing_graphviz_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "graphviz.py").write_text("raise ImportError")
    failing(command("inspect", RESNET, "-o", "a.svg"), 2, "a.svg", "onnxprune[draw]")


@needs_dot
def test_missing_dot_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    failing(command("inspect", RESNET, "-o", "a.svg"), 2, "a.svg", "dot", "apt install graphviz")

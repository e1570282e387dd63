"""Widths in steps: given for all, by glob, or by the target that the model is for."""

from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import pytest
from conftest import MODELS, Command
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from outside import Weight, build, feeds_of, macs, tensors

import onnxprune
from onnxprune.allocations import BINS, split
from onnxprune.errors import OnnxPruneError

RESNET = MODELS / "digits-resnet.onnx"
SHIPPED = ("digits-resnet", "digits-densenet", "digits-mobilenet", "digits-conv1d", "digits-mlp")


def widths(model: ModelProto) -> dict[str, int]:
    """How many channels each layer's weight makes."""
    weights = tensors(model)
    axis = {"Conv": 0, "Gemm": 0, "MatMul": 1}  # the shipped models' Gemm has transB
    return {n.input[1]: weights[n.input[1]].dims[axis[n.op_type]] for n in model.graph.node if n.op_type in axis and n.input[1] in weights}


def chain(*hidden: int) -> ModelProto:
    """Linear layers of these widths between 8 inputs and 8 outputs."""
    sizes = (8, *hidden, 8)
    weights: dict[str, Weight] = {f"w{i}": (a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
    last = len(weights) - 1
    lines = [f"h{i} = MatMul({f'r{i}' if i else 'x'}, w{i}) " + (f"r{i + 1} = Relu(h{i})" if i < last else "") for i in range(last + 1)]
    return build("float[N, 8] x", " ".join(lines).replace(f"h{last} ", "y "), "float[N, 8] y", weights)


def attention(heads: int, size: int) -> ModelProto:
    width = heads * size
    weights: dict[str, Weight] = dict.fromkeys(("wq", "wk", "wv"), (16, width)) | {"wo": (width, 16), "up": (16, 64), "down": (64, 16)}
    arrays = {"apart": np.array([2, 5, heads, size]), "joined": np.array([2, 5, width])}
    body = """q = MatMul(x, wq) qr = Reshape(q, apart) qt = Transpose<perm=[0,2,1,3]>(qr)
              k = MatMul(x, wk) kr = Reshape(k, apart) kt = Transpose<perm=[0,2,3,1]>(kr)
              v = MatMul(x, wv) vr = Reshape(v, apart) vt = Transpose<perm=[0,2,1,3]>(vr)
              s = MatMul(qt, kt) p = Softmax(s) a = MatMul(p, vt) at = Transpose<perm=[0,2,1,3]>(a) ar = Reshape(at, joined)
              o = MatMul(ar, wo) u = MatMul(o, up) r = Relu(u) y = MatMul(r, down)"""
    return build("float[2, 5, 16] x", body, "float[2, 5, 16] y", weights | arrays)


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
@pytest.mark.parametrize("target", ["cpu", "tensorrt", "cuda"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_target_meets_every_budget_with_widths_that_kernels_take_whole(name: str, target: str, of: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    result = onnxprune.prune(model, 0.4, of=of, target=target, verify=False)
    assert result.reached == pytest.approx(0.4, abs=0.01)
    if of == "macs":
        feeds = feeds_of(model)
        assert 1 - macs(result.model, feeds) / macs(model, feeds) == pytest.approx(0.4, abs=0.01)
    before = widths(model)
    narrower = {layer: size for layer, size in widths(result.model).items() if size != before[layer]}
    assert narrower
    assert all(size % 4 == 0 for size in narrower.values())  # one or two layers take what is left of the budget
    wide = [size for layer, size in narrower.items() if before[layer] >= 32]
    assert sum(size % 8 == 0 for size in wide) >= 0.8 * len(wide)


def test_a_wide_group_goes_in_coarser_steps_than_a_narrow_one() -> None:
    model = chain(512, 12, 512, 40, 512)
    for target, coarsest in (("cpu", 16), ("tensorrt", 32), ("cuda", 32)):
        result = onnxprune.prune(model, 0.7, target=target, verify=False)
        assert result.on_budget
        kept: dict[int, list[int]] = {g.units: [] for g in result.plan.groups}
        for g in result.plan.groups:
            kept[g.units].append(g.units - len(result.plan.remove.get(g.id, ())))
        assert all(n % coarsest == 0 for n in kept[512])
        assert kept[12] in ([4], [8])  # narrower than the step, and not left whole for that
        assert kept[40] in ([8], [16], [24])


def test_heads_are_as_wide_as_they_are_and_go_one_by_one() -> None:
    model = attention(heads=12, size=32)
    for target, align in (("tensorrt", 1), (None, 32)):
        result = onnxprune.prune(model, 0.25, of="channels", granularity="head", verify=False, target=target, align=align)
        assert [len(units) for units in result.plan.remove.values()] == [3]
        assert tensors(result.model)["wq"].dims[1] == 9 * 32
    odd = onnxprune.prune(attention(heads=12, size=20), 0.25, of="channels", granularity="head", align=8, verify=False)
    assert tensors(odd.model)["wq"].dims[1] % 8 == 0  # 20 wide each: an even number of them
    dims = onnxprune.prune(model, 0.4, target="tensorrt", verify=False)
    assert {tensors(dims.model)[w].dims[1] // 12 % 8 for w in ("wq", "wk", "wv")} == {0}


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9])
def test_nothing_is_kept_that_a_step_does_not_need(ratio: float) -> None:
    result = onnxprune.prune(chain(100, 64), ratio, align=16, min_keep=10, verify=False)
    for g in result.plan.groups:
        kept = g.units - len(result.plan.remove.get(g.id, ()))
        assert kept == g.units or (kept % 16 == 0 and kept >= 10)


def test_layers_can_be_given_steps_by_name(command: Command) -> None:
    model = chain(96, 96, 96)
    result = onnxprune.prune(model, 0.4, align={"w0": 32, "*": 8}, verify=False)
    named = {m.tensor for g in result.plan.groups for m in g.members if (g.units - len(result.plan.remove.get(g.id, ()))) % 32 == 0}
    assert "w0" in named
    assert all(size % 8 == 0 for size in widths(result.model).values())
    done = command(RESNET, "-r", "0.3", "--align", "8", "--align", "blocks.5.conv1*=32", "-q", "--no-verify", "-o", "o.onnx", "--json", "-")
    content = json.loads(done.stdout)
    assert content["options"]["align"] == {"*": 8, "blocks.5.conv1*": 32}
    only = command(RESNET, "-r", "0.3", "--target", "cpu", "-q", "--no-verify", "-o", "o.onnx", "--json", "-")
    assert json.loads(only.stdout)["options"]["target"] == "cpu"


def test_what_is_given_by_name_comes_before_the_target() -> None:
    model = chain(128, 128)
    result = onnxprune.prune(model, 0.45, target="cuda", align={"w0": 1}, verify=False)
    kept = {g.members[0].tensor: g.units - len(result.plan.remove.get(g.id, ())) for g in result.plan.groups}
    assert kept["w1"] % 32 == 0
    assert kept["w0"] % 4 != 0 or result.reached == pytest.approx(0.45, abs=0.005)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align": 0}, "align is 0"),
        ({"align": {"w0": -3}}, "for 'w0'"),
        ({"align": {"nowhere*": 8}}, "no node or tensor"),
        ({"target": "tpu"}, "cpu, tensorrt, cuda"),
    ],
)
def test_steps_and_targets_that_are_none(options: dict[str, object], words: str) -> None:
    with pytest.raises(OnnxPruneError, match=words.replace("*", ".")) as caught:
        onnxprune.prune(chain(16), 0.5, verify=False, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_a_step_that_is_no_number_is_said_in_one_line(command: Command) -> None:
    result = command(RESNET, "-r", "0.3", "--align", "conv*=eight")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --align 'conv*=eight': write it as")
    assert len(result.stderr.splitlines()) == 1


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 1))
def test_losses_are_compared_at_the_widths_that_may_be(seed: int, groups: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    losses = {g: np.cumsum(np.concatenate([[0.0], rng.exponential(1.0, 20)])) for g in range(groups)}
    saved = {g: np.arange(21) / 20 / groups for g in losses}
    levels = {g: np.array([0, 4, 12, 20]) for g in losses}
    found = split(losses, saved, strength, levels)
    options = [o for o in itertools.product(*levels.values()) if sum(o) / 20 / groups >= round(strength * BINS) / BINS - 1e-3]
    least = min(sum(float(losses[g][n]) for g, n in enumerate(o)) for o in options)
    assert all(n in levels[g] for g, n in found.items())
    assert sum(float(losses[g][n]) for g, n in found.items()) == pytest.approx(least)

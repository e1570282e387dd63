"""Latency as a budget, on devices that are made up (so that nothing depends on how busy this one is), and once on this one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS, Command, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

import onnxprune
from onnxprune import caching
from onnxprune.allocations import choose
from onnxprune.cost import Counter, mac_terms
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import group
from onnxprune.importer import load
from onnxprune.probing import nonnegative
from onnxprune.shapes import seeded_feeds
from onnxprune.stopwatch import Stopwatch

quick = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnxprune"


class Device:
    """Where a MatMul costs its sizes rounded up to multiples of `step`; `hidden` is a share of the whole that no kernel shows.

    free: outputs of MatMuls that cost nothing.
    """

    def __init__(self, step: int, hidden: float = 0.0, threads: int = 1, free: Sequence[str] = ()) -> None:
        self.step, self.hidden, self.free = step, hidden, free
        self.device: Mapping[str, str | int] = {"device": f"stairs of {step}", "threads": threads}
        self.profiled = 0

    def layers(self, model: ModelProto) -> dict[str, float]:
        dims = {t.name: t.dims for t in model.graph.initializer}
        layers = [(n.output[0], dims[n.input[1]]) for n in model.graph.node if n.op_type == "MatMul"]
        return {out: 0.0 if out in self.free else float(np.prod([-(-d // self.step) * self.step for d in size])) for out, size in layers}

    def kernels(self, reference: ModelProto, models: Iterable[ModelProto]) -> list[dict[str, float]]:
        whole = self.latencies([reference])[0]
        found = [{out: took / whole for out, took in self.layers(model).items()} for model in models]
        self.profiled += len(found)
        return found

    def latencies(self, models: Sequence[ModelProto]) -> list[float]:
        times = [sum(self.layers(model).values()) for model in models]
        constant = self.hidden / (1 - self.hidden) * sum(self.layers(chain()).values())
        return [constant + took for took in times]


WIDTHS = (32, 144, 96, 272, 128, 16)


def chain(widths: Sequence[int] = WIDTHS) -> ModelProto:
    """x -> MatMul -> Relu -> MatMul -> … -> y."""
    rng = np.random.default_rng(0)
    lines, last = [], "x"
    for i in range(1, len(widths)):
        relu = i < len(widths) - 1
        lines.append(f"h{i} = MatMul({last}, w{i})")
        lines += [f"r{i} = Relu(h{i})"] if relu else []
        last = f"r{i}" if relu else f"h{i}"
    body = "\n".join(lines)
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        chain (float[4, {widths[0]}] x) => (float[4, {widths[-1]}] {last}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for i, shape in enumerate(itertools.pairwise(widths), 1):
        weights = rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[0])
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights.astype(np.float32), f"w{i}"))
    return model


def hidden_widths(model: ModelProto) -> list[int]:
    sizes = {t.name: list(t.dims) for t in model.graph.initializer}
    return [sizes[f"w{i}"][1] for i in range(1, len(WIDTHS) - 1)]


@pytest.mark.parametrize("step", [4, 8, 16, 32])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_widths_end_where_a_step_does_and_the_budget_is_met(step: int, allocation: str) -> None:
    device = Device(step)
    result = onnxprune.prune(chain(), 0.4, of="latency", allocation=allocation, timer=device)
    assert result.on_budget
    before, after = device.latencies([chain(), result.model])
    assert 0.6 * 0.95 <= after / before <= 0.6 * 1.05
    assert result.reached == pytest.approx(1 - after / before)
    kept = hidden_widths(result.model)
    assert kept != list(WIDTHS[1:-1])
    for whole, width in zip(WIDTHS[1:-1], kept, strict=True):
        assert width == whole or width % step == 0  # a unit more would cost a step


class Integers(Device):
    """Where kernels of stored integers have steps, and those of floats none."""

    def layers(self, model: ModelProto) -> dict[str, float]:
        dims = {t.name: list(t.dims) for t in model.graph.initializer}
        stored = {n.output[0]: dims[n.input[0]] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        steps = {n.output[0]: self.step if n.input[1] in stored else 1 for n in model.graph.node if n.op_type == "MatMul"}
        sizes = {n.output[0]: stored.get(n.input[1]) or dims[n.input[1]] for n in model.graph.node if n.op_type == "MatMul"}
        return {out: float(np.prod([-(-d // steps[out]) * steps[out] for d in size])) for out, size in sizes.items()}


def in_integers(model: ModelProto) -> ModelProto:
    """Every weight in 8 bits with one scale."""
    found = []
    for i, tensor in enumerate(list(model.graph.initializer)):
        array = onnx.numpy_helper.to_array(tensor)
        scale = np.float32(np.abs(array).max() / 127)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.round(array / scale).astype(np.int8), f"w{i + 1}_q"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"w{i + 1}_s"))
        found.append(onnx.helper.make_node("DequantizeLinear", [f"w{i + 1}_q", f"w{i + 1}_s"], [tensor.name]))
    nodes = [*found, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_the_kernels_of_a_quantized_file_are_those_of_its_integers() -> None:
    result = onnxprune.prune(in_integers(chain()), 0.4, of="latency", timer=Integers(16))
    assert result.on_budget
    sizes = {t.name: list(t.dims) for t in result.model.graph.initializer}
    kept = [sizes[f"w{i}_q"][1] for i in range(1, len(WIDTHS) - 1)]
    assert kept != list(WIDTHS[1:-1])
    assert all(width == whole or width % 16 == 0 for whole, width in zip(WIDTHS[1:-1], kept, strict=True))


def test_steps_are_measured_not_assumed() -> None:
    result = onnxprune.prune(chain(), 0.4, of="latency", timer=Device(1))
    assert result.on_budget
    assert any(width % 4 for width in hidden_widths(result.model))


def test_a_whole_that_is_more_than_its_kernels_is_met_all_the_same() -> None:
    device = Device(8, hidden=0.3)
    result = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    before, after = device.latencies([chain(), result.model])
    assert result.on_budget
    assert abs(after / before / 0.6 - 1) <= 0.05


@pytest.mark.parametrize("step", [1, 16])
def test_a_device_that_shows_no_kernels_is_met_all_the_same(step: int) -> None:
    class Closed(Device):
        def kernels(self, reference: ModelProto, models: Iterable[ModelProto]) -> list[dict[str, float]]:
            return [{"": sum(times.values())} for times in super().kernels(reference, models)]

    device = Closed(step)
    result = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    before, after = device.latencies([chain(), result.model])
    assert result.on_budget
    assert abs(after / before / 0.6 - 1) <= 0.05
    assert all(whole == n or n % step == 0 for whole, n in zip(WIDTHS[1:-1], hidden_widths(result.model), strict=True))


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_a_cost_model_that_is_far_off_is_corrected(share: float) -> None:
    class Wrong(Device):
        """Shows kernels as a small share of the whole, and makes up the rest."""

        def kernels(self, reference: ModelProto, models: Iterable[ModelProto]) -> list[dict[str, float]]:
            return [{out: share * took for out, took in times.items()} | {"": 1 - share} for times in super().kernels(reference, models)]

    for ratio in (0.2, 0.5, 0.8):
        device = Wrong(4)
        result = onnxprune.prune(chain(), ratio, of="latency", timer=device, verify=False)
        before, after = device.latencies([chain(), result.model])
        assert abs(after / before / (1 - ratio) - 1) <= 0.05
        assert result.on_budget


def test_the_closest_is_said_where_the_latency_is_out_of_reach() -> None:
    device = Device(8, hidden=0.9)
    result = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    assert not result.on_budget
    assert 0.05 < result.reached < 0.1  # most of the tenth that kernels take
    assert result.latency == tuple(device.latencies([chain(), result.model]))


def test_what_costs_no_time_stays_whole() -> None:
    rng = np.random.default_rng(1)
    samples = {"x": rng.standard_normal((64, WIDTHS[0])).astype(np.float32)}
    device = Device(8, free=("h3", "h4"))  # so to narrow the 272 between them saves nothing
    for allocation in ("global", "distortion"):
        result = onnxprune.prune(chain(), 0.3, of="latency", allocation=allocation, calibration=samples, timer=device)
        assert result.on_budget, allocation
        assert hidden_widths(result.model)[2] == 272, allocation


def test_a_layer_ratio_holds_within_a_step_too() -> None:
    result = onnxprune.prune(chain(), 0.3, of="latency", layer_ratios={"w3": 0.25}, scope=["w1", "w2", "w3"], timer=Device(32))
    assert hidden_widths(result.model)[2] == 204  # three quarters of 272, as asked for


def test_alignment_holds_beside_steps() -> None:
    result = onnxprune.prune(chain(), 0.4, of="latency", align=12, timer=Device(8))
    for whole, width in zip(WIDTHS[1:-1], hidden_widths(result.model), strict=True):
        assert width == whole or width % 12 == 0


def test_any_measure_with_steps_is_a_budget() -> None:
    grouping = group(load(chain()))
    plain = Counter(grouping, mac_terms(grouping.model))
    units = {g.id: g.units for g in grouping.groups}

    class Stairs:
        steps = dict.fromkeys(units, 24)

        def __call__(self, kept: Mapping[int, int]) -> float:
            return plain({g: min(units[g], -(-n // 24) * 24) for g, n in kept.items()})

    scores = {g.id: np.random.default_rng(g.id).random(g.units) for g in grouping.groups}
    for rule in ("uniform", "global"):
        choice = choose(grouping, scores, 0.5, Stairs(), rule)
        kept = {g: units[g] - len(gone) for g, gone in choice.remove.items()}
        assert abs(choice.reached - 0.5) < 0.05
        assert choice.reached == pytest.approx(1 - Stairs()(kept) / Stairs()({}))
        assert all(n % 24 == 0 for n in kept.values())


def test_branches_go_for_latency_too() -> None:
    class Counting(Device):
        def layers(self, model: ModelProto) -> dict[str, float]:
            sizes = {t.name: t.dims for t in model.graph.initializer}
            return {n.output[0]: float(np.prod(sizes[n.input[1]])) for n in model.graph.node if n.op_type in ("Conv", "Gemm")}

    device = Counting(1)
    model = onnx.load(MODELS / "digits-resnet.onnx")
    result = onnxprune.prune(model, 0.3, of="latency", granularity="all", timer=device)
    before, after = device.latencies([model, result.model])
    assert result.on_budget
    assert abs(after / before / 0.7 - 1) <= 0.05


def test_what_was_measured_is_kept_and_used_again(cache: Path) -> None:
    device = Device(16)
    first = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    measured = device.profiled
    assert measured > 0
    again = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    assert device.profiled == measured
    assert hidden_widths(again.model) == hidden_widths(first.model)
    sister = chain()
    sister.graph.initializer[0].raw_data = (onnx.numpy_helper.to_array(sister.graph.initializer[0]) * 2).tobytes()
    onnxprune.prune(sister, 0.4, of="latency", timer=device)  # other weights take no other time
    assert device.profiled == measured
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("spoilt", ["", "{", "[]", '{"key": 1}', "rates", "steps", "numbers", "bytes"])
def test_a_spoilt_cache_is_measured_again(cache: Path, spoilt: str) -> None:
    device = Device(16)
    first = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    measured = device.profiled
    [file] = cache.iterdir()
    content = json.loads(file.read_text())
    match spoilt:
        case "rates":
            content["content"]["rates"] = {"h1": [1, 2]}
        case "steps":
            content["content"]["steps"] = dict.fromkeys(content["content"]["steps"], 0)
        case "numbers":
            content["content"]["rest"] = float("nan")
    file.write_bytes(b"\xff\xfe\x00" if spoilt == "bytes" else json.dumps(content).encode() if spoilt.isalpha() else spoilt.encode())
    again = onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    assert device.profiled == 2 * measured
    assert hidden_widths(again.model) == hidden_widths(first.model)
    onnxprune.prune(chain(), 0.4, of="latency", timer=device)
    assert device.profiled == 2 * measured  # it is whole again


def test_other_threads_sizes_and_graphs_are_measured_anew() -> None:
    for device, model in (
        (Device(8), chain()),
        (Device(8, threads=2), chain()),
        (Device(16), chain()),
        (Device(8), chain((32, 64, 96, 8))),
    ):
        onnxprune.prune(model, 0.4, of="latency", timer=device, verify=False)
        assert device.profiled > 0


def test_a_cache_folder_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caching.write({"model": "m"}, {"a": 1})
    assert caching.read({"model": "m"}) is None
    assert onnxprune.prune(chain(), 0.4, of="latency", timer=Device(8)).on_budget


@quick
@given(st.integers(0, 10**6))
def test_least_squares_without_negative_coefficients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = rng.random((12, 3)) * [1e6, 1e3, 1.0]
    truth = rng.random(3) * (rng.random(3) < 0.7) / [1e6, 1e3, 1.0]
    assert nonnegative(columns, columns @ truth) == pytest.approx(truth, abs=1e-9)
    target = rng.standard_normal(12)
    found = nonnegative(columns, target)
    slope = columns.T @ (columns @ found - target) / np.linalg.norm(columns, axis=0)
    assert (found >= 0).all()
    assert (slope[found == 0] >= -1e-6).all()  # the conditions of Karush, Kuhn and Tucker
    assert np.abs(slope[found > 0]).max(initial=0) < 1e-6


def test_kernels_are_named_by_values_of_the_file() -> None:
    model = load(MODELS / "digits-resnet.onnx")
    watch = Stopwatch(seeded_feeds(model.proto, model.input_shapes), seconds=0.0)
    [kernels] = watch.kernels(model.proto, [model.proto])
    values = {o for node in model.proto.graph.node for o in node.output}
    assert set(kernels) <= values | {""}
    assert sum(took > 0 for took in kernels.values()) > 5
    assert all(took >= 0 for took in kernels.values())


def test_kernels_that_a_fusion_adds_belong_to_what_they_serve() -> None:
    """MatMul and Add of three axes become a Gemm between two Reshapes, whose values the file does not know."""
    text = """<ir_version: 8, opset_import: ["": 17]>
        tokens (float[2, 8, 16] x) => (float[2, 8, 4] y) { a = MatMul(x, w) b = Add(a, c) r = Relu(b) y = MatMul(r, v) }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w", (16, 32)), ("c", (32,)), ("v", (32, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    watch = Stopwatch({"x": np.ones((2, 8, 16), np.float32)}, seconds=0.0)
    [kernels] = watch.kernels(proto, [proto])
    assert "" not in kernels
    assert {"y"} < set(kernels) <= {"a", "b", "r", "y"}


def test_the_command_meets_a_latency_or_says_so(command: Command, tmp_path: Path, cache: Path) -> None:
    done = command(MODELS / "digits-resnet.onnx", "--ratio", "0.3", "--of", "latency", "-o", "smaller.onnx", "--json", "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == (0 if content["on_budget"] else 3), done.stderr
    before, after = content["latency"]
    assert content["reached"] == pytest.approx(1 - after / before)
    assert content["on_budget"] == (abs(after / before / 0.7 - 1) <= 0.05)
    assert content["options"]["device"]["threads"] == 1
    assert "latency: " in done.stdout
    assert list(cache.glob("*.json"))
    onnx.checker.check_model(str(tmp_path / "smaller.onnx"), full_check=True)


def test_a_device_that_is_not_there_is_said_at_once(command: Command) -> None:
    done = command(MODELS / "digits-mlp.onnx", "--ratio", "0.3", "--of", "latency", "--provider", "NoExecutionProvider")
    assert done.returncode == 2
    assert "NoExecutionProvider" in done.stderr
    assert "CPUExecutionProvider" in done.stderr
    with pytest.raises(OnnxPruneError, match="threads"):
        onnxprune.prune(two_layers(), 0.3, of="latency", threads=-1)

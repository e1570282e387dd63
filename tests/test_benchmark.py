"""benchmark: counts, sizes, turns, feeds, batches and errors (never how long anything takes)."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime  # type: ignore[import-untyped]
import pytest
from rich.console import Console

from onnxprune.benchmark import Feeds, Measurement, benchmark, table
from onnxprune.errors import OnnxPruneError

module = importlib.import_module("onnxprune.benchmark")  # the package may export the function by this name
PACKAGE = Path(str(module.__file__)).parent
QUICK: dict[str, Any] = {"seconds": 0.0, "min_runs": 2, "max_runs": 2, "warmup": 0, "memory": False}

Save = Callable[..., Path]
Seen = list[dict[str, np.ndarray]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a graph given as text, with arrays as initializers, and gives the path."""

    def write(graph: str, name: str = "m.onnx", external: str | None = None, **weights: np.ndarray) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 17]> {graph}')
        model.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        onnx.save(model, path, save_as_external_data=external is not None, location=external, size_threshold=0)
        return path

    return write


def feeds_seen(path: Path, feeds: dict[str, np.ndarray] | None = None, batch: int | None = None) -> dict[str, np.ndarray]:
    """The feeds that the model is run on, taken where the counter of MACs gets them."""
    seen: Seen = []

    def count(file: str, values: dict[str, np.ndarray]) -> int:
        seen.append(values)
        return 0

    benchmark([path], feeds, batch=batch, macs=count, **QUICK)
    return seen[0]


RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
FIXED = "g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }"
MATMUL = "g (float[N, 3] x) => (float[N, 4] y) { y = MatMul(x, w) }"


def test_measurement_of_a_small_model(save: Save) -> None:
    path = save(MATMUL, w=np.ones((3, 4), np.float32))
    [m] = benchmark([path], macs=lambda file, feeds: 12 * len(feeds["x"]), batch=5, **QUICK)
    assert (m.name, m.macs, m.parameters, m.file_bytes, m.runs) == ("m.onnx", 60, 12, path.stat().st_size, 2)
    assert m.peak_memory_bytes is None
    assert 0 < m.latency_low_s <= m.latency_median_s <= m.latency_high_s
    assert json.loads(json.dumps(m.to_json())) == m.to_json()


def test_nothing_to_measure() -> None:
    assert benchmark([]) == []


def test_parameters_are_floats_in_initializers_constants_and_subgraphs(save: Save) -> None:
    graph = """g (float[N, 3] x, bool c) => (float[N, 3] y) {
        a = Constant<value = float[3] {1.0, 2.0, 3.0}>()
        b = Constant<value_floats = [1.0, 2.0, 3.0]>()
        s = Constant<value_float = 2.0>()
        i = Constant<value_ints = [1, 2]>()
        t = Add(x, w)
        y = If(c) <
            then_branch = then () => (float[N, 3] p) { k = Constant<value = float[3] {0.0, 0.0, 0.0}>() p = Add(t, k) },
            else_branch = else () => (float[N, 3] q) { u = Mul(a, s) v = Mul(u, b) q = Add(t, v) }>
    }"""
    path = save(graph, w=np.ones((1, 3), np.float32), unused=np.arange(100))
    [m] = benchmark([path], **QUICK)
    assert m.parameters == 3 + 3 + 3 + 1 + 3


def test_parameters_of_every_float_type_and_of_functions(save: Save) -> None:
    path = save(RELU, d=np.ones(2), h=np.ones(3, np.float16), b=np.ones(5, ml_dtypes.bfloat16), i=np.ones(7, np.int8))
    model = onnx.load(path)
    body = [onnx.helper.make_node("Constant", [], ["k"], value_floats=[1.0] * 11)]
    body.append(onnx.helper.make_node("Mul", ["k", "k"], ["out"]))
    opset = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("own", "f", [], ["out"], body, opset))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save(model, path)
    assert benchmark([path], **QUICK)[0].parameters == 2 + 3 + 5 + 11


def test_file_size_includes_external_data_once(save: Save, tmp_path: Path) -> None:
    weights = {"w": np.ones((3, 4), np.float32), "z": np.ones(1000, np.float32)}
    path = save(MATMUL, external="m.data", **weights)
    data = tmp_path / "m.data"
    assert data.stat().st_size >= 4048
    [m] = benchmark([path], **QUICK)
    assert m.file_bytes == path.stat().st_size + data.stat().st_size
    assert m.parameters == 1012


def test_parameters_do_not_read_external_data(save: Save, tmp_path: Path) -> None:
    path = save(MATMUL, external="m.data", w=np.ones((3, 4), np.float32))
    (tmp_path / "m.data").write_bytes(b"")
    assert module._load(str(path))[1:] == (12, path.stat().st_size)


def test_models_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    runners: list[Callable[[], object]] = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = module._interleave(runners, warmup=2, least=3, most=9, seconds=0.0)
    assert "".join(calls) == "abab" + "abbaab"
    assert [len(taken) for taken in times] == [3, 3]


def test_runs_stop_at_the_most_while_time_is_left() -> None:
    times = module._interleave([lambda: None, lambda: None, lambda: None], warmup=0, least=1, most=4, seconds=1e9)
    assert [len(taken) for taken in times] == [4, 4, 4]


def test_times_go_to_the_model_that_took_them(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def fake(file: str, feeds: Feeds, threads: int, provider: str) -> Callable[[], object]:
        cost = {"slow.onnx": 4.0, "fast.onnx": 1.0}[Path(file).name]
        return lambda: clock.__setitem__(0, clock[0] + cost)

    monkeypatch.setattr(module, "_runner", fake)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    both = benchmark([save(RELU, "slow.onnx"), save(RELU, "fast.onnx")], seconds=20, min_runs=1, memory=False)
    assert [(m.name, m.latency_median_s, m.runs) for m in both] == [("slow.onnx", 4.0, 8), ("fast.onnx", 1.0, 8)]


def test_session_options(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, Any]] = []
    real = onnxruntime.InferenceSession

    def session(file: str, options: Any, **rest: Any) -> Any:
        made.append((options.intra_op_num_threads, rest["disabled_optimizers"]))
        return real(file, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    benchmark([save(RELU), save(RELU, "n.onnx")], threads=2, **QUICK)
    assert made == [(2, ["Pad_Fusion"])] * 2


def test_models_alike_in_name_are_told_apart(save: Save) -> None:
    paths = [save(RELU, "a/m.onnx"), save(RELU, "b/m.onnx"), save(RELU, "c.onnx")]
    assert [m.name for m in benchmark(paths, **QUICK)] == [str(paths[0]), str(paths[1]), "c.onnx"]


def test_made_feeds_are_seeded_and_fit(save: Save) -> None:
    graph = """g (float[N, 3] x, int64[N, T] ids, bool[2] m, float16 s, int32 w) => (float[N, 3] y, int64[N, T] i,
        bool[2] n, float16 u) { y = Relu(x) i = Identity(ids) n = Not(m) u = Identity(s) }"""
    path = save(graph, w=np.array(1, np.int32))
    first, again = feeds_seen(path), feeds_seen(path)
    kinds = {name: (array.dtype, array.shape) for name, array in first.items()}
    assert kinds == {"x": ("f4", (1, 3)), "ids": ("i8", (1, 1)), "m": (bool, (2,)), "s": ("f2", ())}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert set(np.unique(feeds_seen(path, batch=50)["ids"])) == {0, 1}


def test_integer_inputs_run(save: Save) -> None:
    path = save("g (int64[N, 5] ids) => (float[N, 5, 4] y) { y = Gather(table, ids) }", table=np.ones((2, 4), np.float32))
    [m] = benchmark([path], batch=3, **QUICK)
    assert (m.parameters, m.runs) == (8, 2)


def test_bfloat16_inputs_run(save: Save) -> None:
    path = save("g (bfloat16[N, 5] x) => (bfloat16[N, 5] y) { y = Identity(x) }")
    assert feeds_seen(path)["x"].dtype == ml_dtypes.bfloat16


def test_batch_goes_to_axis_0_and_to_every_axis_of_its_symbol(save: Save) -> None:
    graph = """g (float[N, T] x, float[2, N, 4] state, float[2, T] fixed) => (float[N, T] y, float[2, N, 4] z,
        float[2, T] w) { y = Relu(x) z = Relu(state) w = Relu(fixed) }"""
    shapes = {name: array.shape for name, array in feeds_seen(save(graph), batch=6).items()}
    assert shapes == {"x": (6, 1), "state": (2, 6, 4), "fixed": (2, 1)}


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_given_feeds_are_cut_or_repeated_to_the_batch(save: Save, batch: int) -> None:
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    seen = feeds_seen(save(RELU), {"x": x, "other": x}, batch)
    assert list(seen) == ["x"]
    assert np.array_equal(seen["x"], np.concatenate([x, x, x])[:batch])


def test_given_feeds_stay_as_they_are_without_batch(save: Save) -> None:
    x = np.ones((3, 3), np.float32)
    assert feeds_seen(save(RELU), {"x": x})["x"] is x


def test_fixed_batch_is_kept_or_refused(save: Save) -> None:
    path = save(FIXED)
    assert feeds_seen(path, batch=2)["x"].shape == (2, 3)
    for feeds in (None, {"x": np.ones((2, 3), np.float32)}):
        with pytest.raises(OnnxPruneError, match=r"m\.onnx: its batch is fixed at .*2.*, not 4"):
            benchmark([path], feeds, batch=4, **QUICK)


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, r"is not in the feeds \(none given\)"),
        ({"X": np.ones((2, 3), np.float32)}, r"is not in the feeds \(X\)"),
        ({"x": np.ones((2, 3))}, r"takes float32 \['N', 3\], not float64 \[2, 3\]"),
        ({"x": np.ones((2, 4), np.float32)}, r"takes .*, not float32 \[2, 4\]"),
        ({"x": np.ones(3, np.float32)}, r"takes .*, not float32 \[3\]"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(save: Save, feeds: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(OnnxPruneError, match=rf"m\.onnx: input 'x' {text}") as error:
        benchmark([save(RELU)], feeds, **QUICK)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_input_of_unknown_rank_needs_feeds(save: Save) -> None:
    path = save("g (float x) => (float y) { y = Relu(x) }")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    with pytest.raises(OnnxPruneError, match="input 'x' has no shape"):
        benchmark([path], **QUICK)
    assert benchmark([path], {"x": np.ones((2, 2), np.float32)}, **QUICK)[0].runs == 2


def test_input_of_strings_is_refused(save: Save) -> None:
    with pytest.raises(OnnxPruneError, match="input 'x' is not a tensor of numbers"):
        benchmark([save("g (string[N] x) => (string[N] y) { y = Identity(x) }")], **QUICK)


def test_files_that_do_not_load_are_refused(save: Save, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    save(MATMUL, "torn.onnx", external="torn.data", w=np.ones((3, 4), np.float32))
    (tmp_path / "torn.data").unlink()
    save("g (float[N, 3] x) => (float[N, 3] y) { y = NoSuchOp(x) }", "op.onnx")
    for name, text in (
        ("none.onnx", "No such file"),
        ("text.onnx", "not a readable ONNX model"),
        ("empty.onnx", "does not run"),
        ("torn.onnx", "torn.data"),
        ("op.onnx", "NoSuchOp"),
    ):
        with pytest.raises(OnnxPruneError, match=f"{name}: .*{text}") as error:
            benchmark([save(RELU), tmp_path / name], **QUICK)
        assert "\n" not in str(error.value)


def test_a_model_that_fails_on_its_feeds_is_named(save: Save) -> None:
    path = save("g (float[N, T] x, float[N, S] z) => (float[N, T] y) { y = Add(x, z) }")
    feeds = {"x": np.ones((1, 2), np.float32), "z": np.ones((1, 3), np.float32)}
    with pytest.raises(OnnxPruneError, match=r"m\.onnx: does not run"):
        benchmark([path], feeds, **QUICK)


def test_absent_provider_and_bad_options_are_refused(save: Save) -> None:
    with pytest.raises(OnnxPruneError, match=r"'NoSuchProvider' is not there .*CPUExecutionProvider"):
        benchmark([save(RELU)], provider="NoSuchProvider", **QUICK)
    for options in ({"threads": -1}, {"warmup": -1}, {"min_runs": 0}, {"max_runs": 1, "min_runs": 2}, {"batch": 0}):
        with pytest.raises(OnnxPruneError, match="needs threads >= 0"):
            benchmark([save(RELU)], **{**QUICK, **options})


def test_peak_memory_follows_the_model_and_not_this_process(save: Save) -> None:
    ballast = np.ones(50_000_000)  # 400 MB that the child must not inherit
    big = save("g (float[N, 3] x) => (float[N, M] y) { y = MatMul(x, w) }", "big.onnx", w=np.ones((3, 4_000_000), "f4"))
    small = save(RELU)
    lines: list[str] = []
    results = benchmark([small, big], progress=lines.append, **{**QUICK, "memory": True})
    small_peak, big_peak = (m.peak_memory_bytes for m in results)
    assert small_peak is not None
    assert big_peak is not None
    assert 0 < small_peak < 40e6
    assert 48e6 < big_peak < ballast.nbytes
    assert lines == ["measuring latency", f"measuring peak memory of {small}", f"measuring peak memory of {big}"]


def test_peak_memory_is_none_where_the_child_fails(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert benchmark([save(RELU)], **{**QUICK, "memory": True})[0].peak_memory_bytes is None
    monkeypatch.undo()
    assert module._peak_memory("/no/such/model.onnx", {}, 1, "CPUExecutionProvider") is None


def test_child_does_not_import_from_the_working_directory(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.setattr(sys, "path", [str(PACKAGE.parent), *sys.path[1:]])
    monkeypatch.chdir(tmp_path)
    assert benchmark([save(RELU)], **{**QUICK, "memory": True})[0].peak_memory_bytes


def test_module_imports_light() -> None:
    code = f"""import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})
import importlib.util as u, types
sys.modules["onnxprune"] = package = types.ModuleType("onnxprune")
package.__path__ = [{str(PACKAGE)!r}]
import onnxprune.benchmark
print([name for name in ("onnx", "onnxruntime", "rich") if name in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def rendered(measurements: list[Measurement], width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(measurements))
    return [line.rstrip() for line in console.export_text().splitlines()]


BEFORE = Measurement("resnet.onnx", 4_100_000_000, 25_600_000, 102_400_000, 200_000_000, 0.0803, 0.079, 0.085, 20)
AFTER = Measurement("resnet-pruned.onnx", 2_460_000_000, 12_800_000, 51_200_000, None, 0.04, 0.0395, 0.0425, 20)


def test_table_of_two_models_has_values_and_ratios_in_80_columns() -> None:
    rows = {line.split("  ")[0].strip(): line.split() for line in rendered([BEFORE, AFTER]) if line.strip()}
    assert rows["MACs"][1:] == ["4.10", "G", "2.46", "G", "0.60×"]
    assert rows["parameters"][1:] == ["25.6", "M", "12.8", "M", "0.50×"]
    assert rows["file size"][2:] == ["102", "MB", "51.2", "MB", "0.50×"]
    assert rows["peak memory"][2:] == ["200", "MB", "–"]
    assert rows["latency, median"][2:] == ["80.3", "ms", "40.0", "ms", "0.50×"]
    assert rows["runs"][1:] == ["20", "20"]
    header = next(line for line in rendered([BEFORE, AFTER]) if "resnet" in line)
    assert header.split() == ["resnet.onnx", "resnet-pruned.onnx"]


def test_table_of_one_model_has_no_ratio_and_leaves_out_what_was_not_measured() -> None:
    text = "\n".join(rendered([AFTER]))
    assert "×" not in text
    assert "peak memory" not in text


def test_table_loses_nothing_with_many_models() -> None:
    lines = rendered([BEFORE, AFTER, AFTER, AFTER, BEFORE])
    assert max(map(len, lines)) <= 80
    text = "".join(lines)
    assert "…" not in text
    assert (text.count("0.60×"), text.count("1.00×")) == (3, 7)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (5, "5.00 s"), (999.6, "1.00 ks"), (999.4, "999 s"), (1.234e6, "1.23 Ms"), (4.56e-5, "45.6 µs")],
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert module._si(value, "s") == text

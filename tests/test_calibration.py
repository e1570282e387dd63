"""Samples from every kind of source, and what is said where one does not fit."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import MODELS, SHARED, two_layers

import onnxprune
from onnxprune.calibration import Samples, read_calibration
from onnxprune.errors import OnnxPruneError
from onnxprune.importer import Model, load

RNG = np.random.default_rng(0)


def taking(inputs: str, body: str = "", outputs: str = "float[N, 4] y") -> Model:
    """A model with these inputs; without a body its output comes from no input."""
    body = body or "y = Identity(fixed)"
    text = f'<ir_version: 8, opset_import: ["": 17]> m ({inputs}) => ({outputs}) <float[1, 4] fixed = {{1, 2, 3, 4}}> {{ {body} }}'
    return load(onnx.parser.parse_model(text))


def gathered(samples: Samples, name: str, size: int = 3, axis: int = 0) -> np.ndarray:
    return np.concatenate([feeds[name] for feeds in samples.batches(size)], axis)


def numbers(samples: Samples) -> list[int]:
    return [int(v) for v in gathered(samples, "x")[:, 0]]


def counted(count: int, width: int = 4) -> dict[str, np.ndarray]:
    """Sample i holds the number i."""
    return {"x": np.repeat(np.arange(count, dtype=np.float32)[:, None], width, 1)}


ROWS = taking("float[N, 4] x", "y = Identity(x)")
PAIR = taking("float[2, 4] x", "y = Identity(x)")


def refused(*words: str) -> Any:
    """One line with the words, and exit code 2."""
    return pytest.raises(OnnxPruneError, match="(?s)^(?=[^\n]*$)" + "".join(f"(?=.*{word})" for word in words))


# --- batches, parts, splits ------------------------------------------------------------------------------------------


def test_batches_cover_the_samples_in_order_the_last_smaller() -> None:
    samples = read_calibration(counted(8), ROWS)
    assert (samples.count, [b["x"].shape for b in samples.batches(3)]) == (8, [(3, 4), (3, 4), (2, 4)])
    assert numbers(samples) == list(range(8))
    assert numbers(samples.part(2, 5)) == [2, 3, 4]
    assert numbers(samples.part(2, 8).part(1, 3)) == [3, 4]


def test_a_fixed_batch_is_filled_and_the_rest_left_out() -> None:
    samples = read_calibration(counted(5), PAIR)
    assert [b["x"].shape for b in samples.batches(64)] == [(2, 4), (2, 4)]
    with refused("has 1 samples", "takes 2 at once"):
        read_calibration(counted(1), PAIR)


def test_a_split_is_a_partition_spread_over_the_set() -> None:
    samples = read_calibration(counted(100), ROWS)
    fit, held = samples.split(0.8, seed=3)
    assert (fit.count, held.count) == (80, 20)
    assert sorted(numbers(fit) + numbers(held)) == list(range(100))
    assert all(any(start <= n < start + 10 for n in numbers(held)) for start in range(0, 100, 10))
    assert numbers(samples.split(0.8, seed=3)[1]) == numbers(held) != numbers(samples.split(0.8, seed=4)[1])
    assert [part.count for part in samples.part(0, 2).split(0.99)] == [1, 1]


def test_the_limit_spreads_over_the_set() -> None:
    samples = read_calibration(counted(1000), ROWS, limit=10)
    assert samples.count == 10
    assert [n // 100 for n in numbers(samples)] == list(range(10))
    assert numbers(samples) == numbers(read_calibration(counted(1000), ROWS, limit=10))
    assert read_calibration(counted(3), ROWS, limit=10).count == 3


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_an_npz_with_other_keys_beside_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **counted(4), labels=np.arange(4), note=np.array([{"python": "object"}], object))
    samples = read_calibration(tmp_path / "a.npz", ROWS)
    assert [set(b) for b in samples.batches(2)] == [{"x"}, {"x"}]
    assert [list(extras["labels"]) for _, extras in samples.pairs(3)] == [[0, 1, 2], [3]]


def test_a_folder_of_arrays_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    values = counted(9)["x"]
    np.savez(tmp_path / "b.npz", x=values[5:8])  # a batch
    np.savez(tmp_path / "c.npz", x=values[8])  # one sample
    np.save(tmp_path / "a.npy", values[:5])
    samples = read_calibration(tmp_path, ROWS)
    assert samples.count == 9
    assert np.array_equal(gathered(samples, "x", 4), values)
    assert numbers(samples.part(4, 6)) == [4, 5]


def test_a_folder_is_read_no_sooner_than_it_is_needed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", counted(2)["x"])
    np.save(tmp_path / "b.npy", np.full((2, 4), np.nan, np.float32))
    batches = read_calibration(tmp_path, ROWS).batches(2)
    assert next(batches)["x"].shape == (2, 4)
    with refused("b.npy", "NaN"):
        next(batches)


def test_samples_of_several_sizes_come_in_batches_of_one_size(tmp_path: Path) -> None:
    for i, length in enumerate((3, 3, 5, 3)):
        np.savez(tmp_path / f"{i}.npz", ids=np.ones((1, length), np.int64))
    model = taking("int64[N, S] ids")
    assert [b["ids"].shape for b in read_calibration(tmp_path, model).batches(8)] == [(2, 3), (1, 5), (1, 3)]


def test_several_inputs_split_along_their_own_batch_axis() -> None:
    model = taking("float[N, S] x, float[2, N, 4] state, int64 rate, float[7, 2] anchors")
    arrays = {
        "x": RNG.standard_normal((6, 5), np.float32),
        "state": RNG.standard_normal((2, 6, 4), np.float32),
        "rate": np.array(16000),
        "anchors": RNG.standard_normal((7, 2), np.float32),
    }
    samples = read_calibration(arrays, model)
    assert samples.count == 6
    for name, axis in (("x", 0), ("state", 1)):
        assert np.array_equal(gathered(samples, name, 4, axis), arrays[name])
    for batch in samples.batches(4):
        assert batch["rate"] == 16000
        assert np.array_equal(batch["anchors"], arrays["anchors"])


def test_arrays_that_share_no_axis_are_one_sample_fed_as_they_are() -> None:
    graph = {"nodes": np.ones((5, 3), np.float32), "edges": np.zeros((2, 9), np.int64)}
    samples = read_calibration(graph, taking("float[V, 3] nodes, int64[2, E] edges"))
    [batch] = samples.batches(2)
    assert samples.count == 1
    assert {n: a.shape for n, a in batch.items()} == {"nodes": (5, 3), "edges": (2, 9)}


def test_an_input_with_a_default_may_be_left_out() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> m (float[N, 4] x, float[1] scale) => (float[N, 4] y) <float[1] scale = {2}>
        { y = Mul(x, scale) }"""
    model = load(onnx.parser.parse_model(text))
    assert [set(b) for b in read_calibration(counted(2), model).batches(2)] == [{"x"}]


@pytest.mark.parametrize(
    ("kind", "given", "exact"),
    [
        ("float", np.uint8([[0, 1, 254, 255]]), True),
        ("float", np.float64([[0.1, 1, 2, 3]]), False),
        ("int64", np.uint8([[1, 2, 3, 4]]), True),
        ("int32", np.int64([[1, 2, 3, -4]]), True),
        ("bool", np.int64([[0, 1, 1, 0]]), True),
    ],
)
def test_numbers_are_cast_where_nothing_is_lost(kind: str, given: np.ndarray, exact: bool) -> None:
    [batch] = read_calibration({"x": given}, taking(f"{kind}[N, 4] x")).batches(1)
    assert batch["x"].dtype == {"float": np.float32, "bool": np.bool_}.get(kind, np.dtype(kind if kind[0] == "i" else "f4"))
    assert np.array_equal(batch["x"], given) if exact else np.allclose(batch["x"], given)


@pytest.mark.parametrize(
    ("inputs", "arrays", "words"),
    [
        ("float[N, 4] x, float[N, 2] z", {"x": np.ones((2, 4), np.float32)}, ["no 'z'", "only 'x'", r"'z' float32 \[N, 2\]"]),
        ("float[N, 4] x", {"input": np.ones((2, 4), np.float32)}, ["no 'x'", "only 'input'"]),
        ("float[N, 4] x", {}, ["no 'x'", "no arrays"]),
        ("float[N, 4] x", {"x": np.ones((2, 5), np.float32)}, ["'x'", r"\[2, 5\]", r"\[N, 4\]"]),
        ("float[N, 4] x", {"x": np.ones((2, 4, 1), np.float32)}, ["'x'", r"\[2, 4, 1\]"]),
        ("float[N, 4] x", {"x": np.ones((0, 4), np.float32)}, ["'x'", "no samples"]),
        ("float[N, 4] x", {"x": np.full((2, 4), np.inf, np.float32)}, ["'x'", "infinity"]),
        ("float[N, 4] x", {"x": np.full((2, 4), "a")}, ["'x'", "no numbers"]),
        ("float16[N, 4] x", {"x": np.full((2, 4), 1e6)}, ["'x'", "float16 does not"]),
        ("int64[N, 4] x", {"x": np.ones((2, 4))}, ["'x'", "float64", "int64"]),
        ("int32[N, 4] x", {"x": np.full((2, 4), 2**40)}, ["'x'", "int32 does not"]),
        ("float[N, 4] x, float[N, 4] z", {"x": np.ones((2, 4)), "z": np.ones((3, 4))}, ["'x' has 2", "'z' has 3"]),
        ("float[N, 4] x, float[3, 4] z", {"x": np.ones((2, 4)), "z": np.ones((2, 4))}, ["'z'", r"\[2, 4\]", r"\[3, 4\]"]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(inputs: str, arrays: dict[str, np.ndarray], words: list[str]) -> None:
    with refused(*words):
        read_calibration(arrays, taking(inputs))


def test_files_that_are_no_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "bad.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "text.txt").write_text("text")
    np.save(tmp_path / "one.npy", np.ones((2, 4), np.float32))
    for name, words in {
        "bad.npz": ["bad.npz", "savez"],
        "text.txt": ["text.txt", "not an .npz"],
        "empty": ["empty", "no images"],
        "folder": ["bad.npy", "numpy.save$"],
        "missing": ["missing", "no such file"],
    }.items():
        with refused(*words):
            read_calibration(tmp_path / name, ROWS)
    with refused("one.npy", "is one array", "'z'"):
        read_calibration(tmp_path / "one.npy", taking("float[N, 4] x, float[N, 4] z"))
    with refused("0", "1 at least"):
        read_calibration(tmp_path / "one.npy", ROWS, limit=0)


# --- functions -------------------------------------------------------------------------------------------------------

FUNCTIONS = """
import numpy as np
def batches():
    for start in (0, 3):
        yield {"x": np.arange(start, start + 3, dtype=np.float32)[:, None].repeat(4, 1), "labels": np.arange(3)}
def single():
    return [{"x": [i] * 4, "labels": i} for i in range(5)]
def endless():
    i = 0
    while True:
        yield {"x": np.full((2, 4), i)}
        i += 1
def chance():
    for _ in range(3):
        yield {"x": np.random.standard_normal((1, 4))}
def wrong():
    yield np.ones((2, 4))
def breaks():
    yield {"x": np.ones((2, 4))}
    raise KeyError("gone")
def asks(path):
    yield {}
def nothing():
    return []
def nowhere():
    pass
number = 3
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"feeds_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


_numbers = itertools.count()


def test_a_function_yields_batches_or_samples(functions: str) -> None:
    samples = read_calibration(f"{functions}:batches", ROWS)
    assert (samples.count, numbers(samples)) == (6, list(range(6)))
    assert [list(extras["labels"]) for _, extras in samples.pairs(4)] == [[0, 1, 2, 0], [1, 2]]
    samples = read_calibration(f"{functions}:single", ROWS)
    assert (samples.count, numbers(samples)) == (5, list(range(5)))
    assert [list(extras["labels"]) for _, extras in samples.pairs(4)] == [[0, 1, 2, 3], [4]]
    assert numbers(read_calibration(lambda: iter([counted(2), counted(3)]), ROWS)) == [0, 1, 0, 1, 2]


def test_a_function_that_does_not_end_needs_a_limit(functions: str) -> None:
    assert numbers(read_calibration(f"{functions}:endless", ROWS, limit=5)) == [0, 0, 1, 1, 2]


def test_a_function_is_asked_once_so_that_chance_gives_the_same_samples_in_every_pass(functions: str) -> None:
    samples = read_calibration(f"{functions}:chance", ROWS)
    assert np.array_equal(gathered(samples, "x"), gathered(samples, "x"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong", ["wrong, feed 0", "is a ndarray", "mapping"]),
        ("breaks", ["breaks", "KeyError", "gone"]),
        ("asks", ["asks", "TypeError", "no argument"]),
        ("nothing", ["nothing", "no samples"]),
        ("nowhere", ["nowhere", "yields feeds"]),
        ("number", ["no function 'number'"]),
        ("absent", ["no function 'absent'"]),
    ],
)
def test_a_function_that_gives_no_feeds_is_refused(functions: str, name: str, words: list[str]) -> None:
    with refused(*words):
        read_calibration(f"{functions}:{name}", ROWS)


def test_a_module_that_is_not_there_is_refused(functions: str) -> None:
    with refused("no_such_module", "does not load"):
        read_calibration("no_such_module:feeds", ROWS)


# --- none and noise --------------------------------------------------------------------------------------------------


def test_none_has_no_samples() -> None:
    samples = read_calibration("none", ROWS)
    assert (samples.count, list(samples.batches(4))) == (0, [])


@pytest.mark.parametrize("shape", ["N, 3, 32, 32", "N, 32, 32, 3"])
def test_noise_for_pictures_is_smooth_and_standardized(shape: str) -> None:
    samples = read_calibration("noise", taking(f"float[{shape}] x"))
    images = gathered(samples, "x", 64)
    assert samples.count == 1024  # small pictures
    assert (abs(images.mean()) < 0.1, abs(images.std() - 1) < 0.15) == (True, True)
    rows = 2 if shape.startswith("N, 3") else 1
    one, other = (np.take(images, range(k, k + 31), axis=rows).ravel() for k in (0, 1))
    assert np.corrcoef(one, other)[0, 1] > 0.6  # neighbours are alike, as in photographs
    contrasts = images.reshape(len(images), -1).std(axis=1)
    assert contrasts.max() > 2 * contrasts.min()


def test_noise_is_the_same_for_a_seed_and_in_any_batches() -> None:
    model = taking("float[N, 3, 8, 8] x")
    one = gathered(read_calibration("noise", model, limit=10, seed=1), "x", 3)
    assert np.array_equal(one, gathered(read_calibration("noise", model, limit=10, seed=1), "x", 10))
    assert not np.array_equal(one, gathered(read_calibration("noise", model, limit=10, seed=2), "x", 10))
    assert len({image.tobytes() for image in one}) == 10


def test_noise_goes_through_the_preprocess() -> None:
    model = taking("float[N, 3, 8, 8] x")
    raw = gathered(read_calibration("noise", model, preprocess="raw"), "x")
    assert (raw.min() >= 0, raw.max() <= 255, raw.mean() > 100, raw.std() > 40) == (True, True, True, True)
    assert np.allclose(gathered(read_calibration("noise", model, preprocess="tf"), "x"), raw / 127.5 - 1, atol=1e-5)


def test_noise_for_token_ids_uses_the_whole_table() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> m (int64[N, 4] ids, int64[N, 4] mask) => (float[N, 4, 2] y)
        { wide = Cast<to=7>(ids) y = Gather(table, wide) }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((50, 2), np.float32), "table"))
    [batch] = read_calibration("noise", load(model)).batches(1024)
    assert set(np.unique(batch["ids"])) == set(range(50))
    assert set(np.unique(batch["mask"])) == {0, 1}


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mlp", "digits-conv1d"])
def test_noise_runs_on_the_shipped_models(name: str) -> None:
    session = ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])
    for feeds in read_calibration("noise", load(MODELS / f"{name}.onnx"), limit=9).batches(4):
        assert np.isfinite(session.run(None, feeds)[0]).all()


def test_noise_runs_on_published_models() -> None:
    paths = sorted((SHARED / "real").glob("*.onnx"))
    if not paths:
        pytest.skip("../shared/real is not there")
    for path in paths:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = path.with_suffix(".feeds.npz")
        model = load(path, dict(np.load(given)) if given.exists() else None)
        batches = list(read_calibration("noise", model, limit=3).batches(2))
        assert [next(iter(feeds.values())).shape[0] for feeds in batches] in ([2, 1], [1, 1, 1]), path
        session.run(None, batches[0])


# --- images ----------------------------------------------------------------------------------------------------------

NCHW, NHWC = taking("float[N, 3, 4, 6] x"), taking("float[N, 4, 6, 3] x")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, np.ndarray]:
    """A folder of two pictures of the models' size, in its subfolders, and their pixels (height, width, 3)."""
    image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra `images`, is not installed")
    found = {}
    for name in ("a/2.png", "b/1.png"):
        found[name] = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        (tmp_path / name).parent.mkdir()
        image.fromarray(found[name]).save(tmp_path / name)
    return found


def test_presets_say_what_pixels_become(pictures: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    pixels = np.stack(list(pictures.values())).astype(np.float64)
    mean, std = IMAGENET
    for preset, wanted in {
        "raw": pixels,
        "unit": pixels / 255,
        "tf": pixels / 127.5 - 1,
        "imagenet": (pixels / 255 - mean) / std,
        "scale=1/255,mean=0.485/0.456/0.406,std=0.229/0.224/0.225": (pixels / 255 - mean) / std,
        "imagenet,order=bgr": (pixels[..., ::-1] / 255 - mean) / std,
        "scale=2,mean=1": pixels * 2 - 1,
    }.items():
        assert np.allclose(gathered(read_calibration(tmp_path, NHWC, preprocess=preset), "x"), wanted, atol=1e-4), preset
        turned = gathered(read_calibration(tmp_path, NCHW, preprocess=preset), "x")
        assert np.allclose(turned, wanted.transpose(0, 3, 1, 2), atol=1e-4), preset
    given = {"preset": "unit", "mean": [0.5, 0.5, 0.5], "std": 0.25}
    assert np.allclose(gathered(read_calibration(tmp_path, NHWC, preprocess=given), "x"), (pixels / 255 - 0.5) / 0.25, atol=1e-5)


def test_pictures_are_cropped_in_the_middle_or_stretched(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra `images`, is not installed")
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, 40:80] = 255  # the middle third
    image.fromarray(stripes).save(tmp_path / "stripes.png")
    model = taking("float[N, 3, 20, 20] x")

    def white(preprocess: str, model: Model = model) -> float:
        return float(gathered(read_calibration(tmp_path, model, preprocess=preprocess), "x").mean())

    assert white("unit") > 0.95
    assert white("unit,resize=stretch") == pytest.approx(1 / 3, abs=0.02)
    assert white("unit,resize=30") > 0.99
    free = taking("float[N, 3, H, W] x")
    assert [b["x"].shape for b in read_calibration(tmp_path, free, preprocess="unit,size=10x16").batches(1)] == [(1, 3, 10, 16)]
    with refused("any size", "size=224"):
        white("unit", free)
    with refused("64x64", "20x20"):
        white("unit,size=64")


def test_pictures_of_more_than_8_bits_are_scaled_or_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra `images`, is not installed")
    deep = RNG.integers(0, 2**16, (4, 6), dtype=np.uint16)
    image.fromarray(deep).save(tmp_path / "deep.png")
    found = gathered(read_calibration(tmp_path, taking("float[N, 1, 4, 6] x"), preprocess="raw"), "x")
    assert np.array_equal(found[0, 0], deep >> 8)
    for kind in (np.int32, np.float32):
        image.fromarray(deep.astype(kind)).save(tmp_path / "deep.tiff")
        with refused("deep.tiff", "32-bit", "8 or 16 bits"):
            gathered(read_calibration(tmp_path, taking("float[N, 1, 4, 6] x"), preprocess="raw"), "x")


def test_pictures_become_gray_or_stay_integers_as_the_model_takes_them(pictures: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    gray = gathered(read_calibration(tmp_path, taking("float[N, 1, 4, 6] x"), preprocess="raw"), "x")
    assert gray.shape == (2, 1, 4, 6)
    luma = pictures["a/2.png"] @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert np.allclose(gray[0, 0], luma, atol=1)
    plain = gathered(read_calibration(tmp_path, taking("uint8[N, 4, 6, 3] x")), "x")
    assert plain.dtype == np.uint8
    assert np.array_equal(plain[1], pictures["b/1.png"])


def test_pictures_that_cannot_be_used_are_refused(pictures: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    with refused("not known", "--preprocess", "imagenet"):
        read_calibration(tmp_path, NCHW)
    with refused("one input of 1, 3 or 4 channels", r"\[N, 4\]"):
        read_calibration(tmp_path, ROWS, preprocess="unit")
    with refused("layout=nchw"):
        read_calibration(tmp_path, taking("float[N, C, H, W] x"), preprocess="unit,size=4")
    with refused("2 numbers", "3 channels"):
        read_calibration(tmp_path, NCHW, preprocess="std=0.5/0.5")
    (tmp_path / "a" / "0.jpg").write_bytes(b"no picture")
    with refused("0.jpg", "not an image"):
        next(read_calibration(tmp_path, NCHW, preprocess="unit").batches(1))
    np.save(tmp_path / "c.npy", np.ones(3))
    with refused("both arrays", "c.npy"):
        read_calibration(tmp_path, NCHW, preprocess="unit")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with refused("Pillow", r"onnxprune\[images\]"):
        read_calibration(tmp_path, NCHW, preprocess="unit")


def test_arrays_of_pixels_take_the_preprocess_and_the_models_layout() -> None:
    pixels = RNG.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    found = gathered(read_calibration({"x": pixels}, NCHW, preprocess="tf"), "x")
    assert np.allclose(found, pixels.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert np.array_equal(gathered(read_calibration({"x": pixels}, NCHW, preprocess="tf,size=4x6"), "x"), found)
    with refused(r"pictures of \[4, 6\]", "size"):
        read_calibration({"x": pixels}, NCHW, preprocess="tf,size=8")
    with refused("float32", "for pixels"):
        read_calibration({"x": pixels.astype(np.float32)}, NCHW, preprocess="tf")
    with refused("inputs that hold images"):
        read_calibration(counted(2), ROWS, preprocess="tf")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imagnet", ["no 'imagnet'", "imagenet", "unit"]),
        ("men=0.5", ["no 'men'", "mean"]),
        ("scale=0", ["scale=0", "scale=1/255"]),
        ("scale=1/0", ["scale=1/0"]),
        ("mean=a/b/c", ["mean=a/b/c"]),
        ("std=1/0/1", ["std=1/0/1", "not 0"]),
        ("size=0", ["size=0", "height first"]),
        ("mean=0.5,unit", ["'unit' comes first"]),
        ("unit,layout=chw", ["layout=chw", "layout=nchw"]),
        ("mean=0.5/0.5", ["2 numbers", "3 channels"]),
    ],
)
def test_a_preprocess_that_cannot_be_is_refused(text: str, words: list[str]) -> None:
    with refused(*words):
        read_calibration({"x": np.ones((1, 3, 4, 6), np.uint8)}, NCHW, preprocess=text)


def test_models_that_take_no_numbers_are_refused() -> None:
    with refused("'x'", "no tensor of numbers"):
        read_calibration({"x": np.array([["a"]])}, taking("string[N, 4] x"))


def test_two_layers_run_on_every_kind_of_batch() -> None:
    """The batches are what onnxruntime takes."""
    session = ort.InferenceSession(two_layers().SerializeToString(), providers=["CPUExecutionProvider"])
    for feeds in read_calibration({"x": np.arange(20).reshape(5, 4)}, load(two_layers())).batches(2):
        assert session.run(None, feeds)[0].shape == (len(feeds["x"]), 3)


@pytest.mark.parametrize("calibration", [None, "none"])
def test_a_number_of_samples_without_samples_is_refused(calibration: str | None) -> None:
    with pytest.raises(OnnxPruneError, match=r"--samples .* --calibration") as raised:
        onnxprune.prune(MODELS / "digits-mlp.onnx", 0.3, calibration=calibration, samples=5)
    assert raised.value.exit_code == 2

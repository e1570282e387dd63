"""How near a pruned model stays: figures against plain formulas, on every kind of output, and the evaluation of the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import MODELS, Command, two_layers
from test_cli import failing

from onnxprune.calibration import Samples, read_calibration
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluation import evaluate
from onnxprune.fidelity import Fidelity, OutputFidelity, fidelity
from onnxprune.importer import load
from onnxprune.noise import COUNT

RNG = np.random.default_rng(0)
MLP = MODELS / "digits-mlp.onnx"


def model(body: str, outputs: str, seed: int = 0, inputs: str = "float[N, 4] x") -> onnx.ModelProto:
    """A model with weights w (4, 6) and v (4,) that follow from the seed."""
    text = f'<ir_version: 8, opset_import: ["": 17]> m ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for name, shape in (("w", (4, 6)), ("v", (4,))):
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return proto


def drawn(proto: onnx.ModelProto, count: int = 11, shape: tuple[int, ...] = (4,)) -> Samples:
    return read_calibration({"x": RNG.standard_normal((count, *shape)).astype(np.float32)}, load(proto))


def ran(proto: onnx.ModelProto, samples: Samples) -> list[np.ndarray]:
    """The model's outputs on all samples at once."""
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    [feeds] = samples.batches(1000)
    return [np.asarray(o, np.float64) for o in session.run(None, feeds)]


def only(found: Fidelity) -> OutputFidelity:
    [output] = found.outputs
    return output


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(-1).mean())


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_figures_of_logits_are_the_formulas_however_they_are_batched(batch: int) -> None:
    before, after = two_layers(seed=0), two_layers(seed=1)
    samples = drawn(before)
    [a], [b] = ran(before, samples), ran(after, samples)
    found = only(fidelity(before, after, samples, batch))
    assert found.samples == 11
    assert found.agreement == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert found.cosine == pytest.approx(np.mean([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]), rel=1e-5)
    assert found.kl == pytest.approx(divergence(softmax(a), softmax(b)), rel=1e-5)
    assert found.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-5)


def test_a_model_beside_itself_is_the_same() -> None:
    found = only(fidelity(two_layers(), two_layers(), drawn(two_layers())))
    assert (found.agreement, found.kl, found.sqnr, found.noise) == (1, 0, np.inf, 0)
    assert found.cosine == pytest.approx(1)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["sqnr"] is None


def test_several_candidates_are_as_one_by_one_and_the_nearer_one_loses_less() -> None:
    original = two_layers()
    candidates = []
    for share in (0.5, 0.01):
        other = onnx.ModelProto()
        other.CopyFrom(original)
        tensor = other.graph.initializer[0]
        array = onnx.numpy_helper.to_array(tensor)
        noise = share * np.random.default_rng(7).standard_normal(array.shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
        candidates.append(other)
    samples = drawn(original, 50)
    far, near = fidelity(original, candidates, samples, 8)
    assert [far, near] == [fidelity(original, other, samples, 8) for other in candidates]
    assert near.loss < far.loss


def test_probabilities_are_not_put_through_softmax_again() -> None:
    text, out = "l = MatMul(x, w) y = Softmax(l)", "float[N, 6] y"
    before, after = model(text, out, 0), model(text, out, 1)
    samples = drawn(before)
    [p], [q] = ran(before, samples), ran(after, samples)
    assert only(fidelity(before, after, samples)).kl == pytest.approx(divergence(p, q), rel=1e-4)


@pytest.mark.parametrize(
    ("body", "outputs", "kl", "agreement"),
    [
        ("y = MatMul(x, w)", "float[N, 6] y", True, True),
        ("l = MatMul(x, w) y = LogSoftmax(l)", "float[N, 6] y", True, True),
        ("l = MatMul(x, w) y = Sigmoid(l)", "float[N, 6] y", False, True),
        ("y = Mul(x, v)", "float[N, 4] y", False, True),
        ("l = Mul(x, v) y = ReduceSum<keepdims=1>(l)", "float[N, 1] y", False, False),
        ("l = Mul(x, v) y = ReduceMean<axes=[1], keepdims=0>(l)", "float[N] y", False, False),
    ],
)
def test_which_outputs_have_classes(body: str, outputs: str, kl: bool, agreement: bool) -> None:
    before, after = model(body, outputs, 0), model(body, outputs, 1)
    found = only(fidelity(before, after, drawn(before)))
    assert (found.kl is not None, found.agreement is not None) == (kl, agreement)
    assert found.cosine is not None
    assert found.sqnr is not None


def test_every_position_of_a_sequence_is_a_row() -> None:
    inputs, outputs = "float[N, S, 4] x", "float[N, S, 6] y"
    before, after = (model("y = MatMul(x, w)", outputs, seed, inputs) for seed in (0, 1))
    samples = drawn(before, 5, (3, 4))
    [a], [b] = ran(before, samples), ran(after, samples)
    found = only(fidelity(before, after, samples, 2))
    assert found.kl == pytest.approx(divergence(softmax(a), softmax(b)), rel=1e-5)
    assert found.agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
    assert found.cosine == pytest.approx(np.mean([(x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()) for x, y in zip(a, b, strict=True)]))


def test_every_output_has_its_figures_integers_too() -> None:
    text, out = "y = MatMul(x, w) k = ArgMax<axis=1, keepdims=0>(y) z = Mul(x, v)", "float[N, 6] y, int64[N] k, float[N, 4] z"
    before, after = model(text, out, 0), model(text, out, 1)
    samples = drawn(before, 40)
    found = {o.output: o for o in fidelity(before, after, samples, 7).outputs}
    one, other = ran(before, samples)[1], ran(after, samples)[1]
    assert list(found) == ["y", "k", "z"]
    assert found["k"].agreement == pytest.approx((one == other).mean()) == found["y"].agreement
    assert (found["k"].cosine, found["k"].kl, found["k"].sqnr) == (None, None, None)


def test_outputs_that_changed_size_are_left_out() -> None:
    before = model("y = MatMul(x, w) z = Relu(x)", "float[N, 6] y, float[N, 4] z")
    after = model("l = MatMul(x, w) y = Concat<axis=1>(l, l) z = Relu(x)", "float[N, 12] y, float[N, 4] z")
    assert only(fidelity(before, after, drawn(before))).output == "z"


def test_classes_that_are_masked_out_count_for_nothing() -> None:
    body = "l = MatMul(x, w) y = Add(l, mask)"
    mask = onnx.numpy_helper.from_array(np.float32([0, 0, -np.inf, 0, -np.inf, 0]), "mask")
    protos = [model(body, "float[N, 6] y", seed) for seed in (0, 1)]
    for proto in protos:
        proto.graph.initializer.append(mask)
    samples = drawn(protos[0])
    a, b = (ran(proto, samples)[0][:, [0, 1, 3, 5]] for proto in protos)
    found = only(fidelity(*protos, samples))
    assert found.kl == pytest.approx(divergence(softmax(a), softmax(b)), rel=1e-5)
    assert found.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-5)


def test_a_model_that_gives_nan_is_as_far_as_one_that_gives_zeros() -> None:
    before = model("y = MatMul(x, w)", "float[N, 6] y")
    broken = model("l = Sqrt(x) m = Neg(l) n = Sqrt(m) y = MatMul(n, w)", "float[N, 6] y")
    zeros = model("l = Sub(x, x) y = MatMul(l, w)", "float[N, 6] y")
    samples = drawn(before)
    found = only(fidelity(before, broken, samples))
    assert found == only(fidelity(before, zeros, samples))
    assert (found.cosine, found.sqnr) == (0, 0)


def test_models_of_half_precision_are_compared() -> None:
    body = "h = Cast<to=10>(x) s = Mul(h, h) y = Cast<to=1>(s)"
    half = model(body, "float[N, 4] y")
    assert only(fidelity(half, half, drawn(half))).sqnr == np.inf


def test_fidelity_without_samples_is_refused() -> None:
    with pytest.raises(OnnxPruneError, match="none: has no samples"):
        fidelity(two_layers(), two_layers(), read_calibration("none", load(two_layers())))


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_counts_right_samples_from_any_source(tmp_path: Path) -> None:
    before, after = two_layers(seed=0), two_layers(seed=1)
    x, labels = RNG.standard_normal((50, 4)).astype(np.float32), RNG.integers(0, 3, 50)
    for i in range(5):
        np.savez(tmp_path / f"{i}.npz", x=x[i * 10 : i * 10 + 10], labels=labels[i * 10 : i * 10 + 10])
    arrays = {"x": x, "labels": labels}
    a, b = (ran(proto, read_calibration(arrays, load(before)))[0].argmax(1) for proto in (before, after))
    found = evaluate(before, after, arrays, batch=8)
    assert (found.samples, found.before, found.after) == (50, (a == labels).mean(), (b == labels).mean())
    assert found.agreement == (a == b).mean()
    assert evaluate(before, after, read_calibration(tmp_path, load(before)), batch=7).after == found.after
    assert evaluate(before, after, {"x": x}).before is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(9), r"shape \[9\] for 10 samples"),
        (np.ones(10), "float64"),
        (np.ones((10, 2), int), r"\[2\] a sample"),
        (np.arange(10) % 3 + 1, "label 3 is no class of the model, which has 3"),
        (np.arange(10) % 3 - 1, "label -1"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels: np.ndarray, words: str) -> None:
    with pytest.raises(OnnxPruneError, match=words):
        evaluate(two_layers(), two_layers(), {"x": np.ones((10, 4), np.float32), "labels": labels})


def test_an_output_without_classes_has_no_accuracy() -> None:
    proto = model("l = Mul(x, v) y = ReduceSum<keepdims=1>(l)", "float[N, 1] y")
    found = evaluate(proto, proto, {"x": np.ones((3, 4), np.float32), "labels": np.zeros(3, int)})
    assert (found.before, found.agreement, found.outputs[0].sqnr) == (None, None, np.inf)


METRICS = """
import numpy as np
def error(outputs, data):
    return np.abs(outputs["logits"].argmax(1) - data["labels"]).mean()
def rows(outputs, data):
    return len(data["input"])
def lists(outputs, data):
    return [1, 2]
def breaks(outputs, data):
    return data["target"]
def data():
    digits = np.load({path!r})
    for start in range(0, 600, 100):
        yield {{k: digits[k][start : start + 100] for k in ("input", "labels")}}
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(METRICS.format(path=str(MODELS / "digits-mlp.eval.npz")))
    return path


def test_the_command_takes_a_metric_and_a_function_for_samples(command: Command, tmp_path: Path, metrics: Path) -> None:
    result = command(MLP, "-r", "0.4", "-o", "out.onnx", "--eval", "mine:data", "--metric", "mine:error", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())["evaluation"]
    digits = np.load(MODELS / "digits-mlp.eval.npz")
    for path, value, share in (
        (MLP, found["metric_before"], found["before"]),
        (tmp_path / "out.onnx", found["metric_after"], found["after"]),
    ):
        logits = np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": digits["input"]})[0])
        assert value == pytest.approx(np.abs(logits.argmax(1) - digits["labels"]).mean())
        assert share == pytest.approx((logits.argmax(1) == digits["labels"]).mean())
    for word in ("accuracy on 600 samples", "metric on 600 samples", "SQNR", "KL", "same class as the original"):
        assert word in result.stdout


def test_the_command_says_how_near_the_outputs_stay_without_data(command: Command, tmp_path: Path) -> None:
    result = command(MLP, "-r", "0.3", "-o", "out.onnx", "--eval", "noise", "--json", "-", "--no-verify")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["evaluation"]
    assert (found["samples"], found["before"]) == (4 * COUNT, None)
    [logits] = found["outputs"]
    assert 0 < logits["cosine"] < 1 < logits["sqnr"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "mine:error"], ["--metric", "give --eval"]),
        (["--preprocess", "unit"], ["--preprocess", "give one of them"]),
        (["--eval", "none"], ["none", "no samples"]),
        (["--eval", "nowhere"], ["nowhere", "no such file"]),
        (["--eval", "noise", "--metric", "mine"], ["'mine'", "module:function"]),
        (["--eval", "noise", "--metric", "mine:gone"], ["no function 'gone'"]),
        (["--eval", "mine:data", "--metric", "mine:lists"], ["metric lists", "list"]),
        (["--eval", "mine:data", "--metric", "mine:breaks"], ["metric breaks", "KeyError"]),
        (["--eval", MODELS / "digits-images.eval.npz"], ["'input'", "[600, 1, 8, 8]", "[batch, 64]"]),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    command: Command, tmp_path: Path, metrics: Path, arguments: list[str], words: list[str]
) -> None:
    failing(command(MLP, "-r", "0.3", "-o", "out.onnx", *arguments, "--no-verify"), 2, *words)
    assert not (tmp_path / "out.onnx").exists()


def test_a_metric_is_weighted_by_samples() -> None:
    def rows(outputs: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> int:
        return len(data["x"])

    found = evaluate(two_layers(), two_layers(), {"x": np.ones((5, 4), np.float32)}, batch=4, metric=rows)
    assert found.metric_before == (4 * 4 + 1 * 1) / 5


def test_the_command_takes_a_folder_of_images(command: Command, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra `images`, is not installed")
    digits = np.load(MODELS / "digits-images.eval.npz")["input"][:20, 0]
    top = float(digits.max())
    (tmp_path / "photos").mkdir()
    for i, digit in enumerate(digits):
        image.fromarray(np.round(digit / top * 255).astype(np.uint8)).save(tmp_path / "photos" / f"{i:02}.png")
    resnet = MODELS / "digits-resnet.onnx"
    spec = f"scale={top / 255}"
    result = command(resnet, "-r", "0.1", "-o", "o.onnx", "--eval", "photos", "--preprocess", spec, "--json", "-", "--no-verify")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["evaluation"]
    before, after = (
        np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": digits[:, None]})[0]).argmax(1)
        for path in (resnet, tmp_path / "o.onnx")
    )
    assert (found["samples"], found["agreement"]) == (20, (before == after).mean())
    failing(command(resnet, "-r", "0.1", "-o", "o.onnx", "--eval", "photos"), 2, "photos", "--preprocess")

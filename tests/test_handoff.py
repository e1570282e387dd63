"""Hand-off to training: a checkpoint cut by the exported indices, folded again, is what `apply` leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import MODELS, ROOT, Command, two_layers
from onnx import ModelProto, helper, numpy_helper

import onnxprune
from onnxprune import OnnxPruneError

EPSILON = 1e-5
State = dict[str, np.ndarray]


def tensors(model: ModelProto) -> State:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def with_tensors(model: ModelProto, arrays: Mapping[str, np.ndarray]) -> ModelProto:
    """The model with other values in some of its tensors."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(arrays[tensor.name]), tensor.name))
    return copy


def fold(weight: np.ndarray, norm: State) -> State:
    """A convolution's weight (out, …) and bias with its batch norm folded in, in float32 as an exporter does it."""
    scale = norm["weight"] / np.sqrt(norm["running_var"] + np.float32(EPSILON))
    shaped = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return {"weight": shaped.astype(np.float32), "bias": (norm["bias"] - norm["running_mean"] * scale).astype(np.float32)}


def random_norm(channels: int, rng: np.random.Generator) -> State:
    return {
        "weight": rng.uniform(-1.5, 1.5, channels).astype(np.float32),
        "bias": rng.normal(0, 0.3, channels).astype(np.float32),
        "running_mean": rng.normal(0, 0.3, channels).astype(np.float32),
        "running_var": rng.uniform(0.2, 2, channels).astype(np.float32),
    }


def unfolded(model: ModelProto, seed: int = 0) -> tuple[ModelProto, State, dict[str, str]]:
    """A model with norms folded into its anonymous convolutions, the checkpoint before that, and {weight: stem of the checkpoint}.

    Other tensors have their own names in the checkpoint, which is in the order of the graph.
    """
    rng, own = np.random.default_rng(seed), tensors(model)
    state: State = {}
    stems: dict[str, str] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name not in own:
                continue
            if node.op_type == "Conv" and "::" in name:
                if position == 1:
                    stem = stems[name] = f"stage.{len(stems)}"
                    norm = random_norm(len(own[name]), rng)
                    state[f"{stem}.conv.weight"] = own[name]
                    state |= {f"{stem}.bn.{k}": v for k, v in norm.items()}
                    state[f"{stem}.bn.num_batches_tracked"] = np.array(7)
                    folded = fold(own[name], norm)
                    model = with_tensors(model, {name: folded["weight"], node.input[2]: folded["bias"]})
            else:
                state[name] = own[name]
    return model, state, stems


def biases(model: ModelProto) -> dict[str, str]:
    """{a convolution's weight: its bias}."""
    return {n.input[1]: n.input[2] for n in model.graph.node if n.op_type == "Conv" and len(n.input) > 2}


def refolded(model: ModelProto, stems: Mapping[str, str], cut: State) -> State:
    """What the model's tensors are for a state of `unfolded`."""
    found = {name: array for name, array in cut.items() if not name.startswith("stage.")}
    for weight, stem in stems.items():
        folded = fold(cut[f"{stem}.conv.weight"], {k: cut[f"{stem}.bn.{k}"] for k in random_norm(1, np.random.default_rng(0))})
        found |= {weight: folded["weight"], biases(model)[weight]: folded["bias"]}
    return found


def same(pruned: ModelProto, expected: Mapping[str, np.ndarray]) -> None:
    """Every float tensor of the pruned model is the expected one, to the bit."""
    compared = 0
    for name, array in tensors(pruned).items():
        if array.dtype == np.float32 and array.ndim:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
            compared += 1
    assert compared


# --- what is found ----------------------------------------------------------------------------------------------------


def test_without_a_checkpoint_the_indices_are_those_of_the_files_tensors(command: Command, tmp_path: Path, shipped: str) -> None:
    model = MODELS / f"{shipped}.onnx"
    assert command("plan", model, "-r", "0.4", "-o", "plan.json", "--no-verify", "-q").returncode == 0
    assert command("apply", model, "plan.json", "-o", "small.onnx", "-q").returncode == 0
    result = command("export-plan", model, "plan.json", "-o", "kept.json")
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["format"] == 1
    cut = onnxprune.slice_state(tensors(onnx.load(model)), tmp_path / "kept.json")
    same(onnx.load(tmp_path / "small.onnx"), cut)
    for name, entry in kept["parameters"].items():
        assert name not in cut or list(cut[name].shape) == entry["new_shape"]


def test_folded_norms_of_a_mobilenet_follow_their_convolutions(command: Command, tmp_path: Path) -> None:
    model, state, stems = unfolded(onnx.load(MODELS / "digits-mobilenet.onnx"))
    assert len(stems) > 15
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "state.npz", **state)
    assert command("plan", "model.onnx", "-r", "0.4", "-o", "plan.json", "--no-verify", "-q").returncode == 0
    assert command("apply", "model.onnx", "plan.json", "-o", "small.onnx", "-q").returncode == 0
    result = command("export-plan", "model.onnx", "plan.json", "--state-dict", "state.npz", "-o", "kept.json")
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["unmatched"] == []
    assert set(kept["parameters"]) == set(state)
    pruned = onnx.load(tmp_path / "small.onnx")
    same(pruned, refolded(model, stems, onnxprune.slice_state(state, kept)))
    groups = {a.i for n in pruned.graph.node for a in n.attribute if a.name == "group" and a.i > 1}
    assert {entry["groups"] for entry in kept["parameters"].values() if "groups" in entry} == groups


@pytest.mark.parametrize("name", ["digits-resnet", "digits-mobilenet", "digits-conv1d", "digits-mlp"])
def test_other_names_and_layouts_are_found_by_values(name: str) -> None:
    """Keras' layouts: convolution kernels with the channels last, dense kernels transposed; every name another."""
    model = onnx.load(MODELS / f"{name}.onnx")
    plan = onnxprune.plan(model, 0.4, verify=False)
    own = tensors(model)
    other = {key: f"layer_{i}/kernel" for i, key in enumerate(own)}

    def turned(array: np.ndarray, back: bool) -> np.ndarray:
        order = {4: (3, 2, 0, 1) if back else (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0)}.get(array.ndim)
        return array.transpose(order) if order else array

    kept = onnxprune.keep_indices(model, plan, {other[key]: turned(array, False) for key, array in own.items()})
    assert kept.complete
    cut = onnxprune.slice_state({other[key]: turned(array, False) for key, array in own.items()}, kept)
    same(onnxprune.apply(model, plan).model, {key: turned(cut[other[key]], True) for key in own})


def test_depthwise_kernels_with_a_multiplier_are_two_axes_of_one() -> None:
    """Keras' (height, width, channels, multiplier) is ONNX's (channels × multiplier, 1, height, width)."""
    rng = np.random.default_rng(0)
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        depthwise (float[1, 3, 6, 6] x) => (float[1, 5, 2, 2] y) {
            a = Conv(x, first)
            r = Relu(a)
            d = Conv<group: int = 8>(r, middle)
            y = Conv(d, last)
        }"""
    model = onnx.parser.parse_model(text)
    shapes = {"first": (8, 3, 1, 1), "middle": (16, 1, 3, 3), "last": (5, 16, 3, 3)}
    own = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in own.items())
    plan = onnxprune.plan(model, 0.4, verify=False)
    kernel = own["middle"].reshape(8, 2, 3, 3).transpose(2, 3, 0, 1)
    kept = onnxprune.keep_indices(model, plan, {"a": own["first"], "b": kernel, "c": own["last"]})
    cut = onnxprune.slice_state({"b": kernel, "a": own["first"], "c": own["last"]}, kept)["b"]
    pruned = tensors(onnxprune.apply(model, plan).model)["middle"]
    assert len(pruned) < 16
    np.testing.assert_array_equal(cut.transpose(2, 3, 0, 1).reshape(pruned.shape), pruned)


def test_biases_of_zeros_that_the_exporter_merged_follow_their_layers() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        merged (float[N, 6] x) => (float[N, 3] y) {
            a = MatMul(x, w1)
            b = Add(a, zeros)
            c = Relu(b)
            d = MatMul(c, w2)
            e = Add(d, zeros)
            f = Relu(e)
            y = MatMul(f, w3)
        }"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in {"w1": (6, 8), "w2": (8, 8), "w3": (8, 3)}.items()}
    weights["w1"][:, 2] *= 0.01  # the units that go are not the same in both layers
    weights["w2"][:, 5] *= 0.01
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in (weights | {"zeros": np.zeros(8, np.float32)}).items())
    plan = onnxprune.plan(model, 0.15, of="channels", verify=False)
    state = {"one.weight": weights["w1"].T, "one.bias": np.zeros(8), "two.weight": weights["w2"].T, "two.bias": np.zeros(8)}
    kept = onnxprune.keep_indices(model, plan, {**state, "three.weight": weights["w3"].T})
    assert kept.complete
    for layer in ("one", "two"):
        np.testing.assert_array_equal(kept.parameters[f"{layer}.bias"].keep[0], kept.parameters[f"{layer}.weight"].keep[0])
    assert kept.parameters["one.bias"].keep[0].tolist() != kept.parameters["two.bias"].keep[0].tolist()


def test_a_norm_that_was_written_as_a_product_and_a_sum() -> None:
    model, rng = two_layers(hidden=8), np.random.default_rng(3)
    norm = random_norm(8, rng)
    scale = norm["weight"] / np.sqrt(norm["running_var"] + np.float32(1e-3))
    model.graph.node[1].CopyFrom(helper.make_node("Mul", ["h", "scale"], ["s"]))
    model.graph.node.insert(2, helper.make_node("Add", ["s", "b1"], ["b"]))
    model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    model = with_tensors(model, {"b1": norm["bias"] - norm["running_mean"] * scale})
    plan = onnxprune.plan(model, 0.4, verify=False)
    state = {"fc.weight": tensors(model)["w1"].T, **{f"bn.{k}": v for k, v in norm.items()}, "out.weight": tensors(model)["w2"].T}
    kept = onnxprune.keep_indices(model, plan, state)
    assert kept.complete
    cut = onnxprune.slice_state(state, kept)
    pruned = tensors(onnxprune.apply(model, plan).model)
    assert len(pruned["scale"]) < 8
    np.testing.assert_array_equal(cut["bn.weight"] / np.sqrt(cut["bn.running_var"] + np.float32(1e-3)), pruned["scale"])
    np.testing.assert_array_equal(cut["bn.bias"] - cut["bn.running_mean"] * pruned["scale"], pruned["b1"])


def test_gates_of_an_lstm_in_another_order() -> None:
    """torch's (input, forget, cell, output) is ONNX's (input, output, forget, cell); its two biases are one tensor there."""
    rng, hidden, inputs = np.random.default_rng(0), 12, 5
    state = {
        "rnn.weight_ih_l0": rng.standard_normal((4 * hidden, inputs)).astype(np.float32),
        "rnn.weight_hh_l0": rng.standard_normal((4 * hidden, hidden)).astype(np.float32),
        "rnn.bias_ih_l0": rng.standard_normal(4 * hidden).astype(np.float32),
        "rnn.bias_hh_l0": rng.standard_normal(4 * hidden).astype(np.float32),
        "head.weight": rng.standard_normal((3, hidden)).astype(np.float32),
    }

    def gates(array: np.ndarray) -> np.ndarray:
        i, f, c, o = np.split(array, 4)
        return np.concatenate([i, o, f, c])

    def packed(state: Mapping[str, np.ndarray]) -> State:
        w, r, b1, b2 = (gates(state[f"rnn.{n}_l0"]) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        return {"W": w[None], "R": r[None], "B": np.concatenate([b1, b2])[None], "H": state["head.weight"].T}

    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        recurrent (float[7, 2, {inputs}] x) => (float[7, 1, 2, 3] y) {{
            s = LSTM<hidden_size: int = {hidden}>(x, W, R, B)
            y = MatMul(s, H)
        }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in packed(state).items())
    plan = onnxprune.plan(model, 0.4, verify=False)
    kept = onnxprune.keep_indices(model, plan, state)
    assert kept.complete
    cut = onnxprune.slice_state(state, kept)
    assert len(cut["rnn.weight_hh_l0"]) < 4 * hidden
    same(onnxprune.apply(model, plan).model, packed(cut))


def test_branches_that_go_take_their_parameters_with_them() -> None:
    model, state, stems = unfolded(onnx.load(MODELS / "digits-mobilenet.onnx"))
    plan = onnxprune.plan(model, 0.2, granularity="block", criterion="random")
    kept = onnxprune.keep_indices(model, plan, state)
    assert kept.complete
    pruned = tensors(onnxprune.apply(model, plan).model)
    gone = {stem for weight, stem in stems.items() if weight not in pruned}
    assert gone
    assert {".".join(n.split(".")[:2]) for n in kept.removed if n.startswith("stage.")} == gone
    assert sum(n.endswith("running_var") for n in kept.removed) == len(gone)
    cut = onnxprune.slice_state(state, kept)
    assert not set(kept.removed) & set(cut)
    np.testing.assert_array_equal(cut["head.0.weight"], state["head.0.weight"])


def test_a_checkpoint_that_was_trained_on_is_matched_by_names(command: Command, tmp_path: Path) -> None:
    model = MODELS / "digits-mlp.onnx"
    rng = np.random.default_rng(0)
    state = {f"module.{n}": a + rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in tensors(onnx.load(model)).items()}
    np.savez(tmp_path / "state.npz", **state)
    assert command("plan", model, "-r", "0.4", "-o", "plan.json", "--no-verify", "-q").returncode == 0
    result = command("export-plan", model, "plan.json", "--state-dict", "state.npz", "-o", "kept.json")
    assert result.returncode == 0, result.stderr
    assert "values are not the model's" in result.stdout
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert {entry["by"] for entry in kept["parameters"].values()} == {"name"}
    trained = with_tensors(onnx.load(model), {n.removeprefix("module."): a for n, a in state.items()})
    cut = onnxprune.slice_state(state, kept)
    same(onnxprune.apply(trained, tmp_path / "plan.json").model, {n.removeprefix("module."): a for n, a in cut.items()})


def test_half_precision_checkpoints_match_a_float_model() -> None:
    model = onnx.load(MODELS / "digits-conv1d.onnx")
    plan = onnxprune.plan(model, 0.4, verify=False)
    own = tensors(model)
    names = {key: f"p{i}" for i, key in enumerate(own)}
    kept = onnxprune.keep_indices(model, plan, {names[key]: array.astype(np.float16) for key, array in own.items()})
    assert kept.complete
    same(onnxprune.apply(model, plan).model, {k: onnxprune.slice_state({names[i]: a for i, a in own.items()}, kept)[names[k]] for k in own})


# --- what is left open ------------------------------------------------------------------------------------------------


def two_alike() -> tuple[ModelProto, dict[str, object], State]:
    """Two layers in a row with equal weights, a plan that takes different units from them, and a checkpoint with both."""
    rng = np.random.default_rng(0)
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        alike (float[N, 6] x) => (float[N, 6] y) {
            a = MatMul(x, w0)
            b = Relu(a)
            c = MatMul(b, w1)
            d = Relu(c)
            e = MatMul(d, w2)
            f = Relu(e)
            y = MatMul(f, w3)
        }"""
    model = onnx.parser.parse_model(text)
    middle = rng.standard_normal((6, 6)).astype(np.float32)
    own = {"w0": rng.standard_normal((6, 6)).astype(np.float32), "w1": middle, "w2": middle, "w3": middle[::-1] * 2}
    model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in own.items())
    plan = onnxprune.plan(model, 0.3, of="channels", verify=False, criterion="random").to_json()
    for i, entry in enumerate(plan["groups"]):
        entry["remove"] = [i]
    return model, plan, own


def test_equal_parameters_that_lose_different_units_are_reported_and_left_alone(command: Command, tmp_path: Path) -> None:
    model, plan, own = two_alike()
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    state = {"first": own["w0"], "second": own["w1"], "third": own["w2"], "fourth": own["w3"]}
    np.savez(tmp_path / "state.npz", **state)
    result = command("export-plan", "model.onnx", "plan.json", "--state-dict", "state.npz", "-o", "kept.json")
    assert result.returncode == 3
    warnings = result.stderr.splitlines()
    assert [line.split("'")[1] for line in warnings[:2]] == ["second", "third"]
    assert all("'w1' and 'w2', which lose different units" in line for line in warnings[:2])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [entry.get("parameter", entry.get("tensor")) for entry in kept["unmatched"]] == ["second", "third", "w1", "w2"]
    cut = onnxprune.slice_state(state, kept)
    assert cut["second"] is state["second"]
    assert cut["first"].shape == (6, 5)


def test_names_decide_between_equal_parameters() -> None:
    model, plan, own = two_alike()
    kept = onnxprune.keep_indices(model, plan, own)
    assert kept.complete
    same(onnxprune.apply(model, plan).model, onnxprune.slice_state(own, kept))


def test_a_symmetric_weight_is_not_guessed_to_lie_one_way() -> None:
    model = two_layers(hidden=4)
    own = tensors(model)
    own["w1"] = (own["w1"] + own["w1"].T).astype(np.float32)
    model = with_tensors(model, own)
    plan = onnxprune.plan(model, 0.3, of="channels", verify=False)
    anonymous = {"a": own["w1"], "b": own["b1"], "c": own["w2"]}
    kept = onnxprune.keep_indices(model, plan, anonymous)
    assert kept.unmatched == (("a", "it fits 'w1' with the axes in several orders"),)
    assert onnxprune.keep_indices(model, plan, own).complete  # under its own name it lies as it does there


def test_norms_that_fit_by_no_epsilon_are_not_guessed() -> None:
    model, state, stems = unfolded(onnx.load(MODELS / "digits-mobilenet.onnx"))
    stem = list(stems.values())[3]
    state[f"{stem}.bn.running_var"] = state[f"{stem}.bn.running_var"] * np.float32(1.5)
    kept = onnxprune.keep_indices(model, onnxprune.plan(model, 0.4, verify=False), state)
    assert {name for name, _ in kept.unmatched} == {f"{stem}.bn.{leaf}" for leaf in random_norm(1, np.random.default_rng(0))}
    assert f"{stem}.conv.weight" in kept.parameters


@pytest.mark.parametrize("first", ["norm", "convolution"])
def test_a_norm_that_was_never_trained_is_placed_by_its_neighbours_alone(first: str) -> None:
    """A norm of ones and zeros fits every layer into which such a norm was folded, and this one was not folded at all."""
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        untrained (float[1, 3, 6, 6] x) => (float[1, 4, 6, 6] y) {
            s = Conv(x, w1)
            n = BatchNormalization(s, ones, zeros, zeros, ones)
            r = Relu(n)
            m = Conv(r, between)
            q = Relu(m)
            c = Conv(q, w2, b2)
            d = Relu(c)
            y = Conv(d, w3)
        }"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    fresh = {"weight": np.ones(8), "bias": np.zeros(8), "running_mean": np.zeros(8), "running_var": np.ones(8)}
    norm = {leaf: array.astype(np.float32) for leaf, array in fresh.items()}
    w1, w2, w3 = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 3, 1, 1), (8, 6, 1, 1), (4, 8, 1, 1)))
    between = rng.standard_normal((6, 8, 1, 1)).astype(np.float32)
    w1[2] *= 0.01  # the units that go are not the same in both layers
    w2[5] *= 0.01
    folded = fold(w2, norm)
    own = {
        "w1": w1,
        "between": between,
        "w2": folded["weight"],
        "b2": folded["bias"],
        "w3": w3,
        "ones": np.ones(8, np.float32),
        "zeros": np.zeros(8, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in own.items())
    plan = onnxprune.plan(model, 0.15, of="channels", verify=False)
    early = {f"norm1.{leaf}": array for leaf, array in norm.items()}
    state = {"conv1.weight": w1, **early} if first == "convolution" else {**early, "conv1.weight": w1}
    kept = onnxprune.keep_indices(
        model,
        plan,
        {**state, "between.weight": between, "conv2.weight": w2, **{f"norm2.{k}": v for k, v in norm.items()}, "conv3.weight": w3},
    )
    assert {name for name, _ in kept.unmatched} == (set() if first == "convolution" else set(early))
    for number in (1, 2) if first == "convolution" else (2,):
        for leaf in norm:
            rows = kept.parameters[f"conv{number}.weight"].keep[0].tolist()
            assert kept.parameters[f"norm{number}.{leaf}"].keep[0].tolist() == rows
    assert kept.parameters["conv1.weight"].keep[0].tolist() != kept.parameters["conv2.weight"].keep[0].tolist()


def test_a_norm_whose_shift_does_not_fit_the_bias_is_not_matched() -> None:
    model, state, stems = unfolded(onnx.load(MODELS / "digits-mobilenet.onnx"))
    stem = list(stems.values())[2]
    state[f"{stem}.bn.bias"] = state[f"{stem}.bn.bias"][::-1].copy()
    kept = onnxprune.keep_indices(model, onnxprune.plan(model, 0.4, verify=False), state)
    assert f"{stem}.bn.weight" in dict(kept.unmatched)


def test_a_tensor_that_no_parameter_has_is_named(command: Command, tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "model.onnx")
    own = tensors(two_layers())
    np.savez(tmp_path / "state.npz", first=own["w1"], second=own["w2"])
    assert command("plan", "model.onnx", "-r", "0.5", "-o", "plan.json", "-q").returncode == 0
    result = command("export-plan", "model.onnx", "plan.json", "--state-dict", "state.npz", "-o", "kept.json", "-q")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.splitlines() == ["warning: 'b1': it loses units, and no parameter has its values"]


# --- slicing ----------------------------------------------------------------------------------------------------------


def kept_of_two_layers() -> tuple[State, onnxprune.HandOff]:
    model = two_layers()
    return tensors(model), onnxprune.keep_indices(model, onnxprune.plan(model, 0.4), tensors(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("w1"), "no 'w1'"),
        (lambda state: state.update(w1=state["w1"][:, :3]), "'w1' is [4, 3], in the export [4, 8]"),
        (lambda state: state.update(more=state["w1"]), "'more' was not in the checkpoint"),
    ],
)
def test_another_state_is_refused(change: Callable[[State], object], words: str) -> None:
    state, kept = kept_of_two_layers()
    change(state)
    with pytest.raises(OnnxPruneError, match=re.escape(words)):
        onnxprune.slice_state(state, kept)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2, "parameters": {}}', '{"format": 1, "parameters": {"w": {"shape": [2], "keep": {"0": [5]}}}}']
)
def test_other_files_are_no_exports(content: str, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text(content)
    with pytest.raises(OnnxPruneError, match=r"kept\.json.*export-plan"):
        onnxprune.slice_state({}, tmp_path / "kept.json")


def test_the_json_says_what_the_object_says() -> None:
    state, kept = kept_of_two_layers()
    written = onnxprune.slice_state(state, json.loads(json.dumps(kept.to_json())))
    for name, array in onnxprune.slice_state(state, kept).items():
        np.testing.assert_array_equal(written[name], array)
        assert array.shape == kept.parameters[name].new_shape


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_said_in_one_line(command: Command, tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "model.onnx")
    assert command("plan", "model.onnx", "-r", "0.5", "-o", "plan.json", "-q").returncode == 0
    np.savez(tmp_path / "other.npz", w=np.random.default_rng(1).standard_normal((4, 9)))
    np.savez(tmp_path / "words.npz", w=np.array(["a", "b"]))
    (tmp_path / "state.txt").write_text("")
    cases = {
        ("plan.json", "--state-dict", "other.npz"): "holds none of the checkpoint's values",
        ("plan.json", "--state-dict", "words.npz"): "'w' is no array of numbers",
        ("plan.json", "--state-dict", "state.txt"): "a checkpoint is one of .npz",
        ("plan.json", "--state-dict", "missing.npz"): "no such file",
        ("none.json",): "cannot be read",
    }
    for arguments, words in cases.items():
        result = command("export-plan", "model.onnx", *arguments, "-o", "kept.json")
        assert result.returncode == 2, arguments
        assert len(result.stderr.splitlines()) == 1
        assert words in result.stderr
        assert not (tmp_path / "kept.json").exists()
    same_file = command("export-plan", "model.onnx", "plan.json", "-o", "plan.json")
    assert same_file.returncode == 2
    assert json.loads((tmp_path / "plan.json").read_text())["groups"]


# --- the documentation, run -------------------------------------------------------------------------------------------


def blocks(framework: str) -> list[str]:
    """The Python of a chapter of docs/fine-tuning.md."""
    text = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    chapter = text.split(f"## {framework}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)


def test_the_torch_example_gives_the_module_that_the_pruned_model_is(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    nn = torch.nn

    class Net(nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            self.wide = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1))
            self.norm = nn.GroupNorm(4, 16)
            self.up = nn.ConvTranspose2d(16, 12, 2, 2)
            self.rnn = nn.LSTM(12 * 8, 20, batch_first=True, bidirectional=True)
            self.head = nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 5))

        def forward(self, x):  # type: ignore[no-untyped-def]
            x = self.stem(x)
            x = torch.relu(self.up(self.norm(x + self.wide(x))))
            return self.head(self.rnn(x.permute(0, 2, 1, 3).flatten(2))[0])

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model(torch.randn(8, 3, 4, 4))  # moves the norms' statistics
    model.eval()
    x = torch.randn(2, 3, 4, 4)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False, input_names=["x"])
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "model.pt")
    assert command("model.onnx", "-r", "0.4", "--of", "channels", "-o", "smaller.onnx", "--plan-out", "plan.json", "-q").returncode == 0
    result = command("export-plan", "model.onnx", "plan.json", "--state-dict", "model.pt", "-o", "kept.json")
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    scope = {"model": model}
    for block in blocks("PyTorch"):
        exec(block, scope)
    (expected,) = ort.InferenceSession(tmp_path / "smaller.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    found = model(x)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    assert model.stem[0].out_channels < 16
    found.sum().backward()  # it trains
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def keras_like() -> tuple[ModelProto, State]:
    """What tf2onnx makes of Conv2D, BatchNormalization, ReLU, DepthwiseConv2D, Flatten and Dense, and the weights by their paths."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    state = {
        "conv2d/kernel": array(3, 3, 3, 12),
        "conv2d/bias": array(12),
        "batch_normalization/gamma": array(12),
        "batch_normalization/beta": array(12),
        "batch_normalization/moving_mean": array(12),
        "batch_normalization/moving_variance": np.abs(array(12)) + np.float32(0.1),
        "depthwise_conv2d/kernel": array(3, 3, 12, 1),
        "depthwise_conv2d/bias": np.zeros(12, np.float32),
        "dense/kernel": array(4 * 4 * 12, 20),
        "dense/bias": np.zeros(20, np.float32),
        "dense_1/kernel": array(20, 4),
        "dense_1/bias": array(4),
    }
    text = """
        <ir_version: 8, opset_import: ["": 15]>
        keras (float[N, 8, 8, 3] x) => (float[N, 4] y) {
            t = Transpose<perm: ints = [0, 3, 1, 2]>(x)
            c = Conv(t, fused_weights, fused_bias)
            r = Relu(c)
            d = Conv<group: int = 12>(r, depthwise)
            b = Transpose<perm: ints = [0, 2, 3, 1]>(d)
            f = Reshape(b, shape)
            m = MatMul(f, dense)
            a = Relu(m)
            o = MatMul(a, last)
            y = Add(o, last_bias)
        }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in as_exported(state).items())
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [-1, 192])
    model.graph.initializer.append(shape)
    return model, state


def as_exported(state: Mapping[str, np.ndarray]) -> State:
    scale = state["batch_normalization/gamma"] / np.sqrt(state["batch_normalization/moving_variance"] + np.float32(1e-3))
    offset = (state["conv2d/bias"] - state["batch_normalization/moving_mean"]) * scale + state["batch_normalization/beta"]
    return {
        "fused_weights": (state["conv2d/kernel"] * scale).transpose(3, 2, 0, 1),
        "fused_bias": offset,
        "depthwise": state["depthwise_conv2d/kernel"].transpose(2, 3, 0, 1),
        "dense": state["dense/kernel"],
        "last": state["dense_1/kernel"],
        "last_bias": state["dense_1/bias"],
    }


def test_keras_weights_with_a_folded_norm_and_biases_that_were_left_out(command: Command, tmp_path: Path) -> None:
    model, state = keras_like()
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "model.npz", **state)
    assert command("model.onnx", "-r", "0.4", "-o", "smaller.onnx", "--plan-out", "plan.json", "-q").returncode == 0
    result = command("export-plan", "model.onnx", "plan.json", "--state-dict", "model.npz", "-o", "kept.json")
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "kept.json").read_text())
    cut = onnxprune.slice_state(state, kept)
    same(onnx.load(tmp_path / "smaller.onnx"), as_exported(cut))
    assert len(cut["depthwise_conv2d/bias"]) == cut["depthwise_conv2d/kernel"].shape[2] < 12
    assert len(cut["dense/bias"]) == cut["dense/kernel"].shape[1] < 20


def test_the_keras_example_gives_a_model_with_the_weights_that_stay(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = pytest.importorskip("keras", reason="keras is not installed")
    proto, state = keras_like()
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 3))
    for layer in (
        layers.Conv2D(12, 3, name="conv2d"),
        layers.BatchNormalization(name="batch_normalization"),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, name="depthwise_conv2d"),
        layers.Flatten(),
        layers.Dense(20, activation="relu", name="dense"),
        layers.Dense(4, name="dense_1"),
    ):
        x = layer(x)
    net = keras.Model(inputs, x)
    for weight in net.weights:
        weight.assign(state[weight.path])
    onnx.save(proto, tmp_path / "model.onnx")
    assert command("model.onnx", "-r", "0.4", "-o", "smaller.onnx", "--plan-out", "plan.json", "-q").returncode == 0
    monkeypatch.chdir(tmp_path)
    scope = {"model": net}
    first, rest = blocks("Keras")
    exec(first, scope)
    assert command("export-plan", "model.onnx", "plan.json", "--state-dict", "model.npz", "-o", "kept.json").returncode == 0
    exec(rest, scope)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    (expected,) = ort.InferenceSession(tmp_path / "smaller.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    smaller = scope["smaller"]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(smaller(x)), expected, rtol=1e-3, atol=1e-4)  # type: ignore[operator]

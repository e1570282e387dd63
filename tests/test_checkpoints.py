"""Checkpoints of every format, whole and broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxprune.checkpoints import read_checkpoint
from onnxprune.errors import OnnxPruneError

KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


def safetensors(arrays: dict[str, np.ndarray], **metadata: str) -> bytes:
    """The arrays as the format's description says, header first."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": KINDS[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(dict(sorted(header.items()))).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_safetensors_of_every_type_in_the_order_of_the_data(tmp_path: Path) -> None:
    numbers = np.arange(6).reshape(2, 3)
    arrays = {f"z{len(KINDS) - i}": numbers.astype(np.dtype(getattr(ml_dtypes, k, k))) for i, k in enumerate(KINDS)}
    arrays["scalar"], arrays["empty"] = np.array(3.5), np.zeros((0, 4), np.float32)
    (tmp_path / "state.safetensors").write_bytes(safetensors(arrays, format="pt"))
    found = read_checkpoint(tmp_path / "state.safetensors")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {"a.weight": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "a.bias": np.ones(4, np.float16)}
    package.save_file(arrays, tmp_path / "state.safetensors")
    found = read_checkpoint(tmp_path / "state.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


WHOLE = safetensors({"w": np.ones((2, 3), np.float32)})


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut short"),
        (WHOLE[:40], "cut short"),
        (WHOLE[:-4], "cut short"),
        ((1 << 62).to_bytes(8, "little") + WHOLE[8:], "cut short"),
        (with_header([1]), "cut short"),
        (with_header({"w": {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]}}), "cut short"),
        (with_header({"w": {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 24]}}), "cut short"),
        (with_header({"w": {"dtype": "F32", "shape": [6]}}), "cut short"),
        (with_header({"w": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}}), "type F4"),
        (with_header({}), "holds no arrays"),
    ],
)
def test_broken_safetensors(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(OnnxPruneError, match=words):
        read_checkpoint(tmp_path / "state.safetensors")


@pytest.mark.parametrize("name", ["state.npz", "state.pt", "state.h5", "state.weights.h5", "state.keras"])
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(OnnxPruneError, match=name) as error:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package"), [("state.pt", "torch"), ("state.bin", "torch"), ("m.keras", "h5py"), ("w.weights.h5", "h5py")]
)
def test_a_format_whose_package_is_missing_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OnnxPruneError, match=f"{package} is needed"):
        read_checkpoint(tmp_path / name)


def test_torch_checkpoints_bare_and_nested(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    state = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    for content in (state, {"model": state, "epoch": 2}, {"state_dict": {"model": state}}, {"step": torch.tensor(1), "state_dict": state}):
        torch.save(content, tmp_path / "state.pt")
        found = read_checkpoint(tmp_path / "state.pt")
        assert list(found) == ["w", "b", "n"]
        np.testing.assert_array_equal(found["w"], state["w"].numpy())
        assert found["b"].tolist() == [1, 1]
    torch.save({"epoch": 2}, tmp_path / "none.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("none.pt", "module.pt"):
        with pytest.raises(OnnxPruneError, match="state_dict"):
            read_checkpoint(tmp_path / name)


def test_keras_weights(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    import zipfile

    kernel = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = kernel
        file["optimizer/vars/0"] = kernel
        file["note"] = "text"
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    for name in ("model.weights.h5", "m.keras"):
        found = read_checkpoint(tmp_path / name)
        assert list(found) == ["layers/dense/vars/0"]
        np.testing.assert_array_equal(found["layers/dense/vars/0"], kernel)

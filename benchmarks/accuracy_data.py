"""The arrays that accuracy.py calibrates and measures with: <model>.calibration.npz and <model>.eval.npz in one folder.

CIFAR-10 for the models that are trained on it, sentences for MiniLM (minilm.py writes those), and for models without data what
comes closest without one: enlarged CIFAR images for image models, the bytes of Python's own library for a file-type classifier, its feeds,
shifted and noisy, for a voice detector, else normal noise.  Calibration and evaluation never share a sample.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "real"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A model to measure.  measure: the metric that counts; make: (calibration, evaluation) arrays where no script writes them.

    batch: samples a run; 0 where the arrays are one run's feeds as they are.  target: what is to be reached, (ratio, metric), and
    free: without any sample, half of the way there from L1 norms, uniform, without compensation, as measured before the start.
    """

    measure: str
    make: Callable[[], tuple[Arrays, Arrays]] | None = None
    batch: int = 250
    kind: str = "other"
    target: tuple[tuple[float, float], ...] = ()
    free: tuple[tuple[float, float], ...] = ()


def pictures(height: int, width: int, prepare: Callable[[np.ndarray], np.ndarray], count: int) -> Callable[[], tuple[Arrays, Arrays]]:
    """CIFAR images enlarged between their pixels; prepare: (n, height, width, 3) in 0-255 to what the model takes."""

    def make() -> tuple[Arrays, Arrays]:
        content = np.load(REAL / "cifar10.npz")
        sets = (content["calibration_images"][:count], content["test_images"][:count])
        one, other = ({"": prepare(enlarged(images, height, width))} for images in sets)
        return one, other

    return make


def enlarged(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, h, w, 3) uint8 to (n, height, width, 3) float32, linear between pixels."""
    result = images.astype(np.float32)
    for axis, size in ((1, height), (2, width)):
        places = np.linspace(0, images.shape[axis] - 1, size)
        low = np.minimum(places.astype(int), images.shape[axis] - 2)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        part = (places - low).astype(np.float32).reshape(shape)
        result = np.take(result, low, axis) * (1 - part) + np.take(result, low + 1, axis) * part
    return result


def noise(*shape: int) -> Callable[[], tuple[Arrays, Arrays]]:
    def make() -> tuple[Arrays, Arrays]:
        one, other = ({"": np.random.default_rng(seed).standard_normal((256, *shape), dtype=np.float32)} for seed in (0, 1))
        return one, other

    return make


def contents() -> tuple[Arrays, Arrays]:
    """First and last 2048 bytes of files of Python's library, 256 where a file is shorter: what magika reads."""
    files = sorted(p for p in Path(sysconfig.get_path("stdlib")).rglob("*.*") if p.is_file() and "site-packages" not in p.parts)
    order = np.random.default_rng(0).permutation(len(files))[:256]
    rows = np.full((len(order), 4096), 256, np.int32)
    for row, i in zip(rows, order, strict=True):
        content = np.frombuffer(files[i].read_bytes().strip(), np.uint8)
        head, tail = content[:2048], content[-2048:]
        row[: len(head)] = head
        row[4096 - len(tail) :] = tail
    return {"": rows[:128]}, {"": rows[128:]}


def speech() -> tuple[Arrays, Arrays]:
    """The detector's feeds, shifted, scaled and noisy."""
    given = feeds("wild-silero-vad-16k") or {}

    def some(seed: int) -> Arrays:
        generator = np.random.default_rng(seed)
        sound = np.concatenate([np.roll(given["input"], shift, axis=1) for shift in generator.integers(0, 576, 64)])
        sound = sound * generator.uniform(0.2, 1.5, (64, 1)) + 0.01 * generator.standard_normal(sound.shape)
        return given | {"input": sound.astype(np.float32), "state": np.repeat(given["state"], 64, axis=1)}

    return some(0), some(1)


SUBJECTS = {
    "resnet20-cifar10": Subject("accuracy", kind="cifar", target=((0.3, 0.86), (0.5, 0.825)), free=((0.3, 0.67), (0.5, 0.4905))),
    "resnet56-cifar10": Subject("accuracy", kind="cifar", target=((0.3, 0.885), (0.5, 0.868)), free=((0.3, 0.8455), (0.5, 0.5895))),
    "minilm": Subject("cosine", batch=50, kind="minilm", target=((0.3, 0.97),)),
    "tiny-resnet8-cifar10": Subject("accuracy"),
    "tiny-mobilenetv1-025-vww": Subject("agreement", pictures(96, 96, lambda x: x / 255, 256)),
    "tiny-dscnn-kws": Subject("agreement", noise(49, 10, 1)),
    "tiny-autoencoder-toycar": Subject("cosine", noise(640)),
    "wild-yunet-n-320": Subject("cosine", pictures(320, 320, lambda x: x[..., ::-1].transpose(0, 3, 1, 2), 32), batch=1),
    "wild-ultraface-slim-320": Subject("cosine", pictures(240, 320, lambda x: ((x - 127) / 128).transpose(0, 3, 1, 2), 32), batch=1),
    "wild-silero-vad-16k": Subject("cosine", speech, batch=0),
    "wild-magika-v2": Subject("agreement", contents, batch=32),
}


def model_path(name: str, folder: Path) -> Path:
    return folder / "minilm.onnx" if name == "minilm" else REAL / f"{name}.onnx"


def feeds(name: str) -> Arrays | None:
    """The inputs that a model comes with, for one whose free sizes cannot be guessed."""
    path = REAL / f"{name}.feeds.npz"
    return dict(np.load(path)) if path.is_file() else None


def arrays_path(name: str, folder: Path, which: str) -> Path:
    """`which`: calibration or eval.  Written where it is not there yet."""
    path = folder / f"{name}.{which}.npz"
    if not path.is_file():
        write(name, folder)
    return path


def write(name: str, folder: Path) -> None:
    make = SUBJECTS[name].make
    folder.mkdir(parents=True, exist_ok=True)
    if name == "minilm":
        sys.exit(f"{folder}/minilm.onnx and its arrays are not there: python benchmarks/minilm.py {folder}")
    if make is None:
        subprocess.run([sys.executable, str(REAL / "data.py"), str(folder)], check=True)
        return
    for which, arrays in zip(("calibration", "eval"), make(), strict=True):
        first = input_name(REAL / f"{name}.onnx")
        content = {key or first: np.array(array, order="C") for key, array in arrays.items()}
        np.savez(folder / f"{name}.{which}.npz", **content)  # type: ignore[arg-type]


def input_name(path: Path) -> str:
    import onnx

    graph = onnx.load(path).graph
    weights = {t.name for t in graph.initializer}
    return str(next(v.name for v in graph.input if v.name not in weights))

"""What two settings rest on: how fast distillation goes, and what pictures `--calibration noise` draws.

    python benchmarks/settings.py --rates 1e-3 2e-3 4e-3 8e-3
    python benchmarks/settings.py --pictures leaves pink white --data build/accuracy

Rates on the models in models/, by their outputs on samples that the calibration did not see; pictures on ResNet-20 of ../shared/real,
pruned without a sample (compensation `reconstruct`), by its outputs on the unlabelled calibration images.  No labels, and nothing that a
table of results reports is looked at.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import accuracy_data
import numpy as np
from defaults import held_out, outputs, sqnr
from shipped_models import ARRAYS, MODELS

import onnxprune
from onnxprune import noise
from onnxprune.evaluation import read_arrays

Shape = tuple[int, ...]
SEEN = "resnet20-cifar10"


def pink(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """What dead leaves lie on."""
    return np.asarray(noise._background((int(np.prod(shape[:-3])), *shape[-3:]), rng).reshape(shape), np.float32)


def white(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape), np.float32)


PICTURES: dict[str, Callable[[Shape, np.random.Generator], np.ndarray]] = {"leaves": noise.picture, "pink": pink, "white": white}


def rates(tried: Sequence[float], ratios: Sequence[float]) -> None:
    print("| model | MACs gone | " + " | ".join(f"{rate:g}" for rate in tried) + " |")
    print("| --- | ---: |" + " ---: |" * len(tried))
    columns: list[list[float]] = [[] for _ in tried]
    for name, ratio in itertools.product(ARRAYS, ratios):
        for column, rate in zip(columns, tried, strict=True):
            with patch("onnxprune.distillation.RATE", rate):
                column.append(held_out(MODELS / f"{name}.onnx", ARRAYS[name], ratio, {"compensation": "distill"}))
        print(f"| {name} | {ratio:.0%} | " + " | ".join(f"{column[-1]:.1f}" for column in columns) + " |", flush=True)
    print("| mean | | " + " | ".join(f"{statistics.fmean(column):.1f}" for column in columns) + " |")


def pictures(tried: Sequence[str], ratios: Sequence[float], data: Path) -> None:
    path = accuracy_data.model_path(SEEN, data)
    arrays = read_arrays(accuracy_data.arrays_path(SEEN, data, "calibration"))
    wanted = outputs(path.read_bytes(), arrays)
    print("| MACs gone | " + " | ".join(tried) + " |")
    print("| ---: |" + " ---: |" * len(tried))
    for ratio in ratios:
        found = []
        for name in tried:
            with patch("onnxprune.noise.picture", PICTURES[name]):
                made = onnxprune.prune(path, ratio, calibration="noise", compensation="reconstruct", verify=False).model
            mine = outputs(made.SerializeToString(), arrays)
            same = (mine.argmax(-1) == wanted.argmax(-1)).mean()
            found.append(f"{sqnr(wanted, mine):.1f} dB, {same:.1%}")
        print(f"| {ratio:.0%} | " + " | ".join(found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[])
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=[])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--data", type=Path, default=Path("build/accuracy"))
    args = parser.parse_args()
    if args.rates:
        rates(args.rates, args.ratios)
    if args.pictures:
        pictures(args.pictures, args.ratios, args.data)


if __name__ == "__main__":
    main()

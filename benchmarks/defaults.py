"""What the defaults are chosen by: how near the models in models/ stay to their originals on samples that the calibration did not see.

    python benchmarks/defaults.py --allocations distortion balanced global
    python benchmarks/defaults.py --compensations reconstruct refine distill
    python benchmarks/defaults.py --criteria obs fluctuation energy l1 --compensations update
    python benchmarks/defaults.py --criteria pca obs l2 --ratios 0.15 0.3 --models digits-mobilenet

No labels, and nothing that a table of results reports is looked at.  SQNR is of what varies: the outputs less their means.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime as ort
from onnx import ModelProto
from shipped_models import ARRAYS, MODELS

import onnxprune
from onnxprune.evaluation import read_arrays


def outputs(model: bytes, arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, arrays)[0], np.float64)


def sqnr(wanted: np.ndarray, found: np.ndarray) -> float:
    """In dB; (samples, …)."""
    signal = ((wanted - wanted.mean(axis=0)) ** 2).sum()
    return float(10 * np.log10(signal / max(float(((wanted - found) ** 2).sum()), 1e-30)))


def held_out(path: Path, arrays: str, ratio: float, options: dict[str, str]) -> float:
    """How near the pruned model is on the samples for evaluation, whose labels are not read."""
    unseen = {name: array for name, array in read_arrays(MODELS / f"digits-{arrays}.eval.npz").items() if name != "labels"}
    calibration = MODELS / f"digits-{arrays}.calibration.npz"
    made: ModelProto = onnxprune.prune(path, ratio, calibration=calibration, verify=False, **options).model
    return sqnr(outputs(path.read_bytes(), unseen), outputs(made.SerializeToString(), unseen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--models", nargs="+", choices=ARRAYS, default=list(ARRAYS), metavar="NAME")
    parser.add_argument("--criteria", nargs="+", default=["obs"])
    parser.add_argument("--allocations", nargs="+", default=["distortion"])
    parser.add_argument("--compensations", nargs="+", default=["distill"])
    args = parser.parse_args()
    settings = list(itertools.product(args.criteria, args.allocations, args.compensations))
    print("| model | MACs gone | " + " | ".join(", ".join(f"`{name}`" for name in setting) for setting in settings) + " |")
    print("| --- | ---: |" + " ---: |" * len(settings))
    columns: list[list[float]] = [[] for _ in settings]
    for name, ratio in itertools.product(args.models, args.ratios):
        for column, setting in zip(columns, settings, strict=True):
            options = dict(zip(("criterion", "allocation", "compensation"), setting, strict=True))
            column.append(held_out(MODELS / f"{name}.onnx", ARRAYS[name], ratio, options))
        print(f"| {name} | {ratio:.0%} | " + " | ".join(f"{column[-1]:.1f}" for column in columns) + " |", flush=True)
    print("| mean | | " + " | ".join(f"{statistics.fmean(column):.1f}" for column in columns) + " |")


if __name__ == "__main__":
    main()

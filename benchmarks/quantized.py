"""Float32, pruned, quantized, pruned and then quantized, quantized and then pruned: accuracy, file size, latency.

python benchmarks/quantized.py [--ratio 0.5] [--real ../shared/real]
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from onnxprune import api
from onnxprune.benchmark import benchmark
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluation import evaluate, read_arrays

MODELS = Path(__file__).resolve().parent.parent / "models"
SHIPPED = {
    "digits-resnet": "images",
    "digits-mobilenet": "images",
    "digits-densenet": "images",
    "digits-conv1d": "conv1d",
    "digits-mlp": "mlp",
}
REAL = ("resnet20-cifar10", "resnet56-cifar10")
Arrays = dict[str, np.ndarray]


class Reader(quantization.CalibrationDataReader):
    """Batches of the calibration samples."""

    def __init__(self, arrays: Arrays, batch: int = 32) -> None:
        count = len(next(iter(arrays.values())))
        self._batches: Iterator[Arrays] = ({k: v[i : i + batch] for k, v in arrays.items()} for i in range(0, count, batch))

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)


def quantize(source: Path, target: Path, arrays: Arrays, symmetric: bool) -> None:
    """onnxruntime's static quantization to 8 bits by channel; symmetric: as TensorRT takes it."""
    ready = source.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    kinds: dict[str, Any] = {"weight_type": quantization.QuantType.QInt8}
    if symmetric:
        kinds["activation_type"] = quantization.QuantType.QInt8
        kinds["extra_options"] = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantization.quantize_static(str(ready), str(target), Reader(arrays), per_channel=True, **kinds)


def cases(real: Path | None) -> Iterator[tuple[Path, Arrays, Arrays]]:
    """Models, unlabelled samples, and labelled ones."""
    for name, kind in SHIPPED.items():
        yield (
            MODELS / f"{name}.onnx",
            read_arrays(MODELS / f"digits-{kind}.calibration.npz"),
            read_arrays(MODELS / f"digits-{kind}.eval.npz"),
        )
    if real is not None:
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = ["data.py", folder]
            runpy.run_path(str(real / "data.py"), run_name="__main__")
            for name in REAL:
                data, test = (read_arrays(Path(folder) / f"{name}.{kind}.npz") for kind in ("calibration", "eval"))
                yield real / f"{name}.onnx", data, test


def row(name: str, variant: str, cells: list[str]) -> None:
    print(f"| {name} | {variant} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=512, help="for pruning and for quantizing")
    parser.add_argument("--batch", type=int, default=32, help="of the latency")
    parser.add_argument("--symmetric", action="store_true", help="as TensorRT takes it")
    parser.add_argument("--real", type=Path, help="the folder with the CIFAR models and data.py")
    parser.add_argument("--only", nargs="*", help="names of models")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| model | variant | accuracy | file, kB | latency, of float32's |")
    print("| --- | --- | ---: | ---: | ---: |")
    for source, samples, test in cases(args.real):
        if args.only and source.stem not in args.only:
            continue
        few = {k: v[: args.samples] for k, v in samples.items()}
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            files = {how: folder / f"{how}.onnx" for how in ("float32", "pruned", "quantized", "pruned, quantized", "quantized, pruned")}
            files["float32"].write_bytes(source.read_bytes())
            onnx.save(api.prune(source, args.ratio, calibration=few, target="cpu").model, files["pruned"])
            quantize(files["float32"], files["quantized"], few, args.symmetric)
            quantize(files["pruned"], files["pruned, quantized"], few, args.symmetric)
            try:
                onnx.save(api.prune(files["quantized"], args.ratio, calibration=few, target="cpu").model, files["quantized, pruned"])
            except OnnxPruneError as error:
                print(f"{source.stem}: {error}", file=sys.stderr)
                del files["quantized, pruned"]
            found = benchmark(list(files.values()), batch=args.batch, memory=False, seconds=3.0)
            for (how, file), measured in zip(files.items(), found, strict=True):
                after = evaluate(onnx.load(source), onnx.load(file), test).after
                share = measured.latency_median_s / found[0].latency_median_s
                row(source.stem, how, ["-" if after is None else f"{after:.2%}", f"{measured.file_bytes / 1e3:.0f}", f"{share:.2f}×"])


if __name__ == "__main__":
    main()

"""README's table: the models in models/ at several ratios, with accuracy, parameters and latency.

python benchmarks/shipped_models.py [--align 8] [--calibration data|noise|none]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx

from onnxprune import api
from onnxprune.benchmark import benchmark
from onnxprune.evaluation import evaluate, read_arrays

MODELS = Path(__file__).resolve().parent.parent / "models"
ARRAYS = {
    "digits-resnet": "images",
    "digits-mobilenet": "images",
    "digits-densenet": "images",
    "digits-mlp": "mlp",
    "digits-conv1d": "conv1d",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--align", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="of the latency")
    parser.add_argument(
        "--calibration", choices=["data", "noise", "none"], help="the samples of models/, inputs of our own, or weights alone"
    )
    args = parser.parse_args()
    print("| model | asked | MACs gone | parameters gone | accuracy before | after | latency, of the original |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for name, arrays in ARRAYS.items():
            original, pruned = MODELS / f"{name}.onnx", Path(folder) / f"{name}.onnx"
            for ratio in args.ratios:
                samples = MODELS / f"digits-{arrays}.calibration.npz" if args.calibration == "data" else args.calibration
                result = api.prune(original, ratio, align=args.align, calibration=samples)
                onnx.save(result.model, pruned)
                data = read_arrays(MODELS / f"digits-{arrays}.eval.npz")
                found = evaluate(onnx.load(original), result.model, data)
                before, after = benchmark([original, pruned], batch=args.batch, memory=False, seconds=1.0)
                macs, parameters = (1 - b / a for a, b in (result.macs, result.parameters))
                share = after.latency_median_s / before.latency_median_s
                print(
                    f"| {name} | {ratio:.0%} | {macs:.1%} | {parameters:.1%} | {found.before:.2%} | {found.after:.2%} | {share:.2f}× |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""What a latency budget costs in accuracy, beside a budget of MACs that leaves as many, on trained models.

    pip install '.[peers]' scikit-learn && python benchmarks/latency_accuracy.py resnet mobilenet --json latency_accuracy.json
    python benchmarks/latency_accuracy.py MODEL.onnx CALIBRATION.npz EVAL.npz

`resnet` (64, 128, 256 channels) and `mobilenet` (32 to 512) are trained here, a few minutes each on one core, to read two digits of
scikit-learn that lie over each other in noise; held-out digits are what accuracy is of.  For each share of the time: `--of latency`,
then `--of macs` at the MACs that this left, and the same with `--target cpu`.  The whole model and the
three are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
from onnx import ModelProto

from onnxprune import api
from onnxprune.cost import count_macs
from onnxprune.evaluation import Evaluation, evaluate, read_arrays
from onnxprune.importer import load
from onnxprune.shapes import seeded_feeds
from onnxprune.stopwatch import Stopwatch

ROOT = Path(__file__).resolve().parent.parent
Arrays = dict[str, np.ndarray]
Row = dict[str, Any]
LATENCY, AS_MANY, ALIGNED = "`--of latency`", "`--of macs`, as many as that", "... `--target cpu`"
SIDE, NOISE, SEED = 16, 0.1, 20240
TRAINED_ON, CALIBRATED_ON, HELD_OUT = 60_000, 512, 4000


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# models of our own


def pairs(images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> Arrays:
    """Two digits of 8 x 8 pixels on a canvas of 16 x 16, one to the left, one to the right, and noise; 100 classes."""
    canvas = np.zeros((count, 1, SIDE, SIDE), np.float32)
    chosen = rng.integers(len(images), size=(count, 2))
    for i, (one, other) in enumerate(chosen):
        for digit, left in ((one, rng.integers(0, 4)), (other, rng.integers(5, 9))):
            top = rng.integers(0, 9)
            part = canvas[i, 0, top : top + 8, left : left + 8]
            np.maximum(part, images[digit, 0], out=part)
    canvas += rng.normal(0, NOISE, canvas.shape).astype(np.float32)
    return {"input": canvas, "labels": labels[chosen] @ np.array([10, 1])}


def networks() -> dict[str, Callable[[], Any]]:
    import make_models as parts
    from torch import nn

    def resnet() -> Any:
        model = parts.ResNet((64, 128, 256))
        model.stem[0].stride = (2, 2)
        model.head = nn.Linear(256, 100)
        return model

    def mobilenet() -> Any:
        def layer(inputs: int, outputs: int, kernel: int, stride: int) -> list[Any]:
            return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]

        blocks = [(32, 96, 32, 1), (32, 192, 64, 2), (64, 256, 64, 1), (64, 256, 64, 1), (64, 384, 128, 2), (128, 512, 128, 1)]
        made = [parts.InvertedResidual(i, wide, o, stride=stride, activation=nn.ReLU6) for i, wide, o, stride in blocks]
        return nn.Sequential(*layer(1, 32, 3, 2), *made, *layer(128, 512, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))

    return {"resnet": resnet, "mobilenet": mobilenet}


def trained(build: Callable[[], Any], data: Arrays) -> Any:
    """One pass over the samples, with the same result each time."""
    import torch
    from torch.nn import functional

    torch.manual_seed(SEED)
    model = build().train()
    images, labels = torch.from_numpy(data["input"]), torch.from_numpy(data["labels"])
    batch, peak = 64, 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=len(images) // batch)
    for start in range(0, len(images) - batch + 1, batch):
        loss = functional.cross_entropy(model(images[start : start + batch]), labels[start : start + batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def made(name: str, folder: Path) -> tuple[Path, Arrays, Arrays]:
    """The model's file, unlabelled samples, and labelled ones of digits that it has not seen."""
    import make_models
    import torch

    torch.set_num_threads(1)
    digits, rng = make_models.load(), np.random.default_rng(SEED)
    seen = pairs(digits.train, digits.train_labels, TRAINED_ON, rng)
    few = pairs(digits.train, digits.train_labels, CALIBRATED_ON, rng)
    unseen = pairs(digits.test, digits.test_labels, HELD_OUT, rng)
    path = folder / f"{name}.onnx"
    if not path.exists():
        say(f"{name}: training")
        model = trained(networks()[name], seen)
        axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
        example = torch.from_numpy(few["input"][:2])
        names = {"input_names": ["input"], "output_names": ["logits"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (example,), path, opset_version=17, dynamo=False, dynamic_axes=axes, **names)
    return path, {"input": few["input"]}, unseen


# what is compared


def contenders(path: Path, samples: Arrays, ratio: float, compensation: str) -> dict[str, api.Result]:
    """What each budget leaves, by its name in the table."""

    def ours(share: float, of: str, **options: Any) -> api.Result:
        say(f"{path.stem}: --of {of} at {share:.1%} {options or ''}")
        return api.prune(path, share, of=of, calibration=samples, compensation=compensation, verify=False, **options)

    first = ours(ratio, "latency")
    share = 1 - first.macs[1] / first.macs[0]
    return {
        LATENCY: first,
        AS_MANY: ours(share, "macs"),
        ALIGNED: ours(share, "macs", target="cpu"),
    }


def compared(path: Path, samples: Arrays, test: Arrays, args: argparse.Namespace) -> list[Row]:
    original = onnx.load(path)
    results = [(ratio, label, found) for ratio in args.ratios for label, found in contenders(path, samples, ratio, args.compensate).items()]
    loaded = load(original)
    feeds = seeded_feeds(loaded.proto, {name: (1, *shape[1:]) for name, shape in loaded.input_shapes.items()})
    whole, times = list[float](), list[float]()
    for ratio in args.ratios:
        models = [original, *(found.model for share, _, found in results if share == ratio)]  # more push each other out of the caches
        rounds = []
        for i in range(args.rounds):
            say(f"{path.stem}: timing at {ratio:.0%}, round {i + 1}, load {os.getloadavg()[0]:.1f}")
            rounds.append(Stopwatch(feeds, seconds=args.seconds).latencies(models))
        first, *others = np.median(np.array(rounds), axis=0)
        whole, times = [*whole, first], [*times, *others]
    rows: list[Row] = [{"model": path.stem, "budget": "whole", "macs_left": 1.0, "seconds": float(np.median(whole))}]
    rows[0] |= figures(original, original, test)
    for (ratio, label, found), seconds in zip(results, times, strict=True):
        plain = api.apply(path, found.plan).model  # the same units gone, no layer fitted
        row: Row = {"model": path.stem, "asked": ratio, "budget": label, "macs_left": count_macs(load(found.model)) / count_macs(loaded)}
        row |= {"seconds": float(seconds), **figures(original, found.model, test), "plain": figures(original, plain, test)}
        rows.append(row)
    for row in [row for row in rows if row["budget"] == LATENCY]:
        same = next(one for one in rows if one.get("asked") == row["asked"] and one["budget"] == AS_MANY)
        row["faster_at_macs"] = same["seconds"] / row["seconds"]
        row["faster_at_sqnr"] = at_sqnr(row["sqnr"], [one for one in rows if one["budget"] == AS_MANY]) / row["seconds"]
    return rows


def at_sqnr(sqnr: float, rows: list[Row]) -> float:
    """Seconds that the budget of these rows would take at that SQNR, by the line through the nearest two (logarithms of seconds)."""
    if len(rows) < 2:
        return float("nan")
    one, other = sorted(rows, key=lambda row: abs(row["sqnr"] - sqnr))[:2]
    share = (sqnr - one["sqnr"]) / (other["sqnr"] - one["sqnr"])
    return float(one["seconds"] * (other["seconds"] / one["seconds"]) ** share)


def figures(original: ModelProto, model: ModelProto, test: Arrays) -> Row:
    found: Evaluation = evaluate(original, model, test)
    worst = min(found.outputs, key=lambda out: out.cosine if out.cosine is not None else 1.0)
    return {"accuracy": found.after, "cosine": worst.cosine, "sqnr": worst.sqnr if model is not original else None}


def show(rows: list[Row]) -> None:
    print(
        "| model | time asked to go | budget | MACs left | ms | accuracy | SQNR, dB | accuracy without compensation "
        "| faster than `--of macs` at those MACs | at that SQNR |"
    )
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")

    def cell(row: Row, name: str, form: str) -> str:
        return format(row[name], form) if row.get(name) is not None else ""

    for row in rows:
        cells = [row["model"], cell(row, "asked", ".0%"), row["budget"], f"{row['macs_left']:.1%}", f"{1e3 * row['seconds']:.3f}"]
        cells += [cell(row, "accuracy", ".2%"), cell(row, "sqnr", ".1f"), cell(row.get("plain", {}), "accuracy", ".2%")]
        cells += [cell(row, "faster_at_macs", ".2f"), cell(row, "faster_at_sqnr", ".2f")]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="resnet, mobilenet, or a file, its samples, and labelled ones")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="shares of the time that are to go")
    parser.add_argument("--compensate", default="reconstruct")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing, of which the median counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="a model and round")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "latency_accuracy", help="where trained models are kept")
    parser.add_argument("--json", help="write the rows there")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what[0].endswith(".onnx"):
        path, samples, test = args.what
        cases = [(Path(path), {k: v for k, v in read_arrays(samples).items() if k != "labels"}, read_arrays(test))]
    else:
        cases = [made(name, args.folder) for name in args.what]
    rows: list[Row] = []
    for case in cases:
        rows += compared(*case, args)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # what was measured before does not count
        os.environ["XDG_CACHE_HOME"] = cache
        main()

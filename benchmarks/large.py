"""Time and peak memory of pruning a decoder whose weights stand in files of their own, and what that is at 7 B parameters.

    pip install . && python benchmarks/large.py make /tmp/large/decoder.onnx --gigabytes 4
    python benchmarks/large.py measure --gigabytes 1 4 --json docs/large-models.json

`make` writes a decoder with grouped-query attention, rotary embeddings and SwiGLU; its weights are drawn from a seed and written
one tensor at a time.  `measure` makes, prunes and deletes one of each size, with `onnxprune --no-verify` and then with its proof.
Every command is a process of its own: time is the wall's, memory what the kernel counts as resident at the most (VmHWM: all pages;
RssAnon: without those of mapped files, polled).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
SHARED, POSITIONS = 4, 512  # query heads to a head of keys and values; rows of the tables of the rotary embedding
TARGET = 28.0  # GB: 7 B parameters in float32
ROWS = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class Size:
    """Of a decoder: heads of queries, width of what the SwiGLU makes, layers, words, and width of a head."""

    heads: int
    inner: int
    layers: int = 24
    words: int = 32_000
    head: int = 128

    @property
    def hidden(self) -> int:
        return self.heads * self.head

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.hidden // SHARED
        return self.layers * (attention + 3 * self.hidden * self.inner) + 2 * self.words * self.hidden


def sized(gigabytes: float, width: int) -> Size:
    """The decoder of at most so many GB, of numbers of `width` bytes: the widest stream, then the widest SwiGLU."""
    most = gigabytes * 1e9 / width
    heads = [h for h in range(SHARED, 129, SHARED) if Size(h, 2 * h * 128).parameters <= most] or [SHARED]
    narrow = Size(heads[-1], 0)
    rest = int((most - narrow.parameters) / (3 * narrow.layers * narrow.hidden)) // narrow.head
    return Size(heads[-1], max(1, rest) * narrow.head)


class Decoder:
    """The graph in the making; weights go to the data file as they are drawn."""

    def __init__(self, path: Path, size: Size, kind: str, seed: int) -> None:
        self.path, self.size, self.kind, self.rng = path, size, np.dtype(kind), np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.data = open(path.with_name(path.name + ".data"), "wb")  # noqa: SIM115

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{len(self.nodes)}_{operator}", **attributes))
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, rows: int, columns: int, scale: float) -> str:
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(self.kind), dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        self.data.write(bytes(-self.data.tell() % 4096))
        start, step = self.data.tell(), max(1, ROWS // columns)
        for row in range(0, rows, step):
            part = self.rng.standard_normal((min(step, rows - row), columns), np.float32) * np.float32(scale)
            self.data.write(part.astype(self.kind).tobytes())
        for key, value in (("location", Path(self.data.name).name), ("offset", start), ("length", self.data.tell() - start)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def dense(self, value: str, name: str, rows: int, columns: int) -> str:
        return self.node("MatMul", value, self.weight(name, rows, columns, rows**-0.5))

    def norm(self, value: str, name: str) -> str:
        mean = self.node("ReduceMean", self.node("Mul", value, value), axes=[-1], keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, "epsilon"))
        return self.node("Mul", self.node("Div", value, root), self.constant(name, np.ones(self.size.hidden, self.kind)))

    def heads(self, value: str, shape: str) -> str:
        return self.node("Transpose", self.node("Reshape", value, shape), perm=[0, 2, 1, 3])

    def turned(self, value: str) -> str:
        """Rotary embedding: halves turn with each other."""
        left = self.node("Slice", value, "start", "half", "last")
        right = self.node("Slice", value, "half", "head", "last")
        swapped = self.node("Concat", self.node("Neg", right), left, axis=-1)
        return self.node("Add", self.node("Mul", value, "cos_now"), self.node("Mul", swapped, "sin_now"))

    def repeated(self, value: str) -> str:
        """Keys or values of one head for each of the query heads that share them."""
        wide = self.node("Expand", self.node("Unsqueeze", value, "two"), "copies")
        return self.node("Reshape", wide, "merged")

    def layer(self, x: str, at: str) -> str:
        hidden, narrow = self.size.hidden, self.size.hidden // SHARED
        normed = self.norm(x, f"{at}.input_norm")
        q = self.turned(self.heads(self.dense(normed, f"{at}.q", hidden, hidden), "split"))
        k = self.repeated(self.turned(self.heads(self.dense(normed, f"{at}.k", hidden, narrow), "split_shared")))
        v = self.repeated(self.heads(self.dense(normed, f"{at}.v", hidden, narrow), "split_shared"))
        scores = self.node("MatMul", self.node("Mul", q, "scale"), self.node("Transpose", k, perm=[0, 1, 3, 2]))
        weights = self.node("Softmax", self.node("Add", scores, "mask"), axis=-1)
        mixed = self.node("Transpose", self.node("MatMul", weights, v), perm=[0, 2, 1, 3])
        x = self.node("Add", x, self.dense(self.node("Reshape", mixed, "joined"), f"{at}.o", hidden, hidden))
        normed = self.norm(x, f"{at}.inner_norm")
        gate = self.dense(normed, f"{at}.gate", hidden, self.size.inner)
        gated = self.node(
            "Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), self.dense(normed, f"{at}.up", hidden, self.size.inner)
        )
        return self.node("Add", x, self.dense(gated, f"{at}.down", self.size.inner, hidden))

    def write(self) -> None:
        size, kind, head = self.size, self.kind, self.size.head
        turns = np.outer(np.arange(POSITIONS), 10_000.0 ** (-np.arange(head // 2) / (head // 2)))
        for name, table in (("cos", np.cos(turns)), ("sin", np.sin(turns))):
            self.constant(name, np.concatenate([table, table], axis=1).astype(kind))
        self.constant("epsilon", np.array(1e-5, kind)), self.constant("scale", np.array(head**-0.5, kind))
        self.constant("causal", np.triu(np.full((POSITIONS, POSITIONS), -1e4), 1).astype(kind))
        numbers = {"start": [0], "half": [head // 2], "head": [head], "last": [-1], "first": [0], "second": [1], "both": [0, 1]}
        numbers |= {"two": [2], "zeros": [0, 0], "split": [0, 0, size.heads, head], "split_shared": [0, 0, size.heads // SHARED, head]}
        numbers |= {"joined": [0, 0, size.hidden], "merged": [0, size.heads, -1, head], "copies": [1, 1, SHARED, 1, 1]}
        for name, values in numbers.items():
            self.constant(name, np.array(values, np.int64))
        length = self.node("Slice", self.node("Shape", "input_ids"), "second", "two")
        for table in ("cos", "sin"):
            self.nodes.append(helper.make_node("Slice", [table, "start", length, "first"], [f"{table}_now"]))
        square = self.node("Concat", length, length, axis=0)
        self.nodes.append(helper.make_node("Slice", ["causal", "zeros", square, "both"], ["mask"]))
        x = self.node("Gather", self.weight("embedding", size.words, size.hidden, 0.02), "input_ids")
        for number in range(size.layers):
            x = self.layer(x, f"layers.{number}")
        logits = self.dense(self.norm(x, "norm"), "head_weight", size.hidden, size.words)
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        self.data.close()
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
            [helper.make_tensor_value_info("logits", helper.np_dtype_to_tensor_dtype(kind), ["batch", "sequence", size.words])],
            self.tensors,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), self.path)


@dataclass(frozen=True)
class Run:
    """seconds; bytes resident at the most: of all pages, and without mapped files."""

    seconds: float
    peak: int
    anonymous: int
    code: int


def watched(*command: str) -> Run:
    """Run a command and watch what the kernel says of its memory."""
    begin, peak, anonymous = time.monotonic(), 0, 0
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.poll() is None:
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            peak = max(peak, int(lines["VmHWM"].split()[0]) * 1024)
            anonymous = max(anonymous, int(lines["RssAnon"].split()[0]) * 1024)
        except (OSError, KeyError):
            pass
        time.sleep(0.02)
    return Run(time.monotonic() - begin, peak, anonymous, process.returncode)


def measure(gigabytes: float, kind: str, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One decoder made, pruned without proof and with it, and deleted."""
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        model, smaller = work / "decoder.onnx", work / "smaller.onnx"
        size = sized(gigabytes, np.dtype(kind).itemsize)
        watched(sys.executable, __file__, "make", str(model), "--gigabytes", str(gigabytes), "--type", kind)
        total = sum(p.stat().st_size for p in work.iterdir())
        line = [sys.executable, "-m", "onnxprune", str(model), "--ratio", "0.3", "-q", "-o", str(smaller), *extra]
        found: dict[str, Any] = {"parameters": size.parameters, "bytes": total, "hidden": size.hidden, "type": kind}
        for name, options in (("written", ["--no-verify"]), ("proven", [])):
            found[name] = asdict(watched(*line, *options))
            found["smaller"] = sum(p.stat().st_size for p in work.glob("smaller*"))
            print(f"{total / 1e9:.2f} GB, {name}: {found[name]}", flush=True)
            for written in work.glob("smaller*"):
                written.unlink()
        return found
    finally:
        shutil.rmtree(work)


def projected(small: dict[str, Any], large: dict[str, Any], what: str) -> dict[str, float]:
    """Seconds and bytes at 28 GB on the line through both sizes."""
    share = (TARGET * 1e9 - small["bytes"]) / (large["bytes"] - small["bytes"])
    return {key: small[what][key] + share * (large[what][key] - small[what][key]) for key in ("seconds", "peak", "anonymous")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    maker, measurer = commands.add_parser("make"), commands.add_parser("measure")
    maker.add_argument("path", type=Path)
    maker.add_argument("--gigabytes", type=float, default=4.0)
    maker.add_argument("--seed", type=int, default=0)
    measurer.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    measurer.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    measurer.add_argument("--memory", default="512MB", help="most weights that may be held at once")
    measurer.add_argument("--json", type=Path)
    for one in (maker, measurer):
        one.add_argument("--type", default="float32", choices=["float32", "float16"])
    given = parser.parse_args()
    if given.command == "make":
        Decoder(given.path, sized(given.gigabytes, np.dtype(given.type).itemsize), given.type, given.seed).write()
        return
    rows = [measure(size, given.type, given.folder, ["--memory", given.memory]) for size in given.gigabytes]
    content: dict[str, Any] = {"memory": given.memory, "measured": rows}
    if len(rows) > 1:
        content["projected"] = {what: projected(rows[0], rows[-1], what) for what in ("written", "proven")}
    print(json.dumps(content, indent=1))
    if given.json:
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

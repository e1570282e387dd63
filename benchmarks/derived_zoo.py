"""Quantized, fused, cast and cut-up variants of the zoo's graphs, held to the zoo's own bar; a Markdown table, a line a variant.

python benchmarks/derived_zoo.py ../shared [--only 'resnet18' 'hf_bert*'] [--variants 'qdq-*' ort-all] [--out rows.json]

Each variant's groups are permuted as the rules alone say them (no certificate), then it is pruned, and what is left is
compared with a permuted model without the same units, all by shared/tools/check.py.  `unmade`: onnxruntime's own tool fails
on the graph, or the variant does not run on this CPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime import quantization

import onnxprune
from onnxprune.errors import OnnxPruneError

Feeds = dict[str, np.ndarray]
Row = dict[str, Any]
Made = tuple[ModelProto, Feeds]
SAMPLE = [
    *("hand_resnet_preact", "jax-nnx-resnet18-nchw", "mobilenet_v3_small", "timm_mobilenetv4_conv_small", "tf-mobilenet025-tflite"),
    *("tf-densenet-small-dyn", "hand_shufflenet_v1", "tf-unet-upsample-dyn", "hand_unet3d", "timm_convnext_atto_features"),
    *("hf_bert_cls", "hf_gpt2", "hf_llama__dynamo", "hf_vit", "hf_t5_encoder", "jax-nnx-vit-native-norm", "jax-nnx-swin-windows"),
    *("tf-lstm-classifier", "hand_gru_bidirectional", "tf-mlp-mixer", "tf-transformer-encoder", "hand_kws_dscnn"),
]


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Feeds) -> None:
        self.rows = iter([feeds])

    def get_next(self) -> Feeds | None:
        return next(self.rows, None)


def static(folder: Path, feeds: Feeds, *, form: str, kind: str, per_channel: bool = False) -> ModelProto:
    types = {"int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8, "int16": quantization.QuantType.QInt16}
    formats = {"qdq": quantization.QuantFormat.QDQ, "operators": quantization.QuantFormat.QOperator}
    weight = types["int8" if kind == "int16" else kind]
    source, target = folder / "model.onnx", folder / "derived.onnx"
    quantization.quantize_static(
        source, target, Reader(feeds), quant_format=formats[form], per_channel=per_channel, activation_type=types[kind], weight_type=weight
    )
    return onnx.load(target)


def dynamic(folder: Path, feeds: Feeds, *, kind: str, per_channel: bool = False) -> ModelProto:
    weight = {"int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8}[kind]
    quantization.quantize_dynamic(folder / "model.onnx", folder / "derived.onnx", per_channel=per_channel, weight_type=weight)
    return onnx.load(folder / "derived.onnx")


def saved(folder: Path, feeds: Feeds, *, level: str) -> ModelProto:
    """As a session writes it at one level of graph optimization."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(folder / "derived.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "derived.onnx")


def fused(folder: Path, feeds: Feeds, *, kind: str) -> ModelProto:
    """onnxruntime's transformer optimizer."""
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(str(folder / "model.onnx"), model_type=kind, opt_level=0).save_model_to_file(str(folder / "derived.onnx"))
    return onnx.load(folder / "derived.onnx")


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs(inner)


def cast(model: ModelProto, source: int, target: int) -> ModelProto:
    """Every float tensor, value and conversion of one type in another; what operators demand in float32 stays."""
    copy = ModelProto.FromString(model.SerializeToString())
    if source == target:
        return copy
    dtype = helper.tensor_dtype_to_np_dtype(target)

    def convert(tensor: TensorProto) -> None:
        if tensor.data_type == source:
            with np.errstate(over="ignore"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))

    for graph in graphs(copy.graph):
        stays = {x for n in graph.node if n.op_type in ("Resize", "Upsample") for x in n.input[1:]}
        for tensor in graph.initializer:
            if tensor.name not in stays:
                convert(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == source and value.name not in stays:
                value.type.tensor_type.elem_type = target
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == source and not stays & set(node.output):
                    attribute.i = target
                elif attribute.HasField("t") and not stays & set(node.output):
                    convert(attribute.t)
    return copy


def in_type(folder: Path, feeds: Feeds, *, target: int) -> ModelProto:
    return cast(onnx.load(folder / "model.onnx"), TensorProto.FLOAT, target)


def in_functions(folder: Path, feeds: Feeds, *, size: int) -> ModelProto:
    """Every run of `size` nodes as a local function; weights are what it is called with."""
    model = onnx.load(folder / "model.onnx")
    nodes, last = list(model.graph.node), {v.name for v in model.graph.output}
    calls = []
    for start in range(0, len(nodes), size):
        body, after = nodes[start : start + size], nodes[start + size :]
        made = {o for n in body for o in n.output if o}
        reads = list(dict.fromkeys(x for n in body for x in n.input if x and x not in made))
        wanted = last | {x for n in after for x in n.input}
        makes = [o for n in body for o in n.output if o and o in wanted]
        if not makes or any(a.HasField("g") for n in body for a in n.attribute):
            calls += body
            continue
        name = f"Part{start // size}"
        model.functions.append(helper.make_function("parts", name, reads, makes, body, model.opset_import))
        calls.append(helper.make_node(name, reads, makes, domain="parts"))
    del model.graph.node[:]
    model.graph.node.extend(calls)
    model.opset_import.append(helper.make_opsetid("parts", 1))
    return model


def in_scan(folder: Path, feeds: Feeds) -> ModelProto:
    """The whole model as the body of a Scan over one step; its weights stay outside."""
    model = onnx.load(folder / "model.onnx")
    graph, inner = model.graph, onnx.GraphProto(name="step")
    weights = {t.name for t in graph.initializer}
    inner.node.extend(graph.node)
    inner.input.extend(v for v in graph.input if v.name not in weights)
    inner.output.extend(graph.output)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    for kind, values, target in (("in", inner.input, graph.input), ("out", inner.output, graph.output)):
        for value in values:
            own = target.add()
            own.CopyFrom(value)
            own.name = f"{kind}_{value.name}"
            dims = [d.dim_value or d.dim_param or None for d in value.type.tensor_type.shape.dim]
            own.CopyFrom(helper.make_tensor_value_info(own.name, value.type.tensor_type.elem_type, [1, *dims]))
    names = [[v.name for v in values] for values in (graph.input, graph.output)]
    graph.node.append(helper.make_node("Scan", *names, body=inner, num_scan_inputs=len(graph.input)))
    feeds |= {f"in_{name}": array[None] for name, array in feeds.items()}
    return model


VARIANTS: dict[str, Callable[[Path, Feeds], ModelProto]] = {
    "qdq-int8": partial(static, form="qdq", kind="int8"),
    "qdq-uint8": partial(static, form="qdq", kind="uint8"),
    "qdq-int8-channel": partial(static, form="qdq", kind="int8", per_channel=True),
    "qdq-int16": partial(static, form="qdq", kind="int16"),
    "operators-uint8": partial(static, form="operators", kind="uint8"),
    "operators-int8-channel": partial(static, form="operators", kind="int8", per_channel=True),
    "dynamic-int8": partial(dynamic, kind="int8"),
    "dynamic-uint8-channel": partial(dynamic, kind="uint8", per_channel=True),
    "float16": partial(in_type, target=TensorProto.FLOAT16),
    "bfloat16": partial(in_type, target=TensorProto.BFLOAT16),
    "double": partial(in_type, target=TensorProto.DOUBLE),
    "functions": partial(in_functions, size=6),
    "scan": in_scan,
    "ort-basic": partial(saved, level="BASIC"),
    "ort-extended": partial(saved, level="EXTENDED"),
    "ort-all": partial(saved, level="ALL"),
    "fused-bert": partial(fused, kind="bert"),
    "fused-gpt2": partial(fused, kind="gpt2"),
    "fused-vit": partial(fused, kind="vit"),
    "fused-unet": partial(fused, kind="unet"),
}
FUSES = {
    "fused-bert": ("*bert*", "*electra*"),
    "fused-gpt2": ("*gpt*", "*llama*"),
    "fused-vit": ("*vit*", "*swin*", "*deit*"),
    "fused-unet": ("*unet*",),
}


def unrounded(model: ModelProto) -> ModelProto:
    """Activations that are quantized and at once dequantized only clipped: sums in another order round to other integers."""
    copy = ModelProto.FromString(model.SerializeToString())
    tensors = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in copy.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in copy.graph.node:
        after = readers.get(node.output[0], [])
        if node.op_type != "QuantizeLinear" or not after or any(n.op_type != "DequantizeLinear" for n in after):
            continue
        scale, zero = (tensors[name] for name in node.input[1:3])
        span = np.iinfo(zero.dtype)
        for word, bound in (("low", span.min), ("high", span.max)):
            limit = ((bound - zero.astype(np.float64)) * scale).astype(scale.dtype)
            copy.graph.initializer.append(numpy_helper.from_array(limit.reshape(()), f"{node.output[0]}:{word}"))
        node.op_type, node.domain = "Clip", ""
        node.input[1:] = [f"{node.output[0]}:low", f"{node.output[0]}:high"]
        del node.attribute[:]
        for one in after:
            one.op_type, one.domain = "Identity", ""
            del one.input[1:], one.attribute[:]
    return copy


def tolerant(check: Any) -> None:
    """Quantized operators round a sum one way or the other: what tiny changes of the inputs do, permutations may do."""
    known = check.tolerance

    def tolerance(model: ModelProto, feeds: Feeds, reference: list[np.ndarray]) -> float:
        limit = known(model, feeds, reference)
        if not any("Integer" in n.op_type or n.op_type.startswith(("QLinear", "QGemm", "Dynamic")) for n in model.graph.node):
            return float(limit)
        gaps = []
        for seed in range(3):
            signs = {k: np.random.default_rng(seed).choice([-1, 1], v.shape) for k, v in feeds.items()}
            moved = {k: (v * (1 + 2e-7 * signs[k])).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in feeds.items()}
            gaps.append(check.distance(reference, check.run(model, moved)))
        return min(0.3, max(float(limit), 3 * max(gaps)))

    check.tolerance = tolerance


def judged(model: ModelProto, feeds: Feeds, check: Any, folder: Path, ratio: float) -> Row:
    """The zoo's checks on one model."""
    kinds = {t.data_type for t in model.graph.initializer}
    odd = next((k for k in (TensorProto.BFLOAT16, TensorProto.DOUBLE) if k in kinds), TensorProto.FLOAT)  # what the CPU lacks kernels for
    wide = unrounded(cast(model, odd, TensorProto.FLOAT))
    plain = {k: v.astype(np.float32) if v.dtype.name in ("bfloat16", "float64") else v for k, v in feeds.items()}
    try:
        check.run(wide, plain)
    except Exception as error:
        return {"state": "unmade", "error": str(error)[:200]}
    found = onnxprune.groups(model, feeds=feeds, verify=False)
    content = json.loads(json.dumps(found.to_json()))
    reference = onnx.inliner.inline_local_functions(wide) if wide.functions else wide
    report = check.check_groups(reference, content["groups"], plain)
    carried = {(m["tensor"], m["axis"]) for g in content["groups"] for m in g["members"]}
    row: Row = {"coverage": report["coverage"], "units": report["units"], "places": len(carried)}
    if not report["ok"]:
        return row | {"state": "wrong", "stage": "permutation", "error": [report["wrong"][:2], report["error"]]}
    try:
        result = onnxprune.prune(model, ratio, feeds=feeds)
    except OnnxPruneError as error:
        return row | {"state": "refused" if error.exit_code == 3 else "failed", "stage": "prune", "error": str(error)[:300]}
    row |= {"reached": round(result.reached, 3), "frozen": len(result.proof.frozen) if result.proof else 0}
    plan = json.loads(json.dumps(result.plan.to_json()))
    pruned = unrounded(cast(result.model, odd, TensorProto.FLOAT))
    paths = [str(folder / name) for name in ("left.onnx", "right.onnx")]
    onnx.save(reference, paths[0])
    onnx.save(pruned, paths[1])
    report = check.check_pruned(reference, *paths, plan, plain)
    if not report["ok"]:
        return row | {"state": "wrong", "stage": "pruned", "error": report.get("error") or report.get("masked")}
    touched = [g for g in plan["groups"] if g.get("remove")]
    moved = check.permute(reference, touched, 7)
    following = {**plan, "groups": [dict(g) for g in plan["groups"]]}
    for group in following["groups"]:
        if group.get("remove"):
            group["remove"] = sorted(np.argsort(check.shuffle(group, 7))[group["remove"]].tolist())
    left, right = check.run(pruned, plain), check.run(onnxprune.apply(moved, following, feeds=plain).model, plain)
    gap, limit = check.distance(left, right), check.tolerance(pruned, plain, left)
    if not gap <= limit:
        return row | {"state": "wrong", "stage": "commute", "error": [gap, limit]}
    return row | {"state": "right"}


def late(*_: object) -> None:
    raise TimeoutError("too long")


def variant(name: str, how: str, zoo: Any, check: Any, ratio: float, seconds: int) -> Row:
    row: Row = {"name": name, "variant": how}
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with tempfile.TemporaryDirectory() as text:
            folder, feeds = Path(text), dict(zoo.feeds(name, 0))
            onnx.save(zoo.load(name, 0), folder / "model.onnx")
            try:
                given = dict(feeds)
                model = VARIANTS[how](folder, given)
            except Exception as error:
                return row | {"state": "unmade", "error": str(error)[:200]}
            types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
            whole = onnxprune.groups(folder / "model.onnx", feeds=feeds, verify=False)
            row["original"] = sum(g.units for g in whole.groups)
            feeds = {k: v.astype(helper.tensor_dtype_to_np_dtype(types[k])) for k, v in given.items() if k in types}
            return row | judged(model, feeds, check, folder, ratio)
    except Exception as error:
        return row | {"state": "crashed", "error": repr(error)[:300]}
    finally:
        signal.alarm(0)


def line(how: str, rows: list[Row]) -> str:
    count = [sum(r["state"] == s for r in rows) for s in ("right", "refused", "failed", "crashed", "wrong", "unmade")]
    covered = [r["coverage"] for r in rows if r.get("coverage") is not None]
    shares = [min(1.0, r["units"] / r["original"]) for r in rows if r.get("original") and "units" in r]
    means = [f"{statistics.fmean(found):.3f}" if found else "-" for found in (covered, shares)]
    cells = [len(rows), *count, *means]
    return f"| {how} | " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="the folder with zoo/ and tools/")
    parser.add_argument("--only", nargs="*", default=SAMPLE, help="globs of graph names")
    parser.add_argument("--variants", nargs="*", default=["*"], help="globs of variants")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seconds", type=int, default=120, help="for one variant of one graph")
    parser.add_argument("--out", type=Path, help="the rows as JSON; what stands there is not run again")
    args = parser.parse_args()
    sys.path[:0] = [str(args.shared / "zoo"), str(args.shared / "tools")]
    import check
    import zoo

    tolerant(check)
    logging.disable(logging.CRITICAL)
    rows: list[Row] = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    done = {(r["name"], r["variant"]) for r in rows}
    names = [n for n in zoo.index() if any(fnmatch.fnmatch(n, p) for p in args.only)]
    for how in [v for v in VARIANTS if any(fnmatch.fnmatch(v, p) for p in args.variants)]:
        for name in names:
            if (name, how) in done or not any(fnmatch.fnmatch(name, p) for p in FUSES.get(how, ("*",))):
                continue
            rows.append(variant(name, how, zoo, check, args.ratio, args.seconds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1))
    print("| variant | graphs | right | refused | failed | crashed | wrong | unmade | coverage | units of the original's |")
    print("| --- |" + " ---: |" * 9)
    for how in dict.fromkeys(r["variant"] for r in rows):
        print(line(how, [r for r in rows if r["variant"] == how]))
    print(line("**all**", rows))


if __name__ == "__main__":
    main()

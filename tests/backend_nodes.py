"""onnx's backend node tests as networks: one axis of one input comes out of a layer, every axis of the outputs goes into one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from outside import duplicate

WEIGHT = "z_weight"  # the layer before, (size, size): its columns are the axis
NEWEST = 26  # the newest opset that onnxruntime runs
LARGEST = 3000  # elements; what tests of large tensors say, those of small ones say too
FLOATS = (np.float32, np.float64, np.float16)


@dataclass(frozen=True)
class Place:
    """One axis of one input of one of onnx's cases."""

    name: str
    operators: tuple[str, ...]
    proto: ModelProto
    arrays: tuple[Any, ...]
    input: int
    axis: int

    @property
    def id(self) -> str:
        return f"{self.name}-{self.proto.graph.input[self.input].name}:{self.axis}"


def cases() -> list[Any]:
    """All node cases of the installed onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def places() -> Iterator[Place]:
    """Every axis of size 2 and more of every tensor of numbers or booleans that goes into a case."""
    for case in cases():
        arrays = tuple(case.data_sets[0][0])
        operators = tuple(sorted({n.op_type for n in case.model.graph.node}))
        for i, array in enumerate(arrays):
            if isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and 0 < array.size <= LARGEST:
                for axis, size in enumerate(array.shape):
                    if size > 1:
                        yield Place(case.name, operators, case.model, arrays, i, axis)


def network(place: Place, reference: Sequence[np.ndarray]) -> tuple[ModelProto, dict[str, Any]]:
    """The case between layers, and feeds on which its node sees its own data.

    reference: what the case's outputs are on that data.  The layer before multiplies exactly (a signed permutation), so that
    operators that round or compare see the same numbers under every order.  The layers after read every axis.
    """
    rng = np.random.default_rng([place.input, place.axis])
    model = duplicate(place.proto)
    graph = model.graph
    names = [v.name for v in graph.input]
    array = np.asarray(place.arrays[place.input])
    rank, size = array.ndim, array.shape[place.axis]
    weight = np.eye(size, dtype=np.float32)[rng.permutation(size)] * rng.choice([-2.0, -0.5, 0.5, 2.0], size).astype(np.float32)
    wide = np.nan_to_num(np.moveaxis(array, place.axis, -1).astype(np.float32), nan=0.3, posinf=7, neginf=-7)
    feeds = {"z_in": (wide @ np.linalg.inv(weight.astype(np.float64))).astype(np.float32)}
    perm = list(np.argsort([*[i for i in range(rank) if i != place.axis], place.axis]))
    kind = graph.input[place.input].type.tensor_type.elem_type
    before = [
        helper.make_node("MatMul", ["z_in", WEIGHT], ["z_product"]),
        helper.make_node("Transpose", ["z_product"], ["z_turned"], perm=perm),
        helper.make_node("Cast", ["z_turned"], [names[place.input]], to=kind),
    ]
    after: list[NodeProto] = []
    constants = [numpy_helper.from_array(weight, WEIGHT)]
    outputs = []
    for k, (value, result) in enumerate(zip(graph.output, reference, strict=True)):
        after += _read(k, value.name, np.asarray(result), constants, rng)
        outputs.append(helper.make_tensor_value_info(f"z_out{k}", TensorProto.FLOAT, [2] * np.ndim(result)))
    kept = [helper.make_tensor_value_info("z_in", TensorProto.FLOAT, list(feeds["z_in"].shape))]
    for i, other in enumerate(graph.input):
        given = place.arrays[i]
        if i != place.input and isinstance(given, np.ndarray):
            constants.append(numpy_helper.from_array(given, other.name))
        elif i != place.input:
            kept.append(other)
            feeds[other.name] = given
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(kept)
    graph.output.extend(outputs)
    graph.initializer.extend(constants)
    return model, feeds


def _read(k: int, value: str, result: np.ndarray, constants: list[TensorProto], rng: np.random.Generator) -> list[NodeProto]:
    """A layer along every axis of an output, one after the other."""
    nodes = [helper.make_node("Cast", [value], [f"z_float{k}"], to=TensorProto.FLOAT)]
    last = f"z_float{k}"
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        constants += [numpy_helper.from_array(np.array(x, np.float32), f"z_{n}{k}") for n, x in (("none", 0.1), ("low", -9), ("high", 9))]
        nodes.append(helper.make_node("IsNaN", [last], [f"z_nan{k}"]))
        nodes.append(helper.make_node("Where", [f"z_nan{k}", f"z_none{k}", last], [f"z_number{k}"]))
        nodes.append(helper.make_node("Clip", [f"z_number{k}", f"z_low{k}", f"z_high{k}"], [f"z_finite{k}"]))
        last = f"z_finite{k}"
    rank = result.ndim
    for i, size in enumerate(result.shape):  # the first axis goes last and is read; then the next is the first
        name = f"z_read{k}_{i}"
        constants.append(numpy_helper.from_array(rng.standard_normal((size, 2)).astype(np.float32), name))
        turned = f"z_turned{k}_{i}"
        nodes.append(helper.make_node("Transpose", [last], [turned], perm=[*range(1, rank), 0]))
        last = f"z_out{k}" if i == rank - 1 else f"z_part{k}_{i}"
        nodes.append(helper.make_node("MatMul", [turned, name], [last]))
    if not rank:
        nodes.append(helper.make_node("Identity", [last], [f"z_out{k}"]))
    return nodes

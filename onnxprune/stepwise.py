"""Proof node by node, for models whose outputs rounding alone changes: every node is given what it should get.

If every node makes outputs that are moved as they should be out of inputs that are, then so does the whole model.  No node
sees the rounding of those before it, so that nothing drowns in it.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from onnxprune.importer import FLOATS
from onnxprune.moves import Moves
from onnxprune.running import LEAST, MOST, Arrays, Runner, as_float32, distance, jittered

MADE = ":made"


def every_value(proto: ModelProto, feeds: Arrays, skip: Collection[str], arrays: Arrays | None = None) -> dict[str, np.ndarray]:
    """What the nodes of a model's main graph make, by name, apart from the values in `skip`; `arrays` are given to tensors.

    Raises OnnxPruneError (exit code 4) where the model does not run on the feeds.
    """
    names = [o for n in proto.graph.node for o in n.output if o and o not in skip and n.op_type != "Constant"]
    values = Runner(proto, watch=names).run(feeds, arrays)
    return {name: values[name] for name in names if isinstance(values[name], np.ndarray)}


def apart(proto: ModelProto, values: Arrays) -> ModelProto:
    """A model in which every node reads the given values instead of what the nodes before it make."""
    copy = as_float32(proto)
    copy.ir_version = max(copy.ir_version, 4)
    del copy.graph.output[:], copy.graph.value_info[:]
    for node in copy.graph.node:
        for i, name in enumerate(node.output):
            if name in values:
                node.output[i] = name + MADE
                copy.graph.output.append(helper.make_empty_tensor_value_info(name + MADE))
                kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
                copy.graph.input.append(helper.make_tensor_value_info(name, kind, values[name].shape))
    return copy


class Steps:
    """A model whose every node runs alone, on what another model computed, moved.

    values, feeds: of the first model; other: the model whose nodes run; tensors: what may be given to it anew.
    """

    def __init__(self, values: Arrays, feeds: Arrays, other: ModelProto, tensors: Collection[str] = ()) -> None:
        made = {o for n in other.graph.node for o in n.output if n.op_type != "Constant"}
        self._values = {name: value for name, value in values.items() if name in made}
        self._feeds, self._other, self._tensors = feeds, other, tensors
        self._weights = {t.name: numpy_helper.to_array(t) for t in other.graph.initializer if t.data_type in FLOATS}
        self._runner: Runner | None = None

    def gap(self, moves: Moves, arrays: Arrays | None = None) -> float:
        """The largest gap of a node's results, over what counts as equal there: at most 1 where all is right.

        What counts as equal is measured for every value: by moving all that its node reads by a unit in its last place.
        Raises OnnxPruneError (exit code 4) where a node does not run on its inputs.
        """
        given, arrays = moves.arrays(self._values), dict(arrays or {})
        inputs = moves.arrays(self._feeds) | given
        self._runner = self._runner or Runner(apart(self._other, given), self._tensors)
        found = self._runner.run(inputs, arrays)
        rng = np.random.default_rng(4)
        weights = {name: arrays.get(name, array) for name, array in self._weights.items() if name in self._tensors or not self._tensors}
        noisy = self._runner.run(inputs | jittered(given, rng), arrays | jittered(weights, rng))
        worst = 0.0
        for name, value in given.items():
            got = found[name + MADE]
            if value.dtype.kind == "f":
                noise = distance({name: got}, {name: noisy[name + MADE]})
                allowed = min(MOST, max(LEAST, 5 * noise)) if np.isfinite(noise) else MOST
                worst = max(worst, distance({name: value}, {name: got}) / allowed)
            elif not _alike(value, got):
                return float("inf")
        return worst


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal, or quantized values of which one may have been rounded the other way."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype in (np.uint8, np.int8) and one.size:
        return bool(np.abs(one.astype(int) - other.astype(int)).max() <= 1)
    return np.array_equal(one, other)

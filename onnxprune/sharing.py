"""Constants that several nodes share only because they look alike.

Exporters merge equal initializers: the zero biases of an untrained network, the zero states of its recurrent layers.  One
tensor for all would tie layers that have nothing to do with each other.  Where all of its elements are the same number, every
reader may have one of its own, of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import count

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper


def unshare(
    nodes: Sequence[NodeProto], tensors: Mapping[str, TensorProto], keep: Collection[str], taken: Collection[str]
) -> tuple[tuple[NodeProto, ...], dict[str, str]]:
    """The nodes with a name for each time that they read such a tensor, and {new name: tensor}.

    keep: tensors to leave; taken: names that values of the model have, in bodies too.
    """
    reads = Counter(name for node in nodes for name in node.input if name in tensors and name not in keep)
    shared = {name for name, times in reads.items() if times > 1 and _uniform(tensors[name])}
    if not shared:
        return tuple(nodes), {}
    copies: dict[str, str] = {}
    found = []
    for node in nodes:
        if shared.intersection(node.input):
            own = NodeProto()
            own.CopyFrom(node)
            for i, name in enumerate(node.input):
                if name in shared:
                    own.input[i] = next(fresh for k in count(len(copies)) if (fresh := f"{name}@{k}") not in taken)
                    copies[own.input[i]] = name
            node = own
        found.append(node)
    return tuple(found), copies


def _uniform(tensor: TensorProto) -> bool:
    """A float tensor of one number."""
    floats = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if tensor.data_type not in floats or max(tensor.dims, default=1) < 2 or tensor.data_location == TensorProto.EXTERNAL:
        return False
    array = numpy_helper.to_array(tensor).ravel()
    return bool(array.size and array[0] == array[-1] and np.all(array == array[0]))

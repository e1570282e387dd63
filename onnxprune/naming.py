"""What a group is called for people: a tensor that no other group is called by, and its node where that tensor's name says nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxprune.importer import Model
from onnxprune.scopes import all_graphs

if TYPE_CHECKING:
    from onnxprune.grouping import Group, Grouping

NAMELESS = re.compile(r"onnx::\w+|(?:val|const|tensor|initializer)?_?\d+|(?:/?Constant|ortshared)\w*")  # exporters' own counting
PASSING = ("Transpose", "Identity", "Cast", "Reshape", "Unsqueeze", "DequantizeLinear", "QuantizeLinear")


def group_names(grouping: Grouping) -> dict[int, str]:
    """{id: name} of all groups, as they were named when they were found: the same before and after some of them are frozen."""
    return {group.id: group.name for group in grouping.groups}


def named(model: Model, groups: Sequence[Group]) -> tuple[Group, ...]:
    """All width groups of a model with their names: the first tensor, unless another group begins with it or it has no name of its own.

    Then it is the first that is the group's alone and has a name, else the first one with its node, or with its axis (or "heads").  How
    many more tensors there are is said behind.
    """
    first = Counter(_first(group) for group in groups if group.members)
    starts = Counter(_start(group) for group in groups if group.members)
    owners: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        for member in group.members:
            owners[member.tensor].add(group.id)
    readers = _readers(model)
    found: list[Group] = []
    used = Counter[str]()
    for group in groups:
        count = len({member.tensor for member in group.members})
        more = f" and {count - 1} more" if count > 1 else ""
        name = _name(group, first, starts, owners, readers) if group.members else "no tensor"
        used[name] += 1
        found.append(replace(group, name=name + (f" ({used[name]})" if used[name] > 1 else "") + more))
    return tuple(found)


def branch_name(layers: int, output: str) -> str:
    """What a residual branch of so many layers that ends in an Add is called."""
    return f"branch of {layers} layer{'s' if layers > 1 else ''} to {output}"


def _first(group: Group) -> str:
    return group.members[0].tensor


def _start(group: Group) -> tuple[str, int, str]:
    return group.members[0].tensor, group.members[0].axis, group.kind


def _name(
    group: Group, first: Counter[str], starts: Counter[tuple[str, int, str]], owners: dict[str, set[int]], readers: dict[str, str]
) -> str:
    tensor = _first(group)
    if first[tensor] == 1 and not NAMELESS.fullmatch(tensor):
        return tensor
    own = [member for member in group.members if len(owners[member.tensor]) == 1]
    named = next((member.tensor for member in own if not NAMELESS.fullmatch(member.tensor)), None)
    if named is not None:
        return named
    if not own and not NAMELESS.fullmatch(tensor):
        where = "heads" if group.kind == "head" else f"axis {group.members[0].axis}"
        return f"{tensor}, {where}" + (f" from {group.members[0].indices.min()}" if starts[_start(group)] > 1 else "")
    tensor = own[0].tensor if own else tensor
    return f"{tensor} of {readers[tensor]}" if tensor in readers else tensor


def _readers(model: Model) -> dict[str, str]:
    """The node that each tensor goes into, by its name, or by its operator and what it makes."""
    found: dict[str, str] = {}
    passed: dict[str, list[str]] = {}
    for node in _nodes(model):
        said = node.name or f"the {node.op_type} that makes {node.output[0] if node.output else ''}"
        for name in node.input:
            if node.op_type in PASSING and node.output and name == node.input[0]:
                passed.setdefault(node.output[0], [name]).extend(passed.get(name, ()))
            else:
                for tensor in (name, *passed.get(name, ())):
                    found.setdefault(tensor, said)
    return found


def _nodes(model: Model) -> Iterator[NodeProto]:
    for graph in all_graphs(model.proto.graph):
        yield from graph.node

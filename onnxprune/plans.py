"""Step 6: the plan says which units go; it can be kept, edited and applied to a fine-tuned sister of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Group, Grouping

TURNED = "a plan of principal components (--criterion pca) is of the turned model, not of the file; prune the file with that criterion"


@dataclass(frozen=True)
class Plan:
    """A grouping, the units of each group that go, the options that chose them, and how much of the budget they are.

    remove: {group id: unit numbers, ascending}; reached: share of the budget (0 to 1).
    """

    grouping: Grouping
    remove: Mapping[int, np.ndarray]
    options: Mapping[str, Any] = field(default_factory=dict)
    reached: float = 0.0

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.grouping.groups

    def to_json(self) -> dict[str, Any]:
        """The ★ format: `groups --json` with a `remove` list on each group, the options, and the shapes of the tensors."""
        content = self.grouping.to_json()
        for entry in content["groups"]:
            entry["remove"] = [int(u) for u in self.remove.get(entry["id"], ())]
        tensors = self.grouping.model.tensors
        named = {m.tensor for g in self.groups for m in g.members}
        shapes = {name: list(tensors[name].dims) for name in tensors if name in named}
        return content | {"shapes": shapes, "options": dict(self.options), "reached": round(self.reached, 6)}


def read_plan(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A plan's JSON content; raises OnnxPruneError where it is none."""
    name = "the plan"
    if isinstance(source, Mapping):
        content: Any = dict(source)
    else:
        name = str(source)
        try:
            content = json.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise OnnxPruneError(f"{name}: cannot be read ({error.strerror}); make one with `onnxprune plan`") from error
        except ValueError as error:
            raise OnnxPruneError(f"{name}: not a JSON file ({error}); make one with `onnxprune plan`") from error
    if not isinstance(content, dict) or content.get("format") != 1 or not isinstance(content.get("groups"), list):
        raise OnnxPruneError(f"{name}: not a plan of format 1; make one with `onnxprune plan`")
    _check_header(name, content)
    try:
        for entry in content["groups"]:
            units = int(entry["units"])
            remove = list(entry.get("remove") or [])
            if not all(type(u) is int for u in remove):
                raise OnnxPruneError(f"{name}: the remove list of group {entry['id']} holds {remove[0]!r}; it must hold unit numbers")
            if any(not 0 <= u < units for u in remove) or len(set(remove)) != len(remove):
                raise OnnxPruneError(f"{name}: group {entry['id']} has {units} units; its remove list names others, or one twice")
            if remove and len(remove) == units > 1:
                raise OnnxPruneError(f"{name}: group {entry['id']} would lose all of its {units} units; leave one at least")
            for block in entry.get("blocks") or []:
                if len(set(block) & set(remove)) * len(entry["blocks"]) != len(remove):
                    raise OnnxPruneError(f"{name}: the blocks of group {entry['id']} lose different numbers of units; make them equal")
            for member in entry["members"]:
                str(member["tensor"]), int(member["axis"]), np.asarray(member["indices"], np.int64).reshape(units, -1)
                if len(member["indices"]) != units:
                    raise OnnxPruneError(f"{name}: group {entry['id']} has {units} units, and places of {len(member['indices'])}")
        if not any(entry.get("remove") for entry in content["groups"]):
            raise OnnxPruneError(f"{name}: removes nothing; it may be a groups file: make a plan with `onnxprune plan`")
    except (KeyError, TypeError, ValueError) as error:
        raise OnnxPruneError(f"{name}: a group is not as the format says ({error}); make the plan again") from error
    return content


def _check_header(name: str, content: Mapping[str, Any]) -> None:
    """Options, shapes and the share reached are of the types that the format says; raises OnnxPruneError where not."""
    options, shapes = content.get("options") or {}, content.get("shapes") or {}
    given = options.get("input_shapes") or {} if isinstance(options, Mapping) else None
    allowed = options.get("allow_io") or [] if isinstance(options, Mapping) else None
    sizes = [shape for table in (shapes, given) if isinstance(table, Mapping) for shape in table.values()]
    wrong = {
        "options": not isinstance(options, Mapping),
        "shapes": not isinstance(shapes, Mapping),
        "input_shapes": not isinstance(given, Mapping),
        "shape": any(not isinstance(s, Sequence) or any(type(n) is not int for n in s) for s in sizes),
        "allow_io": not isinstance(allowed, Sequence) or isinstance(allowed, str) or any(not isinstance(one, str) for one in allowed),
        "reached": not isinstance(content.get("reached") or 0.0, int | float),
    }
    if any(wrong.values()):
        what = next(key for key, bad in wrong.items() if bad)
        raise OnnxPruneError(f"{name}: '{what}' is not as the format says; make the plan again")


def check_of_file(criterion: str | None) -> None:
    """Raises OnnxPruneError where a plan by this criterion would speak of another model than the file."""
    if criterion == "pca":
        raise OnnxPruneError(f"no plan is written: {TURNED}")


def match(grouping: Grouping, content: Mapping[str, Any]) -> Plan:
    """The plan on a model: every group that loses units must be a group of the model, place by place.

    Raises OnnxPruneError where the plan was made for another model.
    """
    model = grouping.model
    if (content.get("options") or {}).get("criterion") == "pca":
        raise OnnxPruneError(f"{model.name}: {TURNED}")
    for tensor, shape in (content.get("shapes") or {}).items():
        if tensor not in model.tensors:
            raise OnnxPruneError(f"{model.name}: has no tensor '{tensor}'; the plan was made for another model")
        if list(model.tensors[tensor].dims) != list(shape):
            found = list(model.tensors[tensor].dims)
            raise OnnxPruneError(f"{model.name}: '{tensor}' is {found}, in the plan {shape}; the plan was made for another model")
    by_place: dict[tuple[str, int], list[Group]] = {}
    for own in grouping.groups:
        for member in own.members:
            by_place.setdefault((member.tensor, member.axis), []).append(own)
    remove: dict[int, np.ndarray] = {}
    for entry in content["groups"]:
        if not entry.get("remove"):
            continue
        members = [(str(m["tensor"]), int(m["axis"]), np.asarray(m["indices"], np.int64)) for m in entry["members"]]
        candidates = by_place.get(members[0][:2], []) if members else []
        matching = [g for g in candidates if _fits(g, members)]
        if not matching:
            where = f"{members[0][0]} axis {members[0][1]}" if members else "nowhere"
            raise OnnxPruneError(
                f"{model.name}: no group of its is like group {entry['id']} of the plan ({where}); the plan was made for another model"
            )
        if matching[0].id in remove:
            raise OnnxPruneError(f"{model.name}: the plan names group {entry['id']} ('{members[0][0]}') twice; say once what goes")
        remove[matching[0].id] = np.array(sorted(int(u) for u in entry["remove"]), np.int64)
    return Plan(grouping, remove, dict(content.get("options") or {}), float(content.get("reached") or 0.0))


def _fits(group: Group, members: list[tuple[str, int, np.ndarray]]) -> bool:
    if len(members) != len(group.members):
        return False
    own = {(m.tensor, m.axis): m.indices for m in group.members}
    for tensor, axis, indices in members:
        have = own.get((tensor, axis))
        if have is None or not np.array_equal(have, indices.reshape(len(indices), -1)):
            return False
    return True

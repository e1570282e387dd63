"""Hand-off to training: which indices of a framework's own parameters a plan keeps, so that fine-tuning happens where the code is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.api import Arrays, Progress, Shapes, Source, planned
from onnxprune.correspondence import Correspondence, Masks, Place
from onnxprune.errors import OnnxPruneError
from onnxprune.liveness import Liveness
from onnxprune.plans import Plan
from onnxprune.relations import Mend
from onnxprune.rewriter import Widths


@dataclass(frozen=True)
class Kept:
    """What stays of a parameter: {axis: indices, ascending} for the axes that lose some.

    tensors: those of the model that say so; by: how they were found, as docs/formats.md says; groups: of the convolution with
    this weight, where that has several and the number changes.
    """

    shape: tuple[int, ...]
    keep: Mapping[int, np.ndarray]
    tensors: tuple[str, ...] = ()
    by: str = ""
    groups: int | None = None

    @property
    def new_shape(self) -> tuple[int, ...]:
        return tuple(len(self.keep[i]) if i in self.keep else size for i, size in enumerate(self.shape))

    def to_json(self) -> dict[str, Any]:
        keep = {str(axis): indices.tolist() for axis, indices in self.keep.items()}
        content: dict[str, Any] = {"shape": list(self.shape), "keep": keep, "new_shape": list(self.new_shape)}
        if self.groups is not None:
            content["groups"] = self.groups
        return content | {"tensors": list(self.tensors), "by": self.by}


@dataclass(frozen=True)
class HandOff:
    """What stays of each parameter, the parameters that a cut branch takes with it, and what could not be matched and why.

    unmatched: (parameter, reason) or, for a tensor of the model that loses units and is in no parameter, (tensor, reason).
    """

    parameters: Mapping[str, Kept]
    removed: tuple[str, ...] = ()
    unmatched: tuple[tuple[str, str], ...] = ()
    uncovered: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.unmatched and not self.uncovered

    def to_json(self) -> dict[str, Any]:
        """The format of docs/formats.md."""
        open_ends = [{"parameter": name, "reason": reason} for name, reason in self.unmatched]
        open_ends += [{"tensor": name, "reason": reason} for name, reason in self.uncovered]
        return {
            "format": 1,
            **self.options,
            "parameters": {name: kept.to_json() for name, kept in self.parameters.items()},
            "removed": list(self.removed),
            "unmatched": open_ends,
        }


def keep_indices(
    model: Source,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    *,
    feeds: Arrays | None = None,
    input_shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> HandOff:
    """Which indices of each parameter of `state` a plan keeps; without one, of each tensor of the model under its own name.

    state: {parameter: array or torch tensor}, as the model was exported from it.
    Raises OnnxPruneError (exit code 2) where the plan does not fit the model, or nothing in the state is in it.

    >>> kept = onnxprune.keep_indices("model.onnx", "plan.json", torch_model.state_dict())      # doctest: +SKIP
    >>> smaller.load_state_dict(onnxprune.slice_state(torch_model.state_dict(), kept))          # doctest: +SKIP
    """
    made = planned(model, plan, feeds, input_shapes, progress)
    loaded, widths = made.grouping.model, Widths(made.grouping, made.remove)

    def masks(tensor: str) -> Masks:
        return tuple(widths.mask((tensor, axis)) for axis in range(len(loaded.tensors[tensor].dims)))

    cut = [g.branch for g in made.groups if g.branch is not None and len(made.remove.get(g.id, ()))]
    dead = Liveness(loaded).without(cut) if cut else frozenset[str]()
    if state is None:
        return _own(made, masks, dead)
    if progress is not None:
        progress("matching parameters")
    arrays = {str(name): _numbers(str(name), value) for name, value in state.items()}
    found = Correspondence(loaded, arrays, masks)
    found.find()
    if not found.places:
        raise OnnxPruneError(f"{loaded.name}: holds none of the checkpoint's values; give the checkpoint that it was exported from")
    groups = _groups(made, widths)
    parameters, removed, unmatched = {}, [], []
    for name, array in arrays.items():
        place = found.places.get(name) or (Place((None,) * array.ndim, (), "size") if array.size < 2 else None)
        if place is None and array.dtype.kind in "iub" and not _concerned(array.shape, made, masks):
            place = Place((None,) * array.ndim, (), "size")
        if place is None:
            unmatched.append((name, found.problems.get(name, "no tensor of the model has its values, as they are or folded")))
        elif place.tensors and dead.issuperset(place.tensors):
            removed.append(name)
        else:
            parameters[name] = _kept(array.shape, place, groups)
    left = [(tensor, "it loses units, and no parameter has its values") for tensor in found.uncovered() if tensor not in dead]
    return HandOff(parameters, tuple(removed), tuple(unmatched), tuple(left), {"model": loaded.name})


def slice_state(state: Mapping[str, Any], exported: HandOff | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """The state with the indices that stay, without the parameters that went; numpy arrays and torch tensors alike.

    exported: of `keep_indices`, or what `export-plan` wrote, or its path.  What is listed there as unmatched is returned as it is.
    Raises OnnxPruneError where the state is not the one that was exported.
    """
    content = exported if isinstance(exported, HandOff) else read_handoff(exported)
    open_ends = dict(content.unmatched)
    missing = [name for name, kept in content.parameters.items() if kept.keep and name not in state]
    if missing:
        raise OnnxPruneError(f"the state has no '{missing[0]}', which was exported; give the state of the same model")
    result: dict[str, Any] = {}
    for name, value in state.items():
        if name in content.removed:
            continue
        kept = content.parameters.get(name)
        if kept is None and name not in open_ends:
            raise OnnxPruneError(f"'{name}' was not in the checkpoint that was exported; give the state of the same model")
        if kept is None or not kept.keep:
            result[name] = value
            continue
        if tuple(value.shape) != kept.shape:
            raise OnnxPruneError(f"'{name}' is {list(value.shape)}, in the export {list(kept.shape)}; give the state before pruning")
        for axis, indices in kept.keep.items():
            value = value[(slice(None),) * axis + (indices,)]
        result[name] = value
    return result


def read_handoff(source: Mapping[str, Any] | str | os.PathLike[str]) -> HandOff:
    """What `export-plan` wrote; raises OnnxPruneError where it is not of that format."""
    name = "the export" if isinstance(source, Mapping) else str(source)
    again = "write it with `onnxprune export-plan`"
    try:
        content = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise OnnxPruneError(f"{name}: cannot be read ({error.strerror}); {again}") from error
    except ValueError as error:
        raise OnnxPruneError(f"{name}: not a JSON file ({error}); {again}") from error
    if not isinstance(content, Mapping) or content.get("format") != 1 or not isinstance(content.get("parameters"), Mapping):
        raise OnnxPruneError(f"{name}: not an exported plan of format 1; {again}")
    try:
        parameters = {str(key): _read(entry) for key, entry in content["parameters"].items()}
        unmatched = tuple((str(e["parameter"]), str(e["reason"])) for e in content.get("unmatched", ()) if "parameter" in e)
        uncovered = tuple((str(e["tensor"]), str(e["reason"])) for e in content.get("unmatched", ()) if "tensor" in e)
        return HandOff(parameters, tuple(map(str, content.get("removed", ()))), unmatched, uncovered)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OnnxPruneError(f"{name}: a parameter is not as the format says ({error}); {again}") from error


def _read(entry: Mapping[str, Any]) -> Kept:
    shape = tuple(int(n) for n in entry["shape"])
    keep = {int(axis): np.asarray(indices, np.int64) for axis, indices in entry["keep"].items()}
    for axis, indices in keep.items():
        if not 0 <= axis < len(shape) or indices.ndim != 1 or np.any((indices < 0) | (indices >= shape[axis])):
            raise ValueError(f"axis {axis} of {list(shape)}")
    groups = entry.get("groups")
    return Kept(shape, keep, tuple(entry.get("tensors", ())), str(entry.get("by", "")), None if groups is None else int(groups))


def _own(made: Plan, masks: Any, dead: frozenset[str]) -> HandOff:
    """The model's own tensors, under their own names."""
    model, parameters, removed, left = made.grouping.model, {}, [], []
    copies: dict[str, list[str]] = {}
    for copy, original in model.copies.items():
        copies.setdefault(original, []).append(copy)
    groups = _groups(made, Widths(made.grouping, made.remove))
    for name, tensor in model.tensors.items():
        if name in model.copies:
            continue
        read_as = [one for one in copies.get(name, [name]) if one not in dead]
        shape = tuple(tensor.dims)
        if not read_as:
            removed.append(name)
            continue
        found = [_indices(masks(one)) for one in read_as]
        if any(f.keys() != found[0].keys() or any(not np.array_equal(f[a], found[0][a]) for a in f) for f in found[1:]):
            left.append((name, "several layers share it, and lose different units"))
            continue
        parameters[name] = Kept(shape, found[0], (name,), "the file's own", groups.get(name))
    return HandOff(parameters, tuple(removed), (), tuple(left), {"model": model.name})


def _kept(shape: tuple[int, ...], place: Place, groups: Mapping[str, int]) -> Kept:
    own = [groups[t] for t in place.tensors if t in groups] if len(shape) > 1 else []
    return Kept(shape, _indices(place.masks), place.tensors, place.by, own[0] if own else None)


def _indices(masks: Masks) -> dict[int, np.ndarray]:
    return {axis: np.flatnonzero(mask) for axis, mask in enumerate(masks) if mask is not None}


def _numbers(name: str, value: Any) -> np.ndarray:
    """A parameter as a numpy array: of torch, too, also where numpy lacks its type."""
    for step in ("detach", "cpu"):
        value = getattr(value, step)() if hasattr(value, step) else value
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    array = np.asarray(value)
    if array.dtype.kind not in "fiubV" or array.dtype.names:
        raise OnnxPruneError(f"'{name}' is no array of numbers ({array.dtype}); give the state dict of the model")
    return array


def _groups(made: Plan, widths: Widths) -> dict[str, int]:
    """{weight: groups} of the grouped convolutions whose number of groups changes."""
    found = {}
    for mend in made.grouping.dependencies.mends:
        if isinstance(mend, Mend) and mend.where == "group":
            (axis,) = mend.amounts[0]
            if widths.size(axis) != widths.full(axis):
                found[made.grouping.model.nodes[mend.node].input[1]] = widths.size(axis)
    return found


def _concerned(shape: tuple[int, ...], made: Plan, masks: Any) -> bool:
    """Whether an axis is as long as one of the model's tensors that loses something."""
    model = made.grouping.model
    return any(len(mask) in shape for name in model.tensors for mask in masks(name) if mask is not None)

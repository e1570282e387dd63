"""The names of a checkpoint's parameters: which belong to one module, what they are in it, and which names of the model say the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

Tokens = tuple[str, ...]
_NOISE = {"", "module", "_orig_mod", "ReadVariableOp", "params", "batch_stats"}  # wrappers, collections, what TensorFlow appends
# what a parameter is in a norm: torch, Keras and flax
_ROLES = {
    **dict.fromkeys(("weight", "gamma", "scale"), "scale"),
    **dict.fromkeys(("bias", "beta"), "shift"),
    **dict.fromkeys(("running_mean", "moving_mean", "mean"), "mean"),
    **dict.fromkeys(("running_var", "moving_variance", "var"), "variance"),
}
_NUMBERED = {4: (("scale", "shift", "mean", "variance"),), 3: (("shift", "mean", "variance"), ("scale", "mean", "variance"))}  # Keras' .h5


def tokens(name: str) -> Tokens:
    """The parts of a name without those that say nothing: `module.conv.weight` and `conv/weight:0` are ("conv", "weight")."""
    return tuple(part for part in re.split(r"[./]", re.sub(r":\d+$", "", name)) if part not in _NOISE)


def modules(names: Iterable[str]) -> dict[Tokens, list[str]]:
    """The parameters of each module, both in the order of the checkpoint."""
    found: dict[Tokens, list[str]] = {}
    for name in names:
        found.setdefault(tokens(name)[:-1], []).append(name)
    return found


def bias_of(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The bias among the parameters of a layer with a weight: by its name or, in Keras' numbered ones, as the only vector."""
    vectors = [name for name in names if len(shapes[name]) == 1]
    named = [name for name in vectors if _ROLES.get(_leaf(name)) == "shift"]
    return next(iter(named), vectors[0] if len(vectors) == 1 and _leaf(vectors[0]).isdigit() else None)


def _leaf(name: str) -> str:
    return (tokens(name) or ("",))[-1]


def norm_roles(names: list[str]) -> list[dict[str, str]]:
    """{role: parameter} for each way of reading a module's vectors as a norm's scale, shift, mean and variance."""
    leaves = [_leaf(name) for name in names]
    if all(leaf.isdigit() for leaf in leaves):
        return [dict(zip(roles, names, strict=True)) for roles in _NUMBERED.get(len(names), ())]
    found = {_ROLES[leaf]: name for leaf, name in zip(leaves, names, strict=True) if leaf in _ROLES}
    return [found] if found else []


def same_names(parameters: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{parameter: tensor} where names say the same, given the shapes of both; a prefix that one side has throughout is left out."""
    ours, theirs = {name: tokens(name) for name in parameters}, {name: tokens(name) for name in tensors}
    endings: dict[tuple[str, tuple[int, ...]], list[Tokens]] = {}
    for name, parts in theirs.items():
        if parts:
            endings.setdefault((parts[-1], tensors[name]), []).append(parts)
    votes: Counter[tuple[Tokens, Tokens]] = Counter({((), ()): 1})
    for name, one in ours.items():
        for other in endings.get((one[-1], parameters[name]), ()) if one else ():
            short = min(len(one), len(other))
            if one[-short:] == other[-short:]:
                votes[one[:-short], other[:-short]] += 1
    (left, right), _ = max(votes.items(), key=lambda vote: (vote[1], -len(vote[0][0]) - len(vote[0][1])))
    named, known = _without(left, ours), _without(right, theirs)
    return {named[parts]: known[parts] for parts in named if parts in known}


def _without(prefix: Tokens, names: Mapping[str, Tokens]) -> dict[Tokens, str]:
    """{parts without the prefix: name}, where that is one name."""
    short = {name: parts[len(prefix) :] if parts[: len(prefix)] == prefix else parts for name, parts in names.items()}
    times = Counter(short.values())
    return {parts: name for name, parts in short.items() if parts and times[parts] == 1}

"""Which groups an option's globs speak of."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Grouping
from onnxprune.importer import Model
from onnxprune.scopes import all_graphs, subgraphs


def may_go(
    grouping: Grouping, scope: Sequence[str], exclude: Sequence[str], ratios: Mapping[str, float]
) -> tuple[set[int], dict[int, float]]:
    """The groups to choose from, and the share of units that the user gave for some of them.

    Raises OnnxPruneError for a glob that matches nothing in the model, and for a ratio that is none.
    """
    names = _names(grouping) if scope or exclude or ratios else {}
    chosen = {g.id for g in grouping.groups}
    if scope:
        chosen &= _matching(names, scope, "--scope", grouping.model)
    if exclude:
        chosen -= _matching(names, exclude, "--exclude", grouping.model)
    shares: dict[int, float] = {}
    for pattern, share in ratios.items():
        if not 0 <= share < 1:
            raise OnnxPruneError(f"--layer-ratio {pattern}={share}: a ratio is at least 0 and below 1")
        shares |= dict.fromkeys(_matching(names, [pattern], "--layer-ratio", grouping.model) & chosen, share)
    return chosen, shares


def matched(grouping: Grouping, patterns: Sequence[str], option: str) -> dict[str, set[int]]:
    """For each glob the groups that it matches; raises OnnxPruneError for one that matches nothing in the model."""
    names = _names(grouping) if patterns else {}
    return {pattern: _matching(names, [pattern], option, grouping.model) for pattern in patterns}


def _names(grouping: Grouping) -> dict[int, set[str]]:
    """For each group its tensors and the nodes that read them; for a residual branch all that is in it, and its Add."""
    readers: dict[str, set[str]] = {}
    for node in grouping.model.nodes:
        bodies = (one for graph in subgraphs(node) for part in all_graphs(graph) for one in part.node)
        for name in (*node.input, *(name for one in bodies for name in one.input)):  # a Loop reads what its body reads
            readers.setdefault(name, set()).update({node.name, *node.output} - {""})
    names = {g.id: set().union(*({m.tensor} | readers.get(m.tensor, set()) for m in g.members)) for g in grouping.groups}
    for branch, own in ((g.branch, names[g.id]) for g in grouping.groups if g.branch is not None):
        inside = branch.dead | {branch.output}
        own |= inside | {n.name for n in grouping.model.nodes if inside.intersection(n.output)} - {""}
    return names


def _matching(names: Mapping[int, set[str]], patterns: Sequence[str], option: str, model: Model) -> set[int]:
    """The groups that a glob matches; a glob that matches nothing in the model is the user's mistake."""
    known = {*model.tensors, *(n.name for n in model.nodes), *(o for n in model.nodes for o in n.output)}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
            raise OnnxPruneError(f"{option} '{pattern}': no node or tensor of {model.name} has such a name; see `onnxprune groups`")
    return {g for g, own in names.items() if any(fnmatch.fnmatchcase(name, p) for name in own for p in patterns)}

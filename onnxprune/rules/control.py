"""If, Loop and Scan: what their bodies get and give are values of the outside.  Sequences have the axes of their elements."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.relations import Site, rule
from onnxprune.scopes import flow, taken


def one(site: Site, names: Sequence[str]) -> None:
    """The values are the same one, axis by axis; they are fixed where their sizes are not known to agree."""
    names = [name for name in names if name]
    shapes = {site.shapes.get(name) for name in names}
    if len(shapes) == 1 and None not in shapes:
        for other in names[1:]:
            site.same_all(site.axes(names[0]), site.axes(other))
    else:
        for name in names:
            site.fixed(site.axes(name), f"{site.node.op_type} passes values of other or unknown sizes")


def each(site: Site, whole: str, part: str, axis: int) -> None:
    """An iteration's part is one index of the axis of the whole."""
    w, p = site.axes(whole), site.axes(part)
    if whole not in site.shapes or part not in site.shapes or len(w) != len(p) + 1:
        site.fixed([*w, *p], f"{site.node.op_type} passes values of unknown sizes")
        return
    site.fixed([w.pop(axis)], f"the iterations of {site.node.op_type}")
    for a, b in zip(w, p, strict=True):
        site.same(a, b)


@rule("If", "Loop", "Scan")
def control(site: Site) -> None:
    """States are one value all through; what is scanned has an axis more outside; outputs of If are those of both branches.

    Where the condition of an If is known before any input is, the other branch never runs and says nothing of the output.
    """
    links = flow(site.node, site.opset)
    if links is None:
        raise ValueError("subgraphs that are not understood")
    for carried in links.carried:
        one(site, carried)
    for whole, part, axis in (*links.sliced, *links.stacked):
        each(site, whole, part, axis)
    branch = taken(site.node, site.folded)
    for value, branches in links.chosen:
        one(site, [value, *(branches if branch is None else [branches[branch]])])
        for name in branches if branch is not None else ():
            site.product(site.axes(name), site.axes(name)) if site.axes(name) else None


@rule("SequenceAt", "SequenceConstruct", "SequenceErase", "SequenceInsert")
def sequence(site: Site) -> None:
    """All elements are alike; positions have no axes."""
    for x in site.x:
        site.same_all(x, site.y[0]) if len(x) == len(site.y[0]) else None


@rule("SequenceEmpty", "SequenceLength")
def length(site: Site) -> None:
    """Says nothing of the elements' axes."""
    for axes in (*site.x, *site.y):
        site.product(axes, axes) if axes else None


@rule("ConcatFromSequence", "SplitToSequence")
def unpacked(site: Site) -> None:
    """The axis along which elements stand is fixed, the others are theirs."""
    joins = site.node.op_type == "ConcatFromSequence"
    whole, part = (site.y[0], site.x[0]) if joins else (site.x[0], site.y[0])
    along = site.get("axis", 0) % len(whole)
    kept = [i for i in range(len(whole)) if i != along]
    site.fixed([whole[along], *(part[along : along + 1] if len(part) == len(whole) else [])], "elements of a sequence")
    if len(part) == len(whole):
        site.same_all([whole[i] for i in kept], [part[i] for i in kept])
    elif len(part) == len(kept):
        site.same_all([whole[i] for i in kept], part)

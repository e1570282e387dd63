"""The dependency graph around a node, a value or a group, for people (SVG, PNG, DOT) and for programs (GraphML).

Axes are the graph's nodes and relations its edges, as in `dependency_graph`.  In a drawing every value is one box with a cell for
each of its axes, and edges go from cell to cell.
"""

from __future__ import annotations

import difflib
import fnmatch
import html
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxprune import layouts
from onnxprune.dependencies import axis_graph, axis_label
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Grouping
from onnxprune.relations import Axis
from onnxprune.writing import check_target, write_bytes

if TYPE_CHECKING:
    import networkx as nx

ENDINGS = (".svg", ".png", ".dot", ".graphml")
COLORS = ("#a6cee3", "#fdbf6f", "#b2df8a", "#cab2d6", "#ffff99", "#fb9a99", "#80cdc1", "#e6c2a0")  # of cells under black text
FIXED = "#d9d9d9"
STYLES = {"same": "solid", "concat": "dashed", "product": "dotted"}
LONGEST = 48  # characters of a name in a drawing


def neighbourhood(grouping: Grouping, around: str | None = None, depth: int = 2) -> nx.MultiDiGraph:
    """The axes of a node, value or group and those at most `depth` relations away; of the whole model where `around` is None.

    around: the name of a node or value, a glob over them, or `group:3` (`3` too, where nothing else has that name).  Where any of its
    axes may shrink, steps go on from such axes alone.
    Nodes are named "value:axis" and have `value`, `axis`, `size`, `op` (what makes the value: an operator, `input`, `tensor`, or `part`
    of an axis that only a rule knows), `order` (of values in the model), and where they apply `groups` (their numbers, with commas),
    `fixed` (why) and `statistics`; edges have `relation` and `position` as in `dependency_graph`.
    Raises OnnxPruneError where nothing has such a name.
    """
    whole = axis_graph(grouping.model, grouping.dependencies)
    axes = _described(grouping, whole)
    if around is None:
        return whole
    near = {axis_label(axis) for axis in _named(grouping, around, axes.values())}
    seen, prunable = set(near), {label for label, groups in whole.nodes(data="groups") if groups}
    through = prunable if near & prunable else set(whole)  # what is fixed leads nowhere, unless that is the question
    for _ in range(depth):
        near = {n for one in near & through for n in (*whole.predecessors(one), *whole.successors(one))} - seen
        seen |= near
    return whole.subgraph(seen)


def _described(grouping: Grouping, graph: nx.MultiDiGraph) -> dict[str, Axis]:
    """Say of every node what it is; {node: axis}."""
    model = grouping.model
    makers = {o: n.op_type for n in model.nodes for o in n.output}
    order = {o: 2 * i for i, n in reversed(list(enumerate(model.nodes, 1))) for o in n.output}
    order |= {v: 2 * i - 1 for i, n in reversed(list(enumerate(model.nodes, 1))) for v in n.input if v in model.tensors}
    makers |= dict.fromkeys(model.inputs, "input") | dict.fromkeys(model.tensors, "tensor")
    makers |= dict.fromkeys(grouping.dependencies.sizes, "part")
    owner = {leaf: g.id for g in grouping.groups for leaf in g.leaves}
    axes = {}
    for label, about in graph.nodes(data=True):
        value, _, place = label.rpartition(":")
        axes[label] = axis = value, int(place)
        about |= {"value": value, "axis": axis[1], "op": makers.get(value, "value"), "order": order.get(value, 0)}
        leaves = layouts.leaves(grouping.layout(axis)) if axis in grouping.dims else set()
        if groups := sorted({owner[leaf] for leaf in leaves if leaf in owner}):
            about["groups"] = ",".join(map(str, groups))
        elif "fixed" not in about and (why := sorted({leaf.reason for leaf in leaves if leaf.reason})):
            about["fixed"] = why[0]  # as it is tied to what may not change
    return axes


def _named(grouping: Grouping, around: str, axes: Any) -> list[Axis]:
    """The axes that a name speaks of."""
    model = grouping.model
    nodes = {n.name: [v for v in (*n.input, *n.output) if v] for n in model.nodes if n.name}
    if around in nodes or around in model.shapes:
        values = {*nodes.get(around, ()), *([around] if around in model.shapes else [])}
    else:
        number = around.removeprefix("group:")
        for one in grouping.groups if number.isdecimal() else ():
            if one.id == int(number):
                leaves = set(one.leaves)
                inside = [axis for axis in axes if axis in grouping.dims and not leaves.isdisjoint(layouts.leaves(grouping.layout(axis)))]
                return inside or [(m.tensor, m.axis) for m in one.members]
        values = {v for name, own in nodes.items() if fnmatch.fnmatchcase(name, around) for v in own}
        values |= set(fnmatch.filter(model.shapes, around))
    if not values:
        known = difflib.get_close_matches(around, [*nodes, *model.shapes], n=3, cutoff=0.4)
        hint = f"; near it are {', '.join(known)}" if known else ""
        raise OnnxPruneError(f"--around '{around}': {model.name} has no such node, value or group{hint}; see `onnxprune inspect -v`")
    return [axis for axis in axes if axis[0] in values]


def check_drawing(path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Path:
    """Raises OnnxPruneError where such a file cannot be drawn or written here, before any work is done for it."""
    target = check_target(path, source)
    ending = target.suffix.lower()
    if ending not in ENDINGS:
        raise OnnxPruneError(f"{target}: a drawing's name ends in {', '.join(ENDINGS)}; give one of them")
    if ending != ".graphml":
        _graphviz(target)
        if ending != ".dot":
            from shutil import which

            if which("dot") is None:
                raise OnnxPruneError(
                    f"{target}: needs Graphviz's program 'dot' (apt install graphviz, brew install graphviz); .dot and .graphml do without"
                )
    return target


def _graphviz(target: Path) -> Any:
    try:
        import graphviz
    except ImportError as error:
        raise OnnxPruneError(f"{target}: drawings need graphviz: pip install 'onnxprune[draw]'; .graphml does without") from error
    return graphviz


def draw(graph: nx.MultiDiGraph, path: str | os.PathLike[str], title: str = "") -> None:
    """Write what `neighbourhood` gives: .svg and .png are laid out by Graphviz's `dot`, .dot is its input, .graphml for other programs.

    Raises OnnxPruneError for another ending, where the extra `draw` or the program `dot` is missing, and where the disk does not take it.
    """
    import networkx as nx

    target = check_drawing(path)
    if target.suffix.lower() == ".graphml":
        stream = BytesIO()
        nx.write_graphml(graph, stream)
        write_bytes(stream.getvalue(), target)
        return
    graphviz = _graphviz(target)
    picture = _picture(graphviz, graph, title)
    if target.suffix.lower() == ".dot":
        write_bytes(picture.source.encode(), target)
        return
    try:
        content = picture.pipe(format=target.suffix.lower()[1:])
    except (graphviz.ExecutableNotFound, graphviz.CalledProcessError) as error:
        raise OnnxPruneError(f"{target}: dot cannot draw it ({str(error).splitlines()[0]}); write a .graphml instead") from error
    write_bytes(content, target)


def _picture(graphviz: Any, graph: nx.MultiDiGraph, title: str) -> Any:
    label = f"{title}\\nsolid: the same index; dashed: end to end (whole to part); dotted: factors; grey: fixed"
    picture = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "label": label, "labelloc": "t", "fontname": "Helvetica", "fontsize": "11", "nodesep": "0.15"},
        node_attr={"shape": "plaintext", "fontname": "Helvetica", "fontsize": "10", "margin": "0"},
        edge_attr={"arrowsize": "0.5", "color": "#404040"},
    )
    values: dict[str, list[Mapping[str, Any]]] = {}
    for _, about in graph.nodes(data=True):
        values.setdefault(about["value"], []).append(about)
    names = {value: f"v{i}" for i, value in enumerate(values)}
    for value, cells in values.items():
        picture.node(names[value], label=_box(value, sorted(cells, key=lambda about: int(about["axis"]))), tooltip=graphviz.escape(value))
    for one, other, about in graph.edges(data=True):
        first, second = graph.nodes[one], graph.nodes[other]
        same = about["relation"] == "same"
        if same and first["order"] > second["order"]:  # a relation has no direction; drawn as the data flow
            first, second = second, first
        tail, head = (f"{names[end['value']]}:a{end['axis']}:{side}" for end, side in ((first, "e"), (second, "w")))
        picture.edge(tail, head, style=STYLES[about["relation"]], arrowhead="none" if same else "normal")
    return picture


def _box(value: str, cells: Sequence[Mapping[str, Any]]) -> str:
    """A value as an HTML-like label: what makes it and its name, and a row for each axis."""
    short = value if len(value) <= LONGEST else "…" + value[1 - LONGEST :]
    head = f'<TR><TD BGCOLOR="white"><B>{html.escape(cells[0]["op"])}</B> {html.escape(short)}</TD></TR>'
    rows = "".join(f"<TR>{_cell(about)}</TR>" for about in cells)
    return f'<<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="0" CELLPADDING="3">{head}{rows}</TABLE>>'


def _cell(about: Mapping[str, Any]) -> str:
    text, color = f"axis {about['axis']}: {about['size']}", "white"
    if "groups" in about:
        groups = about["groups"].split(",")
        text += f" – group{'s' if len(groups) > 1 else ''} {', '.join(groups[:4])}" + (" …" if len(groups) > 4 else "")
        color = COLORS[int(groups[0]) % len(COLORS)]
    elif "fixed" in about:
        text += f' – <FONT POINT-SIZE="8">{html.escape(about["fixed"])}</FONT>'
        color = FIXED
    return f'<TD PORT="a{about["axis"]}" BGCOLOR="{color}">{text}</TD>'

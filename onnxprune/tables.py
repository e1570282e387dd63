"""What the commands that explore a model show in the terminal: layers and groups, sensitivities, sweeps."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape

from onnxprune.inspection import Inspection, Layer
from onnxprune.naming import group_names
from onnxprune.sensitivities import Point, Sensitivity, removed
from onnxprune.sweeping import COSTS, Sweep
from onnxprune.terminal import NARROW
from onnxprune.terminal import table as table_of

LARGEST = 30  # layers that are listed at most, unless all are asked for
LEAST = 0.005  # of the MACs or of the parameters, which a layer has to be listed
WIDE = 110  # characters from which on shapes and numbers are shown beside shares


def show_inspection(console: Console, found: Inspection, everything: bool = False) -> None:
    """Layers and groups with what they are worth, what is fixed, and the largest reductions; all layers where `everything` is asked for."""
    model = found.grouping.model
    sizes = ", ".join(f"{escape(name)} {'×'.join(map(str, shape)) or 'of one number'}" for name, shape in model.input_shapes.items())
    console.print(f"[bold]{escape(model.name)}[/]: {found.parameters:,} parameters, {found.macs:,} MACs on {sizes}", soft_wrap=True)
    _show_layers(console, found, everything)
    _show_operators(console, found)
    _show_groups(console, found)
    _show_fixed(console, found)
    _show_reach(console, found)


def _show_layers(console: Console, found: Inspection, everything: bool) -> None:
    shown = list(found.layers) if everything else [one for one in found.layers if max(_shares(found, one)) >= LEAST]
    largest = sorted(shown, key=lambda one: -sum(_shares(found, one)))[: len(shown) if everything else LARGEST]
    shown = [layer for layer in shown if layer in largest]
    left, right = "left", "right"
    columns = [("layer", left), ("parameters", right), ("MACs", right), ("groups", left)]
    wide, narrow = console.width >= WIDE, console.width < NARROW
    if wide:
        numbers = [("parameters", right), ("", right), ("MACs", right), ("", right)]
        columns[1:3] = [("weights", left), ("output", left), *numbers]
    if not narrow:
        columns.insert(1, ("operator", left))
    table = table_of(*columns)
    for column in table.columns[1:2]:
        column.no_wrap = True
    for layer in shown:
        weight = max((shape for _, shape in layer.weights), key=lambda s: (len(s), s), default=())
        groups = ", ".join(map(str, layer.groups[:6])) + (" …" if len(layer.groups) > 6 else "")
        cells = [_share(layer.parameters, found.parameters), _share(layer.macs, found.macs)]
        if wide:
            counts = [f"{count:,}" if count else "" for count in (layer.parameters, layer.macs)]
            cells = ["×".join(map(str, weight)), "×".join(map(str, layer.output)), counts[0], cells[0], counts[1], cells[1]]
        operator = [] if narrow else [layer.op]
        table.add_row(escape(layer.name), *operator, *cells, groups if layer.groups else f"fixed: {escape(layer.fixed or '')}")
    console.print(table)
    if len(shown) < len(found.layers):
        console.print(f"the {len(shown)} largest of {len(found.layers)} layers; -v lists all")


def _trifling(layer: Layer) -> bool:
    """It holds a number or two, such as a scale or an exponent."""
    return not layer.macs and layer.parameters <= 2


def _shares(found: Inspection, layer: Layer) -> tuple[float, float]:
    return layer.macs / max(1, found.macs), layer.parameters / max(1, found.parameters)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part and whole else ""


def _show_operators(console: Console, found: Inspection) -> None:
    macs, parameters = Counter[str](), Counter[str]()
    for layer in found.layers:
        macs[layer.op] += layer.macs
        parameters[layer.op] += layer.parameters
    for title, whole, parts in (("MACs", found.macs, macs), ("parameters", found.parameters, parameters)):
        named = [f"{op} {_share(part, whole)}" for op, part in parts.most_common(5) if part]
        if named:
            console.print(f"{title}: {', '.join(named)}")


def _show_groups(console: Console, found: Inspection) -> None:
    groups = found.grouping.groups
    idle = set(found.proof.unexercised) if found.proof else set()
    if not groups:
        console.print("[yellow]nothing can be pruned[/]")
        return
    wide, names = console.width >= NARROW, group_names(found.grouping)
    kind = (("kind", "left"),) if wide else ()
    table = table_of(("group", "right"), ("units", "right"), *kind, ("tensors", "left"), ("MACs", "right"), ("parameters", "right"))
    for group in groups:
        share = found.alone[group.id]
        kinds = (group.kind,) if wide else ()
        note = " (not exercised by these inputs: stays whole; see --feeds)" if group.id in idle else ""
        name = escape(names[group.id]) + note
        table.add_row(str(group.id), str(group.units), *kinds, name, f"{share.macs:.1%}", f"{share.parameters:.1%}")
    console.print(table)
    console.print("shares: what would go with this group alone, down to --min-keep")


def _show_fixed(console: Console, found: Inspection) -> None:
    if found.grouping.fixed:
        console.print("fixed:")
    for reason, count in Counter(reason for _, _, reason in found.grouping.fixed).most_common():
        example = next((tensor, axis) for tensor, axis, why in found.grouping.fixed if why == reason)
        console.print(f"  {count} × {escape(reason)} (such as {escape(example[0])}, axis {example[1]})", soft_wrap=True)
    untouched = [layer for layer in found.untouched if not _trifling(layer)]
    if untouched:
        macs, parameters = sum(one.macs for one in untouched), sum(one.parameters for one in untouched)
        console.print(
            f"  {len(untouched)} of {sum(not _trifling(layer) for layer in found.layers)} layers have no unit that may go: "
            f"{_share(macs, found.macs) or '0.0%'} of the MACs, {_share(parameters, found.parameters) or '0.0%'} of the parameters",
            soft_wrap=True,
        )


REACHES = {
    "min_keep": "with every group down to --min-keep {keep:g}",
    "one_unit": "with one unit left of each",
    "branches": "with the residual branches cut too (--granularity all)",
}


def _show_reach(console: Console, found: Inspection) -> None:
    console.print("largest reduction:")
    for name, share in found.reach.items():
        how = REACHES[name].format(keep=found.min_keep)
        console.print(f"  {share.macs:.1%} of the MACs, {share.parameters:.1%} of the parameters {how}", soft_wrap=True)


def show_sensitivity(console: Console, found: Sensitivity) -> None:
    """A line a group, the most sensitive first: the change of the outputs, and the quality, at each ratio."""
    by_group: dict[int, list[Point]] = {}
    for point in found.points:
        by_group.setdefault(point.group, []).append(point)
    judged = f" (below it {found.measure})" if found.measure else ""
    console.print(f"[bold]{escape(found.model)}[/]: change of the outputs{judged} without a share of the units of one group alone")
    if found.before is not None:
        console.print(f"{found.measure} of the original: {_quality(found.measure, found.before)}")
    ratios = [(f"{ratio:.4g}", "right") for ratio in found.ratios]
    wide = console.width >= 45 + 10 * len(ratios)  # else the names stand below
    table = table_of(("group", "right"), *((("units", "right"), ("tensor", "left")) if wide else ()), *ratios)
    for group in sorted(by_group, key=lambda g: -max(_moved(p) for p in by_group[g])):
        own = {point.removed: point for point in by_group[group]}
        units = by_group[group][0].units
        cells = [_cell(own[removed(units, ratio)], found.measure) for ratio in found.ratios]
        table.add_row(str(group), *((str(units), escape(found.names.get(group, ""))) if wide else ()), *cells)
    console.print(table)
    for group in () if wide else sorted(by_group):
        console.print(f"  group {group}: {escape(found.names.get(group, ''))}, {by_group[group][0].units} units", soft_wrap=True)
    console.print("change: mean squared change of the outputs by their variance; 1 is as much as they vary themselves")
    if found.skipped:
        console.print(
            f"[yellow]not exercised by the inputs, so left out (give inputs that do with --feeds): {', '.join(map(str, found.skipped))}[/]"
        )


def _cell(point: Point, measure: str | None) -> str:
    moved = "does not run" if point.change is None else f"{point.change:.2g}"
    return moved if point.quality is None else f"{moved}\n{_quality(measure, point.quality)}"


def _moved(point: Point) -> float:
    return float("inf") if point.change is None else point.change


def _quality(measure: str | None, value: float) -> str:
    return f"{value:.2%}" if measure in ("accuracy", "agreement") else f"{value:.4g}"


def show_sweep(console: Console, found: Sweep) -> None:
    """A line a point: what it costs beside the original, its quality, and for which costs it is a Pareto point."""
    measure = found.measure or "quality"
    made = [point for point in found.points if point["error"] is None]
    ways = sorted({f"{point['criterion']} by {point['allocation']}" for point in made})
    original = _quality(measure, found.original["quality"])
    console.print(f"[bold]{escape(found.model)}[/], {escape(', '.join(ways))}: {measure} of the original {original}")
    table = table_of(("point", "left"), *((title, "right") for title in ("MACs", "parameters", "latency", measure)))
    for point in made:
        shares = []
        for cost in COSTS:
            share = "–" if point[cost] is None else f"{point[cost] / (point[f'{cost}_before'] or 1):.1%}"
            shares.append(f"[bold]★ {share}[/]" if cost in point["pareto"] else share)
        name = escape(point["name"]) + ("" if point["on_budget"] else "[yellow] (out of reach)[/]")
        table.add_row(name, *shares, f"[bold]{_quality(measure, point['quality'])}[/]")
    console.print(table)
    console.print("costs are shares of the original's; ★: no other point, nor the original, is as good and cheaper")

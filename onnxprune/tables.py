"""What the commands that explore a model show in the terminal: layers and groups, sensitivities, sweeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxprune.api import why_not
from onnxprune.cautions import UNMOVED
from onnxprune.inspection import Inspection, Layer
from onnxprune.naming import group_names
from onnxprune.report import show_fixed
from onnxprune.sensitivities import Point, Sensitivity, removed
from onnxprune.shortening import fitted, shortened
from onnxprune.sweeping import COSTS, Sweep
from onnxprune.terminal import NARROW
from onnxprune.terminal import table as table_of
from onnxprune.wording import batch_in_words, batch_of, in_words, open_in_words, shape_flag, sizes_in_words

LARGEST = 30  # layers that are listed at most, unless all are asked for
LEAST = 0.005  # of the MACs or of the parameters, which a layer has to be listed
SAID = 0.0005  # of them, which an operator has to be named
WIDE = 110  # characters from which on shapes and numbers are shown beside shares


def show_inspection(console: Console, found: Inspection, everything: bool = False) -> None:
    """Layers and groups with what they are worth, what is fixed, and the largest reductions; all layers where `everything` is asked for."""
    model = found.grouping.model
    batch = batch_in_words(batch_of(model))
    on = f"{batch}, on" if batch else " on"
    sizes = escape(sizes_in_words(model.input_shapes))
    console.print(f"[bold]{escape(model.name)}[/]: {found.parameters:,} parameters, {found.macs:,} MACs{on} {sizes}", soft_wrap=True)
    if found.assumed:
        guess, flag = open_in_words(model, found.assumed), shape_flag(model, found.assumed)
        console.print(f"[yellow]guessed: {escape(guess)}; give the size in use, with {escape(flag)}[/]", soft_wrap=True)
    if not found.grouping.groups:
        console.print(f"[yellow]nothing can be pruned ({escape(why_not(found.grouping))})[/]", soft_wrap=True)
    if found.layers:
        _show_layers(console, found, everything)
        _show_operators(console, found)
    if found.grouping.groups:
        _show_groups(console, found)
    show_fixed(console, found.grouping)
    _show_untouched(console, found)
    if found.grouping.groups:
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

    def made(names: Sequence[str]) -> Table:
        table = table_of(*columns)
        for column in table.columns[1:2]:
            column.no_wrap = True
        for layer, name in zip(shown, names, strict=True):
            weight = max((shape for _, shape in layer.weights), key=lambda s: (len(s), s), default=())
            groups = ", ".join(map(str, layer.groups[:6])) + (" …" if len(layer.groups) > 6 else "")
            cells = [_share(layer.parameters, found.parameters), _share(layer.macs, found.macs)]
            if wide:
                counts = [f"{count:,}" if count else "" for count in (layer.parameters, layer.macs)]
                cells = ["×".join(map(str, weight)), "×".join(map(str, layer.output)), counts[0], cells[0], counts[1], cells[1]]
            operator = [] if narrow else [layer.op]
            table.add_row(escape(name), *operator, *cells, groups or "none")
        return table

    console.print(fitted(console, [layer.name for layer in shown], made))
    for reason, names in _reasons(shown).items():
        alike = shortened(names[:3], max(24, console.width // 3))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"no group in {escape(', '.join(alike))}{more}: {escape(in_words(reason))}")
    if len(shown) < len(found.layers):
        console.print(f"{len(shown)} of {len(found.layers)} layers are shown, the largest; -v shows all")


def _reasons(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Why layers have no group, and which."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.groups:
            found.setdefault(layer.fixed or "", []).append(layer.name)
    return found


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
        named = [f"{op} {_share(part, whole)}" for op, part in parts.most_common(5) if part >= SAID * whole > 0]
        if named:
            console.print(f"{title}: {', '.join(named)}")


def _show_groups(console: Console, found: Inspection) -> None:
    groups = found.grouping.groups
    idle = set(found.proof.unexercised) if found.proof else set()
    kind = (("kind", "left"),) if console.width >= NARROW else ()

    def made(names: Sequence[str]) -> Table:
        table = table_of(("group", "right"), ("units", "right"), *kind, ("tensors", "left"), ("MACs", "right"), ("parameters", "right"))
        for group, name in zip(groups, names, strict=True):
            share = found.alone[group.id]
            kinds = (group.kind,) if kind else ()
            number = f"{group.id}*" if group.id in idle else f"{group.id}"
            table.add_row(number, str(group.units), *kinds, escape(name), f"{share.macs:.1%}", f"{share.parameters:.1%}")
        return table

    console.print(fitted(console, list(group_names(found.grouping).values()), made))
    console.print(f"shares: what goes if this group alone is cut down to what it has to keep (--min-keep {found.min_keep:g})")
    if idle:
        console.print(
            "[yellow]* on these inputs nothing that is done to it changes the outputs, so nothing is proven and it stays whole; give real "
            "inputs with --feeds inputs.npz, or larger made-up ones with --input-shape[/]"
        )


def _show_untouched(console: Console, found: Inspection) -> None:
    untouched = found.untouched
    if untouched and found.grouping.groups:
        macs, parameters = sum(one.macs for one in untouched), sum(one.parameters for one in untouched)
        console.print(
            f"layers without a group, of which nothing can go: {len(untouched)} of {len(found.layers)}, with "
            f"{_share(macs, found.macs) or '0.0%'} of the MACs, {_share(parameters, found.parameters) or '0.0%'} of the parameters",
        )


REACHES = {
    "min_keep": "with every group down to what it has to keep (--min-keep {keep:g})",
    "one_unit": "with one unit left in each (--min-keep 1)",
    "branches": "with the residual branches left out too (--granularity all)",
}


def _show_reach(console: Console, found: Inspection) -> None:
    console.print("the most that can go:")
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
    order = sorted(by_group, key=lambda g: -max(_moved(p) for p in by_group[g]))

    def made(names: Sequence[str]) -> Table:
        table = table_of(("group", "right"), *((("units", "right"), ("tensor", "left")) if wide else ()), *ratios)
        for group, name in zip(order, names, strict=True):
            own = {point.removed: point for point in by_group[group]}
            units = by_group[group][0].units
            cells = [_cell(own[removed(units, ratio)], found.measure) for ratio in found.ratios]
            table.add_row(str(group), *((str(units), escape(name)) if wide else ()), *cells)
        return table

    names = [found.names.get(group, "") for group in order]
    console.print(fitted(console, names, made) if wide else made(names))
    for group in () if wide else sorted(by_group):
        console.print(f"  group {group}: {escape(found.names.get(group, ''))}, {by_group[group][0].units} units", soft_wrap=True)
    console.print("change: mean squared change of the outputs by their variance; 1 is as much as they vary themselves")
    if found.points and all(point.change is not None and point.change < UNMOVED**2 for point in found.points):
        console.print(
            "[yellow]note: no output changes at any point: either these units never do anything or these samples do not reach them; give "
            "--calibration real samples, such as --calibration data.npz[/]"
        )
    if found.skipped:
        left = ", ".join(f"{group} ({found.names.get(group, '')})" for group in found.skipped)
        console.print(
            f"[yellow]left out, as on these inputs nothing that is done to them changes the outputs (give real inputs with --feeds "
            f"inputs.npz): {escape(left)}[/]"
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

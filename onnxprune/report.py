"""What people see in the terminal: groups, widths before and after, the proof, accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from onnxprune.benchmark import Measurement
from onnxprune.certificate import Proof
from onnxprune.evaluation import Evaluation
from onnxprune.grouping import Group, Grouping
from onnxprune.handoff import HandOff
from onnxprune.importer import Model
from onnxprune.inputs import inputs_of
from onnxprune.naming import group_names
from onnxprune.reconstruction import Refit
from onnxprune.result import Result
from onnxprune.shortening import fitted, shortened
from onnxprune.tensorrt import Support
from onnxprune.tensorrt_operators import VERSION
from onnxprune.terminal import NARROW
from onnxprune.terminal import table as table_of
from onnxprune.wording import batch_in_words, batch_of, in_words, open_in_words, shape_flag, sizes_in_words


def show_groups(console: Console, grouping: Grouping, proof: Proof | None) -> None:
    """A line a group, then what is fixed, by reason."""
    widths = [g for g in grouping.groups if g.branch is None]
    blocks = len(grouping.groups) - len(widths)
    also = f", {_branches(blocks)}" if blocks else ""
    found = f"{len(widths)} {'group' if len(widths) == 1 else 'groups'}, {sum(g.units for g in widths)} units"
    console.print(f"[bold]{escape(grouping.model.name)}[/]: {found}{also}")
    wide = console.width >= NARROW
    kind = (("kind", "left"),) if wide else ()

    def made(names: Sequence[str]) -> Table:
        table = table_of(("group", "right"), ("units", "right"), *kind, ("tensors", "left"), ("proof", "left"))
        for group, name in zip(grouping.groups, names, strict=True):
            kinds = (group.kind,) if wide else ()
            table.add_row(str(group.id), str(group.units), *kinds, escape(name), proof_state(group, proof) + MARK * group.statistics)
        table.columns[-1].no_wrap = True
        return table

    if grouping.groups:
        console.print(fitted(console, list(group_names(grouping).values()), made))
    if any(group.statistics for group in grouping.groups):
        console.print(f"{MARK.strip()} its units are also counted in a mean, variance, maximum or softmax, which changes with them")
    show_fixed(console, grouping)


MARK = " *"  # of groups with statistics


def proof_state(group: Group, proof: Proof | None) -> str:
    """What was proven of a group, in a word or two."""
    if proof is None:
        return "not run"
    return "no effect seen" if group.id in proof.unexercised else "not checked" if group.id in proof.unchecked else "proven"


def show_fixed(console: Console, grouping: Grouping) -> None:
    """What may not change, by reason, each with an example."""
    if not grouping.fixed:
        return
    console.print("may not change (axes of weights, and why):")
    for reason, count in Counter(reason for _, _, reason in grouping.fixed).most_common():
        tensor, axis = next((tensor, axis) for tensor, axis, why in grouping.fixed if why == reason)
        what = f"{count} {'axis' if count == 1 else 'axes'}: {escape(in_words(reason))}"
        console.print(f"  {what} (such as {escape(tensor)}, axis {axis})", soft_wrap=True)


def show_places(console: Console, grouping: Grouping) -> None:
    """Every place of every group, and every axis that is fixed, a line each."""
    for group in grouping.groups:
        for member in group.members:
            each = member.indices.shape[1]
            where = f"{escape(member.tensor)}, axis {member.axis}" + (f", {each} places a unit" if each > 1 else "")
            console.print(f"  group {group.id}: {where}", soft_wrap=True)
    for tensor, axis, reason in grouping.fixed:
        console.print(f"  fixed: {escape(tensor)}, axis {axis}: {escape(in_words(reason))}", soft_wrap=True)


def show_result(console: Console, result: Result, ratio: float | None, of: str) -> None:
    """The widths of every group before and after, and what went."""
    width = 20 if console.width >= NARROW else 8
    gone = {g.id: len(result.plan.remove.get(g.id, ())) for g in result.plan.groups}
    losing = [g for g in result.plan.groups if gone[g.id]]
    names = group_names(result.plan.grouping)

    def made(short: Sequence[str]) -> Table:
        table = table_of(("group", "right"), ("tensors", "left"), ("units", "right"), ("", "left"))
        for group, name in zip(losing, short, strict=True):
            kept = group.units - gone[group.id]
            table.add_row(str(group.id), escape(name), f"{group.units} → {kept}", _bar(kept / group.units, width))
        table.columns[-1].no_wrap = True
        return table

    if losing:
        console.print(fitted(console, [names[g.id] for g in losing], made))
    model = result.plan.grouping.model
    batch = batch_in_words(batch_of(model))
    for title, (before, after) in (("MACs", result.macs), ("parameters", result.parameters)):
        if before:
            console.print(f"{title}: {before:,} → {after:,} ({1 - after / before:.1%} less){batch if title == 'MACs' else ''}")
    if result.latency:
        whole, left = result.latency
        console.print(f"latency: {1e3 * whole:.3g} ms → {1e3 * left:.3g} ms ({1 - left / whole:.1%} less){batch}")
    sizes, guessed = open_in_words(model), list(result.plan.options.get("assumed") or [])
    if ratio is not None and guessed:
        console.print(
            f"[yellow]counted and timed at a guessed size, {escape(open_in_words(model, guessed))}: give the size in use, with "
            f"{escape(shape_flag(model, guessed))}[/]"
        )
    elif ratio is not None and sizes:
        console.print(f"counted and timed at {escape(sizes)}")
    if ratio is not None and not result.on_budget:
        console.print(f"[yellow]asked for {ratio:.1%} of {of}; {result.reached:.1%} is the closest found[/]")


def _bar(share: float, width: int) -> str:
    full = round(share * width)
    return f"[green]{'━' * full}[/][dim]{'─' * (width - full)}[/]"


def show_proof(console: Console, proof: Proof | None) -> None:
    """What was tested, what came out, what it means and what to do, in plain words."""
    if proof is None:
        console.print("[yellow]not verified: what is left was not compared with the original (--no-verify)[/]")
        return
    console.print(f"[{'green' if proof.proven or proof.unchecked else 'yellow'}]{verdict(proof)}[/]")
    if proof.inputs:
        made = "made-up inputs (random numbers; --feeds gives real ones)" if proof.seeded else "the inputs of --feeds"
        _point(console, f"tested on {made}: {escape(sizes_in_words(proof.inputs))}")
    count = len(proof.proven) + len(proof.unexercised) + len(proof.unchecked) - len(proof.influence)
    if count:
        whose = "the group's units" if count == 1 else f"the units of {count} groups"
        _point(
            console,
            f"{whose} put in another order: the outputs stay the same (they differ by {_gap(proof.permutation)}; rounding alone makes "
            f"{_gap(proof.rounding)}, more than {_gap(proof.tolerance)} would fail)",
        )
    if proof.influence:
        _point(console, f"{_branches(len(proof.influence))} left out: the same outputs as with zeros in their last layers")
    if proof.commuting is not None:
        _point(console, f"units removed after that reordering: the same outputs as removed before (they differ by {_gap(proof.commuting)})")
    if proof.masked is not None:
        _point(console, f"units removed: the same outputs as with zeros in their place (they differ by {_gap(proof.masked)})")
    if proof.statistics:
        what = "its" if len(proof.statistics) == 1 else "their"
        _point(
            console,
            f"{_some(console, proof, proof.statistics)}: the test with zeros does not apply, as {what} units are also counted in a mean, "
            "variance, maximum or softmax, which becomes that of the units that stay; the other tests do",
        )
    if proof.unexercised:
        larger = ", or larger made-up ones with --input-shape" if proof.seeded else ""
        _point(
            console,
            f"[yellow]{_stays(console, proof, proof.unexercised)} whole: on these inputs nothing that is done to "
            f"{'it' if len(proof.unexercised) == 1 else 'them'} changes the outputs, so nothing can be proven; give real inputs with "
            f"--feeds inputs.npz{larger}[/]",
        )
    if proof.unchecked:
        _point(
            console,
            f"{_some(console, proof, proof.unchecked)}: passed, but there was no time to see whether these inputs would show a mistake",
        )
    for reason, failed in _by_reason(proof).items():
        _point(console, f"[yellow]{_stays(console, proof, failed)} whole: {escape(in_words(reason))}[/]")
    if proof.matches is not None:
        text = "is what the plan leaves" if _same(proof) else "has the plan's shapes and other weights (trained on or compensated)"
        _point(console, f"the pruned model {text} (its outputs differ by {_gap(proof.matches)})")
    if proof.pinned:
        _point(console, f"[yellow]{escape('; '.join(proof.pinned))}: {PINNED}[/]")
    if count or proof.matches is not None:
        _point(console, "[dim]differences are the largest of any output, in its standard deviations: 0.01 is 1 % of how much it varies[/]")


PINNED = (
    "open in the file, and the model runs at no other size, as its exporter wrote the traced one into it. The file works at that size "
    "alone, pruned or not, and some groups may stay whole for it. Export it again with that axis dynamic "
    "(torch.onnx.export(…, dynamo=True, dynamic_shapes=…)), or fixed"
)


def verdict(proof: Proof) -> str:
    """What the proof comes to, in words."""
    kept = len(proof.frozen) + len(proof.unexercised)
    but = f"; {kept} {'group' if kept == 1 else 'groups'} without proof stay{'s' if kept == 1 else ''} whole" if kept else ""
    if not (proof.proven or proof.unchecked):
        return f"nothing is proven{but}"
    if proof.matches is not None and not _same(proof):
        return f"the proof holds for the plan's surgery; the pruned model has its shapes and weights of its own, which no proof covers{but}"
    if proof.commuting is not None or proof.masked is not None:
        return f"the proof holds: what is left computes what the original does without the removed units{but}"
    return f"the proof holds: the units of each group can change places, and the outputs stay as they were{but}"


def _gap(value: float) -> str:
    """A difference in standard deviations, short."""
    return "0" if value == 0 else f"{value:.1g}"


def _point(console: Console, text: str) -> None:
    """Indented, where it takes several lines too."""
    console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _same(proof: Proof) -> bool:
    return proof.matches is None or proof.matches <= proof.tolerance


def _branches(count: int) -> str:
    return f"{count} residual branch{'' if count == 1 else 'es'}"


def _by_reason(proof: Proof) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, reason in proof.frozen.items():
        found.setdefault(reason, []).append(number)
    return found


def _some(console: Console, proof: Proof, ids: Sequence[int]) -> str:
    """The first of some groups, each with its name."""
    first = [i for i in ids[:NAMED] if i in proof.names]
    names = shortened([proof.names[i] for i in first], max(24, console.width - 40))
    said = [f"{i} ({name})" for i, name in zip(first, names, strict=True)]
    more = f" and {len(ids) - len(first)} more" if len(ids) > len(first) else ""
    return escape(("group " if len(ids) == 1 else "groups ") + ", ".join(said) + more)


def _stays(console: Console, proof: Proof, ids: Sequence[int]) -> str:
    return f"{_some(console, proof, ids)} stay{'s' if len(ids) == 1 else ''}"


NAMED = 3  # groups that a sentence names


def show_cautions(console: Console, sentences: Sequence[str]) -> None:
    """Each on lines of its own."""
    for sentence in sentences:
        console.print(f"[yellow]note: {escape(sentence)}[/]")


SLOWER = 1.03  # times the original's latency; less is how clocks vary


def hint_alignment(console: Console, measured: Sequence[Measurement], result: Result) -> None:
    """Say what to do where the pruned model is not as much faster as it is smaller."""
    before, after = measured[0].latency_median_s, measured[1].latency_median_s
    given = result.plan.options
    unaligned = given.get("align") == 1 and given.get("target") is None and result.latency is None
    if unaligned and after > 0.9 * before:
        what = "slower" if after >= SLOWER * before else "hardly faster"
        console.print(
            f"[yellow]smaller, but {what}: fast kernels want widths that are multiples of 8 or 16; try --target cpu (or cuda, tensorrt), "
            "or --of latency[/]"
        )


FIDELITY = {"cosine": ("cosine", "{:.4f}"), "SQNR, dB": ("sqnr", "{:.1f}"), "KL": ("kl", "{:.2g}"), "same top-1": ("agreement", "{:.1%}")}


def _fidelity_titles(console: Console) -> list[str]:
    """Of pairs of figures only so many as stand in one line."""
    return [title for title in FIDELITY if title != "KL" or console.width >= NARROW]


def _figure(value: float, form: str) -> str:
    return "same" if math.isinf(value) else form.format(value)


def _of_one(model: Model) -> dict[str, tuple[int, ...]]:
    """The sizes of one sample of each input that has an axis of samples."""
    axes = inputs_of(model.proto).axes
    return {name: tuple(n for i, n in enumerate(shape) if i != axes[name]) for name, shape in model.input_shapes.items() if name in axes}


def fits_in_words(refits: Sequence[Refit]) -> str:
    """How many layers were fitted, one by one, and for how many nothing better was found."""
    fits = [refit.changed for refit in refits if not refit.partner]
    left = f", {fits.count(False)} left as cut" if False in fits else ""
    return f"{fits.count(True)} layer{'s' * (fits.count(True) != 1)} fitted{left}"


def show_compensation(console: Console, result: Result) -> None:
    """How near the outputs are on calibration samples, before compensation and after."""
    if result.fidelity is None:
        return
    before, after = result.fidelity
    pairs = sum(1 for refit in result.refits if refit.partner)
    layers = f", {fits_in_words(result.refits)}" if result.refits else ""
    layers += f", {pairs} of them refined with the layer before" if pairs else ""
    options, model = result.plan.options, result.plan.grouping.model
    given = options.get("samples")
    of = f"{after.samples} of the {given}" if given and given > after.samples else f"{after.samples}"
    if options.get("calibration") == "noise":
        where = f"{of} made-up samples ('noise', {escape(sizes_in_words(_of_one(model)))} each; real ones may fare worse)"
    else:
        where = f"{of} calibration samples"
    near = f"how near the outputs stay to the original's, without it → with it, on {where}:"
    console.print(f"compensation: {options.get('compensation')}{layers}; {near}")
    titles = _fidelity_titles(console)
    table = table_of(("output", "left"), *((title, "right") for title in titles))
    without = {output.output: output for output in before.outputs}
    for old, new in ((without[new.output], new) for new in after.outputs if new.output in without):  # compared in both
        pairs_of = [(getattr(old, field), getattr(new, field), form) for field, form in map(FIDELITY.__getitem__, titles)]
        row = ["–" if a is None or b is None else f"{_figure(a, form)} → [bold]{_figure(b, form)}[/]" for a, b, form in pairs_of]
        table.add_row(escape(new.output), *row)
    if table.row_count:
        console.print(table)


def show_evaluation(console: Console, found: Evaluation) -> None:
    """Accuracy and the user's metric where there are such, then how near each output stays to the original's."""
    if found.before is not None and found.after is not None:
        console.print(f"accuracy on {found.samples} samples: {found.before:.2%} → [bold]{found.after:.2%}[/]")
    if found.metric_before is not None and found.metric_after is not None:
        console.print(f"metric on {found.samples} samples: {found.metric_before:.4g} → [bold]{found.metric_after:.4g}[/]")
    if found.agreement is not None:
        console.print(f"same class as the original: {found.agreement:.2%} of {found.samples} samples")
    table = table_of(("output", "left"), *((title, "right") for title in FIDELITY))
    for output in found.outputs:
        row = [(getattr(output, field), form) for field, form in FIDELITY.values()]
        table.add_row(escape(output.output), *("–" if value is None else _figure(value, form) for value, form in row))
    if table.row_count:
        console.print(table)


def show_support(console: Console, support: Support) -> None:
    """What TensorRT does not take of a model, by its table of operators, and the profiles that it needs."""
    say = "does not take" if support.refused else "should take all of it"
    console.print(f"TensorRT {VERSION}, by its table of operators: {'[yellow]' if support.refused else ''}{say}")
    for finding in (*support.refused, *support.notes):
        more = f" and {len(finding.where) - 1} more" if len(finding.where) > 1 else ""
        subject = escape(": ".join(text for text in (finding.op, finding.reason) if text))
        line = f"  {subject} ({escape(finding.where[0])}{more})"
        console.print(f"[yellow]{line}[/]" if finding.refused else line, soft_wrap=True)
    for flag, which in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 1)) if support.profiles else ():
        sizes = ",".join(f"{name}:{'x'.join(map(str, both[which]))}" for name, both in support.profiles.items())
        console.print(f"  --{flag}={escape(sizes)}", soft_wrap=True)


def show_handoff(console: Console, found: HandOff, output: str) -> None:
    """How many parameters get smaller, and how they were found."""
    smaller = sum(bool(kept.keep) for kept in found.parameters.values())
    gone = f", {len(found.removed)} go" if found.removed else ""
    left = len(found.unmatched) + len(found.uncovered)
    open_ends = f", {left} unmatched" if left else ""
    console.print(f"{escape(output)}: {smaller} of {len(found.parameters)} parameters get smaller{gone}{open_ends}", soft_wrap=True)
    for how, count in Counter(kept.by for kept in found.parameters.values() if kept.by).most_common():
        console.print(f"  {count} found by {escape(how)}")
    if any(kept.by == "name" for kept in found.parameters.values()):
        console.print("  by name: their values are not the model's, as after more training; check that it is the same model")

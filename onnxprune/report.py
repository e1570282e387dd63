"""What people see in the terminal: groups, widths before and after, the proof, accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from onnxprune.api import Result
from onnxprune.benchmark import Measurement
from onnxprune.certificate import Proof
from onnxprune.evaluation import Evaluation
from onnxprune.grouping import Grouping
from onnxprune.handoff import HandOff
from onnxprune.naming import group_names
from onnxprune.tensorrt import Support
from onnxprune.tensorrt_operators import VERSION
from onnxprune.terminal import NARROW
from onnxprune.terminal import table as table_of


def show_groups(console: Console, grouping: Grouping, proof: Proof | None) -> None:
    """A line a group, then what is fixed, by reason."""
    widths = [g for g in grouping.groups if g.branch is None]
    blocks = len(grouping.groups) - len(widths)
    also = f", {_branches(blocks)}" if blocks else ""
    found = f"{len(widths)} {'group' if len(widths) == 1 else 'groups'}, {sum(g.units for g in widths)} units"
    console.print(f"[bold]{escape(grouping.model.name)}[/]: {found}{also}")
    wide = console.width >= NARROW
    kind = (("kind", "left"),) if wide else ()
    table = table_of(("group", "right"), ("units", "right"), *kind, ("tensors", "left"), ("proof", "left"))
    idle, names = set(proof.unexercised) if proof else set(), group_names(grouping)
    for group in grouping.groups:
        state = "not run" if proof is None else "not exercised" if group.id in idle else "proven"
        state = "unchecked" if proof and group.id in proof.unchecked else state
        state += ", statistics" if group.statistics else ""
        kinds = (group.kind,) if wide else ()
        table.add_row(str(group.id), str(group.units), *kinds, escape(names[group.id]), state)
    if grouping.groups:
        console.print(table)
    if grouping.fixed:
        console.print("fixed:")
        for reason, count in Counter(reason for _, _, reason in grouping.fixed).most_common():
            example = next((tensor, axis) for tensor, axis, why in grouping.fixed if why == reason)
            console.print(f"  {count} × {escape(reason)} (such as {escape(example[0])}, axis {example[1]})", soft_wrap=True)


def show_places(console: Console, grouping: Grouping) -> None:
    """Every place of every group, and every axis that is fixed, a line each."""
    for group in grouping.groups:
        for member in group.members:
            each = member.indices.shape[1]
            where = f"{escape(member.tensor)}, axis {member.axis}" + (f", {each} places a unit" if each > 1 else "")
            console.print(f"  group {group.id}: {where}", soft_wrap=True)
    for tensor, axis, reason in grouping.fixed:
        console.print(f"  fixed: {escape(tensor)}, axis {axis}: {escape(reason)}", soft_wrap=True)


def show_result(console: Console, result: Result, ratio: float | None, of: str) -> None:
    """The widths of every group before and after, and what went."""
    table = table_of(("group", "right"), ("tensors", "left"), ("units", "right"), ("", "left"))
    names, width = group_names(result.plan.grouping), 20 if console.width >= NARROW else 8
    for group in result.plan.groups:
        gone = len(result.plan.remove.get(group.id, ()))
        if gone:
            kept = group.units - gone
            table.add_row(str(group.id), escape(names[group.id]), f"{group.units} → {kept}", _bar(kept / group.units, width))
    table.columns[-1].no_wrap = True
    if table.row_count:
        console.print(table)
    for title, (before, after) in (("MACs", result.macs), ("parameters", result.parameters)):
        if before:
            console.print(f"{title}: {before:,} → {after:,} ({1 - after / before:.1%} less)")
    if result.latency:
        whole, left = result.latency
        console.print(f"latency: {1e3 * whole:.3g} ms → {1e3 * left:.3g} ms ({1 - left / whole:.1%} less)")
    sizes = _open_sizes(result)
    if sizes and ratio is not None:
        console.print(f"counted and timed at {escape(sizes)}; other sizes in use: give them with --input-shape")
    options = result.plan.options
    if ratio is not None and options.get("compensation") == "none" and options.get("calibration") is None:
        console.print(
            "[yellow]chosen by the weights alone, and nothing makes up for what went: expect to lose accuracy; give --calibration "
            "(a few hundred inputs, no labels, or 'noise')[/]"
        )
    if ratio is not None and not result.on_budget:
        console.print(f"[yellow]asked for {ratio:.1%} of {of}; {result.reached:.1%} is the closest that the groups allow[/]")


def _open_sizes(result: Result) -> str:
    """The inputs whose sizes the file leaves open besides the batch, at the sizes that were used: `image 2×3×32×32 (h, w open)`."""
    model, found = result.plan.grouping.model, []
    for value in model.proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        free = [d.dim_param or "?" for d in list(dims)[1:] if not d.HasField("dim_value")]
        if free and value.name in model.input_shapes:
            found.append(f"{value.name} {'×'.join(map(str, model.input_shapes[value.name]))} ({', '.join(free)} open)")
    return ", ".join(found)


def _bar(share: float, width: int) -> str:
    full = round(share * width)
    return f"[green]{'━' * full}[/][dim]{'─' * (width - full)}[/]"


def show_proof(console: Console, proof: Proof | None) -> None:
    """What was proven, in plain words, gaps in standard deviations of the outputs."""
    if proof is None:
        console.print("[yellow]not verified: what is left was not compared with the original[/]")
        return
    console.print(f"[{'green' if proof.proven or proof.unchecked else 'yellow'}]{verdict(proof)}[/]")
    count = len(proof.proven) + len(proof.unexercised) + len(proof.unchecked) - len(proof.influence)
    _point(
        console,
        f"{count} {'group' if count == 1 else 'groups'} permuted: outputs move by {proof.permutation:.1e} standard deviations "
        f"(rounding {proof.rounding:.1e}, allowed {proof.tolerance:.1e})",
    )
    if proof.influence:
        _point(console, f"{_branches(len(proof.influence))}: cutting them is the same as zeros in their last projections")
    for text, ids in (
        ("kept whole, as these inputs do not exercise them (give inputs that do with --feeds)", proof.unexercised),
        ("left unchecked for time whether they are exercised", proof.unchecked),
    ):
        if ids:
            _point(console, f"[yellow]{_some(ids)} {text}[/]")
    for reason, failed in _by_reason(proof).items():
        _point(console, f"[yellow]{_some(failed)} kept whole: {escape(reason)}[/]")
    if proof.commuting is not None:
        _point(console, f"pruning a permuted model gives the same outputs: {proof.commuting:.1e}")
    if proof.masked is not None:
        _point(console, f"the original with zeros in place of the units gives the same outputs: {proof.masked:.1e}")
    if proof.statistics:
        _point(console, f"{_some(proof.statistics)} also in a mean, variance, maximum or softmax, which zeros would not leave alone")
    if proof.matches is not None:
        text = "is what the plan leaves" if _same(proof) else "has the plan's shapes and other weights (trained on or compensated)"
        _point(console, f"the pruned model {text}: {proof.matches:.1e}")
    if proof.pinned:
        _point(console, f"[yellow]{escape('; '.join(proof.pinned))}: {PINNED}[/]")


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
        return f"the proof holds for the plan's surgery; the pruned model has its shapes and weights of its own{but}"
    if proof.commuting is not None or proof.masked is not None:
        return f"the proof holds: the surgery leaves the original minus the removed units{but}"
    return f"the proof holds: the units of each group can change places, and the outputs stay as they were{but}"


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


def _some(ids: Sequence[int]) -> str:
    return ("group " if len(ids) == 1 else "groups ") + ", ".join(map(str, ids[:8])) + (" …" if len(ids) > 8 else "")


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


def show_compensation(console: Console, result: Result) -> None:
    """How near the outputs are on calibration samples, before compensation and after."""
    if result.fidelity is None:
        return
    before, after = result.fidelity
    pairs = sum(1 for refit in result.refits if refit.partner)
    fitted = f", {len(result.refits) - pairs} layers fitted" if result.refits else ""
    fitted += f", {pairs} of them refined with the layer before" if pairs else ""
    noise = result.plan.options.get("calibration") == "noise"
    where = f"inputs of its own making ({after.samples}); real ones may fare worse" if noise else f"{after.samples} calibration samples"
    console.print(f"compensation: {result.plan.options.get('compensation')}{fitted}; on {where}:")
    titles = _fidelity_titles(console)
    table = table_of(("output", "left"), *((title, "right") for title in titles))
    for old, new in zip(before.outputs, after.outputs, strict=True):
        pairs_of = [(getattr(old, field), getattr(new, field), form) for field, form in map(FIDELITY.__getitem__, titles)]
        row = ["–" if a is None or b is None else f"{form.format(a)} → [bold]{form.format(b)}[/]" for a, b, form in pairs_of]
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
        table.add_row(escape(output.output), *("–" if value is None else form.format(value) for value, form in row))
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

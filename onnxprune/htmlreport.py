"""The report as a page: one HTML file that needs no network, to look at before a pruned model is trusted."""

from __future__ import annotations

import io
import math
import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console

from onnxprune import __version__
from onnxprune.allocations import DISTORTION
from onnxprune.benchmark import Measurement
from onnxprune.cautions import cautions
from onnxprune.charts import Sensitivity, Sweep, scores_section, sensitivity_section, sweep_section
from onnxprune.curves import RATIOS
from onnxprune.evaluation import Evaluation
from onnxprune.fidelity import OutputFidelity
from onnxprune.grouping import Group
from onnxprune.layertable import layer_changes
from onnxprune.markup import Cell, Html, Section, bar, code, element, join, page, table
from onnxprune.naming import group_names
from onnxprune.report import fits_in_words, proof_state, show_proof
from onnxprune.result import Result
from onnxprune.wording import batch_in_words, batch_of, in_words

WORDS = {"macs": "MACs", "params": "parameters", "channels": "channels"}
EXAMPLES = 5


def html_report(
    result: Result,
    *,
    measured: Sequence[Measurement] = (),
    evaluation: Evaluation | None = None,
    sensitivity: Sensitivity | None = None,
    sweep: Sweep | None = None,
    command: Sequence[str] | None = None,
) -> str:
    """A result as one HTML file: what the model is, what went, its proof, layers, groups, scores and curves.

    measured: the benchmark of the original and of the pruned model.  sensitivity: where it is not given, what the allocation measured;
    `curvefiles.read_curves` reads those of the commands `sensitivity` and `sweep`.  command: the arguments that made it.

    >>> Path("report.html").write_text(html_report(onnxprune.prune("model.onnx", 0.4)))       # doctest: +SKIP
    """
    charts: dict[str, Any] = {}
    labels = group_names(result.plan.grouping)
    sections = [_summary(result, measured, evaluation)]
    told = cautions(result, evaluation)
    if told:
        sections.append(Section("notes", "Before it is used", element("ul", *(element("li", one, class_="warning") for one in told))))
    sections.append(_proof(result))
    if result.fidelity or evaluation:
        sections.append(_outputs(result, evaluation))
    sections += [_layers(result), _groups(result, labels)]
    if result.scores:
        scores = {g: values for g, values in result.scores.items() if g in labels}
        sections.append(scores_section(scores, result.plan.remove, labels, str(result.plan.options.get("criterion")), charts))
    curves = sensitivity or _measured(result, labels)
    if curves:
        sections.append(sensitivity_section(curves, charts))
    if sweep:
        sections.append(sweep_section(sweep, charts))
    sections += [_fixed(result), made_with(result.plan.options, command)]
    return page(f"{result.plan.grouping.model.name}, pruned", _lead(result), sections, charts, _foot())


def curves_report(
    title: str,
    sensitivity: Sensitivity | None = None,
    sweep: Sweep | None = None,
    *,
    lead: str = "",
    options: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
) -> str:
    """A page of curves alone, for what measures them without pruning once; see `html_report`."""
    charts: dict[str, Any] = {}
    sections = [sensitivity_section(sensitivity, charts)] if sensitivity else []
    sections += [sweep_section(sweep, charts)] if sweep else []
    return page(title, lead, [*sections, made_with(options or {}, command)], charts, _foot())


def _lead(result: Result) -> str:
    options = result.plan.options
    of = WORDS.get(str(options.get("of")), str(options.get("of")))
    if "ratio" not in options:
        return f"{result.reached:.1%} of it went."
    asked = "" if result.on_budget else "; that is the closest found"
    return f"{result.reached:.1%} of its {of} went; {options['ratio']:.1%} was asked{asked}."


def _summary(result: Result, measured: Sequence[Measurement], evaluation: Evaluation | None) -> Section:
    cards = [_card("MACs", *result.macs, _count), _card("Parameters", *result.parameters, _count)]
    if len(measured) >= 2:
        old, new = measured[0], measured[1]
        cards.append(_card("File size", old.file_bytes, new.file_bytes, _bytes))
        cards.append(_card("Latency, median", old.latency_median_s, new.latency_median_s, lambda s: f"{1000 * s:.3g} ms"))
        if old.peak_memory_bytes and new.peak_memory_bytes:
            cards.append(_card("Peak memory", old.peak_memory_bytes, new.peak_memory_bytes, _bytes))
    if evaluation and evaluation.before is not None and evaluation.after is not None:
        cards.append(_plain("Accuracy", f"{evaluation.after:.2%}", f"{evaluation.before:.2%} before, {evaluation.samples} samples"))
    if evaluation and evaluation.metric_before is not None and evaluation.metric_after is not None:
        cards.append(_plain("Metric", f"{evaluation.metric_after:.4g}", f"{evaluation.metric_before:.4g} before"))
    if evaluation and evaluation.before is None and evaluation.agreement is not None:
        cards.append(_plain("Same class", f"{evaluation.agreement:.2%}", f"of {evaluation.samples} samples as the original"))
    model = result.plan.grouping.model
    gone = sum(len(units) for units in result.plan.remove.values())
    made = f"{model.proto.producer_name} {model.proto.producer_version}".strip()
    facts = [
        ("Inputs, as run", _values(model.inputs, model.shapes)),
        *([("MACs, latency", batch_in_words(batch_of(model)).strip())] if batch_in_words(batch_of(model)) else []),
        ("Outputs, as run", _values(model.outputs, model.shapes)),
        ("Nodes", f"{len(model.proto.graph.node)} before, {len(result.model.graph.node)} after"),
        ("Opsets", ", ".join(f"{domain} {number}" for domain, number in sorted(model.opsets.items()))),
        ("Exported by", made or "not said in the file"),
        ("Groups", f"{len(result.plan.groups)}, of which {sum(len(u) > 0 for u in result.plan.remove.values())} lose {gone} units"),
    ]
    return Section("summary", "Summary", join([element("dl", *cards, class_="cards"), _facts(facts)]))


def _values(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Html:
    return join((join([code(name), " ", " × ".join(map(str, shapes.get(name, ()))) or "scalar"]) for name in names), ", ")


def _facts(facts: Sequence[tuple[str, object]]) -> Html:
    return element("dl", *(join([element("dt", name), element("dd", value)]) for name, value in facts), class_="facts")


def _card(title: str, before: float, after: float, say: Any) -> Html:
    share = 1 - after / before if before else 0.0
    less = f"{abs(share):.1%} {'less' if share >= 0 else 'more'}"
    return _plain(title, join([say(after), " ", element("span", less, class_="tag")]), join([bar(before, after), "of ", say(before)]))


def _plain(title: str, big: object, small: object) -> Html:
    return element("div", element("dt", title), element("dd", big, class_="big"), element("dd", small))


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return _count(value) + "B" if value >= 999.5 else f"{value:.0f} B"


def _proof(result: Result) -> Section:
    """In the words of the terminal."""
    console = Console(file=io.StringIO(), width=10_000, no_color=True, highlight=False)
    show_proof(console, result.proof)
    assert isinstance(console.file, io.StringIO)
    lines = [element("li", line.strip()) for line in console.file.getvalue().splitlines()]
    if result.proof is None:
        return Section("proof", "Proof", element("p", "Not verified: the proof was switched off.", class_="warning"))
    return Section("proof", "Proof", element("ul", *lines))


def _outputs(result: Result, evaluation: Evaluation | None) -> Section:
    rows: list[list[object]] = []
    sets: list[tuple[str, int, Sequence[OutputFidelity]]] = []
    if result.fidelity:
        before, after = result.fidelity
        given = result.plan.options.get("samples")
        of = f" (of {given})" if given and given > after.samples else ""
        sets.append((f"pruned alone, calibration samples{of}", before.samples, before.outputs))
        sets.append((f"with compensation, calibration samples{of}", after.samples, after.outputs))
    if evaluation:
        sets.append(("the result, evaluation samples", evaluation.samples, evaluation.outputs))
    for title, samples, outputs in sets:
        for one in outputs:
            figures = ((one.cosine, "{:.4f}"), (one.sqnr, "{:.1f} dB"), (one.kl, "{:.3g}"), (one.agreement, "{:.2%}"))
            cells = ["–" if value is None else Cell("same" if math.isinf(value) else form.format(value), value) for value, form in figures]
            rows.append([code(one.output), title, Cell(samples, samples), *cells])
    columns = ("Output", "Which model, on what", "Samples", "Cosine", "SQNR", "KL, nats", "Same top-1")
    shown = table("How near each output stays to the original's", columns, rows, id="outputs-table", kinds="  nnnnn")
    note = f"Compensation {result.plan.options.get('compensation')}: {fits_in_words(result.refits)}." if result.refits else ""
    return Section("outputs", "Outputs", join([shown, element("p", note, class_="note")] if note else [shown]))


def _layers(result: Result) -> Section:
    rows: list[list[object]] = []
    for number, layer in enumerate(layer_changes(result.plan), 1):
        width: list[object] = ["–", "–"]
        if layer.width:
            old, new = layer.width
            width = [
                Cell(f"{old} → {new}" if new != old else old, old),
                Cell(join([bar(old, new), f" {new / max(old, 1):.0%}"]), new / max(old, 1)),
            ]
        shapes = [
            join([code(name), " ", _shape(old), f" → {_shape(new)}" if new != old else ""]) for name, (old, new) in layer.weights.items()
        ]
        links = join((element("a", g, href=f"#g{g}") for g in layer.groups), ", ")
        macs, share = layer.macs, layer.macs[0] / max(1, result.macs[0])
        rows.append(
            [
                code(layer.name),
                *width,
                Cell(number, number),
                layer.op,
                Cell(_pair(macs), macs[1]),
                Cell(f"{share:.1%}", share),
                Cell(_pair(layer.parameters), layer.parameters[1]),
                links,
                join(shapes, "<br>"),
            ]
        )
    columns = ("Layer", "Width", "Stays", "Place", "Operator", "MACs", "Share of MACs", "Parameters", "Groups", "Weights")
    note = "Every layer that multiplies, in the order of the graph; widths are the units that it makes."
    shown = table("Layers, before and after", columns, rows, id="layers-table", search="Filter layers", kinds=" nln nnn w")
    return Section("layers", "Layers", join([element("p", note, class_="note"), shown]))


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes)) or "1"


def _pair(values: tuple[int, int]) -> str:
    return f"{_count(values[0])} → {_count(values[1])}" if values[0] != values[1] else _count(values[0])


def _groups(result: Result, labels: Mapping[int, str]) -> Section:
    rows = []
    for group in result.plan.groups:
        gone = len(result.plan.remove.get(group.id, ()))
        kept = group.units - gone
        places = [
            element("li", code(m.tensor), f", axis {m.axis}", f", {m.indices.shape[1]} places a unit" if m.indices.shape[1] > 1 else "")
            for m in group.members
        ]
        listed = element("details", element("summary", f"{len(places)} places"), element("ul", *places)) if places else Html("")
        kind = {"channel": "channels", "head": "attention heads", "block": "residual branch"}.get(group.kind, group.kind)
        rows.append(
            [
                Cell(element("span", f"{group.id}", id=f"g{group.id}"), group.id),
                kind,
                Cell(f"{group.units} → {kept}" if gone else group.units, group.units),
                Cell(join([bar(group.units, kept), f" {kept / group.units:.0%}"]), kept / group.units),
                join([code(labels[group.id]), listed]),
                _state(result, group),
            ]
        )
    columns = ("Group", "Kind", "Units", "Stays", "What is coupled", "Proof")
    note = "The units of a group live in all of its places; where one goes, it goes in all of them."
    shown = table("Groups of coupled units", columns, rows, id="groups-table", search="Filter groups, by tensor too", kinds="n nlw")
    return Section("groups", "Groups", join([element("p", note, class_="note"), shown]))


def _state(result: Result, group: Group) -> str:
    proof = result.proof
    if proof is None:
        return "not run"
    return proof_state(group, proof) + (", its units also count in a mean, variance, maximum or softmax" if group.statistics else "")


def _fixed(result: Result) -> Section:
    fixed = result.plan.grouping.fixed
    rows = []
    for reason, count in Counter(reason for _, _, reason in fixed).most_common():
        places = [(tensor, axis) for tensor, axis, why in fixed if why == reason][:EXAMPLES]
        rows.append([in_words(reason), Cell(count, count), join((join([code(t), f" axis {a}"]) for t, a in places), ", ")])
    if not rows:
        return Section("fixed", "What is fixed", element("p", "Nothing is."))
    return Section(
        "fixed",
        "What is fixed",
        table("Axes that may not change, by reason", ("Reason", "Axes", "Such as"), rows, id="fixed-table", kinds=" n "),
    )


def made_with(options: Mapping[str, Any], command: Sequence[str] | None) -> Section:
    """The options and the versions that a report was made with."""
    rows = [[code(name), "–" if value in (None, [], {}, ()) else str(value)] for name, value in options.items()]
    versions = [("onnxprune", __version__), *((name, _version(name)) for name in ("onnx", "onnxruntime", "numpy", "networkx"))]
    facts: list[tuple[str, object]] = [("Command", code("onnxprune " + shlex.join(command)))] if command else []
    facts += [("Versions", ", ".join(f"{name} {found}" for name, found in versions))]
    facts += [("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    parts = [_facts(facts)]
    if rows:
        parts.append(table("Options", ("Option", "Value"), rows, id="options-table"))
    return Section("options", "Options and versions", join(parts))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"


def _foot() -> str:
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return f"Made by onnxprune {__version__} on {made}. Nothing in this page is loaded from a network."


def _measured(result: Result, labels: Mapping[int, str]) -> Sensitivity | None:
    """What the allocation found out, where it measured how much the outputs change."""
    if result.plan.options.get("allocation") != DISTORTION:
        return None
    found: dict[str, list[tuple[float, float]]] = {}
    for group, curve in result.losses.items():
        units = len(curve) - 1
        counts = [(ratio, round(ratio * units)) for ratio in RATIOS]
        if group in labels:
            points = [(ratio, float(curve[k])) for ratio, k in counts if 0 < k < units and math.isfinite(curve[k])]
            found[f"{group}: {labels[group]}"] = [(0.0, 0.0), *points]
    return Sensitivity(found, "change of the outputs, of their variance") if found else None

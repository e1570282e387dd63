"""The commands that look at a model before anything is decided: `inspect`, `sensitivity` and `sweep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from onnxprune.completion import FILE, allocations, criteria, folder, one_of
from onnxprune.errors import OnnxPruneError
from onnxprune.helptext import Grouped
from onnxprune.options import (
    ALLOW_IO,
    CALIBRATION,
    CHOICE,
    DEVICE,
    EVALUATION,
    FEEDS,
    JSON,
    MEMORY,
    MIN_KEEP,
    MODEL,
    PREPROCESS,
    QUIET,
    REPORT,
    SAMPLES,
    SCOPE,
    SEED,
    VERBOSE,
    VERIFY,
    but,
    options,
    read_feeds,
    read_list,
    read_ratios,
    read_shapes,
)
from onnxprune.terminal import complain, console, progress, write_json


@click.command(cls=Grouped)
@MODEL
@options(
    click.option("--around", metavar="NAME", help="Draw the dependencies around this node, value or group (group:3); needs -o."),
    click.option("--depth", metavar="N", type=click.IntRange(0), default=2, show_default=True, help="… up to so many relations away."),
    click.option(
        "--output", "-o", type=FILE, metavar="FILE", help="The drawing: .svg, .png, .dot or .graphml; without --around all of the model."
    ),
    MIN_KEEP,
    FEEDS,
    SEED,
    ALLOW_IO,
    VERIFY,
    JSON,
    QUIET,
    VERBOSE,
)
def inspect(
    model: str,
    around: str | None,
    depth: int,
    output: str | None,
    min_keep: float,
    feeds: str | None,
    shapes: tuple[str, ...],
    seed: int,
    allow_io: tuple[str, ...],
    verify: bool,
    json_path: str | None,
    quiet: bool,
    verbose: bool,
) -> int:
    """Show layers and groups, where MACs and parameters are, what is fixed, and how much could go; draw what is coupled.

    \b
    onnxprune inspect model.onnx
    onnxprune inspect model.onnx --around /layer1/conv1/Conv -o conv1.svg
    onnxprune inspect model.onnx --around group:3 --depth 1 -o group3.graphml
    """
    from onnxprune.drawing import check_drawing, draw, neighbourhood
    from onnxprune.inspection import inspect as look
    from onnxprune.writing import check_apart, check_target

    if around is not None and output is None:
        raise OnnxPruneError("--around draws, so it needs a file: give -o FILE.svg, .png, .dot or .graphml")
    check_apart(model, output, json_path, feeds)
    if output:
        check_drawing(output, model)
    if json_path and json_path != "-":
        check_target(json_path, model)
    with progress(quiet) as say:
        found = look(
            model,
            feeds=read_feeds(feeds),
            input_shapes=read_shapes(shapes),
            allow_io=allow_io,
            min_keep=min_keep,
            verify=verify,
            seed=seed,
            progress=say,
        )
        if output:
            say("drawing")
            graph = neighbourhood(found.grouping, around, depth)
            draw(graph, output, f"{found.grouping.model.name}: {around}, {depth} relations away" if around else found.grouping.model.name)
    write_json(found.to_json(), json_path)
    if not quiet and json_path != "-":
        from onnxprune.tables import show_inspection

        show_inspection(console(), found, verbose)
        if output:
            console().print(f"{output}: {len(graph)} axes", soft_wrap=True)
    return 0


PLOT = click.option("--plot", type=FILE, metavar="FILE", help="The curves too: .svg, .png or .pdf (needs the extra bench).")


@click.command(cls=Grouped)
@MODEL
@options(
    click.option(
        "--ratios",
        metavar="SHARES",
        default="0.1:0.9:0.2",
        show_default=True,
        help="Shares of a group's units: first:last:step, or with commas.",
    ),
    click.option(
        "--criterion",
        shell_complete=one_of(criteria),
        metavar="NAME",
        default="obs",
        show_default=True,
        help="Which units go first (docs/criteria.md).",
    ),
    SAMPLES,
    EVALUATION,
    PREPROCESS,
    SCOPE,
    click.option("--state", type=FILE, metavar="FILE", help="Where points are kept; MODEL-sensitivity.json beside the model if not given."),
    PLOT,
    REPORT,
    FEEDS,
    SEED,
    ALLOW_IO,
    VERIFY,
    MEMORY,
    JSON,
    QUIET,
)
def sensitivity(
    model: str,
    ratios: str,
    calibration: str | None,
    evaluation: str | None,
    state: str | None,
    plot: str | None,
    report_path: str | None,
    feeds: str | None,
    shapes: tuple[str, ...],
    json_path: str | None,
    quiet: bool,
    **chosen: Any,
) -> int:
    """Measure what each group alone is worth: how much the outputs change, and accuracy with it, over the share of its units that go.

    \b
    onnxprune sensitivity model.onnx --calibration data.npz
    onnxprune sensitivity model.onnx --calibration data.npz --eval test.npz --plot curves.svg

    Every point is kept in the state file as soon as it is measured: after an interruption, or with other --ratios, the same command
    goes on where it was.
    """
    from onnxprune.importer import check_file
    from onnxprune.sensitivities import sensitivity as measure
    from onnxprune.writing import check_target

    if calibration is None:
        raise OnnxPruneError("sensitivity measures on samples; give --calibration (samples, or 'noise')")
    source = check_file(model)
    target = check_target(state or source.with_name(f"{source.stem}-sensitivity.json"), source)
    shown = Shown(plot, report_path, json_path)
    shown.check(model, target, feeds, evaluation, calibration)
    with progress(quiet) as say, resumable(str(target)):
        found = measure(
            model,
            calibration,
            ratios=read_list(ratios, "--ratios"),
            evaluation=evaluation,
            feeds=read_feeds(feeds),
            input_shapes=read_shapes(shapes),
            state=target,
            progress=say,
            **chosen,
        )
    shown.write(found.to_json(), {"ratios": ratios, "calibration": calibration, "eval": evaluation, **chosen})
    if shown.aloud(quiet):
        from onnxprune.tables import show_sensitivity

        show_sensitivity(console(), found)
        console().print(shown.where(str(target)), soft_wrap=True)
    return 0


@dataclass(frozen=True)
class Shown:
    """Where measured curves go besides the terminal: the paths of --plot, --report and --json."""

    plot: str | None
    page: str | None
    json: str | None

    def check(self, model: str, output: str | os.PathLike[str], feeds: str | None, *samples: str | None) -> None:
        """Raises OnnxPruneError where one of them cannot be written, or is also the output or holds feeds or samples."""
        from onnxprune.writing import check_apart, check_page, check_samples_stay, check_target

        check_apart(model, self.plot, self.page, self.json, output, feeds)
        check_samples_stay(samples, self.plot, self.page, self.json, output)
        if self.plot:
            from onnxprune.plots import check_plot

            check_plot(self.plot, model)
        if self.page:
            check_page(self.page, model)
        if self.json and self.json != "-":
            check_target(self.json, model)

    def write(self, content: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        if self.plot:
            from onnxprune import plots

            {"sensitivity": plots.plot_sensitivity, "sweep": plots.plot_sweep}[content["kind"]](content, self.plot)
        if self.page:
            from onnxprune.curvefiles import of_content
            from onnxprune.htmlreport import curves_report
            from onnxprune.writing import write_text

            curves, title = of_content([content]), f"{content['model']}: {content['kind']}"
            page = curves_report(title, curves.sensitivity, curves.sweep, lead=curves.lead, options=options, command=sys.argv[1:])
            write_text(page, self.page)
        write_json(content, self.json)

    def aloud(self, quiet: bool) -> bool:
        """Whether the terminal shows them too."""
        return not quiet and self.json != "-"

    def where(self, kept: str) -> str:
        drawn = " and ".join(name for name in (self.plot, self.page) if name)
        return f"kept in {kept}" + (f", drawn in {drawn}" if drawn else "")


@contextmanager
def resumable(where: str) -> Iterator[None]:
    """Says after an interruption that nothing measured is lost."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"what was measured is kept in {where}; the same command goes on from there", err=True)
        raise


@click.command(cls=Grouped)
@MODEL
@options(
    click.option(
        "--ratios",
        metavar="SHARES",
        default="0.1:0.8:0.1",
        show_default=True,
        help="Shares of the budget: first:last:step, or with commas.",
    ),
    click.option(
        "--criteria",
        shell_complete=one_of(criteria, several=True),
        metavar="NAME,…",
        default="",
        help="Try each of these (docs/criteria.md); prune's own if not given.",
    ),
    click.option(
        "--allocations", shell_complete=one_of(allocations, several=True), metavar="NAME,…", default="", help="… with each of these."
    ),
    click.option(
        "--output",
        "-o",
        shell_complete=folder,
        metavar="FOLDER",
        help="For models, plans and results.json; MODEL-sweep beside the model if not given.",
    ),
    click.option(
        "--jobs",
        "-j",
        metavar="N",
        type=int,
        default=1,
        show_default=True,
        help="Points made side by side, a process each; -1: one a core.",
    ),
    click.option(
        "--seconds", metavar="S", type=click.FloatRange(0), default=1.0, show_default=True, help="For each model's latency; 0: none."
    ),
    DEVICE,
    but(CHOICE, "ratio", "criterion", "allocation"),
    CALIBRATION,
    EVALUATION,
    PREPROCESS,
    PLOT,
    REPORT,
    FEEDS,
    SEED,
    VERIFY,
    MEMORY,
    JSON,
    QUIET,
)
def sweep(
    model: str,
    ratios: str,
    criteria: str,
    allocations: str,
    output: str | None,
    plot: str | None,
    report_path: str | None,
    feeds: str | None,
    shapes: tuple[str, ...],
    json_path: str | None,
    quiet: bool,
    layer_ratios: tuple[str, ...],
    **chosen: Any,
) -> int:
    """Prune at many ratios: the curve of accuracy or fidelity over MACs, parameters and latency, with its Pareto points.

    \b
    onnxprune sweep model.onnx --ratios 0.1:0.8:0.1 --calibration data.npz --eval test.npz
    onnxprune sweep model.onnx --criteria obs,l2 --allocations global --jobs 4 --plot curve.svg

    Every model is kept in the folder with its plan.  After an interruption the same command makes what is missing; with other ratios,
    criteria or allocations it adds to what is there.  A point that fails does not stop the others (exit code 3).
    """
    from onnxprune.importer import check_file
    from onnxprune.sweeping import sweep as run

    source = check_file(model)
    folder = output or str(source.with_name(f"{source.stem}-sweep"))
    shown = Shown(plot, report_path, json_path)
    shown.check(model, folder, feeds, chosen["calibration"], chosen["evaluation"])
    with progress(quiet) as say, resumable(folder):
        found = run(
            model,
            folder,
            read_list(ratios, "--ratios"),
            criteria=_names(criteria),
            allocations=_names(allocations),
            feeds=read_feeds(feeds),
            input_shapes=read_shapes(shapes),
            layer_ratios=read_ratios(layer_ratios),
            progress=say,
            **chosen,
        )
    shown.write(found.to_json(), {"ratios": ratios, "criteria": criteria, "allocations": allocations, **chosen})
    if shown.aloud(quiet):
        from onnxprune.tables import show_sweep

        show_sweep(console(), found)
        console().print(shown.where(folder), soft_wrap=True)
    for point in found.failed:
        complain(f"{point['name']}: {point['error']}")
    return 3 if found.failed else 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


COMMANDS = (inspect, sensitivity, sweep)

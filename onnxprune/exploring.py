"""The commands that look at a model before anything is decided: `inspect`, `sensitivity` and `sweep`."""

from __future__ import annotations

import click

from onnxprune.errors import OnnxPruneError
from onnxprune.options import ALLOW_IO, FEEDS, JSON, MODEL, QUIET, SEED, VERBOSE, VERIFY, options, read_feeds, read_shapes
from onnxprune.terminal import console, progress, write_json


@click.command()
@MODEL
@options(
    click.option("--around", metavar="NAME", help="Draw the dependencies around this node, value or group (group:3); needs -o."),
    click.option("--depth", type=click.IntRange(0), default=2, show_default=True, help="… up to so many relations away."),
    click.option("--output", "-o", metavar="FILE", help="The drawing: .svg, .png, .dot or .graphml; without --around all of the model."),
    click.option("--min-keep", default=0.1, show_default=True, help="Least that a group keeps: a share below 1, or a number of units."),
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


COMMANDS = (inspect,)

"""The steps of `prune`, a command each: `groups`, `plan`, `apply`, `export-plan`, `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxprune.completion import FILE
from onnxprune.helptext import Grouped
from onnxprune.options import (
    ALLOW_IO,
    CALIBRATION,
    CHOICE,
    DEVICE,
    FEEDS,
    JSON,
    MEMORY,
    MODEL,
    PREPROCESS,
    QUIET,
    SEED,
    SHARDS,
    TARGET,
    VERBOSE,
    VERIFY,
    options,
    read_feeds,
    read_ratios,
    read_shapes,
)
from onnxprune.terminal import complain, console, progress, write_json


@click.command(cls=Grouped)
@MODEL
@options(FEEDS, SEED, ALLOW_IO, TARGET, VERIFY, MEMORY, JSON, QUIET, VERBOSE)
def groups(
    model: str,
    feeds: str | None,
    shapes: tuple[str, ...],
    seed: int,
    allow_io: tuple[str, ...],
    target: str | None,
    verify: bool,
    memory: int | None,
    json_path: str | None,
    quiet: bool,
    verbose: bool,
) -> int:
    """Show what can be pruned, what cannot, and why.

    \b
    onnxprune groups model.onnx
    onnxprune groups model.onnx --json groups.json
    onnxprune groups model.onnx --target tensorrt      what TensorRT does not take of it, too
    """
    from onnxprune.api import certified, why_not
    from onnxprune.branches import with_branches
    from onnxprune.external import IN_MEMORY
    from onnxprune.grouping import group
    from onnxprune.importer import load
    from onnxprune.tensorrt import check
    from onnxprune.tiles import check_align
    from onnxprune.writing import check_target

    if json_path and json_path != "-":
        check_target(json_path, model)
    check_align(1, target)
    given = read_feeds(feeds)
    with progress(quiet) as say:
        say("reading the model")
        limit = IN_MEMORY if memory is None else memory
        found = with_branches(group(load(model, given, read_shapes(shapes), limit), allow_io))
        found, proof, _ = certified(found, given, seed, verify, say)
    support = check(found.model) if target == "tensorrt" else None
    write_json(found.to_json() | ({"support": support.to_json()} if support else {}), json_path)
    if not quiet and json_path != "-":
        from onnxprune import report

        report.show_groups(console(), found, proof)
        if verbose:
            report.show_places(console(), found)
        if proof:
            report.show_proof(console(), proof)
        if support:
            report.show_support(console(), support)
    if not found.groups:
        complain(f"{Path(model).name}: nothing can be pruned ({why_not(found)})")
        return 3
    return 0


@click.command(cls=Grouped)
@MODEL
@options(
    click.option("--output", "-o", type=FILE, metavar="FILE", required=True, help="The plan, as JSON."),
    CHOICE,
    CALIBRATION,
    PREPROCESS,
    FEEDS,
    SEED,
    VERIFY,
    DEVICE,
    MEMORY,
    QUIET,
)
def plan(
    model: str,
    output: str,
    ratio: float,
    feeds: str | None,
    shapes: tuple[str, ...],
    quiet: bool,
    layer_ratios: tuple[str, ...],
    **chosen: Any,
) -> int:
    """Choose what goes, and write it down; `apply` carries it out.

    \b
    onnxprune plan model.onnx --ratio 0.4 -o plan.json
    """
    from onnxprune import api
    from onnxprune.cautions import cautions
    from onnxprune.plans import check_of_file
    from onnxprune.writing import check_apart, check_samples_stay, check_target, write_text

    check_target(output, model)
    check_of_file(chosen["criterion"])
    check_apart(model, output, feeds)
    check_samples_stay((chosen["calibration"],), output)
    with progress(quiet) as say:
        result = api.prune(
            model,
            ratio,
            feeds=read_feeds(feeds),
            input_shapes=read_shapes(shapes),
            layer_ratios=read_ratios(layer_ratios),
            progress=say,
            **chosen,
        )
        write_text(json.dumps(result.plan.to_json()), output)
    if not quiet:
        from onnxprune import report

        report.show_result(console(), result, ratio, chosen["of"])
        report.show_proof(console(), result.proof)
        report.show_cautions(console(), cautions(result))
        console().print(f"{output} holds the plan; `onnxprune apply {model} {output} -o OUT.onnx` carries it out", soft_wrap=True)
    if not result.on_budget:
        complain(f"the budget is out of reach: {result.reached:.1%} of {chosen['of']} goes, {ratio:.1%} was asked")
        return 3
    return 0


@click.command(cls=Grouped)
@MODEL
@click.argument("plan", type=FILE, metavar="PLAN.json")
@options(
    click.option("--output", "-o", type=FILE, metavar="FILE", required=True, help="The pruned model."),
    FEEDS,
    SEED,
    click.option("--verify/--no-verify", default=False, help="Prove the result on this model (off by default)."),
    MEMORY,
    SHARDS,
    JSON,
    QUIET,
)
def apply(
    model: str,
    plan: str,
    output: str,
    feeds: str | None,
    shapes: tuple[str, ...],
    seed: int,
    verify: bool,
    memory: int | None,
    shard_size: int | None,
    json_path: str | None,
    quiet: bool,
) -> int:
    """Carry out a plan on the model it was made for, or on a fine-tuned sister.

    \b
    onnxprune apply model.onnx plan.json -o smaller.onnx
    """
    from onnxprune import api
    from onnxprune.writing import check_apart, check_target

    target = check_target(output, model)
    check_apart(model, plan, output, json_path, feeds)
    with progress(quiet) as say:
        sizes = read_shapes(shapes)
        result = api.apply(model, plan, feeds=read_feeds(feeds), input_shapes=sizes, verify=verify, memory=memory, seed=seed, progress=say)
        result.save(target, shard_size=shard_size, progress=say)
    write_json({"model": model, "output": str(target), **result.to_json()}, json_path)
    if not quiet and json_path != "-":
        from onnxprune import report

        report.show_result(console(), result, None, "")
        if verify:
            report.show_proof(console(), result.proof)
        unproven = "" if verify else f"; not verified: `onnxprune verify {model} {target} --plan {plan}` does"
        console().print(f"{target} is written, as {plan} says{unproven}", soft_wrap=True)
    return 0


@click.command(cls=Grouped)
@MODEL
@click.argument("plan", type=FILE, metavar="PLAN.json")
@options(
    click.option("--output", "-o", type=FILE, metavar="FILE", required=True, help="The indices that stay, as JSON."),
    click.option(
        "--state-dict",
        "checkpoint",
        type=FILE,
        metavar="CHECKPOINT",
        help="The framework's parameters: .npz, .safetensors, .pt (needs torch), .h5, .keras (h5py); else the file's own tensors.",
    ),
    FEEDS,
    QUIET,
)
def export_plan(model: str, plan: str, output: str, checkpoint: str | None, feeds: str | None, shapes: tuple[str, ...], quiet: bool) -> int:
    """Say which indices of a checkpoint's parameters a plan keeps, to fine-tune where the training code is.

    \b
    onnxprune export-plan model.onnx plan.json --state-dict model.safetensors -o kept.json

    Exit code 3: it is written, and something in it is unmatched; docs/fine-tuning.md shows how to use it.
    """
    from onnxprune.checkpoints import read_checkpoint
    from onnxprune.handoff import keep_indices
    from onnxprune.writing import check_apart, check_target, write_text

    check_target(output, model)
    check_apart(model, plan, output, checkpoint, feeds)
    state = read_checkpoint(checkpoint) if checkpoint else None
    with progress(quiet) as say:
        found = keep_indices(model, plan, state, feeds=read_feeds(feeds), input_shapes=read_shapes(shapes), progress=say)
    write_text(json.dumps(found.to_json() | {"checkpoint": checkpoint}), output)
    if not quiet:
        from onnxprune import report

        report.show_handoff(console(), found, output)
    for name, reason in (*found.unmatched, *found.uncovered):
        click.echo(f"warning: '{name}': {reason}", err=True)
    return 0 if found.complete else 3


@click.command(cls=Grouped)
@MODEL
@click.argument("pruned", type=FILE, metavar="[PRUNED.onnx]", required=False)
@options(
    click.option("--plan", type=FILE, metavar="FILE", help="The plan that made PRUNED.onnx."), FEEDS, SEED, ALLOW_IO, MEMORY, JSON, QUIET
)
def verify(
    model: str,
    pruned: str | None,
    plan: str | None,
    feeds: str | None,
    shapes: tuple[str, ...],
    seed: int,
    allow_io: tuple[str, ...],
    memory: int | None,
    json_path: str | None,
    quiet: bool,
) -> int:
    """Say what is proven of a model's groups and of the model that a plan leaves.

    \b
    onnxprune verify model.onnx
    onnxprune verify model.onnx smaller.onnx --plan plan.json
    """
    from onnxprune import api

    with progress(quiet) as say:
        proof = api.verify(
            model,
            pruned,
            plan,
            feeds=read_feeds(feeds),
            input_shapes=read_shapes(shapes),
            allow_io=allow_io,
            memory=memory,
            seed=seed,
            progress=say,
        )
    write_json(proof.to_json(), json_path)
    if not quiet and json_path != "-":
        from onnxprune import report

        report.show_proof(console(), proof)
        if pruned and not plan:
            console().print(f"{pruned} loads, with the same inputs and outputs; it is compared with the model only with --plan")
    return 0


COMMANDS = (groups, plan, apply, export_plan, verify)

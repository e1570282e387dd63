"""The command line: `onnxprune MODEL.onnx --ratio 0.4` and its commands."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from onnxprune import __version__
from onnxprune.completion import FILE, one_of, providers
from onnxprune.errors import OnnxPruneError
from onnxprune.exploring import COMMANDS
from onnxprune.helptext import Grouped
from onnxprune.options import (
    ALLOW_IO,
    CALIBRATION,
    CHOICE,
    DEVICE,
    EVALUATION,
    FEEDS,
    GATES,
    JSON,
    MEMORY,
    MODEL,
    PREPROCESS,
    QUIET,
    REPORT,
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
from onnxprune.terminal import complain as _complain
from onnxprune.terminal import console as _console
from onnxprune.terminal import progress as _progress
from onnxprune.terminal import warnings_told
from onnxprune.terminal import write_json as _write_json

if TYPE_CHECKING:
    import numpy as np

    from onnxprune.benchmark import Measurement

INTERRUPTED = 130
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # from click 8.2 on


class Commands(click.Group):
    """A group whose default command is `prune`, and which says errors in one line."""

    command_class = Grouped

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            if not ctx.resilient_parsing and not args[0].startswith("-") and not args[0].endswith(".onnx") and not Path(args[0]).exists():
                raise OnnxPruneError(f"'{args[0]}' is neither a file nor a command ({', '.join(self.commands)}); see `onnxprune --help`")
            args = ["prune", *args]
        if args and not ctx.resilient_parsing and not _silent(args):
            _say_configuration(ctx.obj, ctx.default_map or {}, self.commands.get(args[0]))
        return super().parse_args(ctx, args)

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        if not extra.get("resilient_parsing") and not {"--help", "-h", "--version"}.intersection(args):
            from onnxprune.configuration import read_configuration

            extra["obj"], extra["default_map"] = read_configuration(self.commands)
        return super().make_context(info_name, args, parent, **extra)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and files, as a model may be the first word."""
        found = super().shell_complete(ctx, incomplete)
        return found if incomplete and found else [*found, CompletionItem(incomplete, type="file")]

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # an arrow that an encoding lacks is no reason to fail
        try:
            with warnings_told():
                code = super().main(*args, **{**extra, "standalone_mode": False})
        except OnnxPruneError as error:
            _complain(str(error))
            if {"-v", "--verbose"}.intersection(sys.argv[1:]):
                click.echo(_cause(error), err=True, nl=False)
            sys.exit(error.exit_code)
        except click.exceptions.Abort:
            _complain("interrupted; no half-written file is left")
            sys.exit(INTERRUPTED)
        except NO_ARGUMENTS as error:
            click.echo(error.format_message())
            sys.exit(2)
        except click.ClickException as error:
            hint = f"; see `{error.ctx.command_path} --help`" if isinstance(error, click.UsageError) and error.ctx else ""
            _complain(error.format_message().rstrip(".") + hint)
            sys.exit(2)
        except MemoryError:
            _complain("out of memory; use a smaller batch (--input-shape) or more memory")
            sys.exit(2)
        except BrokenPipeError:
            sys.exit(0)
        except Exception as error:
            if os.environ.get("ONNXPRUNE_DEBUG"):
                raise
            if isinstance(error, OSError | UnicodeError):  # standard output that cannot be written to
                _complain(f"cannot print the result ({error}); use --quiet, or another terminal or encoding")
                sys.exit(2)
            _complain(f"unexpected {type(error).__name__} ({error}); ONNXPRUNE_DEBUG=1 shows where, please report it")
            sys.exit(4)
        sys.exit(code if isinstance(code, int) else 0)


def _cause(error: BaseException) -> str:
    """All that onnx or onnxruntime said, where an error cites it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "" if isinstance(error, OnnxPruneError) else f"{error}\n"


def _silent(args: list[str]) -> bool:
    """Whether nothing is to be said but the result, if that."""
    return any(arg in ("-q", "--quiet") or arg.startswith("--json") for arg in args)


def _say_configuration(file: Path | None, defaults: Mapping[str, Any], command: click.Command | None) -> None:
    """The file that options come from, once, so that nobody wonders where from."""
    given = defaults.get(command.name or "", {}) if command else {}
    if file and command and given and not given.get("quiet"):
        flags = [max(option.opts, key=len) for option in command.params if option.name in given]
        click.echo(f"{file}: {', '.join(flags)}; flags on the command line win", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="onnxprune")
def main() -> None:
    """Make an ONNX model smaller: remove whole channels, and prove that it was done right.

    \b
    onnxprune model.onnx --ratio 0.4                   remove 40 % of the multiply-accumulates
    onnxprune model.onnx --ratio 0.4 --of params       … of the parameters
    onnxprune model.onnx --ratio 0.4 --of latency      … of the time that it takes on this machine
    onnxprune model.onnx --ratio 0.4 --eval test.npz   … and show the accuracy before and after
    onnxprune groups model.onnx                        what can be pruned, what cannot, and why
    onnxprune inspect model.onnx                       where MACs and parameters are, and how much could go

    `onnxprune MODEL …` is short for `onnxprune prune MODEL …`.

    Exit codes: 0 done; 2 bad input or usage; 3 nothing to prune (nothing written), or the budget is out of reach (the
    closest is written); 4 the proof failed (nothing written); 5 a figure is below --fail-under (the model is written).
    """


@main.command()
@MODEL
@options(
    click.option("--output", "-o", type=FILE, metavar="FILE", help="The pruned model; MODEL-pruned.onnx if not given."),
    CHOICE,
    CALIBRATION,
    FEEDS,
    SEED,
    EVALUATION,
    GATES,
    PREPROCESS,
    click.option("--plan-out", type=FILE, metavar="FILE", help="Write the plan too."),
    REPORT,
    click.option(
        "--curves", type=FILE, multiple=True, metavar="FILE", help="What `sensitivity` or `sweep` kept, to show in the report too."
    ),
    VERIFY,
    DEVICE,
    MEMORY,
    SHARDS,
    JSON,
    QUIET,
    VERBOSE,
)
def prune(
    model: str,
    output: str | None,
    ratio: float,
    feeds: str | None,
    shapes: tuple[str, ...],
    evaluation: str | None,
    metric: str | None,
    gates: dict[str, float],
    preprocess: str | None,
    plan_out: str | None,
    shard_size: int | None,
    report_path: str | None,
    curves: tuple[str, ...],
    provider: str,
    threads: int,
    json_path: str | None,
    quiet: bool,
    verbose: bool,
    layer_ratios: tuple[str, ...],
    **chosen: Any,
) -> int:
    """Prune a model, prove it, measure it.

    \b
    onnxprune model.onnx --ratio 0.4 -o smaller.onnx
    onnxprune model.onnx --ratio 0.5 --of params --exclude '*classifier*' --align 8
    """
    from onnxprune import api
    from onnxprune.allocations import check_budget, check_ratio
    from onnxprune.cautions import cautions
    from onnxprune.curvefiles import read_curves
    from onnxprune.depth import check_granularity
    from onnxprune.external import AT_ONCE
    from onnxprune.gates import MISSED, check_known, judged
    from onnxprune.importer import check_file, load, read
    from onnxprune.quality import evaluator
    from onnxprune.sizing import sized
    from onnxprune.writing import check_apart, check_page, check_target, write_text

    check_ratio(ratio)
    check_budget(chosen["of"])
    check_granularity(chosen["granularity"])
    check_known(gates, evaluation, metric, chosen["calibration"], chosen["compensation"])
    source = check_file(model)
    target = check_target(output or source.with_name(f"{source.stem}-pruned.onnx"), source)
    check_apart(model, target, plan_out, json_path, report_path, feeds, evaluation, *curves)
    if report_path:
        check_page(report_path, source)
    for extra in (plan_out, json_path):
        if extra and extra != "-":
            check_target(extra, source)
    if curves and not report_path:
        raise OnnxPruneError("--curves are shown in a report; give --report FILE.html too")
    drawn = read_curves(curves, model)
    given, sizes = read_feeds(feeds), read_shapes(shapes)
    with _progress(quiet) as say:
        if preprocess is not None and evaluation is None and chosen["calibration"] is None:
            raise OnnxPruneError("--preprocess says how the samples of --calibration and --eval are used; give one of them")
        compare = None
        if evaluation is not None:  # looked at before any work is done
            chosen["memory"] = chosen["memory"] or AT_ONCE
            file = read(model, chosen["memory"])
            file.external.need_memory(file.name, "--eval")
            sizes = sized(file.proto, given, sizes, [chosen["calibration"], evaluation], preprocess)
            loaded = load(file, given, sizes)
            compare = evaluator(loaded, evaluation, preprocess, metric, chosen["seed"])
            compare.expect(loaded, gates)
        elif metric is not None:
            raise OnnxPruneError("--metric says how the samples of --eval are used; give --eval too")
        result = api.prune(
            model,
            ratio,
            feeds=given,
            input_shapes=sizes,
            layer_ratios=read_ratios(layer_ratios),
            preprocess=preprocess if chosen["calibration"] is not None else None,
            provider=provider,
            threads=threads,
            progress=say,
            **chosen,
        )
        accuracy = None
        if compare is not None:
            say("evaluating")
            accuracy = compare(result.plan.grouping.model.proto, result.model)
        say("writing")
        result.save(target, shard_size=shard_size, progress=say)
        if plan_out:
            write_text(json.dumps(result.plan.to_json()), plan_out)
        timed = not quiet or "speedup" in gates
        measured = _measure([model, str(target)], result, given, provider, threads, say) if timed else []
        if report_path:
            from onnxprune.htmlreport import html_report

            shown = html_report(
                result,
                measured=measured,
                evaluation=accuracy,
                sensitivity=drawn.sensitivity,
                sweep=drawn.sweep,
                command=sys.argv[1:],
            )
            write_text(shown, report_path)
    content = {"model": model, "output": str(target), **result.to_json()}
    content |= {"evaluation": accuracy.to_json() if accuracy else None, "benchmark": [m.to_json() for m in measured]}
    passed = judged(gates, result, accuracy, measured)
    told = cautions(result, accuracy)
    content |= {"gates": [gate.to_json() for gate in passed], "cautions": told}
    _write_json(content, json_path)
    if not quiet and json_path != "-":
        from onnxprune import report
        from onnxprune.benchmark import table
        from onnxprune.wording import batch_in_words, batch_of

        console = _console()
        console.print(f"[bold]{result.plan.grouping.model.name}[/] → [bold]{target}[/]", soft_wrap=True)
        report.show_result(console, result, ratio, chosen["of"])
        if verbose:
            report.show_places(console, result.plan.grouping)
        report.show_proof(console, result.proof)
        if result.support:
            report.show_support(console, result.support)
        if result.fidelity:
            report.show_compensation(console, result)
        if accuracy:
            report.show_evaluation(console, accuracy)
        if measured:
            console.print(table(measured, batch_in_words(batch_of(result.plan.grouping.model))))
            report.hint_alignment(console, measured, result)
        report.show_cautions(console, told)
    if not result.on_budget:
        _complain(
            f"the budget is out of reach: {result.reached:.1%} of {chosen['of']} went, {ratio:.1%} was asked; {target} is the closest"
        )
    missed = [gate for gate in passed if not gate.passed]
    if missed:
        _complain(f"--fail-under: {'; '.join(map(str, missed))}; {target} is written all the same")
        return MISSED
    return 0 if result.on_budget else 3


def _measure(files: list[str], result: Any, feeds: Any, provider: str, threads: int, say: Callable[[str], None]) -> list[Measurement]:
    """The benchmark of both models; a model that it cannot run is no reason to lose the result."""
    import numpy as np

    from onnxprune.benchmark import benchmark
    from onnxprune.importer import load
    from onnxprune.shapes import seeded_feeds

    model: Any = result.plan.grouping.model
    if model.external.places:
        click.echo(f"no benchmark: the weights are more than --memory; `onnxprune bench {files[0]} {files[1]}` runs both", err=True)
        return []
    given = seeded_feeds(model.proto, model.input_shapes)
    if feeds is not None:
        given = {name: np.asarray(feeds[name]).astype(array.dtype) for name, array in given.items()}
    counts = dict(zip(files, result.macs, strict=True))

    def macs(path: str, arrays: Mapping[str, np.ndarray]) -> int | None:
        return counts.get(path) or _macs(load(path, arrays))

    try:
        return benchmark(files, given, provider=provider, threads=threads, seconds=1.0, macs=macs, progress=say)
    except OnnxPruneError as error:
        click.echo(f"warning: no benchmark ({error})", err=True)
        return []


def _macs(model: Any) -> int:
    from onnxprune.cost import count_macs

    return count_macs(model)


@main.command()
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
    with _progress(quiet) as say:
        say("reading the model")
        limit = IN_MEMORY if memory is None else memory
        found = with_branches(group(load(model, given, read_shapes(shapes), limit), allow_io))
        found, proof, _ = certified(found, given, seed, verify, say)
    support = check(found.model) if target == "tensorrt" else None
    _write_json(found.to_json() | ({"support": support.to_json()} if support else {}), json_path)
    if not quiet and json_path != "-":
        from onnxprune import report

        report.show_groups(_console(), found, proof)
        if verbose:
            report.show_places(_console(), found)
        if proof:
            report.show_proof(_console(), proof)
        if support:
            report.show_support(_console(), support)
    if not found.groups:
        _complain(f"{Path(model).name}: nothing can be pruned ({why_not(found)})")
        return 3
    return 0


@main.command()
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
    from onnxprune.writing import check_target, write_text

    check_target(output, model)
    with _progress(quiet) as say:
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

        report.show_result(_console(), result, ratio, chosen["of"])
        report.show_proof(_console(), result.proof)
        report.show_cautions(_console(), cautions(result))
        _console().print(f"{output} holds the plan; `onnxprune apply {model} {output} -o OUT.onnx` carries it out", soft_wrap=True)
    if not result.on_budget:
        _complain(f"the budget is out of reach: {result.reached:.1%} of {chosen['of']} goes, {ratio:.1%} was asked")
        return 3
    return 0


@main.command()
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
    with _progress(quiet) as say:
        sizes = read_shapes(shapes)
        result = api.apply(model, plan, feeds=read_feeds(feeds), input_shapes=sizes, verify=verify, memory=memory, seed=seed, progress=say)
        result.save(target, shard_size=shard_size, progress=say)
    _write_json({"model": model, "output": str(target), **result.to_json()}, json_path)
    if not quiet and json_path != "-":
        from onnxprune import report

        report.show_result(_console(), result, None, "")
        if verify:
            report.show_proof(_console(), result.proof)
        unproven = "" if verify else f"; not verified: `onnxprune verify {model} {target} --plan {plan}` does"
        _console().print(f"{target} is written, as {plan} says{unproven}", soft_wrap=True)
    return 0


@main.command()
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
    with _progress(quiet) as say:
        found = keep_indices(model, plan, state, feeds=read_feeds(feeds), input_shapes=read_shapes(shapes), progress=say)
    write_text(json.dumps(found.to_json() | {"checkpoint": checkpoint}), output)
    if not quiet:
        from onnxprune import report

        report.show_handoff(_console(), found, output)
    for name, reason in (*found.unmatched, *found.uncovered):
        click.echo(f"warning: '{name}': {reason}", err=True)
    return 0 if found.complete else 3


@main.command()
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

    with _progress(quiet) as say:
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
    _write_json(proof.to_json(), json_path)
    if not quiet and json_path != "-":
        from onnxprune import report

        report.show_proof(_console(), proof)
        if pruned and not plan:
            _console().print(f"{pruned} loads, with the same inputs and outputs; it is compared with the model only with --plan")
    return 0


@main.command()
@click.argument("models", type=FILE, metavar="A.onnx [B.onnx …]", nargs=-1, required=True)
@options(
    FEEDS,
    click.option("--batch", metavar="N", type=click.IntRange(1), help="Size of the symbolic first axis."),
    click.option(
        "--threads", metavar="N", type=click.IntRange(0), default=1, show_default=True, help="onnxruntime's threads; 0: its own default."
    ),
    click.option("--warmup", metavar="N", type=click.IntRange(0), default=3, show_default=True, help="Runs before the clock starts."),
    click.option("--seconds", metavar="S", type=click.FloatRange(0), default=2.0, show_default=True, help="Time to spend on each model."),
    click.option(
        "--provider",
        shell_complete=one_of(providers),
        metavar="NAME",
        default="CPUExecutionProvider",
        show_default=True,
        help="onnxruntime provider.",
    ),
    JSON,
    QUIET,
)
def bench(
    models: tuple[str, ...],
    feeds: str | None,
    shapes: tuple[str, ...],
    batch: int | None,
    threads: int,
    warmup: int,
    seconds: float,
    provider: str,
    json_path: str | None,
    quiet: bool,
) -> int:
    """Measure models side by side: MACs, parameters, file size, peak memory, latency.

    \b
    onnxprune bench model.onnx smaller.onnx --batch 8
    """
    from onnxprune.benchmark import benchmark, table
    from onnxprune.external import IN_MEMORY
    from onnxprune.importer import load
    from onnxprune.shapes import seeded_feeds
    from onnxprune.wording import batch_in_words, batch_of

    batches: list[int | None] = []

    def macs(path: str, arrays: Mapping[str, np.ndarray]) -> int | None:
        loaded = load(path, arrays, memory=IN_MEMORY)
        batches.append(batch_of(loaded))
        return _macs(loaded)

    given = read_feeds(feeds)
    if given is None and batch is None:
        first = load(models[0], None, read_shapes(shapes), IN_MEMORY)
        given = seeded_feeds(first.proto, first.input_shapes)
    with _progress(quiet) as say:
        measured = benchmark(
            models,
            given,
            batch=batch,
            threads=threads,
            warmup=warmup,
            seconds=seconds,
            provider=provider,
            macs=macs,
            progress=say,
        )
    _write_json([m.to_json() for m in measured], json_path)
    if not quiet and json_path != "-":
        _console().print(table(measured, batch_in_words(batches[0] if len(set(batches)) == 1 else None)))
    return 0


for one in COMMANDS:
    main.add_command(one)

"""The command that does it all, `prune`, and the one that measures, `bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from onnxprune.completion import FILE
from onnxprune.errors import OnnxPruneError
from onnxprune.helptext import Grouped
from onnxprune.options import (
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
    VERBOSE,
    VERIFY,
    options,
    read_feeds,
    read_ratios,
    read_shapes,
)
from onnxprune.terminal import complain, console, progress, write_json

if TYPE_CHECKING:
    import numpy as np

    from onnxprune.benchmark import Measurement


@click.command(cls=Grouped)
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
    from onnxprune.plans import check_of_file
    from onnxprune.quality import evaluator
    from onnxprune.sizing import sized
    from onnxprune.writing import check_apart, check_page, check_samples_stay, check_target, write_text

    check_ratio(ratio)
    check_budget(chosen["of"])
    check_granularity(chosen["granularity"])
    check_known(gates, evaluation, metric, chosen["calibration"], chosen["compensation"])
    source = check_file(model)
    target = check_target(output or source.with_name(f"{source.stem}-pruned.onnx"), source)
    check_apart(model, target, plan_out, json_path, report_path, feeds, *curves)
    check_samples_stay((chosen["calibration"], evaluation), target, plan_out, json_path, report_path)
    if plan_out:
        check_of_file(chosen["criterion"])
    if report_path:
        check_page(report_path, source)
    for extra in (plan_out, json_path):
        if extra and extra != "-":
            check_target(extra, source)
    if curves and not report_path:
        raise OnnxPruneError("--curves are shown in a report; give --report FILE.html too")
    drawn = read_curves(curves, model)
    given, sizes = read_feeds(feeds), read_shapes(shapes)
    with progress(quiet) as say:
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
    write_json(content, json_path)
    if not quiet and json_path != "-":
        from onnxprune import report
        from onnxprune.benchmark import table
        from onnxprune.wording import batch_in_words, batch_of

        out = console()
        out.print(f"[bold]{result.plan.grouping.model.name}[/] → [bold]{target}[/]", soft_wrap=True)
        report.show_result(out, result, ratio, chosen["of"])
        if verbose:
            report.show_places(out, result.plan.grouping)
        report.show_proof(out, result.proof)
        if result.support:
            report.show_support(out, result.support)
        if result.fidelity:
            report.show_compensation(out, result)
        if accuracy:
            report.show_evaluation(out, accuracy)
        if measured:
            out.print(table(measured, batch_in_words(batch_of(result.plan.grouping.model))))
            report.hint_alignment(out, measured, result)
        report.show_cautions(out, told)
    if not result.on_budget:
        complain(
            f"the budget is out of reach: {result.reached:.1%} of {chosen['of']} went, {ratio:.1%} was asked; {target} is the closest found"
        )
    missed = [gate for gate in passed if not gate.passed]
    if missed:
        complain(f"--fail-under: {'; '.join(map(str, missed))}; {target} is written all the same")
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


@click.command(cls=Grouped)
@click.argument("models", type=FILE, metavar="A.onnx [B.onnx …]", nargs=-1, required=True)
@options(
    FEEDS,
    click.option("--batch", metavar="N", type=click.IntRange(1), help="Size of the symbolic first axis."),
    click.option("--warmup", metavar="N", type=click.IntRange(0), default=3, show_default=True, help="Runs before the clock starts."),
    click.option("--seconds", metavar="S", type=click.FloatRange(0), default=2.0, show_default=True, help="Time to spend on each model."),
    DEVICE,
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
    with progress(quiet) as say:
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
    write_json([m.to_json() for m in measured], json_path)
    if not quiet and json_path != "-":
        console().print(table(measured, batch_in_words(batches[0] if len(set(batches)) == 1 else None)))
    return 0

"""The curve of quality over MACs, parameters and latency: a model pruned at many ratios, side by side over processes.

The points are tasks of joblib, so that `joblib.parallel_config(backend="dask")` around `sweep` takes them to a cluster.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from onnx import ModelProto

from onnxprune import api
from onnxprune.allocations import LATENCY, check_allocation, check_ratio
from onnxprune.benchmark import benchmark
from onnxprune.calibration import read_calibration
from onnxprune.errors import OnnxPruneError, OnnxPruneWarning
from onnxprune.evaluation import Metric
from onnxprune.external import AT_ONCE
from onnxprune.importer import Model, load, read
from onnxprune.keeping import counted, digest_of, keep, key_of, read_kept
from onnxprune.quality import evaluator, quality
from onnxprune.running import Arrays
from onnxprune.selection import check_criterion
from onnxprune.shapes import seeded_feeds
from onnxprune.sizing import check_sized, sized
from onnxprune.stopwatch import check_device
from onnxprune.writing import check_target, write_model, write_text

KIND = "sweep"
RESULTS = "results.json"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COSTS = ("macs", "parameters", "latency")
Source = str | os.PathLike[str] | Arrays | Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """points: as in the JSON format of docs/exploring.md, by criterion, allocation and ratio; folder: where each point's model is.

    measure: what `quality` is (`quality.Quality`); original: its quality, MACs and parameters.
    """

    model: str
    folder: Path
    key: Mapping[str, Any]
    measure: str | None
    original: Mapping[str, Any]
    points: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(point for point in self.points if point["error"] is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": KIND,
            "model": self.model,
            "key": dict(self.key),
            "measure": self.measure,
            "original": dict(self.original),
            "points": list(self.points),
        }


def sweep(
    model: str | os.PathLike[str] | ModelProto,
    output: str | os.PathLike[str],
    ratios: Sequence[float] = RATIOS,
    *,
    criteria: Sequence[str] = (),
    allocations: Sequence[str] = (),
    calibration: Source | None = None,
    preprocess: str | None = None,
    samples: int | None = None,
    evaluation: Source | None = None,
    metric: str | Metric | None = None,
    jobs: int | None = None,
    seconds: float = 1.0,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    feeds: Arrays | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Sweep:
    """Prune a model at every ratio with every criterion and allocation, and say what each costs and how good it is.

    output: a folder, made where it is missing, for each point's model and plan and for results.json; points whose model and row are
    there are not made again.  criteria, allocations: `prune`'s own choice where they are empty; options: the other ones of `prune`.
    Quality is measured on the evaluation samples, else on the calibration samples, else on noise: `quality.Quality`.
    jobs: processes side by side (-1: a core each); None: 1, or what `joblib.parallel_config` says; 1 where latency is the budget, as
    points that are timed would slow each other.  seconds: for the latency of each model, measured here with onnxruntime's `provider`
    and `threads`, one after the other, taking turns with the original; 0: not measured.

    A point that fails does not stop the others: its `error` says why.  Raises OnnxPruneError for bad input, for a folder with points of
    another model, other samples or other options, and where all points fail.
    """
    if unknown := options.keys() - inspect.signature(api.prune).parameters.keys():
        raise TypeError(f"sweep: prune has no option '{min(unknown)}'")
    if jobs == 0:
        raise OnnxPruneError("jobs is 0; it is a number of processes, or -1 for one a core")
    if options.get("of") == LATENCY:
        if jobs not in (None, 1):
            raise OnnxPruneError(f"jobs is {jobs}, and points that are timed side by side slow each other; with --of latency it is 1")
        jobs = 1
    for ratio in ratios:
        check_ratio(ratio)
    folder = Path(output).absolute()
    memory = AT_ONCE if options.get("memory") is None else options["memory"]
    options.pop("memory", None)
    if seconds > 0 or options.get("of") == LATENCY:
        check_device(provider, threads)
    file = read(model, memory)
    file.external.need_memory(file.name, "a sweep")
    sizes = sized(file.proto, feeds, input_shapes, [calibration, evaluation], preprocess)
    if options.get("of") == LATENCY:
        check_sized(file.proto, file.name, feeds, sizes)
    loaded = load(file, feeds, sizes)
    names = [(ratio, criterion, rule) for criterion in criteria or (None,) for rule in allocations or (None,) for ratio in sorted(ratios)]
    for _, criterion, rule in names:
        if criterion is not None:
            check_criterion(criterion, calibration not in (None, "none"), calibration == "none")
        if rule is not None:
            check_allocation(rule, calibration not in (None, "none"))
    judged = evaluation if evaluation is not None else calibration if calibration not in (None, "none") else "noise"
    compare = evaluator(loaded, judged, preprocess, metric, seed)  # what is wrong with it is said before any work is done
    if evaluation is not None:
        compare.expect(loaded)
    given = "none" if calibration is None else calibration
    data = read_calibration(given, loaded, preprocess=preprocess if calibration is not None else None, limit=samples, seed=seed)
    key = key_of(
        model,
        calibration=None if calibration is None else digest_of(data, given),
        eval=digest_of(compare.samples, judged),
        metric=getattr(metric, "__name__", metric),
        input_shapes={k: list(v) for k, v in loaded.input_shapes.items()},
        preprocess=preprocess,
        samples=samples,
        seed=seed,
        provider=provider,
        threads=threads,
        **options,
    )
    kept = read_kept(folder / RESULTS, KIND, key, "give another folder with -o, or remove that one")
    rows = {row["name"]: row for row in kept.get("points", ()) if row["error"] is None and (folder / row["model"]).is_file()}
    found = Sweep(loaded.name, folder, key, kept.get("measure"), kept.get("original") or {}, ())
    source = _prepared(model, folder)
    task = Task(
        source=source,
        folder=str(folder),
        judged=_absolute(judged),
        metric=metric,
        calibrated={} if calibration is None else {"calibration": _absolute(calibration), "preprocess": preprocess, "samples": samples},
        preprocess=preprocess,
        options={
            **options,
            "seed": seed,
            "feeds": feeds,
            "input_shapes": sizes,
            "memory": memory,
            "provider": provider,
            "threads": threads,
        },
    )
    found = _made(found, task, {_name(*name): name for name in names}, rows, jobs, progress)
    for row in rows.values() if seconds > 0 else ():
        if row["error"] is None and row["latency"] is None:
            if progress:
                progress(f"measuring latency of {row['model']}")
            row |= _latency(source, folder / row["model"], loaded, feeds, provider, threads, seconds)
            keep(_marked(found, rows).to_json(), folder / RESULTS)
    found = _marked(found, rows)
    keep(found.to_json(), folder / RESULTS)
    return found


def _prepared(model: str | os.PathLike[str] | ModelProto, folder: Path) -> str:
    """The folder is there, and the model is in a file whose path holds for all processes."""
    if folder.exists() and not folder.is_dir():
        raise OnnxPruneError(f"{folder}: is a file; give a folder for the models")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OnnxPruneError(f"{folder}: the folder cannot be made ({error.strerror}); choose another") from error
    check_target(folder / RESULTS)
    if isinstance(model, ModelProto):
        write_model(model, folder / "original.onnx")
        model = folder / "original.onnx"
    return os.path.abspath(model)


def _made(
    found: Sweep,
    task: Task,
    wanted: Mapping[str, tuple[float, str | None, str | None]],
    rows: dict[str, Row],
    jobs: int | None,
    progress: Callable[[str], None] | None,
) -> Sweep:
    """Makes the points that are missing in `rows`, and puts them there."""
    missing = {name: point for name, point in wanted.items() if name not in rows}
    for name in missing:
        check_target(found.folder / f"{name}.onnx", task.source)
    tell = counted(len(wanted), len(wanted) - len(missing), "points", progress)
    try:
        run = Parallel(n_jobs=jobs, backend="sequential" if jobs == 1 else None, return_as="generator_unordered")
        for row, original in run(delayed(task)(name, *point) for name, point in missing.items()):
            rows[row["name"]] = row
            found = _marked(replace(found, measure=original.pop("measure", found.measure), original=original or found.original), rows)
            if len(found.failed) < len(found.points):
                keep(found.to_json(), found.folder / RESULTS)
            tell()
    except KeyboardInterrupt:
        for half in found.folder.glob(".*.tmp"):  # of processes that were ended as they wrote
            half.unlink(missing_ok=True)
        raise
    except TerminatedWorkerError as error:
        done = sum(name in rows for name in wanted)
        raise OnnxPruneError(
            f"{found.model}: a process was killed, perhaps for memory; {done} of {len(wanted)} points are kept in {found.folder}: "
            "start again with fewer --jobs"
        ) from error
    if rows and all(row["error"] is not None for row in rows.values()):
        if not any(found.folder.iterdir()):
            found.folder.rmdir()
        first = next(iter(rows.values()))
        raise OnnxPruneError(f"no point could be made: {first['error']}", first["exit_code"])
    return found


def _name(ratio: float, criterion: str | None, rule: str | None) -> str:
    """What a point's files are called."""
    return re.sub(r"[^\w.+-]", "_", "-".join([f"{ratio:g}", *(part for part in (criterion, rule) if part)]))


def _absolute(source: Source) -> Source:
    """A path holds in other processes too, wherever they run."""
    if isinstance(source, str | os.PathLike) and os.path.exists(source):
        return os.path.abspath(source)
    return source


@dataclass(frozen=True, eq=False)
class Task:
    """Makes one point, in whatever process; calibrated: what `prune` is told of samples; options: the others."""

    source: str
    folder: str
    judged: Source
    metric: str | Metric | None
    calibrated: Mapping[str, Any]
    preprocess: str | None
    options: Mapping[str, Any]

    def __call__(self, name: str, ratio: float, criterion: str | None, rule: str | None) -> tuple[Row, dict[str, Any]]:
        """The point's row, and of the original its costs, its quality and what that measures; ({}, where the point fails)."""
        if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's business, which ends its processes
        row: Row = {"name": name, "ratio": ratio, "criterion": criterion, "allocation": rule, "error": None, "exit_code": 0}
        try:
            with parallel_config(backend="threading"), warnings.catch_warnings():  # what is parallel inside a point stays in its process
                warnings.simplefilter("ignore", OnnxPruneWarning)  # of the samples, which `sweep` has said
                return self._made(row)
        except OnnxPruneError as error:
            return row | {"error": str(error), "exit_code": error.exit_code}, {}
        except Exception as error:  # whatever happens to one point, the others go on
            return row | {"error": f"unexpected {type(error).__name__} ({error})", "exit_code": 4}, {}

    def _made(self, row: Row) -> tuple[Row, dict[str, Any]]:
        result = api.prune(
            self.source, row["ratio"], criterion=row["criterion"], allocation=row["allocation"], **self.calibrated, **self.options
        )
        original = result.plan.grouping.model
        compare = evaluator(original, self.judged, self.preprocess, self.metric, self.options["seed"])
        evaluation = compare(original.proto, result.model)
        judged = quality(evaluation)
        model, plan = f"{row['name']}.onnx", f"{row['name']}.plan.json"
        write_text(json.dumps(result.plan.to_json()), Path(self.folder) / plan)
        write_model(result.model, Path(self.folder) / model)
        row |= {
            "criterion": result.plan.options["criterion"],
            "allocation": result.plan.options["allocation"],
            "model": model,
            "plan": plan,
            "reached": result.reached,
            "on_budget": result.on_budget,
            "quality": judged.value,
            "evaluation": evaluation.to_json(),
            "latency": None,
            "latency_before": None,
            "pareto": [],
        }
        for cost, (before, after) in (("macs", result.macs), ("parameters", result.parameters)):
            row |= {cost: after, f"{cost}_before": before}
        costs = {"macs": result.macs[0], "parameters": result.parameters[0]}
        return row, {**costs, "quality": judged.before, "measure": judged.measure}


def _latency(source: str, pruned: Path, model: Model, feeds: Arrays | None, provider: str, threads: int, seconds: float) -> Row:
    """Median seconds of one run of the pruned model and of the original, taking turns; a note where that does not work."""
    given = seeded_feeds(model.proto, model.input_shapes)
    if feeds is not None:
        given = {name: np.asarray(feeds[name]).astype(array.dtype) for name, array in given.items()}
    try:
        before, after = benchmark([source, pruned], given, provider=provider, threads=threads, seconds=seconds, memory=False)
    except OnnxPruneError as error:
        return {"note": f"no latency ({error})"}
    return {"latency": after.latency_median_s, "latency_before": before.latency_median_s}


def _marked(found: Sweep, rows: Mapping[str, Row]) -> Sweep:
    """With these points in order, each with the costs for which no other point, nor the original, is as good and cheaper."""
    order = sorted(rows.values(), key=lambda row: (str(row["criterion"]), str(row["allocation"]), row["ratio"]))
    good = [row for row in order if row["error"] is None]
    for row in good:
        row["pareto"] = [cost for cost in COSTS if row[cost] is not None and not _beaten(row, cost, good, found.original)]
    return replace(found, points=tuple(order))


def _beaten(row: Row, cost: str, others: Iterable[Row], original: Mapping[str, Any]) -> bool:
    own = row[cost] / (row[f"{cost}_before"] or 1), -row["quality"]
    rivals = [(o[cost] / (o[f"{cost}_before"] or 1), -o["quality"]) for o in others if o is not row and o[cost] is not None]
    rivals.append((1.0, -original["quality"]))
    return any(rival != own and rival[0] <= own[0] and rival[1] <= own[1] for rival in rivals)

"""Accuracy without training: onnxprune's criteria, allocations and compensations beside Torch-Pruning and onnxsim at the same MACs.

    pip install '.[peers,bench]' && python benchmarks/minilm.py build/accuracy --texts FOLDER
    python benchmarks/accuracy.py --part peers ours ablation minilm others

One row is one result, made in a process of its own (or, `--together`, with all of its model and calibration) and measured by onnxruntime on
data kept for reporting.  The rows are kept in docs/accuracy.json as they come: what is there is not run again.  docs/accuracy.md,
docs/accuracy-pairs.md and docs/accuracy.svg are drawn from all rows.  benchmarks/README.md says what each part and column is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accuracy_data
import numpy as np
from accuracy_data import SUBJECTS
from accuracy_pairs import page
from accuracy_report import draw, markdown
from accuracy_tables import COMPENSATIONS, Row

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PARTS = ("peers", "ours", "ablation", "minilm", "others")
CIFAR = [name for name, subject in SUBJECTS.items() if subject.kind == "cifar"]
OTHERS = [name for name, subject in SUBJECTS.items() if subject.kind == "other"]


@dataclass(frozen=True)
class Job:
    """One process: a method at a ratio.  options: onnxprune's, all of them names; none for a peer, whose method's name says all."""

    part: str
    model: str
    ratio: float
    method: str
    seed: int = 0
    options: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Parts share results: the same method on the same model is one row."""
        return json.dumps([self.model, self.ratio, self.method, self.seed])


def ours(part: str, model: str, ratio: float, seed: int, options: dict[str, str]) -> Job:
    return Job(part, model, ratio, "onnxprune " + ", ".join(options.values()), seed, options)


def jobs(part: str, args: argparse.Namespace) -> Iterator[Job]:
    """What a part runs, from the names on the command line."""
    default = dict(zip(("criterion", "allocation", "compensation", "calibration"), args.default, strict=True))
    names = {
        "criterion": args.criteria,
        "allocation": args.allocations,
        "compensation": args.compensations,
        "calibration": args.calibrations,
    }
    settings = [dict(zip(names, values, strict=True)) for values in itertools.product(*names.values())]
    models = args.models or {"minilm": ["minilm"], "others": OTHERS, "peers": [*CIFAR, "minilm"]}.get(part, CIFAR)
    for model, ratio in itertools.product(models, args.ratios):
        if part == "peers":
            from accuracy_peers import DRAWN, METHODS

            for method in METHODS.get(SUBJECTS[model].kind, ()):
                if not args.methods or any(word in method for word in args.methods):
                    yield from (Job(part, model, ratio, method, seed) for seed in (args.seeds if method in DRAWN else args.seeds[:1]))
        elif part == "ablation":
            for seed, compensation, calibration in itertools.product(args.seeds, COMPENSATIONS, args.calibrations):
                yield ours(part, model, ratio, seed, default | {"compensation": compensation, "calibration": calibration})
        elif part == "others":
            for seed, compensation in itertools.product(args.seeds[:1], dict.fromkeys(("none", default["compensation"]))):
                yield ours(part, model, ratio, seed, default | {"compensation": compensation})
        else:
            yield from (ours(part, model, ratio, seed, options) for seed in args.seeds for options in settings)


# a process: one job, or those that share what they read and measure


def child(jobs: Sequence[Job], folder: Path, evaluated: int | None = None) -> Iterator[list[Row]]:
    """The rows of each job, which are of one model, ratio, seed and calibration where there are several."""
    if len(jobs) == 1:
        yield alone(jobs[0], folder, evaluated)
    else:
        from accuracy_grid import together

        path = accuracy_data.model_path(jobs[0].model, folder)
        made = together(jobs, *calibrated(jobs[0], folder), path, accuracy_data.feeds(jobs[0].model))
        known: dict[Any, Row] = {}
        for job, (result, model) in zip(jobs, made, strict=True):
            if result not in known:
                known[result] = measured(job, model(), folder, evaluated)
            yield [{"method": job.method} | known[result]]


def alone(job: Job, folder: Path, evaluated: int | None) -> list[Row]:
    """The rows of a job: a peer's method gives one for its result and one for what it does after pruning."""
    path = accuracy_data.model_path(job.model, folder)
    calibration = accuracy_data.arrays_path(job.model, folder, "calibration")
    if job.part == "peers":
        import accuracy_peers

        with np.load(calibration) as content:
            arrays = {name: content[name] for name in content.files}
        case = accuracy_peers.Case(path, job.ratio, arrays, job.seed)
        made = accuracy_peers.METHODS[SUBJECTS[job.model].kind][job.method](case)
        largest, rows = resident("VmHWM"), []
        for after, result in made.items():
            row = {"method": f"{job.method} + {after}" if after else job.method, "seconds": result.seconds, "mib": largest}
            rows.append(row | ({"failed": result.failed} if result.model is None else measured(job, result.model, folder, evaluated)))
        return rows
    import onnxprune

    source, samples = calibrated(job, folder)
    names: dict[str, Any] = {**job.options, "calibration": source, "samples": samples, "feeds": accuracy_data.feeds(job.model)}
    steps: list[Step] = []
    start = time.perf_counter()
    note(steps, "reading the model")
    result = onnxprune.prune(str(path), job.ratio, seed=job.seed, progress=lambda text: note(steps, text), **names)
    note(steps, "")
    largest = max(size for _, _, size in steps)
    row = {"method": job.method, "seconds": time.perf_counter() - start, "mib": largest, "steps": times(steps)}
    return [row | measured(job, result.model, folder, evaluated)]


def calibrated(job: Job, folder: Path) -> tuple[str, int | None]:
    """What onnxprune takes as calibration, the file of arrays or a name of its own, and how many samples of it, spread over all."""
    kind, _, count = job.options["calibration"].partition(":")
    path = accuracy_data.arrays_path(job.model, folder, "calibration")
    return str(path) if kind == "data" else kind, int(count) if count else None


Step = tuple[str, float, float]


def note(steps: list[Step], text: str) -> None:
    """A step begins: its name without counts, now, and the largest resident size since the last one began."""
    name = re.split(r",? (?:pass|batch) \d", text.partition(":")[0])[0]
    name = " ".join(word for word in name.split() if word.isalpha())
    steps.append((name, time.perf_counter(), resident("VmHWM")))
    Path("/proc/self/clear_refs").write_text("5")


def times(steps: list[Step]) -> list[tuple[str, float, float]]:
    """(step, seconds, peak MiB) of each step; what reports its progress often is one step."""
    found: dict[str, tuple[float, float]] = {}
    for (name, start, _), (_, end, size) in itertools.pairwise(steps):
        seconds, largest = found.get(name, (0.0, 0.0))
        found[name] = (seconds + end - start, max(largest, size))
    return [(name, round(seconds, 3), round(size)) for name, (seconds, size) in found.items()]


def resident(field: str) -> float:
    """A resident size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


# measures


def run(model: Any, arrays: dict[str, np.ndarray], batch: int) -> list[np.ndarray]:
    """All outputs; batch: samples a run, 0 for the arrays as they are."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        model if isinstance(model, str) else model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [v.name for v in session.get_inputs()]
    if not batch:
        return [np.asarray(y) for y in session.run(None, {n: arrays[n] for n in names})]
    parts = [session.run(None, {n: arrays[n][i : i + batch] for n in names}) for i in range(0, len(arrays[names[0]]), batch)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def measured(job: Job, model: Any, folder: Path, evaluated: int | None) -> Row:
    """MACs left as onnxprune counts them on the file, and how far the outputs are from the original's.

    accuracy, before: top-1 on labels; agreement: the same top-1 as the original; cosine: of each sample's output, the mean over the
    samples, of the worst output; sqnr: signal over difference in dB, of the worst output.  evaluated: on so many samples, spread over
    all, if not on all.
    """
    import onnx

    from onnxprune.cost import count_macs
    from onnxprune.importer import load

    path, subject = accuracy_data.model_path(job.model, folder), SUBJECTS[job.model]
    with np.load(accuracy_data.arrays_path(job.model, folder, "eval")) as content:
        arrays = {name: content[name] for name in content.files}
    kept = folder / f"{job.model}.outputs.npz"
    if not kept.is_file():
        np.savez(kept, *run(str(path), arrays, subject.batch))
    with np.load(kept) as content:
        expected = [content[name] for name in content.files]
    if evaluated and subject.batch:  # images stand class by class
        places = np.arange(evaluated) * len(expected[0]) // evaluated
        arrays, expected = {name: array[places] for name, array in arrays.items()}, [array[places] for array in expected]
    got = run(model, arrays, subject.batch)
    after, before = (count_macs(load(proto, accuracy_data.feeds(job.model))) for proto in (model, onnx.load(path)))
    row: Row = {"macs": 1 - after / before} | ({"evaluated": evaluated} if evaluated else {})
    flat = [
        (y.reshape(len(y), -1).astype(np.float64), z.reshape(len(z), -1).astype(np.float64)) for y, z in zip(expected, got, strict=True)
    ]
    row["cosine"] = min(float(((y * z).sum(1) / (np.linalg.norm(y, axis=1) * np.linalg.norm(z, axis=1) + 1e-30)).mean()) for y, z in flat)
    row["sqnr"] = min(float(10 * np.log10((y * y).sum() / (((y - z) ** 2).sum() + 1e-30))) for y, z in flat)
    if subject.measure == "cosine":
        return row
    one, other = (outputs[0].argmax(-1) for outputs in (expected, got))
    row["agreement"] = float((one == other).mean())
    if "labels" in arrays:
        row |= {"before": float((one == arrays["labels"]).mean()), "accuracy": float((other == arrays["labels"]).mean())}
    return row


def in_a_process(jobs: Sequence[Job], args: argparse.Namespace) -> Iterator[tuple[Job, list[Row]]]:
    """`child` in a process of its own, each job as it comes; `failed` says why where the others did not end well."""
    line = [sys.executable, __file__, "--child", json.dumps([asdict(job) for job in jobs]), "--data", str(args.data)]
    line += ["--evaluated", str(args.evaluated)] if args.evaluated else []
    left = list(jobs)
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        clock = threading.Timer(args.limit, process.kill)
        clock.start()
        for text in process.stdout or ():
            if text.startswith("[") and left:
                job = left.pop(0)
                yield job, [common(job) | row for row in json.loads(text)]
        stopped = not clock.is_alive()
        clock.cancel()
        code = process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1][:200]
    for job in left:
        yield job, [common(job) | {"method": job.method, "failed": f"over {args.limit:.0f} s" if stopped else last, "crashed": True}]


def common(job: Job) -> Row:
    return {"part": job.part, "model": job.model, "ratio": job.ratio, "seed": job.seed, "options": job.options, "job": job.key}


def batches(jobs: Sequence[Job], together: bool) -> list[list[Job]]:
    """The jobs of each process: one, or with `together` those of onnxprune that share model, ratio, seed and calibration."""

    def shared(job: Job) -> str:
        what = [job.model, job.ratio, job.seed, job.options["calibration"]] if job.options else []
        return json.dumps(what) if together and what else job.key

    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(shared(job), []).append(job)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", default=[], choices=PARTS, help="what to run; without any, the tables are drawn again")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), help="instead of the part's own")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5], help="of the MACs of the whole model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="of the peers those whose name has one of these words")
    parser.add_argument("--criteria", nargs="+", default=["l1", "l2"])
    parser.add_argument("--allocations", nargs="+", default=["uniform", "global"])
    parser.add_argument("--compensations", nargs="+", default=list(COMPENSATIONS))
    parser.add_argument("--calibrations", nargs="+", default=["data"], help="data, data:256 (so many of it), none or noise")
    parser.add_argument(
        "--default",
        nargs=4,
        default=["obs", "distortion", "distill", "data"],
        metavar=("CRITERION", "ALLOCATION", "COMPENSATION", "CALIBRATION"),
        help="what the ablation and the other models start from",
    )
    parser.add_argument(
        "--free",
        nargs=4,
        default=["obs", "distortion", "distill", "noise"],
        metavar=("CRITERION", "ALLOCATION", "COMPENSATION", "CALIBRATION"),
        help="what is shown as onnxprune without samples, of the rows that are there",
    )
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "accuracy", help="where the arrays are, and minilm.onnx")
    parser.add_argument("--evaluated", type=int, metavar="N", help="measure on N of the samples that are kept for it")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "accuracy.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "accuracy.md")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "accuracy.svg")
    parser.add_argument("--again", action="store_true", help="run what is already there once more")
    parser.add_argument(
        "--together",
        action="store_true",
        help="all of a model and calibration in one process, which reads and measures once; --limit is for all of it",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        for made in child([Job(**job) for job in json.loads(args.child)], args.data, args.evaluated):
            print(json.dumps(made), flush=True)
        return
    rows: list[Row] = json.loads(args.json.read_text()) if args.json.is_file() else []
    done = {row["job"] for row in rows if "crashed" not in row and not args.again}
    todo = {job.key: job for part in args.part for job in jobs(part, args) if job.key not in done}
    results = (result for batch in batches(list(todo.values()), args.together) for result in in_a_process(batch, args))
    for number, (job, made) in enumerate(results, 1):
        rows = [row for row in rows if row["job"] != job.key] + made
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        for row in made:
            metric = SUBJECTS[job.model].measure
            took = f", {row['seconds']:.1f} s" if "seconds" in row else ""
            said = row.get("failed") or f"{metric} {row[metric]:.4f} at {row['macs']:.3f} of the MACs gone{took}"
            print(f"{number}/{len(todo)} {job.model} {job.ratio} {row['method']} (seed {job.seed}): {said}", file=sys.stderr, flush=True)
    if rows:
        args.table.write_text(markdown(rows, args.default, args.free))
        args.table.with_stem(f"{args.table.stem}-pairs").write_text(page(rows))
        try:
            draw(rows, args.default, args.free, args.plot)
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()

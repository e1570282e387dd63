"""The options that the commands share, and how what a user writes for them is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from onnxprune.completion import (
    FILE,
    allocations,
    budgets,
    compensations,
    criteria,
    granularities,
    no_samples,
    one_of,
    pixels,
    providers,
    targets,
)
from onnxprune.errors import OnnxPruneError
from onnxprune.gates import read_gates

if TYPE_CHECKING:
    import numpy as np

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    """Bytes, written as 500MB or 2GB (powers of 1000), 1GiB (of 1024), or as a plain number."""

    name = "size"
    units: ClassVar = {"": 1, "b": 1} | {f"{k}{b}": s**i for b, s in (("b", 1000), ("ib", 1024)) for i, k in enumerate("kmgt", 1)}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
        if not found or found[2] not in self.units or not float(found[1]):
            self.fail(f"'{value}' is no size; write it as 500MB or 2GB", param, ctx)
        return int(float(found[1]) * self.units[found[2]])


class Share(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A share, written as 0.4 or as 40%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return read_share(value)
        except ValueError:
            self.fail(f"'{value}' is no share; write it as 0.4 or 40%", param, ctx)


def read_share(text: Any) -> float:
    """0.4 of "0.4" and of "40%"; raises ValueError for what is neither, and for 100% and more, which would read as units elsewhere."""
    number, percent, rest = str(text).strip().partition("%")
    if rest or (percent and float(number) >= 100):
        raise ValueError(text)
    return float(number) / 100 if percent else float(number)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several option decorators as one, in reading order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def but(decorator: Callable[[F], F], *names: str) -> Callable[[F], F]:
    """Shared options without those parameters that a command has in another form."""

    def decorate(function: F) -> F:
        parameters = getattr(decorator(function), "__click_params__")  # noqa: B009  (click's, which mypy does not know)
        parameters[:] = [one for one in parameters if one.name not in names]
        return function

    return decorate


MODEL = click.argument("model", type=FILE, metavar="MODEL.onnx")
FEEDS = options(
    click.option("--feeds", type=FILE, metavar="FILE.npz", help="Inputs for the proof and the counters: an array for each input."),
    click.option("--input-shape", "shapes", metavar="NAME=1,3,224,224", multiple=True, help="An input's shape instead (seeded values)."),
)
SEED = click.option("--seed", metavar="N", type=click.IntRange(0), default=0, show_default=True, help="Everything random follows from it.")
ALLOW_IO = click.option("--allow-io", multiple=True, metavar="GLOB", help="Graph inputs or outputs that may change size.")
JSON = click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write the result as JSON; - is standard output.")
REPORT = click.option(
    "--report", "report_path", type=FILE, metavar="FILE.html", help="Write what came out as a page to look at, with charts."
)
QUIET = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; prune then skips its benchmark.")
VERBOSE = click.option("--verbose", "-v", is_flag=True, help="List every place of every group, and every fixed axis.")
VERIFY = click.option("--verify/--no-verify", default=True, help="Prove the result on the model (on by default).")
TARGET = click.option(
    "--target",
    shell_complete=one_of(targets),
    metavar="cpu|tensorrt|cuda",
    help="Where it will run: says --align group by group; tensorrt: also what it does not take of the model.",
)
MEMORY = click.option(
    "--memory",
    type=Size(),
    metavar="SIZE",
    help="Most weights to hold at once; of more in other files one tensor at a time is read (512MiB; with --calibration 2GiB).",
)
SHARDS = click.option("--shard-size", type=Size(), metavar="SIZE", help="Write the weights to files of at most so much: 1GB.")
SCOPE = options(
    click.option("--scope", multiple=True, metavar="GLOB", help="Prune only layers with such a node or tensor name."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave such layers as they are."),
)
MIN_KEEP = click.option(
    "--min-keep", type=Share(), default=0.1, show_default=True, help="Least that a group keeps: a share below 1, or a number of units."
)
CHOICE = options(
    click.option("--ratio", "-r", type=Share(), required=True, help="Share of the budget to remove: 0.4 or 40%."),
    click.option(
        "--of",
        shell_complete=one_of(budgets),
        default="macs",
        show_default=True,
        metavar="macs|params|channels|latency",
        help="Which budget.",
    ),
    click.option(
        "--granularity",
        shell_complete=one_of(granularities),
        default="channel",
        show_default=True,
        metavar="channel|head|block|all",
        help="What goes: channels and heads, whole heads alone, residual branches, or all of them.",
    ),
    click.option(
        "--criterion",
        shell_complete=one_of(criteria),
        metavar="NAME",
        help="Which units go first: l1, l2, obs, fluctuation, … (docs/criteria.md); auto.",
    ),
    click.option(
        "--allocation",
        shell_complete=one_of(allocations),
        metavar="NAME",
        help="How the groups share it: uniform, global, standardized, pq, distortion; auto.",
    ),
    SCOPE,
    click.option(
        "--layer-ratio",
        "layer_ratios",
        multiple=True,
        metavar="GLOB=RATIO",
        help="What such layers make loses this share of units.",
    ),
    MIN_KEEP,
    click.option(
        "--align",
        multiple=True,
        metavar="[GLOB=]N",
        callback=lambda context, option, texts: read_align(texts),
        help="Widths of layers stay multiples of N; of layers with such a node or tensor name.",
    ),
    TARGET,
    ALLOW_IO,
)


DEVICE = options(
    click.option(
        "--provider",
        shell_complete=one_of(providers),
        metavar="NAME",
        default="CPUExecutionProvider",
        show_default=True,
        help="onnxruntime provider on which models are timed.",
    ),
    click.option(
        "--threads", metavar="N", type=click.IntRange(0), default=1, show_default=True, help="Its threads; 0: onnxruntime's own default."
    ),
)
SAMPLES = options(
    click.option(
        "--calibration",
        shell_complete=one_of(no_samples, files=True),
        metavar="SOURCE",
        help="Samples without labels: an .npz, a folder of arrays or images, module:function, noise, or none.",
    ),
    click.option("--samples", metavar="N", type=click.IntRange(1), help="Take so many of them, spread over the source."),
)
CALIBRATION = options(
    SAMPLES,
    click.option(
        "--compensation",
        shell_complete=one_of(compensations),
        metavar="NAME",
        help="How what stays makes up for what went: distill, refine, reconstruct, moments, update, mean, merge (data-free), none.",
    ),
    click.option("--steps", metavar="N", default=1, show_default=True, type=click.IntRange(1), help="Rounds of choosing and compensating."),
)
GATES = click.option(
    "--fail-under",
    "gates",
    multiple=True,
    metavar="FIGURE=LEAST[,…]",
    callback=lambda context, option, texts: read_gates(texts),
    help="Exit code 5 where it comes out lower: accuracy, speedup, agreement, cosine, macs, params, metric.",
)
PREPROCESS = click.option(
    "--preprocess",
    shell_complete=one_of(pixels),
    metavar="SPEC",
    help="What pixels of images and integer arrays become: imagenet, tf, unit, raw, or such as scale=1/255,mean=0.5,std=0.5.",
)
EVALUATION = options(
    click.option(
        "--eval",
        "evaluation",
        shell_complete=one_of(no_samples, files=True),
        metavar="SOURCE",
        help="Samples to compare both models on, as for --calibration; with `labels` in them accuracy before and after.",
    ),
    click.option("--metric", metavar="MODULE:FUNCTION", help="Your own metric on them: function(outputs, data) -> float."),
)


def read_align(texts: tuple[str, ...]) -> int | dict[str, int]:
    """A number of units for all layers, or {glob: number}, `*` being the rest."""
    found: dict[str, int] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            found[pattern or "*"] = int(number)
        except ValueError:
            raise OnnxPruneError(f"--align '{text}': write it as a number of units, such as 8, or as 'GLOB=8'") from None
    return found.get("*", 1) if found.keys() <= {"*"} else found


def read_feeds(path: str | None) -> dict[str, np.ndarray] | None:
    if path is None:
        return None
    from onnxprune.evaluation import read_arrays

    return read_arrays(path)


def read_shapes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        try:
            found[name] = tuple(int(s) for s in sizes.split(",") if s.strip())
        except ValueError:
            name = ""
        if not name or any(s < 1 for s in found[name]):
            raise OnnxPruneError(f"--input-shape '{text}': write it as NAME=1,3,224,224")
    return found


def read_ratios(texts: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        pattern, _, ratio = text.rpartition("=")
        try:
            found[pattern] = read_share(ratio)
        except ValueError:
            pattern = ""
        if not pattern:
            raise OnnxPruneError(f"--layer-ratio '{text}': write it as 'GLOB=0.3'")
    return found


def read_list(text: str, option: str) -> tuple[float, ...]:
    """Ratios as first:last:step or with commas between them, rising; raises OnnxPruneError for what is neither, or not in 0 … 1."""
    try:
        if ":" in text:
            first, last, step = (read_share(part) for part in text.split(":"))
            found = [first + i * step for i in range(int((last - first) / step + 1e-6) + 1)] if step > 0 else []
        else:
            found = [read_share(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise OnnxPruneError(f"{option} '{text}': write it as first:last:step, such as 0.1:0.8:0.1, or as 0.1,0.3,0.5")
    wrong = [ratio for ratio in found if not 0 < ratio < 1]
    if wrong:
        raise OnnxPruneError(f"{option} '{text}': {wrong[0]:g} is no share to remove; it must lie between 0 and 1")
    return tuple(sorted({round(ratio, 6) for ratio in found}))

"""The command line: `onnxprune MODEL.onnx --ratio 0.4` and its commands."""

from __future__ import annotations

import click

from onnxprune import __version__, exploring, pruning, stepwise
from onnxprune.invocation import Commands


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


for one in (pruning.prune, *stepwise.COMMANDS, pruning.bench, *exploring.COMMANDS):
    main.add_command(one)

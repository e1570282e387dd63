"""What a user should know of a result before it is used, each in one plain sentence that ends with what to do."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.compensation import FEWEST
from onnxprune.evaluation import Evaluation
from onnxprune.fidelity import OutputFidelity
from onnxprune.naming import group_names
from onnxprune.result import Result
from onnxprune.seats import as_cut, unknown_readers

NEARLY_ALL = 0.85  # share of its units that a group has lost then
UNMOVED = 1e-6  # standard deviations
WORSE = 1.02  # times what is lost by the removal alone: more than rounding
ENOUGH = 64  # samples from which on what is fitted to them is worth something elsewhere, as a rule

AS_CUT = {  # why a compensation does nothing for a layer
    "mean": "they have no bias to take what is missing; --compensation update or distill changes weights, too",
    "merge": "what they read is not known from the weights alone; give samples with --calibration",
}


def cautions(result: Result, evaluation: Evaluation | None = None) -> list[str]:
    """Sentences on what the samples cannot tell, on what was chosen blindly, and on where the reduction came from; often none."""
    options = result.plan.options
    found = [*_blind(result), *_few(result), *_lopsided(result), *_unmoved(result)]
    if options.get("compensation", "none") != "none":
        found += [*_left_out(result), *_as_cut(result)]
    if result.fidelity:
        noise = options.get("calibration") == "noise"
        where = "the made-up samples ('noise')" if noise else "the calibration samples"
        found += cannot_tell(result.fidelity[0].outputs, where, "give --calibration real samples, such as --calibration data.npz")
        found += _harmful(result)
    if evaluation is not None:
        found += cannot_tell(evaluation.outputs, "the samples of --eval", "give --eval others, as the model sees them in use")
    return found


def cannot_tell(outputs: Sequence[OutputFidelity], where: str, remedy: str) -> list[str]:
    """Why samples say nothing of a pruned model: nothing changes on them, or the original does not react to them; [] where they do."""
    if not outputs:
        return []
    if all(output.alike for output in outputs):
        return [f"{where} cannot tell good models from bad: the original gives the same outputs for all of them; {remedy}"]
    if all(output.same for output in outputs):
        return [
            f"{where} cannot tell the pruned model from the original: every output is the same with the removed units and without, so "
            f"either these units never do anything or these samples do not reach them; {remedy}"
        ]
    return []


def _unmoved(result: Result) -> list[str]:
    """That the proof's inputs do not show what went, where that is so."""
    if result.proof is None or result.proof.moved is None or result.proof.moved >= UNMOVED:
        return []
    made = "made-up inputs" if result.proof.seeded else "inputs"
    return [
        f"on the {made} of the proof every output is the same with the removed units and without: the surgery is right, but nothing was "
        "seen of how good the pruned model is; give real inputs with --feeds inputs.npz, and samples with --eval data.npz"
    ]


def _blind(result: Result) -> list[str]:
    options = result.plan.options
    if "ratio" not in options or options.get("compensation") != "none" or options.get("calibration") is not None:
        return []
    return [
        "chosen by the weights alone, and nothing makes up for what went: expect to lose accuracy; give --calibration (a few hundred "
        "inputs, no labels, or 'noise')"
    ]


def _few(result: Result) -> list[str]:
    """That a handful of samples was fitted to, and compared on."""
    options = result.plan.options
    count = options.get("samples")
    if not result.fidelity or not isinstance(count, int) or count >= ENOUGH or options.get("calibration") == "noise":
        return []
    samples = "one calibration sample" if count == 1 else f"{count} calibration samples"
    alone = count < FEWEST or options.get("compensation") != "distill"  # which goes on, from FEWEST on
    if alone and result.refits and not any(refit.changed for refit in result.refits):
        return [f"only {samples}: too few to see by whether a fit holds elsewhere, so no layer was fitted; give a few hundred"]
    return [
        f"only {samples}: what is left was fitted to them and compared on them, so other inputs lose more than is shown; give a few "
        "hundred with --calibration, and others with --eval to see"
    ]


def _harmful(result: Result) -> list[str]:
    """That what was to make up for the loss added to it, on the very samples that it was made by."""
    before, after = result.fidelity or (None, None)
    name = result.plan.options.get("compensation")
    if before is None or after is None or after.loss <= WORSE * before.loss or all(output.same for output in after.outputs):
        return []
    instead = "give more samples, or --compensation none" if name == "distill" else "use --compensation distill"
    return [f"--compensation {name} left the outputs further from the original's than removing the units alone; {instead}"]


def _left_out(result: Result) -> list[str]:
    """That layers which read what went are of a form that compensation does not know, so that they are as they were cut."""
    layers = unknown_readers(result.plan)
    if result.plan.options.get("compensation") == "distill":  # which reaches weights that nodes read as they are
        layers = [node for node in layers if not result.plan.grouping.model.tensors.keys() & set(node.input[:2])]
    if not layers:
        return []
    node = layers[0]
    what = f"{len(layers)} layers that read what went are" if len(layers) > 1 else "a layer that reads what went is"
    more = ", …" if len(layers) > 1 else ""
    return [
        f"{what} only cut, not fitted ('{node.name or node.output[0]}'{more}): the weight is shared or computed by other nodes, "
        "or the operator is of a form that is not known here; fold constants first, as onnxsim does, and prune that file"
    ]


def _as_cut(result: Result) -> list[str]:
    """That a compensation does nothing for some layers."""
    name = str(result.plan.options.get("compensation"))
    layers = as_cut(result.plan, result.model) if name in AS_CUT else []
    if not layers:
        return []
    what = f"{len(layers)} layers that read what went" if len(layers) > 1 else "a layer that reads what went"
    more = ", …" if len(layers) > 1 else ""
    return [f"--compensation {name} left {what} as cut ('{layers[0].node.name or layers[0].node.output[0]}'{more}): {AS_CUT[name]}"]


def _lopsided(result: Result) -> list[str]:
    """Where all of the reduction comes from one group of several, or groups lost nearly all of their units."""
    names = group_names(result.plan.grouping)
    gone = {g.id: len(result.plan.remove.get(g.id, ())) for g in result.plan.groups}
    losing = [g for g in result.plan.groups if gone[g.id]]
    if len(losing) == 1 < len(gone):
        [group] = losing
        what = f"{gone[group.id]} of its {group.units} units" if group.branch is None else "it is left out"
        return [
            f"all of the reduction comes from one group of {len(gone)}: group {group.id} ({names[group.id]}), {what}; to spread it, "
            "use another --allocation (uniform takes the same share of all), a higher --min-keep, or --exclude that group"
        ]
    emptied = sorted((g for g in losing if g.branch is None and gone[g.id] >= NEARLY_ALL * g.units), key=lambda g: 1 - gone[g.id] / g.units)
    if not emptied:
        return []
    worst = emptied[0]
    many = f", and {len(emptied) - 1} more lost {NEARLY_ALL:.0%} or more" if len(emptied) > 1 else ""
    return [
        f"group {worst.id} ({names[worst.id]}) keeps only {worst.units - gone[worst.id]} of {worst.units} units{many}; to leave more in "
        "each group, use a higher --min-keep (such as 0.3) or another --allocation"
    ]

"""What comes after the choice: surgery and its proof, compensation, quantizing again, timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnxprune.certificate import Bench, Proof
from onnxprune.compensation import compensation as compensations
from onnxprune.cost import counter
from onnxprune.errors import ProofError
from onnxprune.fidelity import fidelity
from onnxprune.importer import Model
from onnxprune.latency import met
from onnxprune.moves import Moves
from onnxprune.plans import Plan
from onnxprune.quantized import Stored, requantized
from onnxprune.reconstruction import Refit
from onnxprune.result import Result
from onnxprune.rewriter import rewrite
from onnxprune.stopwatch import Timer
from onnxprune.study import Study
from onnxprune.tensorrt import check as supported
from onnxprune.tensorrt import check_introduced
from onnxprune.verification import check_model, prove_surgery

Progress = Callable[[str], None]
FEW = 256  # samples on which the result is compared with the original


def finish(made: Plan, proof: Proof | None, bench: Bench | None, on_budget: bool, progress: Progress | None) -> Result:
    """Rewrite, prove, count."""
    if progress:
        progress("rewriting")
    if proof is not None and bench is not None:
        pruned, grouping, proof = prove_surgery(bench, made.grouping, made.remove, proof, progress)
        made = replace(made, grouping=grouping)
    else:
        pruned = rewrite(made.grouping, made.remove)
    kept = {g.id: g.units - len(made.remove.get(g.id, ())) for g in made.groups}
    macs, parameters = counter(made.grouping, "macs"), counter(made.grouping, "params")
    return Result(
        model=pruned,
        plan=made,
        proof=proof,
        macs=(round(macs({})), round(macs(kept))),
        parameters=(round(parameters({})), round(parameters(kept))),
        reached=made.reached,
        on_budget=on_budget,
    )


def compensated(result: Result, study: Study, name: str, bench: Bench | None) -> Result:
    """The result finished, and with its weights compensated where that is asked for; checked again where numbers are new."""
    cut, result = result.model, replace(result, model=study.finish(result.model))
    model, refits = result.model, list[Refit]()
    if name != "none":
        model, refits = compensations.call(name, study.on(result.plan.grouping), result.plan, result.model)
    if bench is not None and (name != "none" or model is not cut):
        check_model(bench, model, Moves(result.plan.grouping, after=result.plan.remove))
    if name == "none" or not study.samples.count:
        return replace(result, model=model)
    if study.progress:
        study.progress("comparing with the original")
    original = result.plan.grouping.model.proto
    found = fidelity(original, [result.model, model], study.part(FEW))
    return replace(result, model=model, refits=tuple(refits), fidelity=(found[0], found[1]))


def stored_as(result: Result, stored: Stored, study: Study) -> Result:
    """What was done to a copy in floats done to the file itself, proven on it, and quantized again.

    Raises ProofError with the groups of the copy.
    """
    options, numbers = result.plan.options, stored.numbers
    remove = {numbers[i]: units for i, units in result.plan.remove.items()}
    made = Plan(stored.grouping, remove, options, result.reached)
    try:
        cut = finish(made, stored.proof, stored.bench, result.on_budget, study.progress)
    except ProofError as error:
        raise ProofError(str(error), {i: error.groups[own] for i, own in numbers.items() if own in error.groups}) from error
    original = stored.grouping.model.proto
    model = requantized(result.model, original, cut.model)
    if stored.bench is not None:
        check_model(stored.bench, model, Moves(cut.plan.grouping, after=remove))
    found = fidelity(original, [cut.model, model], study.part(FEW)) if result.fidelity else None
    scores, losses = ({numbers[i]: one for i, one in named.items() if i in numbers} for named in (result.scores, result.losses))
    fidelities = (found[0], found[1]) if found else None
    return replace(cut, model=model, refits=result.refits, fidelity=fidelities, scores=scores, losses=losses)


def for_target(result: Result, original: Model, target: str | None) -> Result:
    """The result with what TensorRT does not take of the original; raises OnnxPruneError (exit code 4) where pruning adds to that."""
    if target != "tensorrt":
        return result
    check_introduced(original.proto, result.model)
    return replace(result, support=supported(original))


def timed(result: Result, loaded: Model, ratio: float, timer: Timer, progress: Progress | None) -> Result:
    """The result with the latency of what it is in the end."""
    if progress:
        progress("timing the result")
    before, after = timer.latencies([loaded.proto, result.model])
    return replace(result, latency=(before, after), reached=1 - after / before, on_budget=met((before, after), ratio))

"""What units are chosen and compensated on: the file's own groups, those of its copy in floats, or those of the turned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from onnxprune.allocations import Limits
from onnxprune.certificate import Bench, Proof
from onnxprune.cost import Measure
from onnxprune.errors import OnnxPruneError
from onnxprune.grouping import Grouping
from onnxprune.importer import Model, load
from onnxprune.quantized import Measured, Stored, in_floats
from onnxprune.rotation import rotate
from onnxprune.running import Arrays
from onnxprune.scoping import may_go
from onnxprune.selection import PCA
from onnxprune.study import Study
from onnxprune.tiles import Align, ladder

NO_EFFECT = (
    "on these inputs nothing that is done to its groups changes the outputs, so nothing is proven; give real inputs with --feeds inputs.npz"
)
T = TypeVar("T")
Find = Callable[[Model], Grouping]
Prove = Callable[[Grouping], tuple[Grouping, Proof | None, Bench | None]]


@dataclass(frozen=True)
class Ground:
    """stored: where `grouping` is that of a copy in floats, the file itself; proof and bench are None then, as the file has its own."""

    grouping: Grouping
    proof: Proof | None
    bench: Bench | None
    study: Study
    stored: Stored | None = None

    @property
    def named(self) -> Grouping:
        """The groups under the names of the file, which globs speak of and kernels run on."""
        return self.stored.grouping if self.stored else self.grouping

    def own(self, named: Mapping[int, T]) -> dict[int, T]:
        """What is said of the file's groups said of these."""
        return {i: named[own] for i, own in self.stored.numbers.items() if own in named} if self.stored else dict(named)

    def free(self, scope: Sequence[str], exclude: Sequence[str], ratios: Mapping[str, float]) -> tuple[set[int], dict[int, float]]:
        """The groups to choose from, and the share of units that the user gave for some of them.

        Raises OnnxPruneError where none is left (exit code 3), and for bad globs and ratios.
        """
        name, proof = self.named.model.name, self.stored.proof if self.stored else self.proof
        named, given = may_go(self.named, scope, exclude, ratios)
        chosen = set(self.own(dict.fromkeys(named)))
        idle = set(self.own(dict.fromkeys(proof.unexercised))) if proof else set[int]()
        if chosen and chosen <= idle:
            raise OnnxPruneError(f"{name}: {NO_EFFECT}", 3)
        chosen -= idle  # their coupling is not proven
        if not chosen:
            raise OnnxPruneError(f"{name}: no group is left to prune; widen --scope or --exclude less", 3)
        return chosen, {g: share for g, share in self.own(given).items() if g in chosen}

    def measure(self, named: Measure) -> Measure:
        """A budget of the file's groups as one of these."""
        return Measured(named, self.stored.numbers) if self.stored else named

    def limits(self, least: float, align: Align, target: str | None) -> list[Limits]:
        """What groups keep, from the coarsest alignment that is tried to the finest."""
        return [Limits(least, self.own(steps)) for steps in ladder(self.named, align, target)]


def lay(whole: Ground, criterion: str, find: Find, prove: Prove, feeds: Arrays | None) -> Ground:
    """What a criterion works on, from the groups of the file as it is; `find` and `prove` are for the groups of other models.

    Raises OnnxPruneError (exit code 3) where no stream can be turned into principal components for the criterion `pca`.
    """
    if criterion == PCA:
        return _turned(whole, find, prove, feeds)
    floats = in_floats(whole.grouping, feeds, find)
    if floats is None:
        return whole
    grouping, numbers = floats  # chosen and fitted in floats; what the file holds is cut and proven
    study = replace(whole.study, grouping=grouping)
    return Ground(grouping, None, None, study, Stored(whole.grouping, whole.proof, whole.bench, numbers))


def _turned(whole: Ground, find: Find, prove: Prove, feeds: Arrays | None) -> Ground:
    model, study = whole.grouping.model, whole.study
    rotated = rotate(whole.grouping, study.batches(), whole.bench, progress=study.progress)
    if not rotated.scores:
        reason = next(iter(rotated.skipped.values()), "it has no groups of channels")
        raise OnnxPruneError(f"{model.name}: none of its streams can be turned into principal components ({reason}); try obs", 3)
    turned = replace(load(rotated.model, feeds, model.input_shapes), name=model.name, external=model.external)
    grouping, proof, bench = prove(find(turned))
    study = replace(study, grouping=grouping, known=rotated.scores_in(grouping), finish=rotated.rescaled)
    return Ground(grouping, proof, bench, study)

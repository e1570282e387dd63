"""Which tensors of the model a checkpoint's parameters are, and so which indices of each parameter stay.

Exporters rename parameters, transpose them, merge equal ones and fold norms into convolutions, so names are a hint and values
are the evidence.  Several places are no trouble where they all lose the same; else the parameter is left open, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxprune.alignments import Link, fitting, kept, scaled
from onnxprune.branches import NORMS, outward
from onnxprune.importer import FLOATS, Model
from onnxprune.parameters import bias_of, modules, norm_roles, same_names, tokens
from onnxprune.pieces import assembled

Masks = tuple[np.ndarray | None, ...]
EPSILONS = (1e-5, 1e-3, 1e-4, 1e-6, 2e-5, 1e-2, 1e-8, 1e-12, 0.0)  # what frameworks and papers give batch norms
NORM = 1e-4  # relative: what folding a norm rounds


@dataclass(frozen=True)
class Place:
    """Which indices of a parameter's axes stay, bool or None for all; the tensors that say so; and how they were found."""

    masks: Masks
    tensors: tuple[str, ...]
    by: str


@dataclass(frozen=True)
class Scaled:
    """A layer's weight that the model has times `scale`, along an axis of its tensor; parameter: None for a scale that stands alone."""

    parameter: str | None
    tensor: str
    axis: int
    scale: np.ndarray


class Correspondence:
    """Finds the parameters' places, one kind of evidence after the other; `places` and `problems` hold what came of it.

    state: {parameter: array}; masks: what stays of each axis of a tensor, as a reader of the model names it.
    """

    def __init__(self, model: Model, state: Mapping[str, np.ndarray], masks: Callable[[str], Masks]) -> None:
        self.model, self.state, self.masks = model, state, masks
        self.places: dict[str, Place] = {}
        self.problems: dict[str, str] = {}
        self.covered: set[str] = set()
        self.shared = set(model.copies.values())
        self.arrays = {
            name: model.array(name)
            for name, tensor in model.tensors.items()
            if name not in self.shared and np.prod(tensor.dims, dtype=np.int64) > 1 and model.array(name).dtype.kind in "fiubV"
        }
        self.plain = {name for name, array in self.arrays.items() if _uniform(array)}
        self.by_size: dict[int, list[str]] = {}
        for name, array in self.arrays.items():
            self.by_size.setdefault(array.size, []).append(name)
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        self.alias: dict[str, str] = {}
        for node in model.nodes:
            for position, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, position))
            if node.op_type == "Identity" and node.input[0] in model.tensors:
                self.alias[node.output[0]] = node.input[0]
        known = {name: array.shape for name, array in self.arrays.items() if name not in model.copies}
        self.shapes = {name: array.shape for name, array in state.items()}
        self.names = same_names(self.shapes, known)
        self.modules = modules(state)
        self.scales: list[Scaled] = []

    def find(self) -> None:
        """Every kind of evidence, the strongest first."""
        self._by_values()
        self._by_scale()
        self._by_norm()
        self._by_structure()
        self._by_pieces()
        self._by_name()

    def open(self) -> list[str]:
        """The parameters that have no place yet, and could lose something."""
        return [name for name, array in self.state.items() if name not in self.places and array.size > 1]

    def uncovered(self) -> list[str]:
        """The float tensors that lose something and are no parameter's; those of one number hold nothing to carry over."""
        pruned = [name for name in self.arrays if any(mask is not None for mask in self.masks(name)) and name not in self.plain]
        return [name for name in pruned if name not in self.covered and self.model.tensors[name].data_type in FLOATS]

    def _settle(self, name: str, links: Iterable[Link], by: str) -> bool:
        """Give a parameter its place where all of the links say the same; else say why not."""
        links, shape = list(links), self.state[name].shape
        found: list[Masks] = []
        for link in links:
            masks = kept(link, shape, self.arrays[link.tensor].shape, self.masks(link.tensor))
            if masks is None:
                self.problems[name] = f"what stays of '{link.tensor}' is not whole rows of it"
                return False
            found.append(masks)
        if not found:
            return False
        if not all(_equal(found[0], other) for other in found[1:]):
            tensors = list(dict.fromkeys(link.tensor for link in links))
            self.problems[name] = (
                f"it fits '{tensors[0]}' and '{tensors[1]}', which lose different units"
                if len(tensors) > 1
                else f"it fits '{tensors[0]}' with the axes in several orders"
            )
            return False
        tensors = list(dict.fromkeys(link.tensor for link in links))
        self.places[name] = Place(found[0], tuple(tensors), by)
        self.covered.update(tensors)
        return True

    def _by_values(self) -> None:
        """The same values, the axes in any order; of one number only under the same name."""
        moments = {name: _moments(array) for name, array in self.arrays.items()}
        fits: dict[str, dict[str, list[Link]]] = {}
        for name, array in self.state.items():
            if array.size < 2:
                continue
            own, named = _moments(array), self.names.get(name)
            uniform = _uniform(array)
            candidates = [t for t in self.by_size.get(array.size, ()) if t == named or not uniform]
            candidates = [t for t in candidates if (array.dtype.kind in "fV") == (self.arrays[t].dtype.kind in "fV")]
            alike = [t for t in candidates if np.allclose(own, moments[t], rtol=0.02, atol=1e-3 * own[-1] + 1e-30, equal_nan=True)]
            fits[name] = {t: links for t in alike if (links := fitting(t, array, self.arrays[t]))}
            if named in fits[name]:
                links = fits[name][named]
                self._settle(name, links[:1] if array.shape == self.arrays[named].shape else links, "name and values")
        claimed = set(self.covered)
        for name, found in fits.items():
            if name in self.places or not found:
                continue
            free = {t: links for t, links in found.items() if t not in claimed}
            for some in (found, free):
                if self._settle(name, [link for links in some.values() for link in links], "values"):
                    break

    def _by_scale(self) -> None:
        """The weight of a layer into which a norm was folded: a number for each channel times the checkpoint's."""
        tensors = {t for t, array in self.arrays.items() if array.ndim > 1 and array.dtype.kind in "fV"} - self.covered - self.plain
        for name in self.open():
            array = self.state[name]
            if array.dtype.kind not in "fV" or array.ndim < 2 or _uniform(array):
                continue
            candidates = [t for t in self.by_size.get(array.size, ()) if t in tensors]
            found = [(t, *one) for t in candidates for one in scaled(t, array, self.arrays[t])]
            named = [one for one in found if one[0] == self.names.get(name)]
            if self._settle(name, [one[1] for one in named or found], "scale"):
                self.scales += [Scaled(name, t, axis, scale) for t, _, axis, scale in named or found]

    def _by_norm(self) -> None:
        """The vectors of a norm that was folded: its numbers make the scale that the weight shows, and the bias behind it."""
        vectors = [
            t for t, array in self.arrays.items() if array.size == max(array.shape) and t not in self.covered and t not in self.plain
        ]
        loose = [Scaled(None, t, int(np.argmax(self.arrays[t].shape)), self.arrays[t].reshape(-1).astype(np.float64)) for t in vectors]
        order = list(self.modules)
        left = set(self.open())
        for position, names in enumerate(self.modules.values()):
            own = [name for name in names if name in left and self.state[name].ndim == 1]
            if not own:
                continue
            vector = [name for name in names if self.state[name].ndim == 1 and self.state[name].size > 1]
            fits = [one for one in (*self.scales, *loose) if any(self._fits(roles, one) for roles in norm_roles(vector))]
            before = order[position - 1] if position else None
            near = [one for one in fits if one.parameter is not None and tokens(one.parameter)[:-1] == before]
            near = [one for one in near if one.axis == self._out(one.tensor)] or near
            fits = [one for one in fits if _telling(one.scale)] or near
            for name in own:
                self._settle(name, [Link(one.tensor, axis=one.axis) for one in fits], "norm") or self._settle(
                    name, [Link(one.tensor, axis=one.axis) for one in near], "norm"
                )
            for one in (near or fits) if own[0] in self.places else ():
                self._explain(one)

    def _explain(self, one: Scaled) -> None:
        """The layer's bias, in the model and in the checkpoint, is as long as its outputs, and part of what was verified."""
        readers = [node for node, _ in self.readers.get(one.tensor, ())]
        slot = self._bias(one.tensor)
        self.covered.update([slot] if slot is not None else [])
        if one.parameter is None:  # a norm written as Mul and Add
            self.covered.update(t for node in readers for t in self._behind(node, ("Add", "Sub")) if self.arrays[t].size == len(one.scale))
        bias = self._own_bias(one)
        if bias is not None and bias not in self.places:
            self._settle(bias, [Link(one.tensor, axis=one.axis)], "norm")

    def _fits(self, roles: Mapping[str, str], one: Scaled) -> bool:
        """Whether a norm gives this scale, and with the layer's own bias the bias that the model has behind it."""
        size = len(one.scale)
        if any(self.state[name].size != size for name in roles.values()) or ("scale" not in roles and "variance" not in roles):
            return False
        part = {role: self.state[name].astype(np.float64) for role, name in roles.items()}
        gain, shift, mean = part.get("scale", np.ones(size)), part.get("shift", np.zeros(size)), part.get("mean", np.zeros(size))
        for epsilon in EPSILONS if "variance" in part else (None,):
            scale = gain if epsilon is None else gain / np.sqrt(np.maximum(part["variance"] + epsilon, 1e-300))
            known = np.isfinite(one.scale)
            if not np.allclose(one.scale[known], scale[known], rtol=NORM, atol=1e-6 * np.abs(scale).max()):
                continue
            if one.parameter is None or one.axis != self._out(one.tensor):
                return True
            slot, own = self._bias(one.tensor), self._own_bias(one)
            bias = self.state[own].astype(np.float64) if own is not None else np.zeros(size)
            there = self.arrays[slot].astype(np.float64).reshape(-1) if slot is not None else np.zeros(size)
            terms = np.abs(shift) + np.abs(bias * scale) + np.abs(mean * scale)
            if there.size == bias.size == size and np.all(
                np.abs(shift + (bias - mean) * scale - there) <= NORM * terms + 1e-6 * terms.max()
            ):
                return True
        return False

    def _own_bias(self, one: Scaled) -> str | None:
        """The bias in the checkpoint of the layer whose weight this is."""
        if one.parameter is None:
            return None
        return bias_of(self.modules[tokens(one.parameter)[:-1]], self.shapes)

    def _out(self, tensor: str) -> int | None:
        """The axis of a layer's weight along which its outputs lie."""
        for node, position in self.readers.get(tensor, ()):
            axis = outward(node, position)
            if axis is not None:
                return axis % self.arrays[tensor].ndim
        return None

    def _bias(self, tensor: str) -> str | None:
        """The tensor that the layer with this weight adds to its outputs."""
        for node, position in self.readers.get(tensor, ()):
            if node.op_type in ("Conv", "ConvTranspose", "Gemm") and position == 1:
                name = self.alias.get(node.input[2], node.input[2]) if len(node.input) > 2 else ""
                return name if name in self.arrays else None
            if node.op_type == "MatMul":
                return next((name for name in self._behind(node, ("Add",))), None)
        return None

    def _behind(self, node: NodeProto, ops: tuple[str, ...]) -> list[str]:
        """The tensors of the elementwise operators that read what a node makes."""
        return [
            name
            for out in node.output
            for reader, _ in self.readers.get(out, ())
            if reader.op_type in ops
            for name in reader.input
            if name in self.arrays
        ]

    def _by_structure(self) -> None:
        """What values alone do not tell: the tensor that the same layer reads beside a parameter of the same module."""
        order = list(self.modules.values())
        for position, names in enumerate(order):
            for name in (n for n in names if n in set(self.open())):
                nodes = self._nodes(n for n in names if n in self.places)
                if not nodes and position:  # a norm whose vectors are all ones and zeros, right behind the layer before
                    behind = [r for node in self._nodes(order[position - 1]) for out in node.output for r, _ in self.readers.get(out, ())]
                    nodes = [node for node in behind if node.op_type in NORMS]
                slots = [self.alias.get(x, x) for node in nodes for x in (*node.input, *self._behind(node, ("Add", "Mul", "Sub")))]
                links = [link for t in dict.fromkeys(slots) if t in self.arrays for link in fitting(t, self.state[name], self.arrays[t])]
                if self._settle(name, links, "structure"):
                    self.problems.pop(name, None)
                elif not links and name == bias_of(names, self.shapes) and not np.any(self.state[name]):
                    self._settle(name, self._outputs(names, self.state[name].size), "structure")

    def _nodes(self, names: Iterable[str]) -> list[NodeProto]:
        """The nodes that read the tensors of these parameters."""
        tensors = [t for name in names if name in self.places for t in self.places[name].tensors]
        nodes = [node for t in tensors for node, _ in self.readers.get(t, ())]
        made = [reader for node in nodes if node.op_type == "Identity" for reader, _ in self.readers.get(node.output[0], ())]
        return [*nodes, *made]

    def _outputs(self, names: Iterable[str], size: int) -> list[Link]:
        """The axis of the module's weight that a bias of zeros, which the exporter left out, is as long as."""
        found = []
        for name in names:
            for tensor in self.places[name].tensors if name in self.places and self.state[name].ndim > 1 else ():
                axis = self._out(tensor)
                if axis is not None and self.arrays[tensor].shape[axis] == size and self._bias(tensor) is None:
                    found.append(Link(tensor, axis=axis))
        return found

    def _by_pieces(self) -> None:
        """What the exporter cut up or packed: gates of a recurrent layer in another order, queries, keys and values."""
        for name in self.open():
            array = self.state[name]
            if name not in self.problems and array.dtype.kind in "fV" and not _uniform(array):
                found = assembled(array, self.arrays, self.masks)
                if found is not None:
                    self.places[name] = Place(found[0], found[1], "pieces")
                    self.covered.update(found[1])

    def _by_name(self) -> None:
        """Names and shapes alone, for a checkpoint that was trained on since the export."""
        for name in self.open():
            tensor = self.names.get(name)
            if tensor in self.arrays and tensor not in self.covered and self.arrays[tensor].shape == self.state[name].shape:
                shape = tuple(n for n in self.state[name].shape if n > 1)
                if self._settle(name, [Link(tensor, shape, tuple(range(len(shape))))], "name"):
                    self.problems.pop(name, None)


def _equal(one: Masks, other: Masks) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b)) for a, b in zip(one, other, strict=True)
    )


def _uniform(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    return bool(flat[0] == flat[-1] and np.all(flat == flat[0]))


def _telling(scale: np.ndarray) -> bool:
    """Whether a scale tells layers apart: norms that were never trained all give one number, up to rounding."""
    return bool(np.nanmax(scale) - np.nanmin(scale) > NORM * np.nanmax(np.abs(scale)))


def _moments(array: np.ndarray) -> np.ndarray:
    """Mean, smallest, largest and root mean square: the same in any order of axes."""
    values = array.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([values.mean(), values.min(), values.max(), np.sqrt(np.square(values).mean())])

"""LSTM, GRU and RNN, back through time (Hochreiter and Schmidhuber 1997; Cho et al. 2014, arXiv:1406.1078; Elman 1990).

Gates are computed again for all steps at once from the states that were made, so that only short recursions are left to Scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import TensorProto, ValueInfoProto, helper

from onnxprune.gradients import NoRuleError, Site, Tape, Value, adjoint

Step = Callable[[list[Value], list[Value]], tuple[list[Value], Value]]
TURNED = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
STATES = (5, 6)  # the inputs that are states at the start


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent layer, its steps in the order in which it makes them.

    x (steps, batch, inputs); h, before (steps, batch, size): the states and those a step before; w (gates · size, inputs), r (gates · size,
    size); starts: the states at the start, (batch, size); changes: how the loss changes with h and with each state at the end; bias
    (2, gates · size), None where there is none.
    """

    tape: Tape
    turned: bool
    sizes: tuple[int, int, int, int]  # steps, batch, inputs, size
    x: Value
    h: Value
    before: Value
    w: Value
    r: Value
    bias: Value | None
    starts: list[Value]
    changes: list[Value]

    def gates(self, start: int, stop: int, states: Value | None = None) -> list[Value]:
        """Gates `start` up to `stop` before their activations; states: what R is multiplied by in the place of the states before."""
        size = self.sizes[3]
        w, r = (each.part(0, start * size, stop * size).transpose([1, 0]) for each in (self.w, self.r))
        made = self.x @ w + (self.before if states is None else states) @ r
        if self.bias is not None:
            made = made + self.bias.part(1, start * size, stop * size).sum([0])
        return [made.part(2, i * size, (i + 1) * size) for i in range(stop - start)]

    def passed(self, back: Value, inner: Sequence[tuple[Value, Value]], states: Sequence[Value]) -> tuple[Value, ...]:
        """What goes to X, W, R, B and the states at the start.

        back (steps, batch, gates · size): to the gates before their activations; inner: the same for the part with R, some gates at a time,
        and what R was multiplied by; states: what comes out at the start.
        """
        steps, batch, inputs, size = self.sizes

        def product(change: Value, read: Value, width: int) -> Value:
            rows = change.tape.op("Flatten", change, axis=2).transpose([1, 0])
            return rows @ read.reshape([steps * batch, width])

        to_w = product(back, self.x, inputs)
        to_r = self.tape.op("Concat", *(product(change, read, size) for change, read in inner), axis=0)
        sums = [each.sum([0, 1], keepdims=False) for each in (back, *(change for change, _ in inner))]
        to_bias, ends = self.tape.op("Concat", *sums, axis=0), [state.reshape([1, batch, size]) for state in states]
        one = [self.tape.op("Unsqueeze", each, self.tape.integers([0])) for each in (to_w, to_r, to_bias)]
        return _turned(back @ self.w, self.turned), *one, *ends


def _directions(site: Site, usual: Sequence[str], unusual: Sequence[str] = ()) -> list[Direction]:
    """Raises NoRuleError where activations are not the usual ones, lengths or peepholes are given, or one of these attributes."""
    turns = TURNED[site.text("direction", "forward")]
    given = [a.decode() if isinstance(a, bytes) else a for a in site.get("activations") or [*usual] * len(turns)]
    if given != [*usual] * len(turns) or site.has(4) or site.has(7) or any(site.get(name) for name in ("layout", "clip", *unusual)):
        raise NoRuleError
    made = Value(site.tape, site.node.output[0])
    if not made.name:
        made = site.tape.op(site.node.op_type, *(x if x.name else None for x in site.x), **site.attributes)
    return [_direction(site, made, number, turned) for number, turned in enumerate(turns)]


def _direction(site: Site, made: Value, number: int, turned: bool) -> Direction:
    tape, (steps, batch, inputs), (_, wide, size) = site.tape, site.shape(), site.shape(2)
    last = (batch, size)
    h = _turned(made.part(1, number, number + 1).reshape([steps, *last]), turned)
    w, r = (site.x[i].part(0, number, number + 1).reshape([wide, n]) for i, n in ((1, inputs), (2, size)))
    starts = [site.x[i].part(0, number, number + 1).reshape(last) if site.has(i) else _zeros(tape, last) for i in STATES]
    given = zip([*site.gs, None, None][:3], (1, 0, 0), ((steps, *last), last, last), strict=True)
    change, *ends = (g.part(at, number, number + 1).reshape(shape) if g else _zeros(tape, shape) for g, at, shape in given)
    bias = site.x[3].part(0, number, number + 1).reshape([2, wide]) if site.has(3) else None
    sizes, before = (steps, batch, inputs, size), _before(h, starts[0], steps)
    return Direction(tape, turned, sizes, _turned(site.x[0], turned), h, before, w, r, bias, starts, [_turned(change, turned), *ends])


def _together(site: Site, found: Sequence[tuple[Value, ...]]) -> list[Value | None]:
    """What goes to each input, from that of each direction."""
    to_x, *others = zip(*found, strict=True)
    rest = [site.tape.op("Concat", *each, axis=0) for each in others]
    back = [site.tape.op("Sum", *to_x), *rest[:3], None, *rest[3:]]
    return [change if site.has(position) else None for position, change in enumerate(back)]


@adjoint("LSTM")
def lstm(site: Site) -> Sequence[Value | None]:
    """Gates i, o, f, c; C = f·C₋₁ + i·c, H = o·tanh(C)."""

    def one(way: Direction) -> tuple[Value, ...]:
        tape, (steps, *_), (_, cell) = way.tape, way.sizes, way.starts
        gate = way.gates(0, 4)
        i, o, f = (tape.op("Sigmoid", each) for each in gate[:3])
        new = tape.op("Tanh", gate[3])

        def remembered(states: list[Value], now: list[Value]) -> tuple[list[Value], Value]:
            kept = states[0] * now[0] + now[1]
            return [kept], kept.tape.op("Identity", kept)

        _, cells = _scan(tape, [cell], [f, i * new], remembered, False)
        shown = tape.op("Tanh", cells)
        slopes = [new * i * (1 - i), shown * o * (1 - o), _before(cells, cell, steps) * f * (1 - f), i * (1 - new * new)]

        def passed(states: list[Value], now: list[Value]) -> tuple[list[Value], Value]:
            change, slope, seen, kept = now
            to_h = change + states[0]
            to_c = to_h * seen + states[1]
            back = to_h.tape.op("Concat", to_c, to_h, to_c, to_c, axis=1) * slope
            return [back @ Value(back.tape, way.r.name), to_c * kept], back

        changes, *ends = way.changes
        scanned = [changes, tape.op("Concat", *slopes, axis=2), o * (1 - shown * shown), f]
        states, back = _scan(tape, ends, scanned, passed, True)
        return way.passed(back, [(back, way.before)], states)

    return _together(site, [one(way) for way in _directions(site, ["Sigmoid", "Tanh", "Tanh"], ["input_forget"])])


@adjoint("GRU")
def gru(site: Site) -> Sequence[Value | None]:
    """Gates z, r, h; H = (1 − z)·h + z·H₋₁, where r scales H₋₁ before R of gate h, or with linear_before_reset what R made of it."""
    late = bool(site.get("linear_before_reset", 0))

    def one(way: Direction) -> tuple[Value, ...]:
        tape, size = way.tape, way.sizes[3]
        z, r = (tape.op("Sigmoid", each) for each in way.gates(0, 2))
        r_h = way.r.part(0, 2 * size, 3 * size)
        if late:
            inner = way.before @ r_h.transpose([1, 0])
            outer = way.x @ way.w.part(0, 2 * size, 3 * size).transpose([1, 0])
            if way.bias is not None:
                outer, inner = (made + way.bias.part(0, i, i + 1).part(1, 2 * size, 3 * size) for i, made in enumerate((outer, inner)))
            new, scaled = tape.op("Tanh", outer + r * inner), inner
        else:
            new, scaled = tape.op("Tanh", way.gates(2, 3, r * way.before)[0]), way.before
        r_zr = way.r.part(0, 0, 2 * size)

        def passed(states: list[Value], now: list[Value]) -> tuple[list[Value], Value]:
            change, to_z, to_new, to_r, keep, reset = now
            inside = change.tape
            to_h = change + states[0]
            dz, dn = to_h * to_z, to_h * to_new
            if late:
                dr, read = dn * to_r, (dn * reset) @ Value(inside, r_h.name)
            else:
                du = dn @ Value(inside, r_h.name)
                dr, read = du * to_r, du * reset
            both = inside.op("Concat", dz, dr, axis=1)
            return [to_h * keep + read + both @ Value(inside, r_zr.name)], inside.op("Concat", both, dn, axis=1)

        changes, end, _ = way.changes
        scanned = [changes, (way.before - new) * z * (1 - z), (1 - z) * (1 - new * new), scaled * r * (1 - r), z, r]
        states, back = _scan(tape, [end], scanned, passed, True)
        both, dn = back.part(2, 0, 2 * size), back.part(2, 2 * size, 3 * size)
        return way.passed(back, [(both, way.before), (dn * r, way.before) if late else (dn, r * way.before)], states)

    return _together(site, [one(way) for way in _directions(site, ["Sigmoid", "Tanh"])])


SLOPES: dict[str, Callable[[Value], Value]] = {  # of an activation, by what it makes
    "Tanh": lambda h: 1 - h * h,
    "Sigmoid": lambda h: h * (1 - h),
    "Relu": lambda h: h.tape.op("Cast", h.tape.op("Greater", h, h.tape.constant(0.0)), to=TensorProto.FLOAT),
}


@adjoint("RNN")
def rnn(site: Site) -> Sequence[Value | None]:
    """H = f(W·X + R·H₋₁ + b), f a tanh if nothing else is said."""
    kind = next(iter(site.get("activations") or ["Tanh"]))
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind not in SLOPES:
        raise NoRuleError

    def one(way: Direction) -> tuple[Value, ...]:
        def passed(states: list[Value], now: list[Value]) -> tuple[list[Value], Value]:
            back = (now[0] + states[0]) * now[1]
            return [back @ Value(back.tape, way.r.name)], back.tape.op("Identity", back)

        changes, end, _ = way.changes
        states, back = _scan(way.tape, [end], [changes, SLOPES[kind](way.h)], passed, True)
        return way.passed(back, [(back, way.before)], states)

    return _together(site, [one(way) for way in _directions(site, [kind])])


def _zeros(tape: Tape, shape: Sequence[int]) -> Value:
    return tape.op("ConstantOfShape", tape.integers(shape))


def _turned(value: Value, turned: bool) -> Value:
    """The steps the other way round."""
    if not turned:
        return value
    bounds = ([-1], [-(2**31)], [0], [-1])
    return value.tape.op("Slice", value, *(value.tape.integers(each) for each in bounds))


def _before(values: Value, first: Value, steps: int) -> Value:
    """At each step the value of the step before."""
    start = values.tape.op("Unsqueeze", first, values.tape.integers([0]))
    return values.tape.op("Concat", start, values.part(0, 0, steps - 1), axis=0)


def _scan(tape: Tape, states: list[Value], scanned: list[Value], step: Step, backwards: bool) -> tuple[list[Value], Value]:
    """The states at the end, and one value of each step."""
    inner = Tape(prefix=f"{tape.prefix}{len(tape.nodes)}/")
    given = [Value(inner, f"{inner.prefix}given {i}") for i in range(len(states) + len(scanned))]
    ended, made = step(given[: len(states)], given[len(states) :])

    def floats(values: Sequence[Value]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(v.name, TensorProto.FLOAT, None) for v in values]

    body = helper.make_graph(inner.nodes, "step", floats(given), floats([*ended, made]))
    order = {"scan_input_directions": [int(backwards)] * len(scanned), "scan_output_directions": [int(backwards)]}
    found = tape.op("Scan", *states, *scanned, output=len(states), body=body, num_scan_inputs=len(scanned), **order)
    return [Value(tape, f"{found.name}.{i}") for i in range(len(states))], found

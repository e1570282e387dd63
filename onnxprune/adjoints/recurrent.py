"""LSTM: gates are computed again for all steps at once from what it made, so that only two short recursions are left to Scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import TensorProto, ValueInfoProto, helper

from onnxprune.gradients import NoRuleError, Site, Tape, Value, adjoint

Step = Callable[[list[Value], list[Value]], tuple[list[Value], Value]]
USUAL = ["Sigmoid", "Tanh", "Tanh"]  # activations
TURNED = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}


@adjoint("LSTM")
def lstm(site: Site) -> Sequence[Value | None]:
    """Back through time (Hochreiter and Schmidhuber 1997), each direction for itself; gates stand in the order i, o, f, c."""
    turns = TURNED[site.text("direction", "forward")]
    used = [a.decode() if isinstance(a, bytes) else a for a in site.get("activations") or USUAL * len(turns)]
    special = site.has(4) or site.has(7) or any(site.get(name) for name in ("layout", "clip", "input_forget"))
    if used != USUAL * len(turns) or special:
        raise NoRuleError
    made = Value(site.tape, site.node.output[0])
    if not made.name:
        made = site.tape.op("LSTM", *(x if x.name else None for x in site.x), **site.attributes)
    found = [_direction(site, made, number, turned) for number, turned in enumerate(turns)]
    to_x = [parts[0] for parts in found]
    w, r, bias, h, c = (site.tape.op("Concat", *each, axis=0) for each in list(zip(*found, strict=True))[1:])
    back = [site.tape.op("Sum", *to_x), w, r, bias, None, h, c]
    return [change if site.has(position) else None for position, change in enumerate(back)]


def _direction(site: Site, made: Value, number: int, turned: bool) -> tuple[Value, ...]:
    """What goes to X, W, R, B and the states at the start from the first direction or from the second."""
    tape, (steps, batch, inputs), size = site.tape, site.shape(), site.shape(2)[2]
    many, last = steps * batch, (batch, size)
    x = _turned(site.x[0], turned)
    h = _turned(made.part(1, number, number + 1).reshape([steps, *last]), turned)
    w, r = (site.x[i].part(0, number, number + 1).reshape([4 * size, n]) for i, n in ((1, inputs), (2, size)))
    first = [site.x[i].part(0, number, number + 1).reshape(last) if site.has(i) else _zeros(tape, last) for i in (5, 6)]
    h_before = _before(h, first[0], steps)
    gates = x @ w.transpose([1, 0]) + h_before @ r.transpose([1, 0])
    if site.has(3):
        bias = site.x[3].part(0, number, number + 1).reshape([2, 4 * size])
        gates = gates + bias.sum([0])
    gate = [gates.part(2, i * size, (i + 1) * size) for i in range(4)]
    i, o, f = (tape.op("Sigmoid", each) for each in gate[:3])
    new = tape.op("Tanh", gate[3])

    def remembered(states: list[Value], now: list[Value]) -> tuple[list[Value], Value]:
        cell = states[0] * now[0] + now[1]
        return [cell], cell.tape.op("Identity", cell)

    _, cells = _scan(tape, [first[1]], [f, i * new], remembered, False)
    shown = tape.op("Tanh", cells)
    slopes = [new * i * (1 - i), shown * o * (1 - o), _before(cells, first[1], steps) * f * (1 - f), i * (1 - new * new)]

    def passed(states: list[Value], now: list[Value]) -> tuple[list[Value], Value]:
        change, slope, seen, kept = now
        to_h = change + states[0]
        to_c = to_h * seen + states[1]
        back = to_h.tape.op("Concat", to_c, to_h, to_c, to_c, axis=1) * slope
        return [back @ Value(back.tape, r.name), to_c * kept], back

    given = zip([*site.gs, None, None][:3], (1, 0, 0), ((steps, *last), last, last), strict=True)
    changes, *ends = (g.part(at, number, number + 1).reshape(shape) if g else _zeros(tape, shape) for g, at, shape in given)
    scanned = [_turned(changes, turned), tape.op("Concat", *slopes, axis=2), o * (1 - shown * shown), f]
    (to_h, to_c), back = _scan(tape, ends, scanned, passed, True)
    rows = back.reshape([many, 4 * size]).transpose([1, 0])
    to_bias = back.sum([0, 1], keepdims=False).reshape([1, 4 * size])
    return (
        _turned(back @ w, turned),
        (rows @ x.reshape([many, inputs])).reshape([1, 4 * size, inputs]),
        (rows @ h_before.reshape([many, size])).reshape([1, 4 * size, size]),
        tape.op("Concat", to_bias, to_bias, axis=1),
        to_h.reshape([1, *last]),
        to_c.reshape([1, *last]),
    )


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

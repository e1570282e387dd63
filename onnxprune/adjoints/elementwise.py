"""Operators that compute each number of the output from those at the same place, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from onnxprune.gradients import NoRuleError, Site, Value, adjoint

Slope = Callable[[Site, Value, Value], Value]


def slope(*operators: str) -> Callable[[Slope], Slope]:
    """Register the derivative of a function of one number, (site, x, y) -> y'."""

    def register(derivative: Slope) -> Slope:
        adjoint(*operators)(lambda site: (site.g * derivative(site, site.x[0], site.y[0]),))
        return derivative

    return register


def _cast(value: Value) -> Value:
    """True is 1."""
    return value.tape.op("Cast", value, to=1)


def _between(site: Site, x: Value, low: float, high: float) -> Value:
    """1 where low < x < high."""
    above = site.tape.op("Greater", x, site.tape.constant(low))
    below = site.tape.op("Less", x, site.tape.constant(high))
    return _cast(site.tape.op("And", above, below))


slope("Tanh")(lambda site, x, y: 1 - y * y)
slope("Sigmoid")(lambda site, x, y: y * (1 - y))
slope("Exp")(lambda site, x, y: y)
slope("Sqrt")(lambda site, x, y: (site.tape.op("Reciprocal", y) * 0.5).where(site.tape.op("Greater", y, site.tape.constant(0.0))))
slope("Reciprocal")(lambda site, x, y: -(y * y))
slope("Log")(lambda site, x, y: site.tape.op("Reciprocal", x))
slope("Abs")(lambda site, x, y: site.tape.op("Sign", x))
slope("Erf")(lambda site, x, y: site.tape.op("Exp", -(x * x)) * (2 / math.sqrt(math.pi)))
slope("Softplus")(lambda site, x, y: site.tape.op("Sigmoid", x))
slope("Sin")(lambda site, x, y: site.tape.op("Cos", x))
slope("Cos")(lambda site, x, y: -site.tape.op("Sin", x))
slope("Tan")(lambda site, x, y: y * y + 1)
slope("Atan")(lambda site, x, y: site.tape.op("Reciprocal", x * x + 1))
slope("Sinh")(lambda site, x, y: site.tape.op("Cosh", x))
slope("Cosh")(lambda site, x, y: site.tape.op("Sinh", x))
slope("Asinh")(lambda site, x, y: site.tape.op("Reciprocal", site.tape.op("Sqrt", x * x + 1)))
slope("Softsign")(lambda site, x, y: (1 - site.tape.op("Abs", y)) * (1 - site.tape.op("Abs", y)))
slope("ThresholdedRelu")(lambda site, x, y: _cast(site.tape.op("Greater", x, site.tape.constant(site.get("alpha", 1.0)))))
slope("Relu")(lambda site, x, y: _cast(site.tape.op("Greater", y, site.tape.constant(0.0))))
slope("HardSigmoid")(lambda site, x, y: _between(site, y, 0.0, 1.0) * site.get("alpha", 0.2))
slope("HardSwish")(lambda site, x, y: _cast(site.tape.op("Greater", x, site.tape.constant(3.0))) + _between(site, x, -3, 3) * (x / 3 + 0.5))


@slope("LeakyRelu")
def leaky_relu(site: Site, x: Value, y: Value) -> Value:
    slow = float(site.get("alpha", 0.01))
    return _cast(site.tape.op("Greater", x, site.tape.constant(0.0))) * (1 - slow) + slow


@slope("Elu")
def elu(site: Site, x: Value, y: Value) -> Value:
    """1 above 0, alpha·eˣ below, which is y + alpha."""
    return site.tape.op("Where", site.tape.op("Greater", x, site.tape.constant(0.0)), site.tape.constant(1.0), y + site.get("alpha", 1.0))


@slope("Celu")
def celu(site: Site, x: Value, y: Value) -> Value:
    """1 above 0, exp(x/alpha) below, which is y/alpha + 1."""
    above = site.tape.op("Greater", x, site.tape.constant(0.0))
    return site.tape.op("Where", above, site.tape.constant(1.0), y / float(site.get("alpha", 1.0)) + 1)


@slope("Selu")
def selu(site: Site, x: Value, y: Value) -> Value:
    alpha, gamma = site.get("alpha", 1.67326319217681884765625), site.get("gamma", 1.05070102214813232421875)
    return site.tape.op("Where", site.tape.op("Greater", x, site.tape.constant(0.0)), site.tape.constant(gamma), y + alpha * gamma)


@slope("Mish")
def mish(site: Site, x: Value, y: Value) -> Value:
    """y = x·tanh(softplus(x))."""
    inner = site.tape.op("Tanh", site.tape.op("Softplus", x))
    return inner + x * (1 - inner * inner) * site.tape.op("Sigmoid", x)


@slope("Swish")
def swish(site: Site, x: Value, y: Value) -> Value:
    """y = x·sigmoid(alpha·x)."""
    alpha = float(site.get("alpha", 1.0))
    gate = site.tape.op("Sigmoid", x * alpha)
    return gate + y * (1 - gate) * alpha


@slope("Gelu")
def gelu(site: Site, x: Value, y: Value) -> Value:
    """y = x·Φ(x), or with tanh in the place of Φ."""
    if site.get("approximate", b"none") in ("tanh", b"tanh"):
        root = math.sqrt(2 / math.pi)
        inner = site.tape.op("Tanh", (x + x * x * x * 0.044715) * root)
        return (inner + 1) * 0.5 + x * (1 - inner * inner) * ((x * x * (3 * 0.044715) + 1) * (0.5 * root))
    half = (site.tape.op("Erf", x * (1 / math.sqrt(2))) + 1) * 0.5
    return half + x * site.tape.op("Exp", x * x * -0.5) * (1 / math.sqrt(2 * math.pi))


@slope("Clip")
def clip(site: Site, x: Value, y: Value) -> Value:
    """Where y is x, nothing was cut off."""
    return _cast(site.tape.op("Equal", x, y))


@adjoint("Identity")
def identity(site: Site) -> Sequence[Value | None]:
    return (site.g,)


@adjoint("Dropout")
def dropout(site: Site) -> Sequence[Value | None]:
    """Nothing is dropped, but for training: then what it drops is another at each run."""
    if site.has(2) and site.array(2).any():
        raise NoRuleError
    return (site.g,)


@adjoint("Neg")
def neg(site: Site) -> Sequence[Value | None]:
    return (-site.g,)


@adjoint("Cast")
def cast(site: Site) -> Sequence[Value | None]:
    """Floats to floats (all are float32 here): what comes from integers passes nothing back to them."""
    return (site.g,)


@adjoint("CastLike")
def cast_like(site: Site) -> Sequence[Value | None]:
    """As Cast; the second input says a type, and its numbers change nothing."""
    return site.g, site.tape.op("ConstantOfShape", site.tape.integers(site.shape(1)))


@adjoint("Add")
def add(site: Site) -> Sequence[Value | None]:
    return site.fit(0, site.g), site.fit(1, site.g)


@adjoint("Sum")
def total(site: Site) -> Sequence[Value | None]:
    return tuple(site.fit(i, site.g) for i in range(len(site.node.input)))


@adjoint("Mean")
def mean(site: Site) -> Sequence[Value | None]:
    many = len(site.node.input)
    return tuple(site.fit(i, site.g / many) for i in range(many))


@adjoint("Sub")
def sub(site: Site) -> Sequence[Value | None]:
    return site.fit(0, site.g), site.fit(1, -site.g)


@adjoint("Mul")
def mul(site: Site) -> Sequence[Value | None]:
    a, b = site.x
    return site.fit(0, site.g * b), site.fit(1, site.g * a)


@adjoint("Div")
def div(site: Site) -> Sequence[Value | None]:
    back = site.g / site.x[1]
    return site.fit(0, back), site.fit(1, -(back * site.y[0]))


@adjoint("Pow")
def power(site: Site) -> Sequence[Value | None]:
    """Of a constant exponent."""
    exponent = site.array(1)
    if exponent.size != 1:
        raise NoRuleError
    n = float(exponent.ravel()[0])
    x = site.x[0]
    slope = x if n == 2 else site.tape.op("Pow", x, site.tape.constant(n - 1))
    if n < 1:  # without bounds at 0, as that of Sqrt
        slope = slope.where(site.tape.op("Not", site.tape.op("Equal", x, site.tape.constant(0.0))))
    return (site.g * slope * n,)


@adjoint("PRelu")
def prelu(site: Site) -> Sequence[Value | None]:
    x, slow = site.x
    above = site.tape.op("Greater", x, site.tape.constant(0.0))
    below = site.tape.op("Not", above)
    return site.g.where(above) + (site.g * slow).where(below), site.fit(1, (site.g * x).where(below))


@adjoint("Where")
def where(site: Site) -> Sequence[Value | None]:
    condition = site.x[0]
    return None, site.fit(1, site.g.where(condition)), site.fit(2, site.g.where(site.tape.op("Not", condition)))


@adjoint("Max", "Min")
def extreme(site: Site) -> Sequence[Value | None]:
    """To whichever of the inputs it was, in equal parts where it was several."""
    equal = [site.tape.op("Equal", x, site.y[0]) for x in site.x]
    many = site.tape.op("Sum", *(_cast(each) for each in equal))
    return tuple(site.fit(i, (site.g / many).where(each)) for i, each in enumerate(equal))

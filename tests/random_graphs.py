"""Random networks of the kinds that people prune, small enough to be proven in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto
from outside import Weight, build

Draw = Callable[[st.SearchStrategy[Any]], Any]
ACTIVATIONS = ["Relu", "Sigmoid", "Tanh", "Elu", "LeakyRelu", "Softplus", "HardSigmoid", "Abs", "Identity"]
LARGEST = 12  # pixels a side, beyond which nothing is enlarged


@dataclass(frozen=True)
class Value:
    """A feature map (batch, width, side, side), or rows (batch, side, width)."""

    name: str
    width: int
    side: int


@dataclass
class Net:
    """A network as it grows: the text of its nodes, its weights, and the values that later layers may go back to."""

    draw: Draw
    opset: int
    text: list[str] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def width(self) -> int:
        return int(self.draw(st.integers(4, 16)))

    def new(self) -> str:
        return f"v{len(self.text)}"

    def node(self, operator: str, *inputs: str, attributes: str = "") -> str:
        """Adds a node with one output and gives the output's name."""
        out = self.new()
        self.text.append(f"{out} = {operator} {f'<{attributes}>' if attributes else ''} ({', '.join(inputs)})")
        return out

    def nodes(self, count: int, operator: str, *inputs: str, attributes: str = "") -> list[str]:
        """Adds a node with several outputs."""
        outs = [f"{self.new()}_{i}" for i in range(count)]
        self.text.append(f"{', '.join(outs)} = {operator} <{attributes}> ({', '.join(inputs)})")
        return outs

    def weight(self, *shape: int) -> str:
        """Seeded numbers that keep the variance of what they multiply; positive in vectors."""
        name, rng = f"w{len(self.weights)}", np.random.default_rng(len(self.weights))
        fan = int(np.prod(shape[1:])) or 1
        drawn = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(fan)
        self.weights[name] = drawn.astype(np.float32)
        return name

    def constant(self, value: list[int] | np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = value
        return name

    def axes(self, operator: str, value: str, axes: list[int], since: int, attributes: str = "") -> str:
        """A node whose axes are an attribute in old opsets."""
        if self.opset >= since:
            return self.node(operator, value, self.constant(axes), attributes=attributes)
        return self.node(operator, value, attributes=f"axes={axes}" + (f", {attributes}" if attributes else ""))

    def reshape(self, value: str, *target: int) -> str:
        return self.node("Reshape", value, self.constant(list(target)))

    def transpose(self, value: str, *perm: int) -> str:
        return self.node("Transpose", value, attributes=f"perm={list(perm)}")

    def split(self, value: str, axis: int, sizes: list[int]) -> list[str]:
        if self.opset >= 13:
            return self.nodes(len(sizes), "Split", value, self.constant(sizes), attributes=f"axis={axis}")
        return self.nodes(len(sizes), "Split", value, attributes=f"axis={axis}, split={sizes}")

    def activated(self, value: str) -> str:
        return self.node(self.pick(ACTIVATIONS), value)

    def earlier(self, value: Value) -> Value:
        """A value of the same size from further back, where there is one."""
        return self.pick([v for v in self.values if v.side == value.side])  # type: ignore[no-any-return]

    def convolved(self, value: Value, width: int, kernel: int = 1, group: int = 1) -> Value:
        inputs = [value.name, self.weight(width, value.width // group, kernel, kernel)]
        if self.pick((True, False)):
            inputs.append(self.weight(width))
        pad = kernel // 2
        return replace(value, name=self.node("Conv", *inputs, attributes=f"group={group}, pads={[pad] * 4}"), width=width)

    def scaled(self, value: str, shape: tuple[int, ...]) -> str:
        """A scale and a shift."""
        return self.node("Add", self.node("Mul", value, self.weight(*shape)), self.weight(*shape))

    def normalized(self, rows: str, width: int) -> str:
        """Layer normalization over the last axis, in one node or in many."""
        if self.opset >= 17 and self.pick((True, False)):
            return self.node("LayerNormalization", rows, self.weight(width), self.weight(width))
        mean = self.axes("ReduceMean", rows, [-1], 18)
        centred = self.node("Sub", rows, mean)
        variance = self.axes("ReduceMean", self.node("Mul", centred, centred), [-1], 18)
        spread = self.node("Sqrt", self.node("Add", variance, self.constant(np.array(1e-5, np.float32))))
        return self.scaled(self.node("Div", centred, spread), (width,))

    def mixed(self, rows: str, width: int, out: int) -> str:
        """A linear layer over the last axis."""
        return self.node("Add", self.node("MatMul", rows, self.weight(width, out)), self.weight(out))

    def attended(self, rows: str, width: int) -> str:
        """Attention with heads; queries, keys and values apart or packed."""
        heads, size = self.pick((1, 2, 3)), self.pick((2, 4))
        inner = heads * size
        if self.pick((True, False)):
            parts = self.split(self.mixed(rows, width, 3 * inner), 2, [inner] * 3)
        else:
            parts = [self.mixed(rows, width, inner) for _ in range(3)]
        q, k, v = (self.transpose(self.reshape(p, 0, 0, heads, size), 0, 2, *((3, 1) if p is parts[1] else (1, 3))) for p in parts)
        scores = self.node("Mul", self.node("MatMul", q, k), self.constant(np.array(size**-0.5, np.float32)))
        mixture = self.node("MatMul", self.node("Softmax", scores, attributes="axis=3" if self.opset < 13 else "axis=-1"), v)
        return self.mixed(self.reshape(self.transpose(mixture, 0, 2, 1, 3), 0, 0, inner), inner, width)


Step = Callable[[Net, Value], Value]


def divisors(number: int) -> list[int]:
    return [d for d in (2, 3, 4) if number % d == 0]


# layers of feature maps


def conv(net: Net, v: Value) -> Value:
    return net.convolved(v, net.width(), net.pick((1, 3)))


def depthwise(net: Net, v: Value) -> Value:
    return net.convolved(v, v.width * net.pick((1, 1, 2)), 3, v.width) if v.width <= 16 else v


def grouped(net: Net, v: Value) -> Value:
    group = net.pick(divisors(v.width) or [1])
    return net.convolved(v, group * net.pick((4, 6)), net.pick((1, 3)), group)


def transposed(net: Net, v: Value) -> Value:
    if v.side > LARGEST // 2:
        return v
    group = net.pick([1, *divisors(v.width)])
    out = net.pick((4, 5, 6))
    made = net.node("ConvTranspose", v.name, net.weight(v.width, out, 2, 2), attributes=f"group={group}, strides=[2,2]")
    return Value(made, out * group, 2 * v.side)


def batch_norm(net: Net, v: Value) -> Value:
    return replace(v, name=net.node("BatchNormalization", v.name, *(net.weight(v.width) for _ in range(4))))


def prelu(net: Net, v: Value) -> Value:
    return replace(v, name=net.node("PRelu", v.name, net.weight(v.width, 1, 1)))


def activation(net: Net, v: Value) -> Value:
    return replace(v, name=net.activated(v.name))


def residual(net: Net, v: Value) -> Value:
    """An earlier value is added, through a projection or padded with zeros where it is not as wide."""
    other = net.earlier(v)
    if other.width < v.width and net.pick((True, False)):
        low = net.pick((0, (v.width - other.width) // 2))
        pads = net.constant([0, low, 0, 0, 0, v.width - other.width - low, 0, 0])
        other = replace(other, name=net.node("Pad", other.name, pads))
    elif other.width != v.width:
        other = net.convolved(other, v.width)
    return replace(v, name=net.node("Add", v.name, other.name))


def concat(net: Net, v: Value) -> Value:
    other = net.earlier(v)
    if other.width + v.width > 40:
        return v
    return replace(v, name=net.node("Concat", other.name, v.name, attributes="axis=1"), width=v.width + other.width)


def gate(net: Net, v: Value) -> Value:
    """One half gates the other."""
    if v.width % 2 or v.width < 8:
        return v
    half, other = net.split(v.name, 1, [v.width // 2] * 2)
    return replace(v, name=net.node("Mul", half, net.node("Sigmoid", other)), width=v.width // 2)


def swap(net: Net, v: Value) -> Value:
    """Cut in two, one part activated, joined the other way round."""
    cut = net.draw(st.integers(1, v.width - 1))
    first, second = net.split(v.name, 1, [cut, v.width - cut])
    return replace(v, name=net.node("Concat", net.activated(second), first, attributes="axis=1"))


def cut(net: Net, v: Value) -> Value:
    if v.width < 8:
        return v
    start = net.draw(st.integers(0, v.width // 2 - 1))
    end = net.draw(st.integers(start + v.width // 2, v.width))
    bounds = [net.constant([n]) for n in (start, net.pick((end, end - v.width)) if end < v.width else 2**31, 1)]
    return replace(v, name=net.node("Slice", v.name, *bounds), width=end - start)


def gather(net: Net, v: Value) -> Value:
    order = net.draw(st.permutations(range(v.width)))
    return replace(v, name=net.node("Gather", v.name, net.constant(list(order)), attributes="axis=1"))


def shuffle(net: Net, v: Value) -> Value:
    group = net.pick(divisors(v.width) or [1])
    apart = net.reshape(v.name, 0, *net.pick(((group, v.width // group), (group, -1), (-1, v.width // group))), v.side, v.side)
    turned = net.transpose(apart, 0, 2, 1, 3, 4)
    return replace(v, name=net.reshape(turned, 0, net.pick((v.width, -1)), v.side, v.side))


def excite(net: Net, v: Value) -> Value:
    pooled = net.node("GlobalAveragePool", v.name) if net.pick((True, False)) else net.axes("ReduceMean", v.name, [2, 3], 18, "keepdims=1")
    squeezed = net.convolved(Value(pooled, v.width, 1), net.pick((2, 4)))
    raised = net.convolved(replace(squeezed, name=net.node("Relu", squeezed.name)), v.width)
    return replace(v, name=net.node("Mul", v.name, net.node("Sigmoid", raised.name)))


def pool(net: Net, v: Value) -> Value:
    if v.side < 4 or v.side % 2:
        return v
    return replace(
        v, name=net.node(net.pick(("MaxPool", "AveragePool")), v.name, attributes="kernel_shape=[2,2], strides=[2,2]"), side=v.side // 2
    )


def depth_to_space(net: Net, v: Value) -> Value:
    if v.width % 4 or v.width < 16 or v.side > LARGEST // 2:
        return v
    mode = net.pick(("DCR", "CRD"))
    return Value(net.node("DepthToSpace", v.name, attributes=f'blocksize=2, mode="{mode}"'), v.width // 4, v.side * 2)


def resize(net: Net, v: Value) -> Value:
    if v.side > LARGEST // 2:
        return v
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    return replace(
        v, name=net.node("Resize", v.name, net.constant(np.zeros(0, np.float32)), scales, attributes='mode="nearest"'), side=2 * v.side
    )


def pad(net: Net, v: Value) -> Value:
    made = net.node("Pad", v.name, net.constant([0, 0, 1, 1, 0, 0, 1, 1]), attributes=f'mode="{net.pick(("constant", "reflect"))}"')
    return replace(v, name=made, side=v.side + 2) if v.side < LARGEST else v


def channels_last(net: Net, v: Value) -> Value:
    turned = net.transpose(v.name, 0, 2, 3, 1)
    return replace(v, name=net.transpose(net.normalized(turned, v.width), 0, 3, 1, 2))


def group_norm(net: Net, v: Value) -> Value:
    group = net.pick(divisors(v.width) or [1])
    apart = net.reshape(v.name, 0, group, -1)
    normal = net.node("InstanceNormalization", apart, net.weight(group), net.weight(group))
    return replace(v, name=net.scaled(net.reshape(normal, 0, v.width, v.side, v.side), (v.width, 1, 1)))


def pixels_attend(net: Net, v: Value) -> Value:
    rows = net.transpose(net.reshape(v.name, 0, net.pick((0, v.width)), -1), 0, 2, 1)
    back = net.transpose(net.attended(rows, v.width), 0, 2, 1)
    return replace(v, name=net.reshape(back, 0, v.width, v.side, v.side))


IMAGE_STEPS: tuple[Step, ...] = (
    *(conv, conv, conv, depthwise, grouped, transposed, batch_norm, prelu, activation, residual, residual, concat, gate, swap, cut),
    *(gather, shuffle, excite, pool, depth_to_space, resize, pad, channels_last, group_norm, pixels_attend),
)


# layers of rows


def linear(net: Net, v: Value) -> Value:
    width = net.width()
    return replace(v, name=net.activated(net.mixed(v.name, v.width, width)), width=width)


def row_norm(net: Net, v: Value) -> Value:
    return replace(v, name=net.normalized(v.name, v.width))


def attention(net: Net, v: Value) -> Value:
    return replace(v, name=net.node("Add", v.name, net.attended(v.name, v.width)))


def feed_forward(net: Net, v: Value) -> Value:
    inner = net.width()
    return replace(v, name=net.node("Add", v.name, net.mixed(net.activated(net.mixed(v.name, v.width, inner)), inner, v.width)))


def row_gate(net: Net, v: Value) -> Value:
    inner = net.width()
    up, side = net.split(net.mixed(v.name, v.width, 2 * inner), 2, [inner] * 2)
    return replace(v, name=net.mixed(net.node("Mul", up, net.node("Sigmoid", side)), inner, v.width))


def row_skip(net: Net, v: Value) -> Value:
    other = net.earlier(v)
    name = other.name if other.width == v.width else net.mixed(other.name, other.width, v.width)
    return replace(v, name=net.node("Add", name, v.name))


def row_concat(net: Net, v: Value) -> Value:
    other = net.earlier(v)
    return replace(v, name=net.node("Concat", v.name, other.name, attributes="axis=2"), width=v.width + other.width) if v.width < 24 else v


ROW_STEPS: tuple[Step, ...] = (linear, linear, row_norm, attention, feed_forward, row_gate, row_skip, row_concat)


# heads


def flattened(net: Net, v: Value) -> str:
    """Batch and features, by Flatten, by Reshape, or by a Reshape to a shape taken from the value."""
    form = net.pick(("Flatten", "Reshape", "Shape"))
    if form == "Flatten":
        return net.node("Flatten", v.name)
    if form == "Reshape":
        return net.reshape(v.name, 0, -1)
    batch = net.node("Gather", net.node("Shape", v.name), net.constant([0]))
    return net.node("Reshape", v.name, net.node("Concat", batch, net.constant([-1]), attributes="axis=0"))


def image_head(net: Net, v: Value) -> str:
    """Writes the output `y` and gives its shape without the batch."""
    kind = net.pick(("flatten", "pool", "conv"))
    if kind == "conv":
        net.text.append(f"y = Conv ({v.name}, {net.weight(3, v.width, 1, 1)})")
        return f"3,{v.side},{v.side}"
    if kind == "pool":
        v = Value(net.node(net.pick(("GlobalAveragePool", "GlobalMaxPool")), v.name), v.width, 1)
    features = v.width * v.side**2
    transposed = net.pick((0, 1))
    weight = net.weight(*((5, features) if transposed else (features, 5)))
    net.text.append(f"y = Gemm <transB={transposed}> ({flattened(net, v)}, {weight}, {net.weight(5)})")
    return "5"


def row_head(net: Net, v: Value) -> str:
    mean = net.pick((True, False))
    name = net.axes("ReduceMean", v.name, [1], 18, "keepdims=0") if mean else v.name
    net.text.append(f"y = MatMul ({name}, {net.weight(v.width, 3)})")
    return "3" if mean else f"{v.side},3"


@st.composite
def models(draw: Draw) -> ModelProto:
    """A network of 2 to 12 layers, with a first layer that makes the features and a head that makes the output."""
    net = Net(draw, draw(st.integers(11, 21)))
    batch, images = net.pick(("2", "N")), net.pick((True, True, False))
    side = net.pick((4, 6, 8)) if images else net.pick((3, 5))
    first, steps, head = (conv, IMAGE_STEPS, image_head) if images else (linear, ROW_STEPS, row_head)
    value = first(net, Value("x", 3, side))
    net.values.append(value)
    for _ in range(draw(st.integers(2, 12))):
        value = net.pick(steps)(net, value)
        net.values.append(value)
    result = head(net, value)
    shape = f"3,{side},{side}" if images else f"{side},3"
    return build(f"float[{batch},{shape}] x", " ".join(net.text), f"float[{batch},{result}] y", net.weights, net.opset)

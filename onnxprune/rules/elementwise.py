"""Operators that compute each output element from the input elements at the same place, with ONNX broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.relations import Axis, Site, rule

UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu Cast Clip ai.onnx.ml:Binarizer
""".split()
VARIADIC = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
    Mul Or Pow PRelu Sub Sum SwiGLU Where Xor
""".split()


def broadcast(site: Site, inputs: Sequence[Sequence[Axis]], output: Sequence[Axis]) -> None:
    """Shapes align at the last axis; an input axis of size 1 is repeated (ONNX's Broadcasting.md)."""
    for axes in inputs:
        site.same_all(list(axes)[::-1], list(output)[::-1])


@rule(*UNARY)
def unary(site: Site) -> None:
    site.same_all(site.x[0], site.y[0])


@rule(*VARIADIC)
def variadic(site: Site) -> None:
    axes = site.x
    if site.opset < 7 and site.get("broadcast"):  # the second input stands at `axis` of the first
        start = site.get("axis", len(site.x[0]) - len(site.x[1]))
        site.same_all(site.x[1], site.x[0][start:])
        axes = site.x[:1]
    broadcast(site, axes, site.y[0])


@rule("CastLike")
def cast_like(site: Site) -> None:
    """Of the second input only the type matters."""
    site.same_all(site.x[0], site.y[0])
    for axis in site.x[1]:
        site.product([axis], [axis])


@rule("Dropout")
def dropout(site: Site) -> None:
    for output in site.y:
        site.same_all(site.x[0], output)


@rule(*(f"com.microsoft:{op}" for op in ("BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "ScaledSiLU")))
def fused_activation(site: Site) -> None:
    """x, perhaps plus a bias along the last axis and a skip, through an activation."""
    broadcast(site, site.x, site.y[0])


@rule("com.microsoft:BiasSplitGelu")
def bias_split_gelu(site: Site) -> None:
    """(N, S, 2·D) plus a bias -> one half times the Gelu of the other, (N, S, D)."""
    x, y = site.x[0], site.y[0]
    two = site.new(2)
    site.fixed([two], "the halves of BiasSplitGelu")
    site.same_all(x[:-1], y[:-1])
    site.same(site.x[1][0], x[-1])
    site.product([x[-1]], [two, y[-1]])

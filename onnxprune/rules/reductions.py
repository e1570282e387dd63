"""Pooling, reductions over axes, and what looks for places along an axis."""

from __future__ import annotations

from onnxprune.relations import Site, rule
from onnxprune.rules.layers import windows


@rule("MaxPool", "AveragePool", "LpPool", "MaxUnpool")
def pool(site: Site) -> None:
    places = len(site.y) > 1 or len(site.x) > 1  # MaxPool makes and MaxUnpool takes indices, which count over all places
    for output in site.y:
        site.same_all(site.x[0][1:2], output[1:2])
        windows(site, site.x[0], output, () if places else site.get("kernel_shape", ()))
    for indices in site.y[1:]:
        site.fixed(indices[:2], "MaxPool's indices count over all channels")


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(site: Site) -> None:
    site.same_all(site.x[0][:2], site.y[0][:2])
    site.statistics(site.x[0][2:])


def reduce(site: Site, neutral: bool) -> None:
    """The reduced axes go (or stay with size 1); the others pass.  neutral: a zero does not change the result."""
    x, y = site.x[0], list(site.y[0])
    axes = site.numbers("axes", 1)
    if axes is None and site.has(1):
        site.fixed([*x, *y], f"{site.node.op_type} over axes that are computed at run time")
        return
    if not axes:
        if site.get("noop_with_empty_axes", 0):
            site.same_all(x, y)
            return
        axes = list(range(len(x)))
    gone = {a % len(x) for a in axes}
    keep = bool(site.get("keepdims", 1))
    for i, axis in enumerate(x):
        if i not in gone:
            site.same_all([axis], [y.pop(0)])
            continue
        if keep:
            y.pop(0)
        if neutral:
            site.product([axis], [axis])
        else:
            site.statistics([axis])


@rule("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
def reduce_sum(site: Site) -> None:
    reduce(site, neutral=True)


@rule("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp")
def reduce_statistics(site: Site) -> None:
    reduce(site, neutral=False)


@rule("ArgMax", "ArgMin", "CumSum", "TopK")
def along_axis(site: Site) -> None:
    """The result names or orders places along the axis: that axis is fixed, the others pass."""
    x, op = site.x[0], site.node.op_type
    number = site.number(1) if op == "CumSum" else None
    if op == "CumSum" and number is None:
        site.fixed([*x, *site.y[0]], "CumSum along an axis that is computed at run time")
        return
    axis = int(number.ravel()[0]) if number is not None else site.get("axis", -1 if op == "TopK" else 0)
    axis %= len(x)
    for output in site.y:
        others = [a for i, a in enumerate(x) if i != axis]
        targets = [a for i, a in enumerate(output) if i != axis] if len(output) == len(x) else output
        site.same_all(others, targets)
        site.fixed([output[axis]] if len(output) == len(x) else [], f"{op} tells places along it apart")
    site.fixed([x[axis]], f"{op} tells places along it apart")

"""Layers of state-space and linear-attention models as operators, and mixtures of experts."""

from __future__ import annotations

from onnxprune.relations import Axis, Site, rule
from onnxprune.rules.attention import keep_scale, ordered
from onnxprune.rules.layers import channels_first, grouped

MS = "com.microsoft"


@rule("CausalConvWithState", f"{MS}:CausalConvWithState")
def causal_convolution(site: Site) -> None:
    """x (N, C, …), w (C, 1, kernel…), bias (C), past (N, C, places) -> y like x, present like past: a kernel a channel."""
    last = bool(site.get("channels_last", 0))
    x, y = (channels_first(a) if last else a for a in (site.x[0], site.y[0]))
    w = site.x[1]
    site.same_all(x[:2], y[:2])
    site.fixed([*x[2:], *y[2:], *w[1:]], "spatial axis")
    for axes in (w, *site.x[2:3]):
        site.same_all(axes, [x[1]])
    for state in (*site.x[3:4], *site.y[1:2]):
        if state and last:
            site.fixed([*state, x[1]], "a state with channels last")
        else:
            start = len(state) - len(x)  # a window of states comes first
            site.same_all(state[start:], x[:2])
            site.fixed([*state[:start], *state[start + 2 :]], "windows and places of a state")


@rule("LinearAttention", f"{MS}:LinearAttention")
def linear_attention(site: Site) -> None:
    """q (N, T, heads·size), k (N, T, kv·size), v (N, T, kv·inner), state (N, kv, size, inner) -> (N, T, heads·inner), state.

    A decay is (N, T, kv·size) or (N, T, kv), a rate (N, T, kv) or (N, T, 1).
    """
    q, k, v, y = site.x[0], site.x[1], site.x[2], site.y[0]
    many, few = site.get("q_num_heads"), site.get("kv_num_heads")
    if many % few or site.size(k[2]) * many != site.size(q[2]) * few or site.get("state_window", 0):
        site.fixed([a for axes in (*site.x, *site.y) for a in axes], "linear attention of other heads")
        return
    heads, kv = site.new(many), site.new(few)
    size, inner = site.new(site.size(q[2]) // many), site.new(site.size(v[2]) // few)
    grouped(site, heads, kv, site.new(many // few))
    decay, rate = (site.x[i] if site.has(i) else [] for i in (4, 5))
    for axes, count, width in ((q, heads, size), (k, kv, size), (v, kv, inner), (y, heads, inner)):
        grouped(site, axes[2], count, width)
    if decay and site.size(decay[2]) == few:
        site.same(decay[2], kv)
    elif decay:
        grouped(site, decay[2], kv, size)
    site.same_all(rate[2:], [kv])
    for axes in (q, k, v, y, decay, rate):
        site.same_all(axes[:1], q[:1])
        ordered(site, axes[1:2])
    for state in (site.x[3] if site.has(3) else [], *site.y[1:2]):
        site.same_all(state, [q[0], kv, size, inner])
    for attribute, axis in (("q_num_heads", heads), ("kv_num_heads", kv)):
        site.mend(attribute, {0: [axis]})
    keep_scale(site, size)


@rule(f"{MS}:GatedRMSNorm")
def gated_rms_norm(site: Site) -> None:
    """x (…, groups·C) normalized over each C, times scale (C) and the activated gate."""
    x, scale = site.x[0], site.x[1]
    groups = site.new(site.size(x[-1]) // site.size(scale[0]))
    for axes in (site.x[2], site.y[0]):
        site.same_all(x, axes)
    grouped(site, x[-1], groups, scale[0])
    site.statistics([scale[0]])


@rule(f"{MS}:LinearAttentionGate")
def linear_attention_gate(site: Site) -> None:
    """Gates (N, T, heads) with a bias and a scale a head."""
    for axes in (*site.x, *site.y):
        site.same_all(axes[::-1], site.x[0][::-1])


def expert_rows(site: Site, rows: Axis, inner: Axis) -> None:
    """Gate and value rows of a fused SwiGLU, neighbours (1) or halves (2); else the neurons themselves."""
    if site.size(rows) == site.size(inner):
        site.same(rows, inner)
        return
    two = site.new(2)
    site.fixed([two], "gate and value of SwiGLU")
    site.product([rows], [inner, two] if site.get("swiglu_fusion", 0) == 1 else [two, inner])


@rule(f"{MS}:MoE")
def experts(site: Site) -> None:
    """x (…, H), router (tokens, E), first (E, rows, H) and bias (E, rows), second (E, H, inner) and bias (E, H), third (E, inner, H).

    A unit is a neuron of all experts at one place; the experts themselves are told apart by the router.
    """
    x, y, first, second = site.x[0], site.y[0], site.x[2], site.x[4]
    if site.size(second[1]) != site.size(x[-1]):
        site.fixed([a for axes in (*site.x, *site.y) for a in axes], "experts with transposed weights")
        return
    inner = second[2]
    site.same_all(x, y)
    for rows in (first, site.x[6] if site.has(6) else [], site.x[3] if site.has(3) else [], site.x[7] if site.has(7) else []):
        if rows:
            expert_rows(site, rows[1], inner)
            site.same_all(rows[2:], x[-1:])
    site.same(second[1], x[-1])
    site.same_all(site.x[5][1:] if site.has(5) else [], x[-1:])
    site.fixed([site.x[1][0], *x[:-1]], "tokens that the router names")
    site.fixed([site.x[1][1], *(axes[0] for axes in site.x[2:] if axes)], "experts that the router names")

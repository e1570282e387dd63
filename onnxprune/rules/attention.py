"""Attention and rotary embeddings as operators: hidden axes are heads × head size, heads of the queries are key heads × repeats."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.relations import Axis, Site, rule
from onnxprune.rules.layers import grouped


def split_heads(site: Site, axes: Sequence[Axis], heads: Axis, size: Axis) -> None:
    """(N, S, heads·size) or (N, heads, S, size)."""
    if len(axes) == 3:
        grouped(site, axes[2], heads, size)
    elif len(axes) == 4:
        site.same(axes[1], heads)
        site.same(axes[3], size)


def outer_axes(site: Site, axes: Sequence[Axis], like: Sequence[Axis]) -> None:
    """Batch and, where the ranks agree, sequence axes."""
    places = {3: (0, 1), 4: (0, 2)}
    site.same_all([axes[i] for i in places[len(axes)]], [like[i] for i in places[len(like)]])


def over_heads(site: Site, position: int, heads: Axis) -> None:
    """A bias or mask that broadcasts to (N, heads, S, T)."""
    if site.has(position) and len(site.x[position]) >= 3 and site.size(site.x[position][-3]) == site.size(heads) > 1:
        site.same(site.x[position][-3], heads)


def cached(site: Site, axes: Sequence[Axis], heads: Axis, size: Axis) -> None:
    """Past or present keys or values (N, heads, T, size)."""
    if axes:
        site.same(axes[1], heads)
        site.same(axes[3], size)
        site.fixed([axes[0], axes[2]], "batch and length of a cache")


def logits(site: Site, first: int, heads: Axis) -> None:
    """Outputs (N, heads, S, T) from the first on."""
    for axes in site.y[first:]:
        if len(axes) > 1:
            site.same(axes[1], heads)
            site.fixed([axes[0], *axes[2:]], "batch and lengths of attention's logits")


def keep_scale(site: Site, size: Axis) -> None:
    """The default scale follows from the head size; a narrower head keeps the scale that it was trained with."""
    if not site.get("scale"):
        site.keep("scale", site.size(size) ** -0.5, size)


@rule("Attention")
def attention(site: Site) -> None:
    """Y = softmax(Q·Kᵀ·scale + mask)·V, in 3-D (N, S, heads·size) or 4-D (N, heads, S, size); opset 23."""
    q, k, v, y = site.x[0], site.x[1], site.x[2], site.y[0]
    many = site.get("q_num_heads") if len(q) == 3 else site.size(q[1])
    few = site.get("kv_num_heads") if len(k) == 3 else site.size(k[1])
    heads, kv = site.new(many), site.new(few)
    size = site.new(site.size(q[-1]) // (many if len(q) == 3 else 1))
    inner = site.new(site.size(v[-1]) // (few if len(v) == 3 else 1))
    grouped(site, heads, kv, site.new(many // few))
    for axes, count, width in ((q, heads, size), (k, kv, size), (v, kv, inner), (y, heads, inner)):
        split_heads(site, axes, count, width)
    outer_axes(site, q, y)
    over_heads(site, 3, heads)
    for position, width in ((4, size), (5, inner)):
        if site.has(position):
            cached(site, site.x[position], kv, width)
    for axes, width in zip(site.y[1:3], (size, inner), strict=False):
        cached(site, axes, kv, width)
    logits(site, 3, heads)
    for attribute, axis in (("q_num_heads", heads), ("kv_num_heads", kv)):
        if attribute in site.attributes:
            site.mend(attribute, {0: [axis]})
    keep_scale(site, size)


@rule("com.microsoft:Attention")
def packed_attention(site: Site) -> None:
    """x (N, S, I), w (I, q + k + v), b (q + k + v), past (2, N, heads, P, size) -> y (N, S, v), present."""
    x, w, y = site.x[0], site.x[1], site.y[0]
    count = site.get("num_heads")
    widths = site.get("qkv_hidden_sizes") or [site.size(w[1]) // 3] * 3
    heads, size, inner = site.new(count), site.new(widths[0] // count), site.new(widths[2] // count)
    parts = [site.new(width) for width in widths]
    site.same(x[2], w[0])
    outer_axes(site, x, y)
    for whole in (w[1], *(site.x[2] if site.has(2) else [])):
        site.concat(whole, parts)
    for part, width in zip(parts, (size, size, inner), strict=True):
        grouped(site, part, heads, width)
    site.same(y[2], parts[2])
    for axes in (site.x[4] if site.has(4) else [], *site.y[1:2]):
        if axes:
            site.same(axes[2], heads)
            site.same(axes[4], size)
            site.same(size, inner)
            site.fixed([axes[0], axes[1], axes[3]], "batch and length of a cache")
    over_heads(site, 5, heads)
    if site.get("do_rotary"):
        site.fixed([size], "rotary embedding inside Attention")
    site.mend("num_heads", {0: [heads]})
    site.mend("qkv_hidden_sizes", {i: [part] for i, part in enumerate(parts)})
    keep_scale(site, size)


@rule("com.microsoft:MultiHeadAttention")
def multi_head_attention(site: Site) -> None:
    """q (N, S, heads·size), k and v (N, T, …), b (q + k + v), past (N, heads, P, size) -> y (N, S, heads·size), present."""
    q, y = site.x[0], site.y[0]
    if len(q) != 3 or not (site.has(1) and site.has(2)) or len(site.x[1]) == 5:
        site.fixed([a for axes in (*site.x, *site.y) for a in axes], "packed queries, keys and values")
        return
    k, v, count = site.x[1], site.x[2], site.get("num_heads")
    heads, size, inner = site.new(count), site.new(site.size(q[2]) // count), site.new(site.size(y[2]) // count)
    for axes, width in ((q, size), (k, size), (v, inner), (y, inner)):
        split_heads(site, axes, heads, width)
    outer_axes(site, q, y)
    if site.has(3):
        parts = [site.new(count * site.size(width)) for width in (size, size, inner)]
        site.concat(site.x[3][0], parts)
        for part, width in zip(parts, (size, size, inner), strict=True):
            grouped(site, part, heads, width)
    over_heads(site, 5, heads)
    for axes, width in (*zip(site.x[6:8], (size, inner), strict=False), *zip(site.y[1:3], (size, inner), strict=False)):
        cached(site, axes, heads, width)
    logits(site, 3, heads)
    site.mend("num_heads", {0: [heads]})
    keep_scale(site, size)


@rule("com.microsoft:GroupQueryAttention")
def group_query_attention(site: Site) -> None:
    """q (N, S, heads·size), k and v (N, T, kv·size) or all three packed in q; past and present (N, kv, T, size)."""
    q, y = site.x[0], site.y[0]
    many, few = site.get("num_heads"), site.get("kv_num_heads")
    heads, kv, size = site.new(many), site.new(few), site.new(site.size(y[2]) // many)
    grouped(site, heads, kv, site.new(many // few))
    outer_axes(site, q, y)
    grouped(site, y[2], heads, size)
    if site.has(1):
        for axis, count in ((q[2], heads), (site.x[1][2], kv), (site.x[2][2], kv)):
            grouped(site, axis, count, size)
    else:
        parts = [site.new(site.size(count) * site.size(size)) for count in (heads, kv, kv)]
        site.concat(q[2], parts)
        for part, count in zip(parts, (heads, kv, kv), strict=True):
            grouped(site, part, count, size)
    for axes in (*site.x[3:5], *site.y[1:3]):
        cached(site, axes, kv, size)
    over_heads(site, 10, heads)
    logits(site, 3, heads)
    if site.has(11):
        site.same(site.x[11][0], heads)
    if site.get("do_rotary"):
        site.fixed([size], "rotary embedding inside GroupQueryAttention")
    site.mend("num_heads", {0: [heads]})
    site.mend("kv_num_heads", {0: [kv]})
    keep_scale(site, size)


@rule("RotaryEmbedding", "com.microsoft:RotaryEmbedding")
def rotary_embedding(site: Site) -> None:
    """The first rotary_embedding_dim of each head are pairs, a half (or, interleaved, two neighbours) each; cos and sin (…, pairs)."""
    x, y = site.x[0], site.y[0]
    tables = site.x[2:4] if site.node.domain == "com.microsoft" else site.x[1:3]
    pairs = tables[0][-1]
    count = site.get("num_heads") or 0
    whole = site.size(x[-1])
    turned = 2 * site.size(pairs)
    head = whole if len(x) == 4 else whole // count if count else turned
    heads, size = site.new(whole // head if len(x) == 3 else site.size(x[1])), site.new(head)
    site.same_all(x, y)
    split_heads(site, x, heads, size)
    for table in tables[1:]:
        site.same(table[-1], pairs)
    part, two = site.new(turned), site.new(2)
    site.fixed([two], "the two of a rotated pair")
    site.product([part], [pairs, two] if site.get("interleaved") else [two, pairs])
    site.concat(size, [part] if turned == head else [part, site.new(head - turned)])
    if count:
        site.mend("num_heads", {0: [heads]})
    if site.get("rotary_embedding_dim"):
        site.mend("rotary_embedding_dim", {0: [part]})

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


def tokens(axes: Sequence[Axis]) -> Axis:
    """The sequence axis of (N, S, heads·size) or (N, heads, S, size)."""
    return axes[1 if len(axes) == 3 else 2]


def cached(site: Site, axes: Sequence[Axis], batch: Axis, heads: Axis, size: Axis) -> None:
    """Past or present keys or values (N, heads, T, size)."""
    if axes:
        site.same_all([axes[0], axes[1], axes[3]], [batch, heads, size])
        site.fixed([axes[2]], "length of a cache")


def masked(site: Site, position: int, logits: Sequence[Axis]) -> None:
    """A mask or bias that broadcasts to the logits (N, heads, S, T); what is missing of a shorter one is masked."""
    if site.has(position):
        mask = site.x[position]
        site.same_all(mask[::-1], logits[::-1])
        if mask and site.size(mask[-1]) not in (1, site.size(logits[-1])):
            site.fixed([mask[-1], logits[-1]], "a mask that is shorter than the sequence")


def ordered(site: Site, sequences: Sequence[Axis]) -> None:
    """Attention that tells places along the sequences apart."""
    site.fixed(sequences, f"{site.node.op_type} knows the order of the sequence")


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
        site.same(axes[0], q[0])
    queries, keys = tokens(q), tokens(k)
    site.same(tokens(y), queries)
    site.same(tokens(v), keys)
    states = [*(site.x[4:6] if site.has(4) else []), *site.y[1:3]]
    for axes, width in zip(states, (size, inner) * 2, strict=False):
        cached(site, axes, q[0], kv, width)
    past = [axes[2] for axes in states[:2] if site.has(4)]
    whole = keys
    if past:
        whole = site.new(site.size(past[0]) + site.size(keys))
        site.concat(whole, [past[0], keys])
        site.same(past[0], past[1])
    for axes in site.y[1:3]:
        site.same_all(axes[2:3], [whole])
    logits = [q[0], heads, queries, whole]
    masked(site, 3, logits)
    for axes in site.y[3:]:
        site.same_all(axes, logits)
    if site.has(6):
        site.same_all(site.x[6], [q[0]])
    site.statistics([whole])
    if site.get("is_causal") or site.has(6) or any(site.get(f"{side}_window_size", -1) >= 0 for side in ("left", "right")):
        ordered(site, [queries, whole])
    for attribute, axis in (("q_num_heads", heads), ("kv_num_heads", kv)):
        if attribute in site.attributes:
            site.mend(attribute, {0: [axis]})
    keep_scale(site, size)


@rule("com.microsoft:QAttention")
def quantized_attention(site: Site) -> None:
    """Scales and zero points follow the bias, a value a column of the weight or one for all."""
    w, past, mask = site.x[1], site.x[8] if site.has(8) else [], site.has(5)
    for position in (4, 7):
        if site.has(position) and len(site.x[position]) == 1 and site.size(site.x[position][0]) > 1:
            site.same(site.x[position][0], w[1])
    packed(site, past, [], mask)


@rule("com.microsoft:Attention")
def packed_attention(site: Site) -> None:
    packed(site, site.x[4] if site.has(4) else [], site.x[5] if site.has(5) else [], site.has(3) or site.has(6))


def packed(site: Site, past: Sequence[Axis], bias: Sequence[Axis], masked_keys: bool) -> None:
    """x (N, S, I), w (I, q + k + v), b (q + k + v), past (2, N, heads, P, size) -> y (N, S, v), present."""
    x, w, y = site.x[0], site.x[1], site.y[0]
    count = site.get("num_heads")
    widths = site.get("qkv_hidden_sizes") or [site.size(w[1]) // 3] * 3
    heads, size, inner = site.new(count), site.new(widths[0] // count), site.new(widths[2] // count)
    parts = [site.new(width) for width in widths]
    site.same(x[2], w[0])
    site.same_all(x[:2], y[:2])
    for whole in (w[1], *(site.x[2] if site.has(2) else [])):
        site.concat(whole, parts)
    for part, width in zip(parts, (size, size, inner), strict=True):
        grouped(site, part, heads, width)
    site.same(y[2], parts[2])
    for axes in (past, *site.y[1:2]):
        if axes:
            cached(site, axes[1:], x[0], heads, size)
            site.fixed(axes[:1], "keys and values of a cache")
            site.same(size, inner)
    site.same_all(bias[::-1], [x[1], x[1], heads, x[0]])
    site.statistics([x[1]])
    if masked_keys or past or len(site.y) > 1 or site.get("unidirectional"):
        ordered(site, x[:2])
    if site.get("do_rotary"):
        site.fixed([size], "rotary embedding inside Attention")
    site.mend("num_heads", {0: [heads]})
    if site.node.op_type == "QAttention":  # it has three equal parts
        site.same(size, inner)
    else:
        site.mend("qkv_hidden_sizes", {i: [part] for i, part in enumerate(parts)})
    keep_scale(site, size)


@rule("com.microsoft:MultiHeadAttention")
def multi_head_attention(site: Site) -> None:
    """q (N, S, heads·size), k and v (N, T, …), b (q + k + v), past (N, heads, P, size) -> y (N, S, heads·size), present.

    Keys and values may be packed, (N, T, heads, 2, size), as may be all three.
    """
    q, y, count = site.x[0], site.y[0], site.get("num_heads")
    k, v = (site.x[i] if site.has(i) else [] for i in (1, 2))
    heads, inner = site.new(count), site.new(site.size(y[2]) // count)
    packed = q if len(q) == 5 else k if len(k) == 5 else []
    size = inner if packed else site.new(site.size(q[2]) // count)
    if packed:
        site.same_all([packed[0], packed[2], packed[4]], [q[0], heads, size])
        site.fixed([packed[3]], "packed queries, keys and values")
        k = v = []
    for axes, width in ((q, size), (k, size), (v, inner), (y, inner)):
        split_heads(site, axes, heads, width)
        site.same_all(axes[:1], q[:1])
    if site.has(3):
        parts = [site.new(count * site.size(width)) for width in (size, size, inner)]
        site.concat(site.x[3][0], parts)
        for part, width in zip(parts, (size, size, inner), strict=True):
            grouped(site, part, heads, width)
    for axes, width in (*zip(site.x[6:8], (size, inner), strict=False), *zip(site.y[1:3], (size, inner), strict=False)):
        cached(site, axes, q[0], heads, width)
    queries, keys = q[1], (packed[1] if packed else tokens(k))
    site.same(y[1], queries)
    site.same_all([tokens(v)] if v else [], [keys])
    site.statistics([keys])
    masked(site, 5, [q[0], heads, queries, keys])
    for axes in site.y[3:]:
        site.same_all(axes[:3], [q[0], heads, queries])
    if any(site.has(i) for i in (4, 6, 8, 9)) or len(site.y) > 1 or site.get("unidirectional"):
        ordered(site, [q[0], queries, keys])
    site.mend("num_heads", {0: [heads]})
    keep_scale(site, size)


@rule("com.microsoft:GroupQueryAttention")
def group_query_attention(site: Site) -> None:
    """q (N, S, heads·size), k and v (N, T, kv·size) or all three packed in q; past and present (N, kv, T, size)."""
    q, y = site.x[0], site.y[0]
    many, few = site.get("num_heads"), site.get("kv_num_heads")
    heads, kv, size = site.new(many), site.new(few), site.new(site.size(y[2]) // many)
    grouped(site, heads, kv, site.new(many // few))
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
        cached(site, axes, q[0], kv, size)
    masked(site, 10, [q[0], heads, q[1], site.new(0)])
    for axes in site.y[3:]:
        site.same_all(axes[1:2], [heads])
    ordered(site, [a for axes in (q, site.x[1], site.x[2], y) for a in axes[:2]])
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
    positions = site.x[1 if site.node.domain == "com.microsoft" else 3] if site.has(3) else []
    rows = [x[0], tokens(x)]
    site.same_all(positions if len(positions) == 2 else [], rows)
    for table in tables:
        site.same(table[-1], pairs)
        if len(table) == 3:
            site.same_all(table[:2], rows)
        else:
            site.fixed(table[:1], "indexed by RotaryEmbedding")
    if len(positions) < 2 and len(tables[0]) == 2:
        ordered(site, rows)
    part, two = site.new(turned), site.new(2)
    site.fixed([two], "the two of a rotated pair")
    site.product([part], [pairs, two] if site.get("interleaved") else [two, pairs])
    site.concat(size, [part] if turned == head else [part, site.new(head - turned)])
    if count:
        site.mend("num_heads", {0: [heads]})
    if site.get("rotary_embedding_dim"):
        site.mend("rotary_embedding_dim", {0: [part]})

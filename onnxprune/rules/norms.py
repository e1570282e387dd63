"""Normalizations: which axes the statistics are taken over, and where scale and bias stand."""

from __future__ import annotations

from onnxprune.relations import Site, rule


@rule("BatchNormalization")
def batch_normalization(site: Site) -> None:
    """Running statistics, a channel each: nothing is shared between channels; in training over the other axes."""
    x = site.x[0]
    site.same_all(x, site.y[0])
    if site.get("training_mode") or (site.opset < 7 and not site.get("is_test")):
        site.statistics([*x[:1], *x[2:]])
    for parameter in site.x[1:]:
        site.same_all(parameter, x[1:2])
    for running in site.y[1:]:
        site.same_all(running, x[1:2])


@rule("InstanceNormalization")
def instance_normalization(site: Site) -> None:
    """Mean and variance over the spatial axes of each channel."""
    x = site.x[0]
    site.same_all(x, site.y[0])
    site.statistics(x[2:])
    for parameter in site.x[1:]:
        site.same_all(parameter, x[1:2])


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "com.microsoft:SimplifiedLayerNormalization")
def layer_normalization(site: Site) -> None:
    """Statistics over all axes from `axis` on; scale and bias broadcast over them."""
    x = site.x[0]
    first = site.get("axis", -1) % len(x)
    site.same_all(x, site.y[0])
    site.statistics(x[first:])
    for parameter in site.x[1:]:
        site.same_all(parameter[::-1], x[::-1])
    for saved in site.y[1:]:
        site.same_all(saved, x)


@rule("GroupNormalization")
def group_normalization(site: Site) -> None:
    """Channels are num_groups × channels a group; scale and bias: a channel each since opset 21, a group each before."""
    x = site.x[0]
    groups = site.new(site.get("num_groups"))
    inner = site.new(site.size(x[1]) // site.size(groups))
    site.product([x[1]], [groups, inner])
    site.same_all(x, site.y[0])
    site.statistics([inner, *x[2:]])
    for parameter in site.x[1:]:
        site.same_all(parameter, x[1:2] if site.opset >= 21 else [groups])
    site.mend("num_groups", {0: [groups]})


@rule("com.microsoft:GroupNorm", "com.microsoft:SkipGroupNorm")
def fused_group_norm(site: Site) -> None:
    """Group normalization of x, or of x + skip + bias; (N, …, C) unless channels_last is 0, the skip may be (N, C)."""
    x, y, place = site.x[0], site.y[0], -1 if site.get("channels_last", 1) else 1
    groups = site.new(site.get("groups"))
    inner = site.new(site.size(x[place]) // site.size(groups))
    site.product([x[place]], [groups, inner])
    for axes in site.y:
        site.same_all(x, axes)
    site.statistics([inner, *(a for a in x[1:] if a != x[place])])
    for parameter in (*site.x[1:3], *site.x[4:5]):
        site.same_all(parameter, [x[place]])
    if site.has(3):
        skip = site.x[3]
        site.same_all(skip, [x[0], x[place]] if len(skip) == 2 else y)
    site.mend("groups", {0: [groups]})


@rule("LpNormalization", "Softmax", "LogSoftmax", "MeanVarianceNormalization")
def over_axis(site: Site) -> None:
    """Every element is divided by (or compared with) its neighbours along an axis; before opset 13, along all the later ones."""
    x, op = site.x[0], site.node.op_type
    site.same_all(x, site.y[0])
    if op == "MeanVarianceNormalization":
        site.statistics([x[i] for i in site.get("axes", [0, 2, 3])])
        return
    old = op != "LpNormalization" and site.opset < 13
    axis = site.get("axis", 1 if old else -1) % len(x)
    site.statistics(x[axis:] if old else [x[axis]])


@rule("Hardmax")
def hardmax(site: Site) -> None:
    """One at the first largest place: the order matters where two are alike."""
    x, old = site.x[0], site.opset < 13
    axis = site.get("axis", 1 if old else -1) % len(x)
    site.same_all(x, site.y[0])
    site.fixed(x[axis:] if old else [x[axis]], "Hardmax takes the first of equals")


@rule("LRN")
def local_response(site: Site) -> None:
    """A sum over neighbouring channels: their order matters."""
    site.same_all(site.x[0], site.y[0])
    site.fixed([site.x[0][1]], "LRN sums over neighbouring channels")


@rule("com.microsoft:SkipLayerNormalization", "com.microsoft:SkipSimplifiedLayerNormalization")
def skip_layer_normalization(site: Site) -> None:
    """input + skip (+ bias), normalized over the last axis; the sum is another output."""
    x = site.x[0]
    site.statistics(x[-1:])
    site.same_all(x[::-1], site.x[1][::-1])
    for parameter in site.x[2:]:
        site.same_all(parameter, x[-1:])
    site.same_all(x, site.y[0])
    for axes in site.y[1:]:
        site.same_all(axes, x)


@rule("com.microsoft:EmbedLayerNormalization", "com.microsoft:QEmbedLayerNormalization")
def embed_layer_normalization(site: Site) -> None:
    """Word, position and segment embeddings (rows, H) added and normalized over H."""
    hidden = site.y[0][-1]
    site.statistics([hidden])
    for position in (2, 3, 4):
        if site.has(position):
            site.same(site.x[position][1], hidden)
            site.fixed(site.x[position][:1], "indexed by EmbedLayerNormalization")
    for parameter in site.x[5:7]:
        site.same_all(parameter, [hidden])
    for axes in site.y[2:]:
        site.same_all(axes, site.y[0])
    site.fixed([*site.y[0][:-1], *(a for axes in site.y[1:2] for a in axes)], "batch and places")

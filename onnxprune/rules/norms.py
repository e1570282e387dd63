"""Normalizations: which axes the statistics are taken over, and where scale and bias stand."""

from __future__ import annotations

from onnxprune.relations import Site, rule


@rule("BatchNormalization")
def batch_normalization(site: Site) -> None:
    """Running statistics, a channel each: nothing is shared between channels."""
    x = site.x[0]
    site.same_all(x, site.y[0])
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
    site.same_all(site.x[0], site.y[0])
    site.fixed(site.x[0], "Hardmax takes the first of equals")


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


@rule("com.microsoft:EmbedLayerNormalization")
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

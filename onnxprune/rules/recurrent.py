"""LSTM, GRU and RNN: the rows of their weights are gates × hidden units; both directions share the hidden axis."""

from __future__ import annotations

from onnxprune.relations import Axis, Site, rule

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def stacked(site: Site, whole: Axis, hidden: Axis) -> None:
    """whole = blocks × hidden, where the number of blocks follows from the sizes."""
    if site.size(whole) == site.size(hidden):
        site.same(whole, hidden)
        return
    several = site.new(site.size(whole) // site.size(hidden))
    site.fixed([several], "gates")
    site.product([whole], [several, hidden])


@rule("com.microsoft:DynamicQuantizeLSTM")
def quantized_lstm(site: Site) -> None:
    """As LSTM, with W (D, I, 4·H) and R (D, H, 4·H) transposed, quantized with a scale and zero point a direction or a column."""
    w, r = site.x[1], site.x[2]
    hidden = r[1]
    site.same(site.x[0][2], w[1])
    scales = [axes[1] for axes in site.x[8:12] if len(axes) == 2]
    for columns in (w[2], r[2], *scales, *(site.x[i][1] for i in (3, 7) if site.has(i))):
        stacked(site, columns, hidden)
    for axes in (*(site.x[i] for i in (5, 6) if site.has(i)), *(y for y in site.y if y)):
        site.same(axes[-1], hidden)
        site.fixed(axes[:-1], "steps, directions and batch of a recurrent layer")
    site.mend("hidden_size", {0: [hidden]})


@rule(*GATES)
def recurrent(site: Site) -> None:
    """X (T, N, I), W (D, gates·H, I), R (D, gates·H, H), B (D, 2·gates·H), P (D, 3·H), h and c (D, N, H) -> Y (T, D, N, H).

    With layout 1 the batch axis comes first.
    """
    x, w, r = site.x[0], site.x[1], site.x[2]
    hidden = r[2]
    site.same(x[2], w[2])
    for rows in (w[1], r[1], *(site.x[i][1] for i in (3, 7) if site.has(i))):
        stacked(site, rows, hidden)
    states = [site.x[i] for i in (5, 6) if site.has(i)] + [axes for axes in site.y[1:] if axes]
    for axes in (*states, site.y[0]):
        site.same_all(axes[-1:], [hidden])
        site.fixed(axes[:-1], "steps, directions and batch of a recurrent layer")
    site.mend("hidden_size", {0: [hidden]})


@rule("ReverseSequence")
def reverse_sequence(site: Site) -> None:
    """The first steps of every sequence in the batch are turned around."""
    turned = {site.get("time_axis", 0), site.get("batch_axis", 1)}
    site.same_all(*([axis for i, axis in enumerate(axes) if i not in turned] for axes in (site.x[0], site.y[0])))
    site.fixed([axes[i] for axes in (site.x[0], site.y[0]) for i in turned], "sequence axis")

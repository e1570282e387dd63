"""Transforms of signals, matrices and grids: their own axes are fixed, those of the batch pass."""

from __future__ import annotations

from onnxprune.relations import Site, rule


@rule("Det")
def determinant(site: Site) -> None:
    site.same_all(site.x[0][:-2], site.y[0])
    site.fixed(site.x[0][-2:], "a determinant's axis")


@rule("DFT")
def fourier(site: Site) -> None:
    """Along one axis; the last holds real and imaginary parts."""
    x, y = site.x[0], site.y[0]
    given = site.number(2) if site.has(2) else None
    if site.has(2) and given is None:
        site.fixed([*x, *y], "DFT along an axis that is computed at run time")
        return
    axis = (int(given.ravel()[0]) if given is not None else site.get("axis", 1 if site.opset < 20 else -2)) % len(x)
    others = [i for i in range(len(x) - 1) if i != axis]
    site.same_all([x[i] for i in others], [y[i] for i in others])
    site.fixed([x[axis], y[axis], x[-1], y[-1]], "DFT's axis")


@rule("STFT")
def short_fourier(site: Site) -> None:
    """signal (N, length, 1 or 2) -> (N, frames, bins, 2)."""
    site.same(site.x[0][0], site.y[0][0])
    site.fixed([*site.x[0][1:], *site.y[0][1:], *(a for axes in site.x[1:] for a in axes)], "STFT's axis")


@rule("AffineGrid")
def affine_grid(site: Site) -> None:
    """theta (N, r, r + 1) -> (N, …, r)."""
    x, y = site.x[0], site.y[0]
    if site.number(1) is None:
        site.fixed([*x, *y], "AffineGrid of a size that depends on data")
        return
    site.same(x[0], y[0])
    site.fixed([*x[1:], *y[1:], *site.x[1]], "spatial axis")
    site.mend(1, {0: [y[0]]})

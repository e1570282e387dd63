"""Quantize and dequantize: elementwise, with a scale and a zero point for the tensor or for each index of one axis."""

from __future__ import annotations

from onnxprune.relations import Site, rule


@rule("DequantizeLinear", "QuantizeLinear")
def quantize(site: Site) -> None:
    x = site.x[0]
    site.same_all(x, site.y[0])
    if site.get("block_size", 0):
        site.fixed(x, "quantized in blocks")
        return
    axis = site.get("axis", 1)
    for parameter in site.x[1:]:
        if len(parameter) == 1 and site.size(parameter[0]) > 1:
            site.same(parameter[0], x[axis % len(x)])

"""Quantizers by name (`k_means_type`). To add one: a function of the type `kmeans.Quantizer` in a file, and its entry here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...common.registry import Entry, Registry

if TYPE_CHECKING:
    from .kmeans import Quantizer

QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer",
    {
        "kmeans": Entry(".compression.quantize.kmeans:kmeans", "plain k-means"),
        "src": Entry(".compression.quantize.kmeans:src", "annealed k-means (SR-C)"),
    },
)

"""Quantizers by name (`k_means_type`). To add one: a function of the type `kmeans.Quantizer` in a file, and its entry
here."""

from __future__ import annotations

from typing import Any

from ...common.registry import Entry, Registry

QUANTIZERS: Registry[Any] = Registry(
    "quantizer",
    {
        "kmeans": Entry(".compression.quantize.kmeans:kmeans", "plain k-means"),
        "src": Entry(".compression.quantize.kmeans:src", "annealed k-means (SR-C)"),
    },
)

"""What the metadata of a packed file say of a quantized layer, and which layers ask for a later format."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..compression.quantize.layers import QuantizedLayer

VERSION_WITH_EIGHT_BITS = 5
VERSION_ALONG_OUTPUTS = 6


@dataclass(frozen=True)
class PackedLayer:
    """How a layer of a packed file is quantized: type and shape of its weight, subvector length d, centroids k, and
    along what its subvectors run."""

    kind: str
    shape: tuple[int, ...]
    d: int
    k: int
    layout: str = "input"

    @property
    def n_codes(self) -> int:
        """Subvectors of the weight."""
        return math.prod(self.shape) // self.d


def described_layer(layer: QuantizedLayer) -> list[Any]:
    """`[type, shape, d, k]`, and "output" where its subvectors run along outputs."""
    entry = [layer.quantized_kind, list(layer.weight_shape), layer.d, layer.k]
    return entry if layer.layout == "input" else [*entry, layer.layout]


def read_layer(entry: Any) -> PackedLayer:
    """The layer of an entry that a file holds.

    Raises:
        ValueError: it is none; says why, where that is not seen at once.
    """
    if not isinstance(entry, list) or len(entry) not in (4, 5) or entry[4:] not in ([], ["output"]):
        raise ValueError
    kind, shape, d, k = entry[:4]
    numbers = shape if isinstance(shape, list) and 2 <= len(shape) <= 8 else [None]
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.]{1,200}", kind):
        raise ValueError
    if not all(type(n) is int and 1 <= n < 1 << 31 for n in [*numbers, d, k]) or k < 2 or k & (k - 1):
        raise ValueError
    along_outputs = len(entry) == 5
    cut = shape[0] if along_outputs else math.prod(shape[1:])
    if cut % d or math.prod(shape) >= 1 << 48:
        raise ValueError(f"d = {d} does not divide the rows of {shape}")
    return PackedLayer(kind=kind, shape=tuple(shape), d=d, k=k, layout="output" if along_outputs else "input")


def version_for_layers(model: nn.Module) -> int | None:
    """The format version that a network's quantized layers ask for; None: any."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    if any(layer.layout == "output" for layer in layers):
        return VERSION_ALONG_OUTPUTS
    return VERSION_WITH_EIGHT_BITS if any(layer.codebook_bits == 8 for layer in layers) else None

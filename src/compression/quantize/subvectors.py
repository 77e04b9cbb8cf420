"""How a weight is cut into subvectors, and how many centroids a layer can use (paper section 3.1).

A weight (c_out, c_in, h, w) is read as the matrix (c_out, c_in*h*w), row-major, and each row is cut into m consecutive
subvectors of length d. A transposed convolution is read as it is stored: its first axis holds the input channels.
What has to be done the same way for every layer type stands in this one table.

Shapes: R rows (first axis of the weight), C channels of the second axis, d subvector length, m subvectors per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import PlanError

Layer = Any
"""A module whose attributes depend on its type (torch's own annotation of them is Tensor | Module)."""

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
QUANTIZABLE_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Layer types that can be quantized. A subclass is left alone: its forward may use the weight in another way."""


def can_be_quantized(module: Layer) -> bool:
    """Whether `module` is exactly one of the layer types that can be quantized, with a weight of its own.

    A weight that hooks compute from other parameters (older weight and spectral norm, pruning) is not a parameter
    itself.
    """
    return type(module) in QUANTIZABLE_TYPES and module._parameters.get("weight") is not None


def kernel_area(module: Layer) -> int:
    """h*w of a convolution's kernel; 1 for a linear layer."""
    return math.prod(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 1


def weight_shape(module: Layer) -> torch.Size:
    """Shape of the weight as it is stored."""
    return module.weight.shape


def to_subvectors(weight: Tensor, d: int) -> Tensor:
    """Cut `weight` (R, ...) into its subvectors, row by row: (R*m, d).

    Raises:
        PlanError: d does not divide the length of a row.
    """
    row = weight[0].numel()
    if row % d:
        raise PlanError(
            f"subvector size {d} does not divide the row length {row} of a weight of shape {tuple(weight.shape)}"
        )
    return weight.reshape(-1, d)


def from_subvectors(subvectors: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Put subvectors (R*m, d) back together as a weight of `shape`; the inverse of `to_subvectors`."""
    return subvectors.reshape(shape)


@dataclass(frozen=True)
class BlockRule:
    """Subvector lengths of the three kinds of layers (spec: `pw_subvector_size`, `fc_subvector_size`,
    `large_subvectors`)."""

    fc_subvector_size: int = 4
    pw_subvector_size: int = 4
    large_subvectors: bool = False


def subvector_size(module: Layer, rule: BlockRule, override: int | None = None) -> tuple[int, str | None]:
    """The subvector length d of a layer, and a note where the rule could not be followed.

    Linear: `fc_subvector_size`. 1x1 convolution: `pw_subvector_size`. Other convolutions: h*w, or 2*h*w with large
    blocks (h*w where the channels cannot be paired). `override` (layer_specs) replaces d of a linear layer or 1x1
    convolution.

    Raises:
        PlanError: d does not divide the row length, or `override` is given for a spatial convolution.
    """
    area = kernel_area(module)
    row = weight_shape(module)[1:].numel()
    if area > 1:
        if override is not None and override not in (area, 2 * area):
            raise PlanError(
                f"subvector_size {override} was given for a {'x'.join(map(str, module.kernel_size))} convolution, "
                f"whose subvectors have {area} (small blocks) or {2 * area} values (large blocks); use "
                "large_subvectors: True or False instead"
            )
        large = rule.large_subvectors if override is None else override == 2 * area
        if large and row % (2 * area):
            return (
                area,
                f"an odd number of channels ({row // area}) cannot be paired: small blocks (d = {area}) are used "
                "instead of large ones",
            )
        return (2 * area if large else area), None
    d = (
        override
        if override is not None
        else (rule.fc_subvector_size if isinstance(module, nn.Linear) else rule.pw_subvector_size)
    )
    if row % d:
        divisors = [n for n in range(2, min(row, 32) + 1) if row % n == 0] or [1]
        raise PlanError(
            f"subvector size {d} does not divide its {row} inputs per output; possible sizes: "
            f"{', '.join(map(str, divisors))}"
        )
    return d, None


def clamp_centroids(k: int, n_subvectors: int) -> int:
    """min(k, 2^floor(log2(n/4))) for n subvectors: at least four subvectors per centroid ("And the bit goes down").

    Returns 0 where not even two centroids are left; such a layer stays uncompressed.
    """
    quarter = n_subvectors // 4
    limit = 1 << (quarter.bit_length() - 1) if quarter else 0
    return min(k, limit) if limit >= 2 else 0


def bits_per_code(k: int) -> int:
    """log2(k) for a power of two k >= 2.

    Raises:
        PlanError: k is not a power of two.
    """
    if k < 2 or k & (k - 1):
        raise PlanError(f"k = {k} is not a power of two (2, 4, 8, ...): codes of log2(k) bits could not be counted")
    return k.bit_length() - 1

"""How a weight is cut into subvectors, and how many centroids a layer can use (paper section 3.1).

A weight (c_out, c_in, h, w) is read as the matrix (c_out, c_in*h*w), row-major, and each row is cut into m consecutive
subvectors of length d. A transposed convolution is read as it is stored: its first axis holds the input channels.
In the layout "output" it is the columns of that matrix that are cut, each into c_out / d consecutive subvectors, which
stand one beside the other: those of the first d outputs first, in the order of the columns.
What has to be done the same way for every layer type stands in this one table.

Shapes: R rows (first axis of the weight), C channels of the second axis, d subvector length, m subvectors per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ...common.errors import PlanError

LAYOUTS = ("input", "output")
"""Along what subvectors run: the inputs (and kernel) of one output, or neighbouring outputs."""
Layer = Any
"""A module whose attributes depend on its type (torch's own annotation of them is Tensor | Module)."""


class AlongOutputs(int):
    """The length d of subvectors that run along neighbouring outputs, where other layers' run along inputs."""


def kernel_area(module: Layer) -> int:
    """h*w of a convolution's kernel; 1 for any other module."""
    return math.prod(module.kernel_size) if isinstance(module, _ConvNd) else 1


def to_subvectors(weight: Tensor, d: int, layout: str = "input") -> Tensor:
    """Cut `weight` (R, ...) into its subvectors, row by row: (R*m, d).

    Raises:
        PlanError: d does not divide the length of a row, or in the layout "output" the number of rows.
    """
    if layout == "output":
        if weight.shape[0] % d:
            raise PlanError(f"subvector size {d} does not divide the {weight.shape[0]} outputs of a weight")
        return weight.reshape(weight.shape[0] // d, d, -1).transpose(1, 2).reshape(-1, d)
    row = weight[0].numel()
    if row % d:
        raise PlanError(
            f"subvector size {d} does not divide the row length {row} of a weight of shape {tuple(weight.shape)}"
        )
    return weight.reshape(-1, d)


def from_subvectors(subvectors: Tensor, shape: torch.Size | tuple[int, ...], layout: str = "input") -> Tensor:
    """Put subvectors (..., d) back together as a weight of `shape`; the inverse of `to_subvectors`."""
    if layout == "output":
        d = subvectors.shape[-1]
        return subvectors.reshape(shape[0] // d, -1, d).transpose(1, 2).reshape(shape)
    return subvectors.reshape(shape)


def codes_shape(shape: Sequence[int], d: int, layout: str = "input") -> tuple[int, int]:
    """The shape of the matrix of codes of a weight of `shape`: (R, m), or (R / d, values of a row).

    Raises:
        ValueError: d does not divide what is cut.
    """
    rows, row = shape[0], math.prod(shape[1:])
    if layout == "output":
        if rows % d:
            raise ValueError(f"subvector size {d} does not divide the {rows} outputs")
        return rows // d, row
    if row % d:
        raise ValueError(f"subvector size {d} does not divide the row length {row}")
    return rows, row // d


def scripted_vectors(codebook: Tensor, codes: Tensor, as_trained: bool, along_outputs: bool) -> Tensor:
    """What TorchScript compiles of a quantized weight, but for its shape; `as_trained`: without the rounding of a
    file."""
    chosen = codebook if as_trained else codebook.to(torch.float16).type_as(codebook)
    vectors = chosen.index_select(0, codes.reshape(-1))
    if along_outputs:
        return vectors.view(codes.size(0), codes.size(1), -1).transpose(1, 2).contiguous()
    return vectors


def clamp_centroids(k: int, n_subvectors: int) -> int:
    """min(k, 2^floor(log2(n/4))) for n subvectors: at least four subvectors per centroid ("And the bit goes down").

    Returns 0 where not even two centroids are left; such a layer stays uncompressed.
    """
    quarter = n_subvectors // 4
    limit = 1 << (quarter.bit_length() - 1) if quarter else 0
    return min(k, limit) if limit >= 2 else 0


SCALE_BITS = 32
"""Of the scale of a codebook that has one."""


def bits_of(n_subvectors: int, d: int, k: int, scale: float = 1.0, codebook_bits: int = 16) -> int:
    """Bits of a quantized weight: codes and codebook.

    Args:
        n_subvectors: of the weight.
        d: length of each.
        k: centroids.
        scale: of a codebook of 16-bit values.
        codebook_bits: of each of the codebook's values, 16 or 8.
    """
    return n_subvectors * bits_per_code(k) + codebook_size(k * d, codebook_bits, scale != 1)


def codebook_size(n_values: int, codebook_bits: int, has_scale: bool) -> int:
    """Bits of a codebook: its values, and its scale where it has one, as those of 8-bit values always do."""
    return n_values * codebook_bits + SCALE_BITS * (has_scale or codebook_bits == 8)


def bits_per_code(k: int) -> int:
    """log2(k) for a power of two k >= 2.

    Raises:
        PlanError: k is not a power of two.
    """
    if k < 2 or k & (k - 1):
        raise PlanError(f"k = {k} is not a power of two (2, 4, 8, ...): codes of log2(k) bits could not be counted")
    return k.bit_length() - 1

"""What a weight loses to the 16-bit floats that codebooks are made of, and the energies of a quantized weight.

Below 6e-8 a 16-bit float is zero, and below 6e-5 it has fewer digits than above: a weight of very small values would be
lost whatever its codebook, and above 65504 there is none. The codebook of such a weight is stored divided by a power of
two, its scale. Everything here is summed in double precision, in chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .subvectors import to_subvectors

CHUNK = 1 << 17
"""Values that are looked at at a time."""
MOST_LOST = 0.01
"""Share of a layer's energy that the rounding alone may lose."""
SAFE_SIZE = 2.0**-8
"""Where the largest value is at least so large, what becomes less precise is no part of the energy."""
WORTH_A_NOTE = 1e-5
"""Above what the rounding of values in the normal range of 16-bit floats loses (up to 2.4e-7)."""


def range_problem(values: Tensor) -> str | None:
    """Why a codebook cannot hold values of this size; None: it can. Nothing is copied."""
    size = largest_size(values)
    if not math.isfinite(size):
        return "the weight holds values that are not finite (NaN or infinity)"
    largest = torch.finfo(torch.float16).max
    if size > largest:
        return f"the weight holds values beyond {largest:.0f}, which 16-bit codebooks cannot hold"
    return None


def largest_size(weight: Tensor) -> float:
    """The largest |value|, NaN where there is one. Nothing is copied."""
    ends = [abs(float(end)) for end in torch.aminmax(weight)] if weight.numel() else [0.0]
    return max(ends) if all(map(math.isfinite, ends)) else math.nan


def scale_of(weight: Tensor) -> float:
    """The power of two that a codebook of `weight` is divided by in files: 1 unless its values are beyond 16-bit
    floats, or so small that these lose more of them than of others."""
    size = largest_size(weight)
    if not 0 < size < math.inf:
        return 1.0
    if SAFE_SIZE <= size <= torch.finfo(torch.float16).max or (size < 1 and rounding_loss(weight) <= WORTH_A_NOTE):
        return 1.0
    return 2.0 ** min(max(math.floor(math.log2(size)), -126), 127)  # a normal number of 32 bits


def rounding_loss(weight: Tensor, scale: float = 1.0) -> float:
    """Share of the energy of `weight` that is lost where every value, divided by `scale`, becomes the nearest 16-bit
    float, 0 to 1."""
    lost = energy = 0.0
    size = largest_size(weight)
    for chunk in weight.reshape(-1).split(CHUNK) if size else ():
        exact = chunk.double()
        # in units of the largest value, whose square may be less than a double can hold
        lost += float(((exact - (exact / scale).half().double() * scale) / size).square().sum())
        energy += float((exact / size).square().sum())
    return lost / energy if energy else 0.0


def weight_problem(weight: Tensor) -> str | None:
    """Why `weight` cannot be quantized with 16-bit codebooks; None: it can."""
    if not math.isfinite(largest_size(weight)):
        return "the weight holds values that are not finite (NaN or infinity)"
    if (loss := rounding_loss(weight, scale_of(weight))) <= MOST_LOST:
        return None
    return (
        "the weight's values are too small or too large for 16-bit codebooks: the rounding alone would lose "
        f"{100 * loss:.3g} % of its energy, {100 * MOST_LOST:.3g} % are allowed. Add the layer to "
        "model.compression_parameters.ignored_modules"
    )


def energies(weight: Tensor, codebook: Tensor, codes: Tensor, layout: str = "input") -> tuple[float, float]:
    """Sums of squares of what quantizing changed, and of the weight itself.

    Args:
        weight: (R, ...).
        codebook: (k, d).
        codes: (n,) of its subvectors.
        layout: along what these run.
    """
    d = codebook.shape[1]
    exact = codebook.double()
    lost = energy = 0.0
    cut = to_subvectors(weight, d, layout)
    pieces = zip(cut.split(max(1, CHUNK // d)), codes.split(max(1, CHUNK // d)), strict=True)
    for vectors, members in pieces:
        wide = vectors.double()
        energy += float(wide.square().sum())
        lost += float((wide - exact[members]).square().sum())
    return lost, energy

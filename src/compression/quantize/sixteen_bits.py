"""What a weight loses to the 16-bit floats that codebooks are made of, and the energies of a quantized weight.

Below 6e-8 a 16-bit float is zero, and below 6e-5 it has fewer digits than above: a weight of very small values is lost
whatever its codebook. Everything here is summed in double precision, in chunks.
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
WORTH_A_NOTE = 1e-5
"""Above what the rounding of values in the normal range of 16-bit floats loses (up to 2.4e-7)."""


def range_problem(values: Tensor) -> str | None:
    """Why a codebook cannot hold values of this size; None: it can. Nothing is copied."""
    ends = [float(end) for end in torch.aminmax(values)] if values.numel() else []
    if not all(math.isfinite(end) for end in ends):
        return "the weight holds values that are not finite (NaN or infinity)"
    largest = torch.finfo(torch.float16).max
    if any(abs(end) > largest for end in ends):
        return f"the weight holds values beyond {largest:.0f}, which 16-bit codebooks cannot hold"
    return None


def rounding_loss(weight: Tensor) -> float:
    """Share of the energy of `weight` that is lost where every value becomes the nearest 16-bit float, 0 to 1."""
    lost = energy = 0.0
    scale = max((abs(float(end)) for end in torch.aminmax(weight)), default=0.0) if weight.numel() else 0.0
    for chunk in weight.reshape(-1).split(CHUNK) if scale else ():
        exact = chunk.double()
        # in units of the largest value, whose square may be less than a double can hold
        lost += float(((exact - chunk.half().double()) / scale).square().sum())
        energy += float((exact / scale).square().sum())
    return lost / energy if energy else 0.0


def weight_problem(weight: Tensor) -> str | None:
    """Why `weight` cannot be quantized with 16-bit codebooks; None: it can."""
    problem = range_problem(weight)
    if problem or (loss := rounding_loss(weight)) <= MOST_LOST:
        return problem
    return (
        f"the weight's values are too small for 16-bit codebooks: the rounding alone would lose {100 * loss:.3g} % of "
        f"its energy, {100 * MOST_LOST:.3g} % are allowed (values below 3e-08 become zero). Scale the weight up and "
        "what follows it down, or add the layer to model.compression_parameters.ignored_modules"
    )


def energies(weight: Tensor, codebook: Tensor, codes: Tensor) -> tuple[float, float]:
    """Sums of squares of what quantizing changed, and of the weight itself.

    Args:
        weight: (R, ...).
        codebook: (k, d).
        codes: (n,) of its subvectors.
    """
    d = codebook.shape[1]
    exact = codebook.double()
    lost = energy = 0.0
    pieces = zip(to_subvectors(weight, d).split(max(1, CHUNK // d)), codes.split(max(1, CHUNK // d)), strict=True)
    for vectors, members in pieces:
        wide = vectors.double()
        energy += float(wide.square().sum())
        lost += float((wide - exact[members]).square().sum())
    return lost, energy

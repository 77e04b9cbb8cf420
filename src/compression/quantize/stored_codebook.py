"""A codebook as files hold it, and as it comes back from them.

With 16 bits its values are floats, divided by a power of two where `sixteen_bits.scale_of` says so. With 8 bits they
are whole numbers from -127 to 127 times one scale, the largest |value| / 127 with as few digits as make every product
exact in the codebook's own type: a codebook that comes from a file is rounded to itself, and needs no scale of its own
while it is trained. Zeros stay zeros, and no value moves by more than half a step.

Shapes: codebook (k, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import PlanError

CODEBOOK_BITS = (16, 8)
"""What a value of a codebook may take."""
LARGEST = 127
"""Of the whole numbers; -128 is not used."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LARGEST_SCALE, LARGEST_SCALE_OF_HALF = 2.0**121, 2.0**9
"""So that 127 times it is finite."""


def check_codebook_bits(bits: int) -> int:
    """The bits, which a codebook's values can have.

    Raises:
        PlanError: they cannot.
    """
    if bits not in CODEBOOK_BITS:
        raise PlanError(f"codebook_bits = {bits}: expected 16 or 8")
    return bits


def stored_values(codebook: Tensor, bits: int, scale: Tensor | None) -> Tensor:
    """The values that a file holds: float16, or int8. Those of an 8-bit codebook must be finite.

    Args:
        codebook: (k, d).
        bits: of a value.
        scale: () float32, of a 16-bit codebook that has one.
    """
    if bits == 8:
        return _whole(codebook, eight_bit_scale(codebook)).to(torch.int8)
    return (codebook if scale is None else codebook / scale).to(torch.float16)


def as_stored(codebook: Tensor, bits: int, scale: Tensor | None) -> Tensor:
    """The codebook as it comes back from a file, in its own type; arguments as for `stored_values`."""
    if bits == 8:
        step = eight_bit_scale(codebook)
        return (_whole(codebook, step) * step).type_as(codebook)
    rounded = stored_values(codebook, bits, scale).type_as(codebook)
    return rounded if scale is None else rounded * scale


def eight_bit_scale(codebook: Tensor) -> Tensor:
    """() float32: the step of an 8-bit codebook.

    A product has 7 binary digits more than the step, which is a bfloat16 of 8: together fewer than the 24 of a float32.
    For types of fewer digits the step is a power of two. Plain operators, which everything that follows operators
    understands.
    """
    step = codebook.detach().abs().amax().float() / LARGEST
    # what torch.fx follows is no tensor, and its type is not known
    if isinstance(codebook, Tensor) and codebook.dtype in (torch.float16, torch.bfloat16):
        fraction, exponent = torch.frexp(step)
        step = torch.ldexp(torch.ones_like(step), exponent - (fraction == 0.5).to(exponent.dtype))
        if codebook.dtype == torch.float16:
            return step.clamp(SMALLEST_SCALE, LARGEST_SCALE_OF_HALF)
    return step.to(torch.bfloat16).float().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def some_are_zero(codebook: Tensor) -> bool:
    """Whether centroids are zero, but not all of them: a weight that is zero everywhere is one that begins so."""
    with torch.no_grad():
        zero = (codebook == 0).all(1)
        return bool(zero.any() and not zero.all())


def _whole(codebook: Tensor, step: Tensor) -> Tensor:
    """The codebook in steps, rounded."""
    return (codebook.float() / step).round().clamp(-LARGEST, LARGEST)

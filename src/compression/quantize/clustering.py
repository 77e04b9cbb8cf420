"""What a quantizer makes of the subvectors of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clustering:
    """A codebook and the code of every training vector.

    Attributes:
        codebook: (k, d), values that 16-bit floats, or 8-bit steps, hold exactly.
        codes: (n,) int64, the nearest centroid of each vector.
        distortion: mean squared error per vector, |x - c|^2 / n summed.
        iterations: mean updates made.
    """

    codebook: Tensor
    codes: Tensor
    distortion: float
    iterations: int

"""Sums of the members of every centroid, compiled by numba: one pass over the vectors, in float64.

Shapes: vectors (n, d) float32, codes (n,) int64, sums (k, d) float64, counts (k,) int64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...common.compiling import loop


@loop()
def accumulate(
    vectors: NDArray[np.float32], codes: NDArray[np.int64], sums: NDArray[np.float64], counts: NDArray[np.int64]
) -> None:
    """Add every vector to the sum of its centroid, and count it; `sums` and `counts` start at zero."""
    for i in range(vectors.shape[0]):
        c = codes[i]
        counts[c] += 1
        for j in range(vectors.shape[1]):
            sums[c, j] += vectors[i, j]

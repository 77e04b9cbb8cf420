"""The vectors of each centroid, sorted: sums over them without atomic additions.

Shapes: n vectors of length d, k centroids, codes (n,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Members:
    """Indices of the vectors, sorted by code.

    Attributes:
        order: (n,) int32, those of centroid 0 first, each group in its original order.
        starts: (k,) int32, where in `order` the members of each centroid begin.
    """

    order: Tensor
    starts: Tensor

    @staticmethod
    def of(codes: Tensor, k: int) -> Members:
        """Sort codes (n,) with values below k."""
        counts = torch.bincount(codes, minlength=k)
        return Members(torch.argsort(codes, stable=True).int(), (counts.cumsum(0) - counts).int())

    def sums(self, vectors: Tensor) -> Tensor:
        """(k, d) sums over the members of each centroid; zeros where there are none.

        A segmented sum: several times faster than index_add_ on the CPU (`python -m benchmarks.cost`, part e), to which it
        was equal to the bit where it was compared, and made for the same result at every call on CUDA too.
        """
        return F.embedding_bag(self.order, vectors.contiguous(), self.starts, mode="sum")

    @staticmethod
    def serve(device: torch.device) -> bool:
        """Whether `sums` works there: not every device has embedding_bag."""
        return device.type in ("cpu", "cuda")

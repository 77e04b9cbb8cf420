"""The vectors of each centroid, sorted: sums over them without atomic additions.

Shapes: n vectors of length d, k centroids, codes (n,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

        A segmented sum: several times faster than index_add_ on the CPU (`python -m benchmarks.cost`, part e), to which
        it was equal to the bit where it was compared, and made for the same result at every call on CUDA too.
        """
        return F.embedding_bag(self.order, vectors.contiguous(), self.starts, mode="sum")

    @staticmethod
    def serve(device: torch.device) -> bool:
        """Whether `sums` works there: not every device has embedding_bag."""
        return device.type in ("cpu", "cuda")


class Dequantize(torch.autograd.Function):
    """codebook[codes]; the gradient of a centroid is the sum over its members, which are sorted once: codes do not
    change."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, codes: Tensor, members: Members | None) -> Tensor:
        """Codebook (k, d) and codes (n,) -> (n, d); `members` where a gradient will be asked for on such a device."""
        ctx.codes, ctx.members, ctx.k = codes, members, codebook.shape[0]
        return codebook.index_select(0, codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient (n, d) -> that of the codebook (k, d)."""
        # half-precision sums over thousands of members would lose their small terms
        wide = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
        if Members.serve(wide.device):
            total = ctx.members.sums(wide)
        else:
            total = torch.zeros(ctx.k, wide.shape[1], dtype=wide.dtype, device=wide.device).index_add_(
                0, ctx.codes.long(), wide
            )
        return total.to(gradient.dtype), None, None

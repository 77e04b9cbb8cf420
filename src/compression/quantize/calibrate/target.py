"""What a weight is quantized towards, and the loss that says how near a codebook and codes come.

A weight is read as B blocks of R rows and C columns, each block with the second moment H of its own inputs: one block
for a linear layer or a convolution, one per group of a grouped convolution. Each row is cut into m subvectors of d
columns, or, where subvectors run along outputs, each column into subvectors of d rows. One codebook serves all blocks.

The loss is sum_b tr((W* - Ŵ) H (W* - Ŵ)ᵀ): with H the mean of x xᵀ it is the mean square of what the outputs lose.

Shapes: B blocks, R rows, C columns, k centroids. aim (B, R, C), hessian (B, C, C), codes (B, r, m): r = R, C = m d
along inputs, and R = r d, C = m along outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..members import Members
from .layout import rows_of, vectors_of

DAMPING = 0.01
"""What is added to the diagonal of H, in units of its mean: inputs that were hardly seen are not free."""
AIM_DAMPING = 0.1
"""The same where W* is solved for, which must not follow what only these inputs say."""
FEW_PLACES = 0.4
"""What is added to both per column and place: moments of few places say what these inputs do, not what others will."""
HARDER = 10.0
"""By how much more H is damped after a factorization failed."""


@dataclass(frozen=True)
class State:
    """A codebook (k, d), codes (B, r, m) and their loss; and (W* - Ŵ) H (B, R, C), its slope, with which most steps
    begin."""

    codebook: Tensor
    codes: Tensor
    loss: float
    slope: Tensor


@dataclass(frozen=True)
class Target:
    """What a weight is quantized towards.

    Attributes:
        aim: W* (B, R, C) float32.
        hessian: H (B, C, C), damped: positive definite.
        d: subvector length.
        pruned: (B, r, m), subvectors that are zero and stay so, by the code 0 and a first centroid of zeros; None:
            there are none.
        along: what subvectors run along, "input" or "output".
    """

    aim: Tensor
    hessian: Tensor
    d: int
    pruned: Tensor | None = None
    along: str = "input"

    @property
    def width(self) -> int:
        """Columns of a subvector."""
        return 1 if self.along == "output" else self.d

    @property
    def m(self) -> int:
        """Subvectors in a row of them."""
        return self.aim.shape[2] // self.width

    def rows(self, codebook: Tensor, codes: Tensor) -> Tensor:
        """Ŵ (B, R, C) of a codebook (k, d), or anything with its shape, and codes (B, r, m)."""
        return rows_of(codebook[codes], self.along)

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows (B, R, C) as subvectors (B*r*m, d)."""
        return vectors_of(rows, self.d, self.along).reshape(-1, self.d)

    def stacked(self, columns: Tensor) -> Tensor:
        """The columns of one subvector of each row of them (B, R, width) as subvectors (B, r, d)."""
        return columns.reshape(columns.shape[0], -1, self.d)

    def columns(self, vectors: Tensor) -> Tensor:
        """The inverse of `stacked`."""
        return vectors.reshape(vectors.shape[0], -1, self.width)

    def times(self, codebook: Tensor, own: Tensor) -> Tensor:
        """(B, k, d): a codebook (k, d) times the part (B, width, width) of H, or of its factor, that belongs to the
        columns of one subvector; along outputs it is the same number for all d."""
        return codebook * own if self.along == "output" else codebook @ own

    @cached_property
    def factor(self) -> Tensor:
        """M (B, C, C), upper triangular with H = M Mᵀ."""
        return upper_factor(self.hessian)

    def state(self, codebook: Tensor, codes: Tensor, slope: Tensor | None = None) -> State:
        """A codebook (k, d) and codes (B, r, m) with their loss; `slope` where it is known."""
        error = self.aim - self.rows(codebook, codes)
        slope = error @ self.hessian if slope is None else slope
        return State(codebook=codebook, codes=codes, loss=summed_products(error, slope), slope=slope)


def quadratic(matrix: Tensor, hessian: Tensor) -> float:
    """sum_b tr(A H Aᵀ) for A (B, R, C) and H (B, C, C), summed in double precision."""
    return summed_products(matrix @ hessian, matrix)


def summed_products(one: Tensor, other: Tensor) -> float:
    """Of the values (B, R, C) of two tensors, those of a row in their own precision, all rows in double precision."""
    return float(torch.einsum("brc,brc->br", one, other).cpu().double().sum())


def caution(columns: int, places: int) -> float:
    """What is added to the damping of moments of so many columns that so few places were seen for."""
    return FEW_PLACES * columns / max(places, 1)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H (B, C, C) with `damping` times the mean of its diagonal added to it.

    A block whose inputs are all zero gets the mean of the other blocks, so that its weights are still quantized for
    what they are; where all are zero H becomes the identity.
    """
    means = hessian.diagonal(dim1=1, dim2=2).mean(1)
    typical = means[means > 0].mean() if bool((means > 0).any()) else means.new_ones(())
    added = torch.where(means > 0, damping * means, typical)
    return hessian + torch.diag_embed(added[:, None].expand(-1, hessian.shape[1]))


def lower_factor(hessian: Tensor) -> Tensor:
    """L (B, C, C), lower triangular with H = L Lᵀ.

    Where 32-bit floats cannot factor a block, all are damped harder: the result is then that of a more cautious loss.
    """
    extra = torch.finfo(hessian.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(hessian)
    while bool(failed.any()):
        if extra > 1:
            raise ValueError("the moments of the inputs cannot be factored: they are not finite")
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, extra))
        extra *= HARDER
    return factor


def upper_factor(hessian: Tensor) -> Tensor:
    """M (B, C, C), upper triangular with H = M Mᵀ: the lower factor of H turned around, no inverse is needed."""
    return lower_factor(hessian.flip(1, 2)).flip(1, 2)


def asymmetric_aim(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float = AIM_DAMPING) -> Tensor:
    """W* = W + W G (H + λ I)⁻¹: the weight that gives from x what the dense layer gives from y (beyond the paper).

    G is the mean of (y - x) xᵀ.

    Args:
        weight: W (B, R, C).
        hessian: H (B, C, C), mean of x xᵀ over inputs x of the quantized network.
        cross: W G (B, R, C), y the inputs of the dense network at the same places.
        damping: λ in units of the mean of H's diagonal.
    """
    if not bool(cross.any()):
        return weight
    factor = lower_factor(damped(hessian, damping))
    return weight + torch.cholesky_solve(cross.transpose(1, 2).contiguous(), factor).transpose(1, 2)


def sums_by_code(vectors: Tensor, codes: Tensor, k: int) -> Tensor:
    """(k, d) sums of the vectors (n, d) with each of the codes (n,)."""
    if Members.serve(vectors.device):
        return Members.of(codes, k).sums(vectors)
    return torch.zeros(k, vectors.shape[1], dtype=vectors.dtype, device=vectors.device).index_add_(0, codes, vectors)

"""How a weight is read as blocks of rows that share their inputs, whatever operator it belongs to.

A transposed convolution is stored with its input channels first; the columns that act on one output are the input
channels and the kernel. Its subvectors run along the kernel, so where d divides the kernel's area each of them lies
within a row of this reading, and else there is none.

Subvectors along outputs (`subvectors`, layout "output") reach over d rows of a block and stand in one column: the r
rows of subvectors are then R / d, with C of them in each. Along inputs r is R, with C / d in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def layout_of(
    shape: Sequence[int], d: int, blocks: int, transposed: bool = False, along: str = "input"
) -> Tensor | None:
    """Which subvector, counted in the weight's order, stands where: (B, r, m).

    Args:
        shape: of the weight.
        d: subvector length; divides its rows.
        blocks: B: groups of a grouped convolution, or parts of the rows with inputs of their own.
        transposed: whether the weight is that of a transposed convolution.
        along: what subvectors run along, "input" or "output".

    Returns:
        None where subvectors reach over rows, or along outputs over blocks.
    """
    n = math.prod(shape) // d
    if along == "output":
        rows = shape[0] // blocks
        return None if rows % d else torch.arange(n).view(blocks, rows // d, -1)
    if not transposed:
        return torch.arange(n).view(blocks, shape[0] // blocks, -1)
    area = math.prod(shape[2:])
    if area % d:
        return None
    return torch.arange(n).view(blocks, shape[0] // blocks, shape[1], area // d).transpose(1, 2).flatten(2)


def rows_of(vectors: Tensor, along: str) -> Tensor:
    """Subvectors (B, r, m, d) put together as rows (B, R, C)."""
    return vectors.transpose(2, 3).flatten(1, 2) if along == "output" else vectors.flatten(2)


def vectors_of(rows: Tensor, d: int, along: str) -> Tensor:
    """Rows (B, R, C) cut into subvectors (B, r, m, d); the inverse of `rows_of`."""
    if along == "output":
        return rows.unflatten(1, (-1, d)).transpose(2, 3)
    return rows.unflatten(2, (-1, d))

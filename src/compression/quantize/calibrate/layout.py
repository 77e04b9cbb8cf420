"""How a weight is read as blocks of rows that share their inputs, whatever operator it belongs to.

A transposed convolution is stored with its input channels first; the columns that act on one output are the input
channels and the kernel. Its subvectors run along the kernel, so where d divides the kernel's area each of them lies
within a row of this reading, and else there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def layout_of(shape: Sequence[int], d: int, blocks: int, transposed: bool = False) -> Tensor | None:
    """Which subvector, counted in the weight's order, stands where: (B, R, m).

    Args:
        shape: of the weight.
        d: subvector length; divides its rows.
        blocks: B: groups of a grouped convolution, or parts of the rows with inputs of their own.
        transposed: whether the weight is that of a transposed convolution.

    Returns:
        None where subvectors reach over rows.
    """
    n = math.prod(shape) // d
    if not transposed:
        return torch.arange(n).view(blocks, shape[0] // blocks, -1)
    area = math.prod(shape[2:])
    if area % d:
        return None
    return torch.arange(n).view(blocks, shape[0] // blocks, shape[1], area // d).transpose(1, 2).flatten(2)

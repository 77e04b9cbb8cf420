"""Second moments of the inputs of a weight, summed over batches of images.

Shapes: B blocks of R rows, C columns, P places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .norms import wide

STRIPS, LEAST_STRIP = 8, 256
"""Into how many strips of columns H is cut, and how wide each is at least: it is symmetric, so a little more than half
of it is computed."""


@dataclass(frozen=True)
class Moments:
    """Of the inputs x in the quantized network and y in the dense one, at the same places.

    Attributes:
        hessian: H (B, C, C), mean of x xᵀ.
        cross: W G (B, R, C), mean of W (y - x) xᵀ; zeros where the places of the two networks are not the same.
        mean: (B, C) of x.
        output_mean, output_variance: (B, R) of what the dense weight makes of y, without bias.
        count: places.
    """

    hessian: Tensor
    cross: Tensor
    mean: Tensor
    output_mean: Tensor
    output_variance: Tensor
    count: int


class MomentSums:
    """Sums of one weight's inputs.

    Products of a batch are 32-bit floats, and are added in double precision, so that it makes no difference in which
    order, or by how many processes: where two centroids are as good as each other, the last bit would decide, and with
    it all that comes later.

    Args:
        weight: the dense one as (B, R, C), on the device where sums are kept.
    """

    def __init__(self, weight: Tensor) -> None:
        n_blocks, n_rows, n_columns = weight.shape
        self._weight = weight
        zeros = partial(torch.zeros, device=weight.device, dtype=wide(weight.new_empty(0)).dtype)
        self._hessian, self._cross = zeros(n_blocks, n_columns, n_columns), zeros(n_blocks, n_rows, n_columns)
        self._sum, self._outputs = zeros(n_blocks, n_columns), zeros(2, n_blocks, n_rows)
        self._counts = zeros(n_blocks)

    def outputs(self, blocks: slice, inputs: Tensor) -> Tensor:
        """What some blocks of the weight, without bias, make of inputs (g, P, C): (blocks, P, R)."""
        return inputs @ self._weight[blocks].transpose(1, 2)

    def add(self, blocks: slice, inputs: Tensor, dense: Tensor | None) -> None:
        """Add inputs of some of the blocks.

        Args:
            blocks: which; all of them have these inputs, or each its own.
            inputs: x (g, P, C), g 1 or the number of these blocks.
            dense: W y (blocks, P, R) at the same places; None: y is x.
        """
        self._add_squares(self._hessian[blocks], inputs)
        outputs = self.outputs(blocks, inputs)
        if dense is not None:
            self._cross[blocks] += (dense - outputs).transpose(1, 2) @ inputs
            outputs = dense
        self._sum[blocks] += inputs.sum(1)
        self._outputs[0, blocks] += outputs.sum(1)
        self._outputs[1, blocks] += outputs.square().sum(1)
        self._counts[blocks] += inputs.shape[1]

    @staticmethod
    def _add_squares(hessian: Tensor, inputs: Tensor) -> None:
        """Add products to H, on and above the diagonal: strip by strip, what is left of it is left out."""
        n_columns = inputs.shape[2]
        step = max(LEAST_STRIP, -(-n_columns // STRIPS))
        for start in range(0, n_columns, step):
            strip = inputs[:, :, start : start + step].transpose(1, 2)
            hessian[:, start : start + step, start:] += strip @ inputs[:, :, start:]

    def add_over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add what other processes summed.

        Args:
            total: sums a tensor over all of them.
        """
        for sums in (self._hessian, self._cross, self._sum, self._outputs, self._counts):
            sums.copy_(total(sums))

    def moments(self) -> Moments:
        """The means of what was added."""
        n, kept = self._counts.clamp_min(1), self._weight.dtype
        upper = (self._hessian / n[:, None, None]).to(kept).triu()
        mean, square = (sums / n[:, None] for sums in self._outputs)
        return Moments(
            hessian=upper + upper.triu(1).transpose(1, 2),
            cross=(self._cross / n[:, None, None]).to(kept),
            mean=(self._sum / n[:, None]).to(kept),
            output_mean=mean,
            output_variance=(square - mean.square()).clamp_min(0),
            count=int(self._counts.max()),
        )


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

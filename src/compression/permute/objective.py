"""The score of a permutation: log det of the covariance of a child's subvectors (paper section 3.2.2, equation 6).

Why this score. For a Gaussian source in d dimensions, quantized with b bits per vector, rate-distortion theory bounds
the squared error per value from below by det(Cov)^(1/d) * 2^(-2b/d). The codes have log2(k) bits whatever the
permutation is, so the permutation of the smallest determinant promises the smallest error. A determinant is small where
variances are unequal and values correlated: exactly what a codebook can make use of. The score is the logarithm,
because the determinant itself underflows in float64 at d = 98, because small ratios become sums that can be weighted
over children, and because log det is concave in the covariance (`assignment`).

Why the Gram matrix. A permutation only decides which columns of the weight stand together in a subvector. All second
moments that can ever be needed are the inner products of pairs of columns: they are computed once, by one matrix
product. For a permutation the d x d second moment of the subvectors is a sum of entries of this Gram matrix, and

    Cov = second moment - mean mean^T + ridge * I

follows without reading the weight again. A swap of two channels changes only the terms of the few subvectors that hold
them (`kernel`, which does the same for several children at once, has the formulas).

Notation: R rows, C channels, a = h*w values per channel, d subvector length, m subvectors per row, n = R*m subvectors.
A *column* is one input value of a row: column c*a + q is value q of channel c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ...common.errors import GroupError
from ..quantize.subvectors import Layer, kernel_area
from .gram import upper_gram
from .operations import Reshape, is_depthwise

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Proposal = tuple[int, int, Ints, Ints, Floats, Floats, float]
"""Positions i and j, subvectors touched, their columns, second moment, mean and score after the swap."""

RIDGE = 1e-10
"""Added to the diagonal, relative to the mean square of the weight: with it dead or equal channels have a finite score.
It does not depend on the permutation, so that scores can be compared."""


class SwapByProposal:
    """What scores of both kinds of children do alike: the log determinant, and a swap that was scored."""

    permutation: Ints
    columns: Ints
    moment: Floats
    mean: Floats
    ridge: Floats
    value: float

    def commit(self, proposal: Proposal) -> None:
        """Make a swap that `propose` has scored; none may have been made in between."""
        i, j, touched, new, moment, mean, value = proposal
        self.columns[touched] = new
        self.moment, self.mean, self.value = moment, mean, value
        self.permutation[[i, j]] = self.permutation[[j, i]]

    def _logdet(self, moment: Floats, mean: Floats) -> float:
        sign, value = np.linalg.slogdet(moment - np.outer(mean, mean) + self.ridge)
        return float(value) if sign > 0 else float("inf")


class ChildObjective(SwapByProposal):
    """log det(Cov) of one child as a function of the permutation of its input channels, updated swap by swap.

    Attributes:
        permutation: p (C,), channel p[i] stands at position i.
        value: log det of the covariance at `permutation`.
        area, d, n_channels, n_subvectors: a, d, C and n.
        width: W, columns of a row (of a convolution group).
        gram: (G, W, W), inner products of the columns of each convolution group over its rows, divided by n; only
            entries on and above the diagonal are filled, `products` reads them. Where a subvector holds values of two
            neighbouring channels at most (1 < d <= a), only products of columns that can meet in a subvector are
            computed, in two views of `table`: `within` (C, a, a), of the columns of one channel, and `cross` (C*(d-1),
            C*(d-1)), of the last d-1 columns of every channel with the first d-1 of every channel; `gram` then has no
            entries.
        table: all of these, flat.
        tail: d-1 in that case, else 0.
        column_sum: (G*W,), sums of the columns, divided by n.
        columns: (m*G, d), the column at each place of each subvector.
        moment, mean: (d, d) and (d,), of the subvectors.
        ridge: (d, d), added to the covariance.
    """

    def __init__(self, columns: Floats, n_channels: int, d: int, n_groups: int = 1) -> None:
        """Prepare the Gram matrix.

        Args:
            columns: the weight as matrix (R, C/n_groups * a): rows of group g see the channels of group g.
            n_channels: C.
            d: subvector length.
            n_groups: convolution groups.

        Raises:
            GroupError: the weight is zero, so there is nothing to score.
        """
        rows, width = columns.shape
        self.area = width * n_groups // n_channels
        self.d = d
        self.n_channels = n_channels
        grouped = columns.reshape(n_groups, rows // n_groups, width)
        self.n_subvectors = rows * width // d
        self.width = width
        self.tail = d - 1 if n_groups == 1 and 1 < d <= self.area else 0
        if self.tail:
            self._multiply_what_can_meet(columns)
        else:
            # one Gram per group; columns of different groups never share a subvector
            grams = [upper_gram(part, 1.0 / self.n_subvectors) for part in grouped]
            self.gram = np.stack(grams) if n_groups > 1 else grams[0][None]
            self.table = self.gram.reshape(-1)
        self.column_sum = (grouped.sum(axis=1) / self.n_subvectors).reshape(-1)
        squares = self.within if self.tail else self.gram
        power = float(np.trace(squares, axis1=1, axis2=2).sum()) / d
        if not np.isfinite(power) or power <= 0:
            raise GroupError("the weight is zero or not finite")
        self.ridge = RIDGE * power * np.eye(d)
        self.reset(np.arange(n_channels))

    def _multiply_what_can_meet(self, columns: Floats) -> None:
        """Fill `table` for subvectors of two channels at most; for Mask R-CNN's fc6 a tenth of the whole Gram."""
        n, t, area = self.n_channels, self.tail, self.area
        by_channel = columns.reshape(-1, n, area)
        self.table = np.empty(n * area * area + (n * t) ** 2)
        self.within = self.table[: n * area * area].reshape(n, area, area)
        self.cross = self.table[n * area * area :].reshape(n * t, n * t)
        each = np.ascontiguousarray(by_channel.transpose(1, 2, 0))  # (C, a, R)
        np.matmul(each, each.transpose(0, 2, 1), out=self.within)
        self.within /= self.n_subvectors
        last = by_channel[:, :, area - t :].reshape(-1, n * t) / self.n_subvectors
        first = np.ascontiguousarray(by_channel[:, :, :t]).reshape(-1, n * t)
        np.matmul(last.T, first, out=self.cross)
        self.gram = np.empty((0, self.width, self.width))

    @property
    def swap_work(self) -> int:
        """About the multiplications that a swap costs."""
        return self.d**2

    def reset(self, permutation: Ints) -> None:
        """Take `permutation` (C,); everything is computed anew."""
        self.permutation = permutation.copy()
        self.columns = (permutation[:, None] * self.area + np.arange(self.area)).reshape(-1, self.d)
        self.moment = self._block(self.columns)
        self.mean = self.column_sum[self.columns].sum(axis=0)
        self.value = self._logdet(self.moment, self.mean)

    def evaluate(self, permutation: Ints) -> float:
        """The score of another permutation; that of the objective stays."""
        columns = (permutation[:, None] * self.area + np.arange(self.area)).reshape(-1, self.d)
        return self._logdet(self._block(columns), self.column_sum[columns].sum(axis=0))

    def propose(self, i: int, j: int) -> tuple[float, Proposal]:
        """The score after swapping the channels at positions i and j, and what `commit` needs to make the swap."""
        touched = self._subvectors_of(i, j)
        old = self.columns[touched]
        new = old.copy()
        flat = new.reshape(-1)
        where = (touched[:, None] * self.d + np.arange(self.d)).reshape(-1)
        at_i, at_j = where // self.area == i, where // self.area == j
        offset = where % self.area
        flat[at_i] = self.permutation[j] * self.area + offset[at_i]
        flat[at_j] = self.permutation[i] * self.area + offset[at_j]
        moment = self.moment + self._block(new) - self._block(old)
        mean = self.mean + (self.column_sum[new] - self.column_sum[old]).sum(axis=0)
        value = self._logdet(moment, mean)
        return value, (i, j, touched, new, moment, mean, value)

    def try_swap(self, i: int, j: int, threshold: float = 1e-12) -> bool:
        """Swap the channels at positions i and j if the score falls by more than `threshold`; returns whether it did.

        The threshold keeps swaps of equal score from following each other for ever.
        """
        value, proposal = self.propose(i, j)
        if value >= self.value - threshold:
            return False
        self.commit(proposal)
        return True

    def channel_scores(self) -> Floats:
        """(C,) log determinant of each channel's own a x a covariance over the rows (its log variance when a = 1)."""
        area, rows = self.area, self.n_subvectors * self.d // self.column_sum.size
        if self.tail:
            blocks = self.within
        elif area == 1:
            blocks = np.diagonal(self.gram, axis1=1, axis2=2).reshape(-1, 1, 1)
        else:
            per_group = self.width // area
            group, local = np.divmod(np.arange(self.n_channels), per_group)
            at = local[:, None] * area + np.arange(area)
            blocks = self.products(group[:, None, None], at[:, :, None], at[:, None, :])
        scale = self.n_subvectors / rows  # gram and column_sum are divided by n, these covariances are over the rows
        mean = self.column_sum.reshape(-1, area) * scale
        covariances = blocks * scale - mean[:, :, None] * mean[:, None, :]
        ridge = np.eye(area) * max(self.ridge[0, 0], np.finfo(float).tiny)
        return np.linalg.slogdet(covariances + ridge)[1]

    def products(self, group: Ints, first: Ints, second: Ints) -> Floats:
        """Inner products of columns `first` and `second` of convolution groups `group`, all of them broadcast against
        each other."""
        return self.gram[group, np.minimum(first, second), np.maximum(first, second)]

    def _subvectors_of(self, i: int, j: int) -> Ints:
        """Indices of the subvectors that hold a value of position i or j."""
        parts = [np.arange(x * self.area // self.d, ((x + 1) * self.area - 1) // self.d + 1) for x in (i, j)]
        return np.unique(np.concatenate(parts))

    def _block(self, columns: Ints) -> Floats:
        """Sum over the given subvectors (t, d) of their d x d part of the Gram matrix."""
        if self.tail:
            return self._block_of_neighbours(columns)
        group, local = columns // self.width, columns % self.width
        return self.products(group[:, :1, None], local[:, :, None], local[:, None, :]).sum(axis=0)

    def _block_of_neighbours(self, columns: Ints) -> Floats:
        """The same from `within` and `cross`, for every pair of places of which one is not before the other."""
        later, earlier = np.tril_indices(self.d)
        channel, offset = columns // self.area, columns % self.area
        same = channel[:, later] == channel[:, earlier]  # (t, pairs): both columns belong to one channel
        sums = np.where(same, self.within[channel[:, later], offset[:, later], offset[:, earlier]], 0.0).sum(axis=0)
        vector, pair = np.nonzero(~same)
        p, q = later[pair], earlier[pair]
        # q is among the last columns of its channel, p among the first of the next one
        row = channel[vector, q] * self.tail + offset[vector, q] - (self.area - self.tail)
        np.add.at(sums, pair, self.cross[row, channel[vector, p] * self.tail + offset[vector, p]])
        block = np.zeros((self.d, self.d))
        block[later, earlier] = sums
        block[earlier, later] = sums
        return block


def is_optimisable(module: Layer, d: int, reshape: Reshape = None) -> bool:
    """Whether the permutation of the input channels changes which values share a subvector of length d.

    False where subvectors lie within one channel (small blocks), and for a transposed convolution, whose input channels
    are the rows.
    """
    if isinstance(module, nn.ConvTranspose2d) or is_depthwise(module):
        return False
    area = int(np.prod(reshape[2:])) if reshape else kernel_area(module)
    return area % d != 0


def child_objective(module: Layer, d: int, reshape: Reshape = None) -> ChildObjective:
    """The objective of one child.

    Args:
        module: convolution or linear layer.
        d: its subvector length.
        reshape: (C_out, C_in, h, w) of a linear layer that consumes a flattened feature map.

    Raises:
        GroupError: the weight is zero or not finite.
    """
    weight: Tensor = module.weight.detach()
    groups = int(getattr(module, "groups", 1))
    channels = reshape[1] if reshape else int(getattr(module, "in_channels", getattr(module, "in_features", 0)))
    columns = weight.reshape(weight.shape[0], -1).double().cpu().numpy()
    return ChildObjective(columns, n_channels=channels, d=d, n_groups=groups)

"""How one weight is read, given how a forward pass uses it: see `layout`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .layout import layout_of
from .passes import Item
from .uses import Use

MOST_VALUES = 1 << 28
"""Values of one weight's moments, at most (1 GiB): a weight of more blocks is clustered plainly."""


@dataclass(frozen=True)
class Reading:
    """A weight as blocks of rows.

    Attributes:
        item: the weight and its uses in a pass.
        layout: (B, R, m), which of its subvectors stands where.
        weight: the dense one, (B, R, C) float32.
    """

    item: Item
    layout: Tensor
    weight: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether it is used once in a pass, all its rows together."""
        return len(self.item.uses) == 1 and self.part(0) == slice(0, self.weight.shape[0])

    def part(self, number: int) -> slice:
        """The blocks that take part in the use of this number."""
        use, (n_blocks, n_rows, _) = self.item.uses[number], self.weight.shape
        if use.convolution is not None:
            return slice(0, n_blocks)
        return slice(use.start // n_rows, use.stop // n_rows)


def read(item: Item, weight: Tensor, d: int) -> tuple[Reading | None, str]:
    """The reading of a weight with subvectors of length d; or none, and why calibration cannot serve it."""
    blocks, reason = _blocks(item.uses, weight.shape[0])
    layout = layout_of(weight.shape, d, blocks, item.uses[0].transposed)
    if reason or layout is None:
        return None, reason or "its subvectors reach over several outputs, which calibration cannot serve"
    layout = layout.to(weight.device)
    return Reading(item=item, layout=layout, weight=weight.reshape(-1, d)[layout].flatten(2).float()), ""


def _blocks(uses: Sequence[Use], n_rows: int) -> tuple[int, str]:
    """Into how many blocks the rows of a weight fall, as its uses tell their inputs apart; or why it cannot be said."""
    first = uses[0]
    if len({(use.groups, use.transposed, use.convolution is None) for use in uses}) > 1:
        return 1, "it is used in different ways, which calibration cannot serve"
    blocks = first.groups
    if first.convolution is None:
        blocks = n_rows // math.gcd(n_rows, *(edge for use in uses for edge in (use.start, use.stop)))
    if blocks * first.n_columns**2 > MOST_VALUES:
        return 1, "the moments of its inputs would take too much memory"
    return blocks, ""

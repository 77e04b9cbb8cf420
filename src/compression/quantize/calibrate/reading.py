"""How one weight is read, given how a forward pass uses it: see `layout`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..subvectors import to_subvectors
from .layout import layout_of, rows_of
from .passes import Item
from .uses import Use

MOST_VALUES = 1 << 28
"""Values of one weight's moments, at most (1 GiB): a weight of more blocks is clustered plainly."""
WIDEST = 5000
"""Columns whose moments are taken together; longer rows are cut into pieces, as the time grows with the third power."""


@dataclass(frozen=True)
class Reading:
    """A weight as blocks of rows.

    Attributes:
        item: the weight and its uses in a pass.
        layout: (B, r, m), which of its subvectors stands where.
        weight: the dense one, (B, R, C) float32.
        pieces: into which each row is cut: each is a block of its own, as if its inputs had nothing to do with those of
            the others.
    """

    item: Item
    layout: Tensor
    weight: Tensor
    pieces: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether it is used once in a pass, all its rows together and in one piece."""
        once = len(self.item.uses) == 1 and self.part(0) == slice(0, self.weight.shape[0])
        return once and self.pieces == 1

    def part(self, number: int) -> slice:
        """The blocks that take part in the use of this number."""
        use, (n_blocks, n_rows, _) = self.item.uses[number], self.weight.shape
        if use.convolution is not None:
            return slice(0, n_blocks)
        return slice(use.start // n_rows * self.pieces, use.stop // n_rows * self.pieces)

    def cut(self, inputs: Tensor) -> Tensor:
        """Inputs (g, P, all columns) for the blocks: (g * pieces, P, C)."""
        if self.pieces == 1:
            return inputs
        return inputs.unflatten(2, (self.pieces, -1)).transpose(1, 2).flatten(0, 1)


def read(item: Item, weight: Tensor, d: int, along: str = "input") -> tuple[Reading | None, str]:
    """The reading of a weight with subvectors of length d along inputs or outputs; or none, and why calibration cannot
    serve it."""
    blocks, reason = _blocks(item.uses, weight.shape[0])
    pieces = _pieces(item.uses[0].n_columns, 1 if along == "output" else d) if blocks == item.uses[0].groups else 1
    if not reason and blocks * item.uses[0].n_columns ** 2 // pieces > MOST_VALUES:
        reason = "the moments of its inputs would take too much memory"
    layout = layout_of(weight.shape, d, blocks, item.uses[0].transposed, along)
    if reason or layout is None:
        over = "groups of outputs" if along == "output" else "outputs"
        return None, reason or f"its subvectors reach over several {over}, which calibration cannot serve"
    layout = layout.to(weight.device).unflatten(2, (pieces, -1)).transpose(1, 2).flatten(0, 1)
    dense = rows_of(to_subvectors(weight, d, along)[layout], along).float()
    return Reading(item=item, layout=layout, weight=dense, pieces=pieces), ""


def _pieces(n_columns: int, d: int) -> int:
    """Into how many pieces rows are cut: the fewest of whole subvectors and at most `WIDEST` columns."""
    m = n_columns // d
    fitting = (pieces for pieces in range(1, m + 1) if m % pieces == 0 and n_columns // pieces <= WIDEST)
    return next(fitting, m)


def _blocks(uses: Sequence[Use], n_rows: int) -> tuple[int, str]:
    """Into how many blocks the rows of a weight fall, as its uses tell their inputs apart; or why it cannot be said."""
    first = uses[0]
    if len({(use.groups, use.transposed, use.convolution is None) for use in uses}) > 1:
        return 1, "it is used in different ways, which calibration cannot serve"
    blocks = first.groups
    if first.convolution is None:
        blocks = n_rows // math.gcd(n_rows, *(edge for use in uses for edge in (use.start, use.stop)))
    return blocks, ""

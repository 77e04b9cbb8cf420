"""The score of a permutation for a child whose channels stand at any columns of its weight (paper section 3.2.2).

`ChildObjective` is for the common case: the channels fill the rows, one after the other. Here they may stand behind
those of other groups, at several columns each, or at other columns in other rows (`layout`). The score is the same:
log det of the covariance of all subvectors of the weight. What a permutation can change is the second moment of the
subvectors that hold a value of the group, the *touched* ones; that of all others is computed once. For the touched
ones only the inner products of their own columns are needed, over the rows that are laid out alike, so that a group
of 32 channels in a concatenation of 1,000 needs a table of 32 x 32.

Notation: as in `layout`; n subvectors in all, V of them per row class and row touched, U = V * d columns of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...common.errors import GroupError
from .class_tables import FIXED, ClassTables, untouched
from .layout import Ints, RowClass
from .objective import RIDGE, Floats, Proposal, SwapByProposal


def table_entries(classes: Sequence[RowClass], d: int) -> int:
    """Inner products of columns that a `PlacedChild` has to hold."""
    return sum((d * np.unique(one.tracks // d).size) ** 2 for one in classes)


class PlacedChild(SwapByProposal):
    """log det(Cov) of one child as a function of the permutation of a group's channels, updated swap by swap.

    Attributes:
        permutation: p (C,), channel p[i] stands at position i.
        value: log det of the covariance at `permutation`.
        d, n_channels, n_subvectors: d, C and n; all subvectors of the weight count.
        block_size: S, channels that may be exchanged with each other.
        slot: (V, d) the slot at each place of each touched subvector, V over all row classes; `FIXED`: none.
        track: (V, d) its track.
        track_columns: (T, S) the column of each channel of a track, among the U columns of its row class.
        columns: (V, d) the column that stands at each place of each touched subvector.
        touched, touched_at: the subvectors that slot i touches are touched[touched_at[i] : touched_at[i + 1]], rising.
        gram: flat, for each row class (U, U): inner products of its columns over its rows, divided by n; entries on and
            above the diagonal.
        gram_at, width: (V,) where the table of a subvector's row class begins, and its U.
        column_sum: flat, sums of these columns over the rows, divided by n.
        sum_at: (V,) where those of a subvector's row class begin.
        moment, mean: (d, d) and (d,), of all subvectors.
        ridge: (d, d), added to the covariance.
        swap_work: about the multiplications that a swap costs.
    """

    def __init__(self, matrix: Floats, d: int, classes: Sequence[RowClass], n_channels: int, n_blocks: int = 1) -> None:
        """Prepare the inner products.

        Args:
            matrix: the weight (R, L).
            d: subvector length, divides L.
            classes: where the channels stand (`layout.row_classes`).
            n_channels: C.
            n_blocks: of the group.

        Raises:
            GroupError: the weight is zero or not finite, so there is nothing to score.
        """
        self.d, self.n_channels, self.block_size = d, n_channels, n_channels // n_blocks
        self.n_subvectors = matrix.size // d
        power = float(np.square(matrix).sum()) / matrix.size
        if not np.isfinite(power) or power <= 0:
            raise GroupError("the weight is zero or not finite")
        self.ridge = RIDGE * power * np.eye(d)
        self._start_moment, self._start_mean = untouched(matrix, d, classes)
        parts = [ClassTables.of(matrix, d, one, self.n_subvectors) for one in classes]
        tracks = np.cumsum([0, *(len(part.tracks) for part in parts)])
        self.slot = np.concatenate([part.slot for part in parts])
        self.track = np.concatenate([part.track + first for part, first in zip(parts, tracks[:-1], strict=True)])
        self.track_columns = np.concatenate([part.tracks for part in parts])
        self._at_first = np.concatenate([np.arange(part.slot.size).reshape(-1, d) for part in parts])
        counts, widths = [len(part.slot) for part in parts], np.array([part.slot.size for part in parts], np.int64)
        self.width = np.repeat(widths, counts)
        self.gram_at = np.repeat(np.cumsum([0, *(widths**2)])[:-1], counts)
        self.sum_at = np.repeat(np.cumsum([0, *widths])[:-1], counts)
        self.gram = parts[0].gram.reshape(-1) if len(parts) == 1 else np.concatenate([p.gram.ravel() for p in parts])
        self.column_sum = np.concatenate([part.column_sum for part in parts])
        self._n_rows = np.repeat([one.rows.size for one in classes], [len(part.tracks) for part in parts])
        self._list_touched()
        self.swap_work = d * d * max(1, self.touched.size // n_channels)
        self.reset(np.arange(n_channels))

    def _list_touched(self) -> None:
        vectors = np.repeat(np.arange(len(self.slot)), self.d)[self.slot.reshape(-1) != FIXED]
        slots = self.slot.reshape(-1)[self.slot.reshape(-1) != FIXED]
        pairs = np.unique(slots * len(self.slot) + vectors)  # a subvector that holds several values of a slot: once
        self.touched = pairs % len(self.slot)
        counts = np.bincount(pairs // len(self.slot), minlength=self.n_channels)
        self.touched_at = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def reset(self, permutation: Ints) -> None:
        """Take `permutation` (C,); everything is computed anew."""
        self.permutation = permutation.copy()
        self.columns = self._columns_of(permutation)
        self.moment, self.mean = self._moment_of(self.columns)
        self.value = self._logdet(self.moment, self.mean)

    def evaluate(self, permutation: Ints) -> float:
        """The score of another permutation; that of the objective stays."""
        return self._logdet(*self._moment_of(self._columns_of(permutation)))

    def propose(self, i: int, j: int) -> tuple[float, Proposal]:
        """The score after swapping the channels at positions i and j, and what `commit` needs to make the swap."""
        parts = [self.touched[self.touched_at[x] : self.touched_at[x + 1]] for x in (i, j)]
        touched = np.unique(np.concatenate(parts))
        old, slot, track = self.columns[touched], self.slot[touched], self.track[touched]
        new = old.copy()
        for here, other in ((i, j), (j, i)):
            new[slot == here] = self.track_columns[track[slot == here], self.permutation[other] % self.block_size]
        moment = self.moment + self._block(touched, new) - self._block(touched, old)
        sums = self.column_sum[new + self.sum_at[touched, None]] - self.column_sum[old + self.sum_at[touched, None]]
        mean = self.mean + sums.sum(axis=0)
        value = self._logdet(moment, mean)
        return value, (i, j, touched, new, moment, mean, value)

    def falling_variances(self) -> Ints | None:
        """(C,) the permutation that makes the variances per place of a subvector very unequal, as `search.greedy` does:
        the channels of the largest variance to the slots at the first places.

        None where slots do not stand at places of their own (a value of one slot has the place of a value of another
        one that is not at the same places throughout): then there is no such order.
        """
        variance, held = self._variances(), self.slot != FIXED
        slot, track = self.slot[held], self.track[held]
        place = np.broadcast_to(np.arange(self.d), self.slot.shape)[held]
        order = np.arange(self.n_channels)
        for first in range(0, self.n_channels, self.block_size):
            mine = (slot >= first) & (slot < first + self.block_size)
            tracks, of_track = np.unique(track[mine], return_inverse=True)
            places = np.full((self.block_size, tracks.size), FIXED, np.int64)
            places[slot[mine] - first, of_track.reshape(-1)] = place[mine]
            patterns, which = np.unique(places, axis=0, return_inverse=True)
            own = np.concatenate([np.unique(pattern) for pattern in patterns])
            if np.unique(own).size < own.size:
                return None
            slots = np.argsort(which.reshape(-1), kind="stable") + first
            falling = variance[first : first + self.block_size]
            order[slots] = np.argsort(-falling, kind="stable") + first
        return order

    def _variances(self) -> Floats:
        """(C,) mean over a channel's tracks of the logarithm of its variance over the rows."""
        held = np.flatnonzero(self.slot.reshape(-1) != FIXED)
        slot, track = self.slot.reshape(-1)[held], self.track.reshape(-1)[held]
        vector, column = held // self.d, self._at_first.reshape(-1)[held]
        scale = self.n_subvectors / self._n_rows[track]  # tables are divided by n, these variances are over the rows
        square = self.gram[self.gram_at[vector] + column * (self.width[vector] + 1)] * scale
        mean = self.column_sum[self.sum_at[vector] + column] * scale
        logs = np.log(np.maximum(square - mean**2, 0) + self.ridge[0, 0])
        count = np.bincount(slot, minlength=self.n_channels)
        return np.bincount(slot, logs, minlength=self.n_channels) / np.maximum(count, 1)

    def _columns_of(self, permutation: Ints) -> Ints:
        channel = permutation[self.slot] % self.block_size  # FIXED reads any, and is not used
        return np.where(self.slot == FIXED, self._at_first, self.track_columns[self.track, channel])

    def _moment_of(self, columns: Ints) -> tuple[Floats, Floats]:
        moment = self._start_moment + self._block(np.arange(len(columns)), columns)
        return moment, self._start_mean + self.column_sum[columns + self.sum_at[:, None]].sum(axis=0)

    def _block(self, vectors: Ints, columns: Ints) -> Floats:
        """Sum over touched subvectors (t,) with these columns (t, d) of their d x d part of the inner products."""
        row, column = columns[:, :, None], columns[:, None, :]
        at = np.minimum(row, column) * self.width[vectors, None, None] + np.maximum(row, column)
        return self.gram[at + self.gram_at[vectors, None, None]].sum(axis=0)

"""What `PlacedChild` keeps of the rows of a weight that are laid out alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .gram import Floats, upper_gram
from .layout import Ints, RowClass

FIXED = -1
"""The slot of a column that holds no channel of the group."""


@dataclass(frozen=True)
class ClassTables:
    """One row class; V touched subvectors per row, U = V * d columns in them, numbered in the order of the weight.

    Attributes:
        slot: (V, d) the slot at each place of each touched subvector, or `FIXED`.
        track: (V, d) its track.
        tracks: (T, S) the column of every channel of each track, among the U.
        gram: (U, U) inner products of the columns over the rows, divided by the weight's subvectors; entries on and
            above the diagonal.
        column_sum: (U,) sums of the columns, divided alike.
    """

    slot: Ints
    track: Ints
    tracks: Ints
    gram: Floats
    column_sum: Floats

    @staticmethod
    def of(matrix: Floats, d: int, one: RowClass, n_subvectors: int) -> ClassTables:
        """Of the weight `matrix` (R, L), cut into `n_subvectors` of length d."""
        touched = np.unique(one.tracks // d)
        columns = (touched[:, None] * d + np.arange(d)).reshape(-1)
        tracks = np.searchsorted(columns, one.tracks)
        size = one.tracks.shape[1]
        slot, track = np.full(columns.size, FIXED, np.int64), np.zeros(columns.size, np.int64)
        slot[tracks] = one.block[:, None] * size + np.arange(size)
        track[tracks] = np.arange(len(tracks))[:, None]
        part = matrix[np.ix_(one.rows, columns)]
        return ClassTables(
            slot=slot.reshape(-1, d),
            track=track.reshape(-1, d),
            tracks=tracks,
            gram=upper_gram(part, 1.0 / n_subvectors),
            column_sum=part.sum(axis=0) / n_subvectors,
        )


def untouched(matrix: Floats, d: int, classes: Sequence[RowClass]) -> tuple[Floats, Floats]:
    """Second moment (d, d) and mean (d,) of the subvectors that hold no channel of the group, as parts of those of all
    subvectors: divided by the number of all."""
    n = matrix.size // d
    moment, mean = np.zeros((d, d)), np.zeros(d)
    rest = np.ones(matrix.shape[0], bool)
    for one in classes:
        rest[one.rows] = False
    kept = np.ones(matrix.shape[1] // d, bool)
    for rows, touched in [(np.flatnonzero(rest), np.empty(0, np.int64)), *((o.rows, o.tracks // d) for o in classes)]:
        kept[:] = True
        kept[touched] = False
        vectors = matrix[rows].reshape(rows.size, kept.size, d)[:, kept].reshape(-1, d)
        moment += vectors.T @ vectors / n
        mean += vectors.sum(axis=0) / n
    return moment, mean

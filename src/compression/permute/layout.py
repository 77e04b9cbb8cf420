"""Where the channels of a group stand in the rows of a weight, and whether a permutation of them changes which values
share a subvector.

A weight is read as a matrix of R rows and L columns, each row is cut into subvectors of d consecutive columns (paper
section 3.1). The channels of a group can stand at any columns of it: behind the channels of other groups (a
concatenation), at several columns each (a kernel, a flattened map, a channel that is read twice), and at other columns
in other rows (a convolution with groups).

Notation: a *slot* is the place of one channel, a *track* the columns at which the j-th value of every slot stands:
where a channel has q values in a row, its row has q tracks. B blocks (`ChannelGroup.n_blocks`), S = C / B channels in
each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .channels import Places

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowClass:
    """Rows in which the channels stand at the same columns.

    Attributes:
        rows: (n,) their numbers, rising.
        block: (T,) which block of channels each track belongs to.
        tracks: (T, S) columns: channel block[t] * S + s has its value of track t at column tracks[t, s].
    """

    rows: Ints
    block: Ints
    tracks: Ints


def moves_columns(places: Places) -> bool:
    """Whether a permutation moves anything along another axis than the first, the rows of the weight."""
    return any(size > 1 for size in places.shape[1:])


def row_classes(shape: Sequence[int], places: Sequence[Places], n_blocks: int) -> list[RowClass]:
    """The rows of a weight, sorted by where the channels stand in them; rows that hold none are left out.

    Values that a permutation moves from row to row are left out: whole rows or subvectors may move so, which changes
    nothing, and where single values do there is no score.

    Args:
        shape: of the weight (R, ...).
        places: of the group in this weight.
        n_blocks: of the group.
    """
    everywhere: list[tuple[int, Ints]] = []
    by_row: dict[int, list[tuple[int, Ints]]] = {}
    for place in places:
        if not moves_columns(place):
            continue
        rows, columns = _cells(shape, place)
        for block, (of_rows, of_columns) in enumerate(
            zip(np.split(rows, n_blocks), np.split(columns, n_blocks), strict=True)
        ):
            still = (of_rows == of_rows[:1]).all(axis=0)
            for row in np.unique(of_rows[0, still]).tolist():
                tracks = of_columns[:, still & (of_rows[0] == row)].T
                (everywhere if row < 0 else by_row.setdefault(row, [])).append((block, tracks))
    alike: dict[bytes, list[int]] = {}
    found: dict[bytes, list[tuple[int, Ints]]] = {}
    for row in range(shape[0]) if everywhere else sorted(by_row):
        own = by_row.get(row, [])
        key = b"".join(np.array([block, *t.shape]).tobytes() + t.tobytes() for block, t in own)
        alike.setdefault(key, []).append(row)
        found.setdefault(key, [*everywhere, *own])
    return [
        RowClass(
            rows=np.array(rows, np.int64),
            block=np.concatenate([np.full(len(tracks), block, np.int64) for block, tracks in found[key]]),
            tracks=np.ascontiguousarray(np.concatenate([tracks for _, tracks in found[key]])),
        )
        for key, rows in alike.items()
    ]


def _cells(shape: Sequence[int], place: Places) -> tuple[Ints, Ints]:
    """(C, q) rows and columns of the values of each channel; the row is -1 where they stand in all rows."""
    positions = place.positions.numpy()
    counted = [axis for axis, size in enumerate(place.shape) if size > 1]
    index = np.unravel_index(positions, [shape[axis] for axis in counted])
    strides = {axis: math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))}
    columns = np.zeros(positions.shape, np.int64)
    rows = np.full(positions.shape, -1, np.int64)
    for axis, along in zip(counted, index, strict=True):
        if axis == 0:
            rows = np.asarray(along, np.int64)
        else:
            columns += np.asarray(along, np.int64) * strides[axis]
    inner = np.zeros(1, np.int64)
    for axis in strides:
        if axis not in counted:
            inner = (inner[:, None] + np.arange(shape[axis]) * strides[axis]).reshape(-1)
    n = positions.shape[0]
    spread = (columns[:, :, None] + inner).reshape(n, -1)
    return np.repeat(rows, inner.size, axis=1), spread


def changes_subvectors(classes: Sequence[RowClass], d: int) -> bool:
    """Whether a permutation changes which values share a subvector of length d.

    It does not where subvectors lie within one channel and move as a whole.
    """
    return any(
        not _moves_whole_subvectors(one.tracks[one.block == block], d)
        for one in classes
        for block in np.unique(one.block)
    )


def _moves_whole_subvectors(tracks: Ints, d: int) -> bool:
    """Whether the tracks (T, S) of a block fill whole subvectors, which ones together and in which order being the same
    for all channels."""
    n_tracks, n_slots = tracks.shape
    if n_slots < 2:
        return True
    if n_tracks % d:
        return False
    order = np.argsort(tracks[:, 0], kind="stable")
    ordered = tracks[order].reshape(-1, d, n_slots)
    return bool((ordered % d == np.arange(d)[:, None]).all() and (ordered // d == ordered[:, :1] // d).all())


def plain_groups(classes: Sequence[RowClass], shape: Sequence[int]) -> int:
    """Number of convolution groups G of a weight whose channels fill its rows one after the other, each with
    neighbouring columns, the rows of group g with the channels of group g; 0: it is no such weight."""
    n_rows, n_columns = shape[0], math.prod(shape[1:])
    if not classes or n_rows % len(classes):
        return 0
    per_class = n_rows // len(classes)
    next_block = 0
    for number, one in enumerate(classes):
        rows_follow = np.array_equal(one.rows, np.arange(per_class) + number * per_class)
        blocks = np.unique(one.block)
        blocks_follow = np.array_equal(blocks, np.arange(blocks.size) + next_block)
        columns = np.concatenate([one.tracks[one.block == block].T.reshape(-1) for block in blocks])
        if not (rows_follow and blocks_follow and np.array_equal(columns, np.arange(n_columns))):
            return 0
        next_block += blocks.size
    return len(classes)

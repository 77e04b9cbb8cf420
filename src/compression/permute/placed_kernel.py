"""The inner loop of the permutation search for children whose channels stand at any columns, compiled by numba.

What it computes is what `kernel` says, and what `PlacedChild` does in NumPy. Where a channel stands is not computed
from its number here but read from tables, those of all children one after the other.

Notation: K children, C channels, V touched subvectors and E = sum of their lengths over all children, T tracks of S
channels each. Arrays come in three tuples:

  - swaps: first, second (N,) positions; temperatures, draws (N,) or empty;
  - layout: length (K,) d of each child; touched_at (K * C + 1,) and touched: subvectors that slot i of child c touches
    are touched[touched_at[c * C + i] : touched_at[c * C + i + 1]], rising; entry_at (V,) where the places of a
    subvector begin in slot, track (E,) and columns; track_columns (T * S,); gram_at, width, sum_at (V,), gram and
    column_sum as in `PlacedChild`; weight, ridge (K,); S; moment_at, mean_at (K,);
  - state: permutation (C,), columns (E,), moment (lower triangles), mean, logdet (K,), best (C,): changed in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...common.compiling import loop
from .kernel import logdet_of


@loop(inline="always")
def entry(gram: Any, start: int, width: int, first: int, second: int) -> float:
    """The inner product of two columns of a row class, of whose table the part on and above the diagonal is filled."""
    return gram[start + min(first, second) * width + max(first, second)]


@loop()
def replace_columns(vector: int, d: int, i: int, j: int, others: Any, layout: Any, columns: Any, new: Any) -> None:
    """Write to `new` (d,) the columns of a subvector after the swap of slots i and j, which receive `others`: the
    numbers within their block of the channels at j and i."""
    start, slot, track, track_columns, size = layout[3][vector], layout[4], layout[5], layout[6], layout[14]
    for p in range(d):
        at = start + p
        if slot[at] == i:
            new[p] = track_columns[track[at] * size + others[0]]
        elif slot[at] == j:
            new[p] = track_columns[track[at] * size + others[1]]
        else:
            new[p] = columns[at]


@loop()
def add_change(vector: int, d: int, new: Any, layout: Any, columns: Any, moment: Any, mean: Any) -> None:
    """Add to moment (d*d, lower triangle) and mean (d,) what the columns `new` of a subvector change."""
    start, gram_at, width, sum_at = layout[3][vector], layout[7][vector], layout[8][vector], layout[9][vector]
    gram, column_sum = layout[10], layout[11]
    for p in range(d):
        old_p, new_p = columns[start + p], new[p]
        moved = old_p != new_p
        if moved:
            mean[p] += column_sum[sum_at + new_p] - column_sum[sum_at + old_p]
        for q in range(p + 1):
            old_q, new_q = columns[start + q], new[q]
            if moved or old_q != new_q:
                added = entry(gram, gram_at, width, new_p, new_q)
                moment[p * d + q] += added - entry(gram, gram_at, width, old_p, old_q)


@loop()
def next_touched(layout: Any, at: Any, ends: Any) -> int:
    """The next of two rising lists' subvectors, each once; -1 after the last. `at` (2,) is moved on."""
    touched = layout[2]
    left = touched[at[0]] if at[0] < ends[0] else -1
    right = touched[at[1]] if at[1] < ends[1] else -1
    if left >= 0 and (right < 0 or left <= right):
        at[0] += 1
        if left == right:
            at[1] += 1
        return left
    if right >= 0:
        at[1] += 1
    return right


@loop()
def start_of(layout: Any, child: int, i: int, j: int, n: int, at: Any, ends: Any) -> None:
    """Set `at` and `ends` to the lists of the subvectors that slots i and j of a child touch."""
    touched_at = layout[1]
    at[0], ends[0] = touched_at[child * n + i], touched_at[child * n + i + 1]
    at[1], ends[1] = touched_at[child * n + j], touched_at[child * n + j + 1]


@loop()
def run_placed_swaps(swaps: Any, layout: Any, state: Any) -> tuple[float, float, int]:
    """Try to swap the channels at positions first[t] and second[t], for every t; accepted as in `kernel.run_swaps`.

    Returns:
        change of the score, lowest change met, swaps accepted.
    """
    first, second, temperatures, draws = swaps
    length, weight, ridge, size = layout[0], layout[12], layout[13], layout[14]
    moment_at, mean_at = layout[15], layout[16]
    permutation, columns, moment, mean, logdet, best = state
    n = permutation.size
    new_moment, new_mean, new_logdet = moment.copy(), mean.copy(), logdet.copy()
    largest = length.max()
    work, new = np.empty(largest * largest), np.empty(largest, np.int64)
    at, ends, others = np.empty(2, np.int64), np.empty(2, np.int64), np.empty(2, np.int64)
    change = lowest = 0.0
    accepted = 0
    for t in range(first.size):
        i, j = first[t], second[t]
        others[0], others[1] = permutation[j] % size, permutation[i] % size
        delta = 0.0
        for c in range(length.size):
            d, m0, a0 = length[c], moment_at[c], mean_at[c]
            start_of(layout, c, i, j, n, at, ends)
            new_moment[m0 : m0 + d * d] = moment[m0 : m0 + d * d]
            new_mean[a0 : a0 + d] = mean[a0 : a0 + d]
            vector = next_touched(layout, at, ends)
            while vector >= 0:
                replace_columns(vector, d, i, j, others, layout, columns, new)
                add_change(vector, d, new, layout, columns, new_moment[m0 : m0 + d * d], new_mean[a0 : a0 + d])
                vector = next_touched(layout, at, ends)
            new_logdet[c] = logdet_of(new_moment[m0 : m0 + d * d], new_mean[a0 : a0 + d], ridge[c], d, work)
            delta += weight[c] * (new_logdet[c] - logdet[c])
        accept = delta < -1e-12
        if not accept and temperatures.size and delta < np.inf:
            accept = draws[t] < np.exp(-delta / temperatures[t])
        if not accept:
            continue
        accepted += 1
        change += delta
        for c in range(length.size):
            d = length[c]
            start_of(layout, c, i, j, n, at, ends)
            vector = next_touched(layout, at, ends)
            while vector >= 0:
                replace_columns(vector, d, i, j, others, layout, columns, new)
                start = layout[3][vector]
                columns[start : start + d] = new[:d]
                vector = next_touched(layout, at, ends)
        permutation[i], permutation[j] = permutation[j], permutation[i]
        moment[:], mean[:], logdet[:] = new_moment, new_mean, new_logdet
        if change < lowest:
            lowest = change
            best[:] = permutation
    return change, lowest, accepted

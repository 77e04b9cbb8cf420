"""The inner loop of the permutation search, compiled by numba: a candidate swap costs a fraction of a microsecond.

Several children are scored together: the score is the sum over children of weight * log det(Cov). For each child the kernel
keeps the d x d second moment and the mean of the subvectors and updates them by the few subvectors that a swap touches
(`objective`, where the same is written in NumPy for one child). Everything of variable size lies in flat arrays.

Arrays (c: child): gram (flat, at gram_at[c], G_c blocks of W_c x W_c), column_sum (flat, at column_at[c]), columns (flat, at
columns_at[c]: for each value of each subvector the column it holds), moment (flat, at moment_at[c], d_c x d_c), mean (flat, at
mean_at[c]), logdet (c). shape[c] = (area, d, W, tail); with a tail the entries of gram are those of `ChildObjective.table`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@njit(cache=True, nogil=True)
def logdet_of(moment: Floats, mean: Floats, ridge: float, d: int, work: Floats) -> float:
    """log det(moment - mean mean^T + ridge I) by symmetric elimination; infinity where it is not positive definite.

    `moment` holds the lower triangle. The innermost loop runs along a row, which the compiler turns into vector instructions.
    """
    for p in range(d):
        for q in range(p + 1):
            work[q * d + p] = moment[p * d + q] - mean[p] * mean[q]
        work[p * d + p] += ridge
    total, product = 0.0, 1.0
    for p in range(d):
        pivot = work[p * d + p]
        if not pivot > 0.0:
            return np.inf
        product *= pivot
        if not 1e-150 < product < 1e150:  # one logarithm for many pivots, before they leave the range of floats
            total += np.log(product)
            product = 1.0
        inverse = 1.0 / pivot
        for i in range(p + 1, d):
            factor = work[p * d + i] * inverse
            for j in range(i, d):
                work[i * d + j] -= factor * work[p * d + j]
    return total + np.log(product)


@njit(cache=True, nogil=True, inline="always")
def inner_product(
    gram: Floats, start: int, area: int, width: int, tail: int, first_column: int, later: int, earlier: int
) -> float:
    """Of two columns of one subvector, `later` not before `earlier` in it; `first_column` is that of the convolution group."""
    if tail == 0:
        row, column = min(later, earlier) - first_column, max(later, earlier) - first_column
        return gram[start + first_column * width + row * width + column]
    later_channel, earlier_channel = later // area, earlier // area
    if later_channel == earlier_channel:
        return gram[start + later * area + earlier - earlier_channel * area]
    n_channels = width // area
    row = earlier_channel * tail + earlier - earlier_channel * area - (area - tail)
    return gram[start + width * area + row * n_channels * tail + later_channel * tail + later - later_channel * area]


@njit(cache=True, nogil=True)
def run_swaps(
    first: Ints,
    second: Ints,
    temperatures: Floats,
    draws: Floats,
    permutation: Ints,
    shape: Ints,
    weight: Floats,
    ridge: Floats,
    gram: Floats,
    gram_at: Ints,
    column_sum: Floats,
    column_at: Ints,
    columns: Ints,
    columns_at: Ints,
    moment: Floats,
    moment_at: Ints,
    mean: Floats,
    mean_at: Ints,
    logdet: Floats,
    best: Ints,
) -> tuple[float, float, int]:
    """Try to swap the channels at positions first[t] and second[t], for every t, updating the state in place.

    A swap is kept if the score falls by more than 1e-12 (ties would cycle), or, at temperature T > 0, with probability
    exp(-rise / T). `best` receives the permutation of the lowest score seen.

    Returns:
        change of the score, lowest change seen, swaps kept.
    """
    n_children = shape.shape[0]
    new_moment, new_mean, new_logdet = moment.copy(), mean.copy(), logdet.copy()
    largest = 0
    for c in range(n_children):
        largest = max(largest, shape[c, 1])
    work = np.empty(largest * largest)
    old_columns, new_columns = np.empty(largest, np.int64), np.empty(largest, np.int64)
    change = lowest = 0.0
    kept = 0
    for t in range(first.size):
        i, j = first[t], second[t]
        channel_i, channel_j = permutation[i], permutation[j]
        delta = 0.0
        for c in range(n_children):
            area, d, width, tail = shape[c, 0], shape[c, 1], shape[c, 2], shape[c, 3]
            m0, a0, g0, s0, c0 = moment_at[c], mean_at[c], gram_at[c], column_at[c], columns_at[c]
            for p in range(d):
                new_mean[a0 + p] = mean[a0 + p]
                for q in range(p + 1):
                    new_moment[m0 + p * d + q] = moment[m0 + p * d + q]
            from_i, to_i = i * area // d, ((i + 1) * area - 1) // d
            from_j, to_j = j * area // d, ((j + 1) * area - 1) // d
            n_i = to_i - from_i + 1
            for step in range(n_i + to_j - from_j + 1):
                v = from_i + step if step < n_i else from_j + step - n_i
                if step >= n_i and from_i <= v <= to_i:
                    continue
                for p in range(d):
                    u = v * d + p
                    position = u // area
                    old_columns[p] = columns[c0 + u]
                    if position == i:
                        new_columns[p] = channel_j * area + u - position * area
                    elif position == j:
                        new_columns[p] = channel_i * area + u - position * area
                    else:
                        new_columns[p] = old_columns[p]
                group_start = (old_columns[0] // width) * width
                for p in range(d):
                    old_p, new_p = old_columns[p], new_columns[p]
                    touched = old_p != new_p
                    if touched:
                        new_mean[a0 + p] += column_sum[s0 + new_p] - column_sum[s0 + old_p]
                    for q in range(p + 1):
                        old_q, new_q = old_columns[q], new_columns[q]
                        if touched or old_q != new_q:
                            added = inner_product(gram, g0, area, width, tail, group_start, new_p, new_q)
                            removed = inner_product(gram, g0, area, width, tail, group_start, old_p, old_q)
                            new_moment[m0 + p * d + q] += added - removed
            value = logdet_of(new_moment[m0 : m0 + d * d], new_mean[a0 : a0 + d], ridge[c], d, work)
            new_logdet[c] = value
            delta += weight[c] * (value - logdet[c])
        accept = delta < -1e-12
        if not accept and temperatures.size and delta < np.inf:
            accept = draws[t] < np.exp(-delta / temperatures[t])
        if not accept:
            continue
        kept += 1
        change += delta
        permutation[i], permutation[j] = channel_j, channel_i
        for c in range(n_children):
            area, d = shape[c, 0], shape[c, 1]
            m0, a0, c0 = moment_at[c], mean_at[c], columns_at[c]
            for p in range(d):
                mean[a0 + p] = new_mean[a0 + p]
                for q in range(p + 1):
                    moment[m0 + p * d + q] = new_moment[m0 + p * d + q]
            logdet[c] = new_logdet[c]
            for r in range(area):
                columns[c0 + i * area + r] = channel_j * area + r
                columns[c0 + j * area + r] = channel_i * area + r
        if change < lowest:
            lowest = change
            best[:] = permutation
    return change, lowest, kept

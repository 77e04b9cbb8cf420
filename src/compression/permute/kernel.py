"""The inner loop of the permutation search, compiled by numba: a candidate swap costs a fraction of a microsecond.

Several children are scored together: the score is the sum over children of weight * log det(Cov). `ChildObjective` does
the same for one child in NumPy, and says what the Gram matrix is.

What a swap changes. Every row of the weight is cut into m subvectors, and the v-th of them takes its values, in every
row, from the same d columns u_v(0), ..., u_v(d-1). Over all n = R*m subvectors of R rows the second moment is therefore
a sum of m blocks (d x d) of the Gram matrix of columns, and the mean a sum of m slices of the column sums:

    moment[p, q] = (1/n) sum over subvectors x of x_p x_q = sum over v of gram[u_v(p), u_v(q)]
    mean[p]      = (1/n) sum over subvectors x of x_p     = sum over v of column_sum[u_v(p)]
    Cov          = moment - mean mean^T

(gram and column_sum are divided by n beforehand; with convolution groups v runs over the subvectors of all groups, each
with the Gram matrix of its group's rows.) Swapping two channels of a values each replaces columns in those v that hold
one of them: in two where d is a multiple of a, in at most 2 * (ceil((a-1)/d) + 1) otherwise. A column replaced at place
p changes row p and column p of the block of v and nothing else: a symmetric update of rank two, e_p w^T + w e_p^T.
Added up over the replaced columns,

    moment += sum over the touched v of (gram[new, new] - gram[old, old])
    mean   += sum over the touched v of (column_sum[new] - column_sum[old])

Costs. A touched v adds at most d(d+1)/2 differences of two entries of the Gram matrix: O(d^2), whatever the numbers of
rows and of channels. The log-determinant of the d x d result is computed anew by elimination, d^3/3 operations, and d
is small.

Exactness. Nothing is approximated: up to rounding, each score is the log-determinant of the covariance of the permuted
weight. Rounding errors of accepted swaps add up, so the caller runs the kernel on a few thousand swaps at a time
(`REFRESH`) and computes moment and mean anew in between.

Invariants between two swaps, for every child c:
  - columns holds, for each place of each subvector, the column that stands there under `permutation`;
  - moment (lower triangle) and mean are the sums above for these columns, and logdet[c] belongs to them;
  - what the new_* arrays hold belongs to the last swap tried and is never read before it is written.

Arrays. Everything of variable size lies in flat arrays; the numbers of child c begin at x_at[c] in array x: gram (G_c
blocks of W_c x W_c, of which the upper triangle is read), column_sum, columns (d_c per subvector), moment (d_c x d_c),
mean (d_c). shape[c] = (area, d, W, tail): a values per channel, d, columns of a row, and the tail of `ChildObjective`,
with which gram holds the entries of `ChildObjective.table` instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...common.compiling import loop

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@loop()
def logdet_of(moment: Floats, mean: Floats, ridge: float, d: int, work: Floats) -> float:
    """log det(moment - mean mean^T + ridge I) by symmetric elimination; infinity where it is not positive definite.

    Gaussian elimination without pivoting (that of Cholesky, L D L^T): the determinant is the product of the pivots, and
    the matrix is positive definite if and only if all of them are positive. `moment` holds the lower triangle; `work`
    (d*d) receives the upper one, so that the innermost loop runs along a row, which the compiler turns into vector
    instructions.
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


@loop(inline="always")
def inner_product(
    gram: Floats, start: int, area: int, width: int, tail: int, first_column: int, later: int, earlier: int
) -> float:
    """Inner product of the columns at two places of one subvector, place `later` not before place `earlier`.

    Without a tail the entry of a whole Gram matrix, of which only the part on and above the diagonal is filled;
    `first_column` is the first column of the convolution group. With a tail `gram` holds two tables (see
    `ChildObjective`): the columns of one channel with each other, and behind them, at width * area, the last columns of
    every channel with the first of every channel. There a subvector spans two neighbouring channels at most: `earlier`
    is one of the last columns of the first, `later` one of the first columns of the second.
    """
    if tail == 0:
        row, column = min(later, earlier) - first_column, max(later, earlier) - first_column
        return gram[start + first_column * width + row * width + column]
    later_channel, earlier_channel = later // area, earlier // area
    if later_channel == earlier_channel:
        return gram[start + later * area + earlier - earlier_channel * area]
    n_channels = width // area
    row = earlier_channel * tail + earlier - earlier_channel * area - (area - tail)
    return gram[start + width * area + row * n_channels * tail + later_channel * tail + later - later_channel * area]


@loop()
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
    """Try to swap the channels at positions first[t] and second[t], for every t, updating the arrays in place.

    A swap is accepted if the score falls by more than 1e-12 (otherwise swaps of equal score would follow each other for
    ever), or, at temperature T > 0, with probability exp(-rise / T): draws[t] is uniform in [0, 1). Without
    temperatures only the former. A covariance that is not positive definite scores infinity and is never accepted.

    Args:
        first, second: (T,) positions; first[t] differs from second[t].
        temperatures, draws: (T,), or empty.
        permutation: p (C,), changed in place.
        shape, ..., mean_at: see the top of the file; columns, moment and mean are changed in place.
        weight, ridge, logdet: (number of children,); logdet is changed in place.
        best: (C,) receives the permutation of the lowest score met, if one is below that of the beginning.

    Returns:
        change of the score, lowest change met, swaps accepted.
    """
    n_children = shape.shape[0]
    new_moment, new_mean, new_logdet = moment.copy(), mean.copy(), logdet.copy()
    largest = 0
    for c in range(n_children):
        largest = max(largest, shape[c, 1])
    work = np.empty(largest * largest)
    old_columns, new_columns = np.empty(largest, np.int64), np.empty(largest, np.int64)
    change = lowest = 0.0
    accepted = 0
    for t in range(first.size):
        i, j = first[t], second[t]
        channel_i, channel_j = permutation[i], permutation[j]
        delta = 0.0
        # --- the score after the swap ---
        for c in range(n_children):
            area, d, width, tail = shape[c, 0], shape[c, 1], shape[c, 2], shape[c, 3]
            m0, a0, g0, s0, c0 = moment_at[c], mean_at[c], gram_at[c], column_at[c], columns_at[c]
            for p in range(d):
                new_mean[a0 + p] = mean[a0 + p]
                for q in range(p + 1):
                    new_moment[m0 + p * d + q] = moment[m0 + p * d + q]
            # position i covers values i*area ... (i+1)*area - 1 of all rows, which lie in the subvectors v = from_i ...
            # to_i
            from_i, to_i = i * area // d, ((i + 1) * area - 1) // d
            from_j, to_j = j * area // d, ((j + 1) * area - 1) // d
            n_i = to_i - from_i + 1
            for step in range(n_i + to_j - from_j + 1):
                v = from_i + step if step < n_i else from_j + step - n_i
                if step >= n_i and from_i <= v <= to_i:
                    continue  # holds values of both channels, and was updated for both already
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
                group_start = (old_columns[0] // width) * width  # a subvector lies within one convolution group
                # the block of this subvector: entry (p, q) changes if the column at p or at q was replaced
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
        # --- make the swap ---
        accepted += 1
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
    return change, lowest, accepted

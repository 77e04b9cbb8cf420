"""A descent step over many channels at once: exchange the channels at one place of many subvectors by linear
assignment.

log det is concave in the covariance, so its linearisation at the present covariance S,

    log det(S') <= log det(S) + trace(S^-1 (S' - S)),

is an upper bound (majorisation). Take every B-th position, beginning at one of the first B, where B is a common
multiple of all children's channels per subvector: these positions lie in different subvectors of every child, always at
the same place. Moving their channels among each other changes neither the mean nor the diagonal blocks of the
covariance, only the products of these channels with their neighbours; for each channel those depend on where it goes
itself and on nothing else. The bound is therefore a sum of costs (channel, position), which a linear assignment
minimises exactly. The score cannot rise; repeated for all B beginnings it falls until no such exchange lowers the
bound.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from .group_objective import GroupObjective
from .objective import ChildObjective, Floats, Ints
from .placed_child import PlacedChild

LARGEST = 1024
"""Positions at a time: an assignment takes time in their third power."""


def assign_channels(objective: GroupObjective, order: Ints, rounds: int, tolerance: float = 1e-5) -> None:
    """Improve the permutation of `objective` in place, until a round over all B beginnings gains less than `tolerance`.

    Does nothing where a child's subvectors do not hold whole channels, or where the positions are too few or too many.

    Args:
        objective: over any number of children, without blocks.
        order: (B,) a sequence of 0 to B - 1 (B from `positions`): in which order the beginnings are taken.
        rounds: at most so many.
        tolerance: change of the score divided by the sum of the children's weights.
    """
    stride = order.size
    n_places = objective.n_channels // stride if stride else 0
    if not 2 <= n_places <= LARGEST:
        return
    enough = tolerance * float(objective.weights.sum())
    for _ in range(rounds):
        before = objective.value
        for beginning in order.tolist():
            places = np.arange(n_places) * stride + beginning
            cost = sum(
                w * linearised(child, places) for w, child in zip(objective.weights, objective.children, strict=True)
            )
            _, chosen = linear_sum_assignment(np.asarray(cost).T)  # chosen[s]: which of the channels goes to places[s]
            candidate = objective.permutation.copy()
            candidate[places] = objective.permutation[places][chosen]
            earlier, value = objective.permutation.copy(), objective.value
            objective.reset(candidate)
            if objective.value >= value - 1e-12:
                objective.reset(earlier)
        if before - objective.value < enough:
            return


def positions(objective: GroupObjective) -> int:
    """B, the common multiple of the children's channels per subvector; 0 where subvectors do not hold whole channels,
    or hold other values too."""
    stride = 1
    for child in objective.children:
        if isinstance(child, PlacedChild):
            return 0
        if child.d % child.area:
            return 0
        stride = math.lcm(stride, child.d // child.area)
    return stride if objective.n_channels % stride == 0 else 0


def linearised(child: ChildObjective, places: Ints) -> Floats:
    """(S, S) cost [x, s] of putting the channel now at places[x] to places[s]: the part of the linearised log det that
    depends on it.

    trace(S^-1 S') summed over the entries that change: twice (the covariance is symmetric) the precision S^-1 [u, v]
    times the inner product of column u of the channel with column v of a neighbour at places[s]. The sum over a new
    arrangement minus that over the present one bounds the change of the score from above.

    Args:
        child: without convolution groups; its subvectors hold whole channels.
        places: (S,) positions in different subvectors, all at the same place of them.
    """
    area, per_subvector = child.area, child.d // child.area
    precision = np.linalg.inv(child.moment - np.outer(child.mean, child.mean) + child.ridge)
    channels = child.permutation[places]
    cost = np.zeros((places.size, places.size))
    own = int(places[0]) % per_subvector  # the same for all of them
    only = np.zeros(1, np.int64)
    for other in range(per_subvector):
        if other == own:
            continue
        neighbours = child.permutation[places - own + other]
        for u in range(area):
            for v in range(area):
                factor = 2.0 * precision[own * area + u, other * area + v]
                cost += factor * child.products(only, (channels * area + u)[:, None], neighbours * area + v)
    return cost

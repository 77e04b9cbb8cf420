"""A descent step over many channels at once: choose one channel per subvector slot by linear assignment.

log det is concave in the covariance, so its linearisation at the present covariance is an upper bound (majorisation). Take the
channels that stand at one position of every B-th slot, B a common multiple of all children's channels per subvector. Moving
them among these slots changes no mean and no diagonal block, and the covariance is linear in who stands where: the bound is
minimised exactly by a linear assignment. Repeated over positions the score falls at every step.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from .group_objective import GroupObjective
from .objective import ChildObjective, Floats, Ints

LARGEST = 1024
"""Slots at a time: the assignment costs their third power."""


def assign_channels(objective: GroupObjective, order: Ints, rounds: int, tolerance: float = 1e-5) -> None:
    """Improve the permutation of `objective` in place, position after position, until a round gains less than `tolerance`.

    Does nothing where a child's subvectors do not hold whole channels, or where the slots are too few or too many.

    Args:
        objective: over any number of children, without blocks.
        order: (B,) in which the positions are taken, as from `positions`.
        rounds: at most so many passes over all positions.
        tolerance: of the score, per subvector.
    """
    stride = order.size
    slots = objective.n_channels // stride if stride else 0
    if not 2 <= slots <= LARGEST:
        return
    enough = tolerance * float(objective.weights.sum())
    for _ in range(rounds):
        before = objective.value
        for position in order.tolist():
            places = np.arange(slots) * stride + position
            cost = sum(
                w * linearised(child, places) for w, child in zip(objective.weights, objective.children, strict=True)
            )
            _, chosen = linear_sum_assignment(np.asarray(cost).T)  # chosen[s]: which of the channels goes to slot s
            candidate = objective.permutation.copy()
            candidate[places] = objective.permutation[places][chosen]
            kept, value = objective.permutation.copy(), objective.value
            objective.reset(candidate)
            if objective.value >= value - 1e-12:
                objective.reset(kept)
        if before - objective.value < enough:
            return


def positions(objective: GroupObjective) -> int:
    """B, the common multiple of the children's channels per subvector; 0 where subvectors do not hold whole channels."""
    stride = 1
    for child in objective.children:
        if child.d % child.area:
            return 0
        stride = math.lcm(stride, child.d // child.area)
    return stride if objective.n_channels % stride == 0 else 0


def linearised(child: ChildObjective, places: Ints) -> Floats:
    """(S, S) cost of the channel now at places[x] standing at places[s]: the part of the linearised log det that depends on it.

    The differences to the cost of the present order bound the change of the score from above.

    Args:
        child: without convolution groups, its subvectors hold whole channels.
        places: (S,) positions, all at the same place within their subvectors, in different subvectors.
    """
    area, per_subvector = child.area, child.d // child.area
    precision = np.linalg.inv(child.moment - np.outer(child.mean, child.mean) + child.ridge)
    channels = child.permutation[places]
    cost = np.zeros((places.size, places.size))
    own = places % per_subvector
    first_place = places - own
    only = np.zeros(1, np.int64)
    for other in range(per_subvector):
        if other == own[0]:
            continue
        neighbours = child.permutation[first_place + other]
        for u in range(area):
            for v in range(area):
                factor = 2.0 * precision[own[0] * area + u, other * area + v]
                cost += factor * child.products(only, (channels * area + u)[:, None], neighbours * area + v)
    return cost

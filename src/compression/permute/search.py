"""Searching the permutation of one group (paper section 3.2.3): greedy start and stochastic local search.

A search is a function (objective, n_blocks, n_tries, generator) -> None that leaves its result in the objective's
permutation. To add one: write it and register it under the name that users write in `permutation_specs.<layer>.optimization`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .objective import ChildObjective, Ints

Search = Callable[[ChildObjective, int, int, torch.Generator], None]


@dataclass(frozen=True)
class SearchResult:
    """The outcome for one group.

    Attributes:
        permutation: p (C,); the identity where nothing better was found.
        before: log det(Cov) of the deciding child at the identity.
        after: the same at `permutation`.
    """

    permutation: Tensor
    before: float
    after: float


def greedy(objective: ChildObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """Very unequal variances per position: sort the channels by falling variance, cut into b runs, interleave them.

    With b = d/a channels per subvector, run j supplies position j of every subvector. Where a subvector does not hold a
    whole number of channels there are no positions to fill, and the order stays.
    """
    if objective.d % objective.area:
        return
    per_subvector = objective.d // objective.area
    size = objective.n_channels // n_blocks
    scores = objective.channel_scores()
    order: list[Ints] = []
    for block in range(n_blocks):
        channels = np.arange(block * size, (block + 1) * size)
        if size % per_subvector:
            return
        falling = channels[np.argsort(-scores[channels], kind="stable")]
        order.append(falling.reshape(per_subvector, -1).T.reshape(-1))
    objective.reset(np.concatenate(order))


def stochastic(objective: ChildObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """Stochastic local search: swap two random channels `n_tries` times, keeping a swap if the score falls."""
    size = objective.n_channels // n_blocks
    if size < 2:
        return
    first = torch.randint(objective.n_channels, (n_tries,), generator=generator)
    shift = torch.randint(1, size, (n_tries,), generator=generator)
    second = first // size * size + (first % size + shift) % size
    for tried, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        objective.try_swap(i, j)
        if tried % 4096 == 4095:
            objective.reset(objective.permutation)  # rounding errors of the running sums must not add up


def random(objective: ChildObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """The best of `n_tries` uniformly drawn permutations: the baseline that a search has to beat."""
    size = objective.n_channels // n_blocks
    best, best_value = objective.permutation, objective.value
    for _ in range(n_tries):
        drawn = torch.cat([torch.randperm(size, generator=generator) + block * size for block in range(n_blocks)]).numpy()
        value = objective.evaluate(drawn)
        if value < best_value:
            best, best_value = drawn, value
    objective.reset(best)


SEARCHES: dict[str, Search] = {"GREEDY": greedy, "STOCHASTIC": stochastic, "RANDOM": random}
PUBLISHED = ("GREEDY", "STOCHASTIC")


def search(
    objective: ChildObjective, n_blocks: int, n_tries: int, generator: torch.Generator, steps: Sequence[str] = PUBLISHED
) -> SearchResult:
    """Run the searches named in `steps` one after the other; a result worse than the identity is dropped.

    Raises:
        KeyError: an unknown name (settings are checked before).
    """
    identity = np.arange(objective.n_channels)
    objective.reset(identity)
    before = objective.value
    for name in steps:
        SEARCHES[name](objective, n_blocks, n_tries, generator)
    objective.reset(objective.permutation)
    if not objective.value < before:
        objective.reset(identity)
    return SearchResult(torch.from_numpy(objective.permutation.copy()), before, objective.value)

"""Searching the permutation of one group (paper section 3.2.3): greedy start, stochastic local search, and beyond.

A search is a function (objective, n_blocks, n_tries, generator) -> None that leaves its result in the objective's
permutation. To add one: write it and register it under the name that users write in
`permutation_specs.<layer>.optimization`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .assignment import assign_channels, positions
from .group_objective import GroupObjective
from .groups import random_permutation
from .objective import Floats, Ints
from .placed_child import PlacedChild
from .registry import STEPS

Step = Callable[[GroupObjective, int, int, torch.Generator], None]


@dataclass(frozen=True)
class SearchResult:
    """The outcome for one group.

    Attributes:
        permutation: p (C,); the identity where nothing better was found.
        before: the score at the identity.
        after: the score at `permutation`.
    """

    permutation: Tensor
    before: float
    after: float


def greedy(objective: GroupObjective, n_blocks: int, _n_tries: int, _generator: torch.Generator) -> None:
    """Very unequal variances per position: sort the channels by falling variance, cut into b runs, interleave them.

    With b = d/a channels per subvector, run j supplies position j of every subvector. By Hadamard's inequality the
    product of the variances bounds det(Cov) from above, and for a given sum of variances that product is smallest where
    they are most unequal. The first child decides. Where a subvector does not hold a whole number of channels there are
    no such positions, and the permutation stays as it is.
    """
    child = objective.children[0]
    if isinstance(child, PlacedChild):
        falling = child.falling_variances()
        if falling is not None:
            objective.reset(falling)
        return
    if child.d % child.area:
        return
    per_subvector = child.d // child.area
    size = child.n_channels // n_blocks
    if size % per_subvector:
        return
    scores = child.channel_scores()
    parts: list[Ints] = []
    for block in range(n_blocks):
        channels = np.arange(block * size, (block + 1) * size)
        sorted_channels = channels[np.argsort(-scores[channels], kind="stable")]
        parts.append(sorted_channels.reshape(per_subvector, -1).T.reshape(-1))  # the rows are the runs
    objective.reset(np.concatenate(parts))


def stochastic(objective: GroupObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """Stochastic local search: swap two random channels `n_tries` times, accepting a swap if the score falls."""
    if objective.n_channels // n_blocks >= 2:
        objective.run(*_pairs(objective, n_blocks, n_tries, generator))


def random(objective: GroupObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """The best of `n_tries` uniformly drawn permutations: the baseline that a search has to beat."""
    best, best_value = objective.permutation, objective.value
    for _ in range(n_tries):
        drawn = random_permutation(objective.n_channels, n_blocks, generator).numpy()
        value = objective.evaluate(drawn)
        if value < best_value:
            best, best_value = drawn, value
    objective.reset(best)


PUBLISHED = ("GREEDY", "STOCHASTIC")


def search(
    objective: GroupObjective, n_blocks: int, n_tries: int, generator: torch.Generator, steps: Sequence[str] = PUBLISHED
) -> SearchResult:
    """Run the searches named in `steps` one after the other; a result worse than the identity is dropped.

    Raises:
        KeyError: an unknown name (settings are checked before).
    """
    identity = np.arange(objective.n_channels)
    objective.reset(identity)
    before = objective.value
    for name in steps:
        STEPS[name](objective, n_blocks, n_tries, generator)
    objective.reset(objective.permutation)  # computed anew, without the rounding errors of the swaps
    if not objective.value < before:
        objective.reset(identity)
    return _result(objective, before)


CHUNK_PER_CHANNEL = 200
SMALL_GAIN = 1e-5
"""A local search tries swaps in chunks of so many per channel, and ends after a chunk that gains less than this per
subvector. The score is a sum over children of weight * log det: the gain is divided by the sum of the weights."""

ANNEALING_PER_CHANNEL = 4000
MOST_TRIES = 1_600_000
MOST_WORK = 80_000_000
"""Swaps of an annealing: so many per channel, at most so many in all, and fewer where one is expensive: a swap costs
about the sum over children of d^2, and tries * that sum stays below the last number. The two limits hold for a local
search too."""

HOTTEST, COLDEST = 3.0, 0.1
"""Temperatures at which an annealing starts and ends, in units of the mean |change| of the score over random swaps. A
swap that raises the score by that unit is accepted with probability exp(-1/3) = 0.72 at the start, and exp(-10) = 5e-5
at the end."""

CandidateMeasure = Callable[[Ints], Floats | None]
"""Permutation -> estimates of the distortion that it leaves: several, each made in the same way for every permutation,
so that two permutations can be compared pair by pair. None, then for all permutations: the score is close enough to the
distortion."""


GroupSearch = Callable[
    [GroupObjective, int, int, torch.Generator, "float | None", "CandidateMeasure | None"], SearchResult
]
"""Objective, blocks, swaps, generator, deadline, measure -> result; the arguments are those of `search_best`."""


def search_published(
    objective: GroupObjective,
    n_blocks: int,
    n_tries: int,
    generator: torch.Generator,
    deadline: float | None = None,  # noqa: ARG001 (of GroupSearch)
    measure: CandidateMeasure | None = None,  # noqa: ARG001 (of GroupSearch)
) -> SearchResult:
    """The paper's search: greedy start, then `n_tries` swaps. It always ends, and needs no measure."""
    return search(objective, n_blocks, n_tries, generator)


def search_best(
    objective: GroupObjective,
    n_blocks: int,
    n_tries: int,
    generator: torch.Generator,
    deadline: float | None = None,
    measure: CandidateMeasure | None = None,
    thorough: bool = True,
) -> SearchResult:
    """As good a permutation as swaps, assignments and annealing find; stops when they no longer gain.

    1. The published candidate: the greedy start with `n_tries` swaps, but scored on all children.
    2. A descent from the identity: linear assignments, which move many channels at once, then swaps, until a chunk of
       them gains next to nothing. It may end in another local minimum than the first.
    3. Simulated annealing of the better of the two, which leaves their local minima, and a descent from the best.
    4. The candidate of the lowest score is taken. The score is exact for Gaussian subvectors only: with `measure` the
       distortion of that candidate is compared with those of the published candidate and of the identity, and one of
       these replaces it where it is better by more than the standard error.

    How many swaps are tried depends on the group alone: the same seed gives the same result, unless a `deadline` cuts
    it short.

    Args:
        objective: the score; its permutation is the result afterwards.
        n_blocks: a permutation stays within this many equal blocks.
        n_tries: swaps of the published candidate.
        generator: draws the swaps.
        deadline: a time of time.monotonic() after which no further step is begun; None: none.
        measure: estimates the distortion that a permutation leaves; None: the score decides.
        thorough: False leaves out steps 2 and 3, and what `measure` is for.
    """
    identity = np.arange(objective.n_channels)
    objective.reset(identity)
    before = objective.value
    if objective.n_channels // n_blocks < 2:
        return _result(objective, before)

    def lowest() -> Ints:
        return min(candidates, key=lambda candidate: candidate[0])[1]

    candidates: list[tuple[float, Ints]] = [(before, identity)]
    greedy(objective, n_blocks, n_tries, generator)
    stochastic(objective, n_blocks, n_tries, generator)
    published = objective.permutation.copy()
    candidates.append((objective.value, published))
    if thorough and not _late(deadline):
        objective.reset(identity)
        _descend(objective, n_blocks, generator, deadline)
        candidates.append((objective.value, objective.permutation.copy()))
    if thorough and not _late(deadline):
        objective.reset(lowest())
        _anneal(objective, n_blocks, generator, deadline)
        _descend(objective, n_blocks, generator, deadline)
        candidates.append((objective.value, objective.permutation.copy()))
    chosen = lowest()
    if thorough and measure is not None and not _late(deadline):
        chosen = _best_measured([chosen, published, identity], measure)
    objective.reset(chosen)
    return _result(objective, before)


def _best_measured(candidates: Sequence[Ints], measure: CandidateMeasure) -> Ints:
    """The candidate of the least distortion; the first one unless another is better by more than the standard error.

    The estimates of two candidates are paired, so the error is that of the mean of their differences: s / sqrt(m - 1)
    for m differences of standard deviation s (computed with divisor m).
    """
    chosen, largest_gain = candidates[0], 0.0
    first = measure(chosen)
    if first is None:
        return chosen
    for candidate in candidates[1:]:
        other = first if np.array_equal(candidate, candidates[0]) else measure(candidate)
        if other is None:
            return candidates[0]
        gains = first - other
        gain, error = float(gains.mean()), float(gains.std() / max(1, gains.size - 1) ** 0.5)
        if gain > max(largest_gain, error):
            chosen, largest_gain = candidate, gain
    return chosen


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _descend(objective: GroupObjective, n_blocks: int, generator: torch.Generator, deadline: float | None) -> None:
    """Assignments, then swaps until a chunk of them no longer gains."""
    stride = positions(objective) if n_blocks == 1 else 0  # an assignment knows nothing of blocks
    order = torch.randperm(stride, generator=generator).numpy() if stride > 1 else np.empty(0, np.int64)
    enough = SMALL_GAIN * float(objective.weights.sum())
    chunk = CHUNK_PER_CHANNEL * objective.n_channels
    assign_channels(objective, order, rounds=4)
    for _ in range(max(1, _most_tries(objective) // chunk)):
        before = objective.value
        objective.run(*_pairs(objective, n_blocks, chunk, generator))
        if before - objective.value < enough or _late(deadline):
            break


def _most_tries(objective: GroupObjective) -> int:
    return min(MOST_TRIES, MOST_WORK // sum(child.swap_work for child in objective.children))


def _anneal(objective: GroupObjective, n_blocks: int, generator: torch.Generator, deadline: float | None) -> None:
    """Simulated annealing: the temperature falls by the same factor at every swap, from `HOTTEST` to `COLDEST`."""
    typical = _typical_change(objective, n_blocks, generator)
    if not np.isfinite(typical) or typical <= 0:
        return
    tries = min(ANNEALING_PER_CHANNEL * objective.n_channels, _most_tries(objective))
    if deadline is not None:
        tries = min(tries, _tries_until(deadline, objective, n_blocks, generator))
    first, second = _pairs(objective, n_blocks, tries, generator)
    draws = torch.rand(tries, generator=generator, dtype=torch.float64).numpy()
    objective.run(first, second, np.geomspace(HOTTEST * typical, COLDEST * typical, tries), draws)


def _tries_until(deadline: float, objective: GroupObjective, n_blocks: int, generator: torch.Generator) -> int:
    """Swaps that can be tried before `deadline`, from the time that 1,000 of them take."""
    started = time.monotonic()
    stochastic(objective, n_blocks, 1000, generator)
    now = time.monotonic()
    return int(max(0.0, deadline - now) / max(now - started, 1e-6) * 1000)


def _typical_change(objective: GroupObjective, n_blocks: int, generator: torch.Generator) -> float:
    """Mean |change| of the score over some random swaps, none of which is made."""
    first, second = _pairs(objective, n_blocks, 64, generator)
    changes = []
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        moves = [child.propose(i, j)[0] - child.value for child in objective.children]
        changes.append(abs(float(np.dot(objective.weights, moves))))
    return float(np.mean(changes))


def _pairs(objective: GroupObjective, n_blocks: int, n: int, generator: torch.Generator) -> tuple[Ints, Ints]:
    """n pairs of different positions, both in the same block, all pairs equally likely."""
    size = objective.n_channels // n_blocks
    first = torch.randint(objective.n_channels, (n,), generator=generator)
    shift = torch.randint(1, size, (n,), generator=generator)
    second = first // size * size + (first % size + shift) % size
    return first.numpy(), second.numpy()


def _result(objective: GroupObjective, before: float) -> SearchResult:
    permutation = torch.from_numpy(objective.permutation.copy())
    return SearchResult(permutation=permutation, before=before, after=objective.value)

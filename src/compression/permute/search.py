"""Searching the permutation of one group (paper section 3.2.3): greedy start, stochastic local search, and beyond.

A search is a function (objective, n_blocks, n_tries, generator) -> None that leaves its result in the objective's
permutation. To add one: write it and register it under the name that users write in `permutation_specs.<layer>.optimization`.
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
from .objective import Floats, Ints

Search = Callable[[GroupObjective, int, int, torch.Generator], None]


@dataclass(frozen=True)
class SearchResult:
    """The outcome for one group.

    Attributes:
        permutation: p (C,); the identity where nothing better was found.
        before: the score at the identity.
        after: the same at `permutation`.
    """

    permutation: Tensor
    before: float
    after: float


def greedy(objective: GroupObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """Very unequal variances per position: sort the channels by falling variance, cut into b runs, interleave them.

    With b = d/a channels per subvector, run j supplies position j of every subvector. The first child decides. Where a
    subvector does not hold a whole number of channels there are no positions to fill, and the order stays.
    """
    child = objective.children[0]
    if child.d % child.area:
        return
    per_subvector = child.d // child.area
    size = child.n_channels // n_blocks
    if size % per_subvector:
        return
    scores = child.channel_scores()
    order: list[Ints] = []
    for block in range(n_blocks):
        channels = np.arange(block * size, (block + 1) * size)
        falling = channels[np.argsort(-scores[channels], kind="stable")]
        order.append(falling.reshape(per_subvector, -1).T.reshape(-1))
    objective.reset(np.concatenate(order))


def stochastic(objective: GroupObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """Stochastic local search: swap two random channels `n_tries` times, keeping a swap if the score falls."""
    if objective.n_channels // n_blocks >= 2:
        objective.run(*_pairs(objective, n_blocks, n_tries, generator))


def random(objective: GroupObjective, n_blocks: int, n_tries: int, generator: torch.Generator) -> None:
    """The best of `n_tries` uniformly drawn permutations: the baseline that a search has to beat."""
    size = objective.n_channels // n_blocks
    best, best_value = objective.permutation, objective.value
    for _ in range(n_tries):
        drawn = torch.cat(
            [torch.randperm(size, generator=generator) + block * size for block in range(n_blocks)]
        ).numpy()
        value = objective.evaluate(drawn)
        if value < best_value:
            best, best_value = drawn, value
    objective.reset(best)


SEARCHES: dict[str, Search] = {"GREEDY": greedy, "STOCHASTIC": stochastic, "RANDOM": random}
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
        SEARCHES[name](objective, n_blocks, n_tries, generator)
    return _result(objective, before)


CHUNK_PER_CHANNEL = 200
SMALL_GAIN = 1e-5
"""Per subvector: a chunk of swaps that gains less ends a local search."""

ANNEALING_PER_CHANNEL = 4000
MOST_TRIES = 1_600_000
MOST_WORK = 80_000_000
"""Swaps of an annealing: so many per channel and in all, fewer where one costs more: tries * (sum over children of d^2) stays below the last.
A local search tries no more than these either."""

HOTTEST, COLDEST = 3.0, 0.1
"""Temperatures of an annealing, in units of the mean |change| that random swaps make."""

Judge = Callable[[Ints], Floats | None]
"""A permutation -> measurements of what it costs, the same number for all and each taken alike; None for all where it cannot say."""


def search_best(
    objective: GroupObjective,
    n_blocks: int,
    n_tries: int,
    generator: torch.Generator,
    deadline: float | None = None,
    judge: Judge | None = None,
) -> SearchResult:
    """As good a permutation as swaps, assignments and annealing find; stops when they no longer gain.

    Candidates are the greedy start with `n_tries` swaps, as published but scored on all children; linear assignments and local search
    until a chunk of swaps gains next to nothing; and simulated annealing of the better of the two, then local search again. The
    amount of work depends on the group alone, so that the same seed gives the same result, unless there is a `deadline` (of
    time.monotonic) to keep.

    The score is that of Gaussian subvectors, which real ones are more or less far from. Where `judge` is given, the identity or the
    published candidate replaces the one of the lowest score if it is measured to be better, by more than the standard error.
    """
    identity = np.arange(objective.n_channels)
    objective.reset(identity)
    before = objective.value
    if objective.n_channels // n_blocks < 2:
        return _result(objective, before)
    found: list[tuple[float, Ints]] = [(before, identity)]

    def keep() -> None:
        found.append((objective.value, objective.permutation.copy()))

    greedy(objective, n_blocks, n_tries, generator)
    stochastic(objective, n_blocks, n_tries, generator)
    keep()
    if not _late(deadline):
        objective.reset(identity)
        _descend(objective, n_blocks, generator, deadline)
        keep()
    if not _late(deadline):
        objective.reset(min(found, key=lambda candidate: candidate[0])[1])
        _anneal(objective, n_blocks, generator, deadline)
        _descend(objective, n_blocks, generator, deadline)
        keep()
    chosen = min(found, key=lambda candidate: candidate[0])[1]
    if judge is not None and not _late(deadline):
        chosen = _best_candidate([chosen, found[1][1], identity], judge)
    objective.reset(chosen)
    return SearchResult(torch.from_numpy(objective.permutation.copy()), before, objective.value)


def _best_candidate(candidates: Sequence[Ints], judge: Judge) -> Ints:
    """The first of `candidates`, or the one that is measured to cost less by the most, if by more than one standard error."""
    chosen, most = candidates[0], 0.0
    own = judge(chosen)
    if own is None:
        return chosen
    for other in candidates[1:]:
        theirs = own if np.array_equal(other, candidates[0]) else judge(other)
        if theirs is None:
            return candidates[0]
        gains = own - theirs
        gain, error = float(gains.mean()), float(gains.std() / max(1, gains.size - 1) ** 0.5)
        if gain > max(most, error):
            chosen, most = other, gain
    return chosen


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _descend(objective: GroupObjective, n_blocks: int, generator: torch.Generator, deadline: float | None) -> None:
    """Assignments, then swaps until they no longer gain."""
    stride = positions(objective) if n_blocks == 1 else 0
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
    return min(MOST_TRIES, MOST_WORK // sum(child.d**2 for child in objective.children))


def _anneal(objective: GroupObjective, n_blocks: int, generator: torch.Generator, deadline: float | None) -> None:
    """Simulated annealing, the temperature falling geometrically."""
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
    """Mean |change| of the score over some random swaps."""
    first, second = _pairs(objective, n_blocks, 64, generator)
    changes = []
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        moves = [child.propose(i, j)[0] - child.value for child in objective.children]
        changes.append(abs(float(np.dot(objective.weights, moves))))
    return float(np.mean(changes))


def _pairs(objective: GroupObjective, n_blocks: int, n: int, generator: torch.Generator) -> tuple[Ints, Ints]:
    """n pairs of different positions, both in the same block."""
    size = objective.n_channels // n_blocks
    first = torch.randint(objective.n_channels, (n,), generator=generator)
    shift = torch.randint(1, size, (n,), generator=generator)
    second = first // size * size + (first % size + shift) % size
    return first.numpy(), second.numpy()


def _result(objective: GroupObjective, before: float) -> SearchResult:
    objective.reset(objective.permutation)
    if not objective.value < before:
        objective.reset(np.arange(objective.n_channels))
    return SearchResult(torch.from_numpy(objective.permutation.copy()), before, objective.value)

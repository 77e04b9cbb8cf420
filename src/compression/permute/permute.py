"""Permuting a whole network: search all groups, then reorder their channels in place (paper section 3.2)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...common.errors import GroupError
from ...common.progress import bar
from ...common.randomness import stream
from ...engines.machine import own_processors
from ..quantize.subvectors import Layer, to_subvectors
from .group_objective import GroupObjective
from .groups import Group, Member, ResolvedGroup, resolve
from .objective import ChildObjective, Floats, Ints, child_objective, is_optimisable
from .search import PUBLISHED, SearchResult, search, search_best

Measure = Callable[[str, Tensor], Floats | None]

MOST_WORKERS = 8
"""Groups searched at a time: each holds the Gram matrices of its children."""


@dataclass(frozen=True)
class PermutationSpec:
    """How the permutation of one child's input is searched (`permutation_specs.<layer>`); None: as for all."""

    reshape: tuple[int, ...] | None = None
    optimization: tuple[str, ...] | None = None


@dataclass(frozen=True)
class GroupResult:
    """What was done to one group.

    Attributes:
        label: names the group.
        children: the layers whose subvectors decided; empty where no child depends on the order.
        before: log det(Cov) of their subvectors before, on average over all subvectors.
        after: the same afterwards.
        permutation: p (C,) as applied; None where the group was left as it was.
    """

    label: str
    children: tuple[str, ...]
    before: float
    after: float
    permutation: Tensor | None


def group_row(result: GroupResult) -> list[Any]:
    """A result as JSON can hold it; its label is left out."""
    permutation = None if result.permutation is None else result.permutation.tolist()
    return [result.children, result.before, result.after, permutation]


def group_result(label: str, row: list[Any]) -> GroupResult:
    """From `group_row`."""
    children, before, after, permutation = row
    return GroupResult(
        label, tuple(children), before, after, None if permutation is None else torch.tensor(permutation)
    )


class Searches(Protocol):
    """Keeps the finished groups of a search, so that a run that goes on after a crash does not repeat them."""

    def recall(self, number: int) -> GroupResult | None:
        """The result of the group at `number` of the groups that `permute` was given, if it was kept."""

    def keep(self, number: int, result: GroupResult) -> None:
        """Keep one; called in the thread of `permute`'s caller."""


def permute(
    model: nn.Module,
    groups: Sequence[Group],
    sizes: Mapping[str, int],
    *,
    how: str = "best",
    n_tries: int = 10_000,
    seconds: float | None = None,
    specs: Mapping[str, PermutationSpec] | None = None,
    seed: int = 0,
    measure: Measure | None = None,
    show_progress: bool = True,
    finished: Searches | None = None,
) -> list[GroupResult]:
    """Choose and apply the permutation of every group, in place; the network's function stays the same.

    The groups are searched in parallel threads: reordering a layer's rows, which is what the other groups do to it, does not
    change its score.

    Args:
        model: the dense network.
        groups: which layers share a permutation.
        sizes: subvector length d of every layer that will be coded, by name.
        how: `best` scores all children of a group together and searches until nothing is gained; `published` is the paper's
            procedure: greedy start, then `n_tries` swaps, scored on the first child that depends on the order.
        n_tries: swaps tried per group by `published`; `best` takes them too as one of its candidates.
        seconds: `best` stops in all groups after about so long; the result then depends on the machine. None: no limit.
        specs: `permutation_specs` by name of the child.
        seed: the run's seed; each group draws from its own stream.
        measure: (name of a child, its subvectors (n, d)) -> some measurements of its distortion, always as many, or None where the
            score is to be trusted; where the sum over the children says so by more than its standard error, `best` takes another
            of its candidates than the one of the lowest score. None: never.
        show_progress: show a progress bar.
        finished: is given every finished group, and asked for it first.

    Raises:
        GroupError: a group does not fit the network.
        ValueError: `how` is unknown.
    """
    if how not in ("best", "published"):
        raise ValueError(f"unknown search {how!r}; known: best, published")
    specs = specs or {}
    resolved = resolve(model, groups, {name: spec.reshape for name, spec in specs.items() if spec.reshape})
    deadline = None if seconds is None else time.monotonic() + seconds
    search_one = partial(
        _search_group, sizes=sizes, how=how, n_tries=n_tries, deadline=deadline, specs=specs, seed=seed, measure=measure
    )
    by_number: dict[int, GroupResult] = {}
    if finished is not None:
        known = {number: finished.recall(number) for number in range(len(resolved))}
        by_number = {
            number: replace(result, label=resolved[number].label)
            for number, result in known.items()
            if result is not None
        }
    open_ones = [number for number in range(len(resolved)) if number not in by_number]
    longest_first = sorted(open_ones, key=lambda number: -resolved[number].width * len(resolved[number].children))
    # as many groups at a time as there are processors, each on one: two teams of BLAS's threads would be in each other's way
    with threadpool_limits(1, "blas"):
        workers = ThreadPoolExecutor(min(own_processors(), MOST_WORKERS))
        try:
            futures = {workers.submit(search_one, resolved[number]): number for number in longest_first}
            for future in bar(as_completed(futures), "permute", len(resolved), show_progress, "group", len(by_number)):
                number = futures[future]
                by_number[number] = future.result()
                if finished is not None:
                    finished.keep(number, by_number[number])
        finally:
            workers.shutdown(cancel_futures=True)  # after Ctrl-C only the groups under way are finished
    results = [by_number[number] for number in range(len(resolved))]
    for group, result in zip(resolved, results, strict=True):
        if result.permutation is not None:
            group.apply(result.permutation)
    return results


def _search_group(
    group: ResolvedGroup,
    sizes: Mapping[str, int],
    how: str,
    n_tries: int,
    deadline: float | None,
    specs: Mapping[str, PermutationSpec],
    seed: int,
    measure: Measure | None,
) -> GroupResult:
    children = _optimisable_children(group, sizes, most=1 if how == "published" else None)
    if not children:
        return GroupResult(group.label, (), 0.0, 0.0, None)
    objectives = [objective for _, objective in children]
    names = tuple(child.name for child, _ in children)
    # the distortion of a child is about n d exp(logdet / d): these weights make the score follow its change
    weights = [objective.n_subvectors * math.exp(objective.value / objective.d) for objective in objectives]
    total = sum(weights)
    together = GroupObjective(objectives, [weight / total for weight in weights])
    restricted = next((specs[name].optimization for name in names if name in specs and specs[name].optimization), None)
    generator = stream(seed, "permutation", names[0])
    result: SearchResult
    if how == "published" or restricted:
        result = search(together, group.n_blocks, n_tries, generator, restricted or PUBLISHED)
    else:
        judge = partial(_distortion, [child for child, _ in children], sizes, measure) if measure is not None else None
        result = search_best(together, group.n_blocks, n_tries, generator, deadline, judge)
    return GroupResult(group.label, names, result.before, result.after, result.permutation)


def _distortion(
    children: Sequence[Member], sizes: Mapping[str, int], measure: Measure, permutation: Ints
) -> Floats | None:
    """What `measure` finds for the children, their inputs reordered, together; None where it does not say."""
    total: Floats = np.zeros(1)
    for child in children:
        layer: Layer = copy.deepcopy(child.module)
        child.side.permute(layer, torch.from_numpy(permutation), child.reshape)
        found = measure(child.name, to_subvectors(layer.weight.detach(), sizes[child.name]))
        if found is None:
            return None
        total = total + found
    return total


def _optimisable_children(
    group: ResolvedGroup, sizes: Mapping[str, int], most: int | None
) -> list[tuple[Member, ChildObjective]]:
    """The (first) children that will be coded and whose subvectors depend on the order of their input channels, with their scores."""
    found: list[tuple[Member, ChildObjective]] = []
    for child in group.children:
        if most is not None and len(found) == most:
            break
        if child.name in sizes and is_optimisable(child.module, sizes[child.name], child.reshape):
            try:
                found.append((child, child_objective(child.module, sizes[child.name], child.reshape)))
            except GroupError:  # a weight of zeros: every order is as good
                continue
    return found

"""Permuting a whole network: search the permutations of all groups, then apply them in place (paper section 3.2)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
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
from .registry import SEARCHES
from .search import search

LayerMeasure = Callable[[str, Tensor], Floats | None]
"""(name of a child, its subvectors (n, d)) -> estimates of its distortion, always as many; None: rely on the score
instead."""

MOST_WORKERS = 8
"""Groups searched at a time: each holds the Gram matrices of its children."""


@dataclass(frozen=True)
class PermutationSpec:
    """How the permutation of one child's input is searched (`permutation_specs.<layer>`); None: as for all."""

    reshape: tuple[int, ...] | None = None
    optimization: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SearchSpec:
    """How permutations are searched; the names are those of the settings (`model.<name>`).

    Attributes:
        search: `best` scores all children of a group together and searches until nothing is gained; `published` is the
            paper's procedure: greedy start, then `sls_iterations` swaps, scored on the first child that depends on the
            permutation.
        sls_iterations: swaps tried per group by `published`, and for the published candidate of `best`.
        search_seconds: `best` stops in all groups after about so long; the result then depends on the machine. None: no
            limit.
        permutation_specs: by name of the child.
    """

    search: str = "best"
    sls_iterations: int = 10_000
    search_seconds: float | None = None
    permutation_specs: Mapping[str, PermutationSpec] = field(default_factory=dict)

    @property
    def reshapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes (C_out, C_in, h, w) of linear layers that consume a flattened feature map, by name."""
        return {name: spec.reshape for name, spec in self.permutation_specs.items() if spec.reshape}


@dataclass(frozen=True)
class GroupResult:
    """What was done to one group.

    Attributes:
        label: names the group.
        children: the layers that were scored; empty where no child depends on the permutation.
        before: weighted mean of the log det(Cov) of their subvectors before.
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
        label=label,
        children=tuple(children),
        before=before,
        after=after,
        permutation=None if permutation is None else torch.tensor(permutation),
    )


class Searches(Protocol):
    """Stores the results of finished groups, so that a run that resumes does not search them again."""

    def recall(self, number: int) -> GroupResult | None:
        """The finished result of the group at `number` of the groups that `permute` was given; None: there is none."""

    def keep(self, number: int, result: GroupResult) -> None:
        """Store one; called in the thread of `permute`'s caller."""


def permute(
    model: nn.Module,
    groups: Sequence[Group],
    sizes: Mapping[str, int],
    spec: SearchSpec | None = None,
    *,
    seed: int = 0,
    measure: LayerMeasure | None = None,
    show_progress: bool = True,
    finished: Searches | None = None,
) -> list[GroupResult]:
    """Choose and apply the permutation of every group, in place; the network's function stays the same.

    Groups are searched independently of each other: what another group does to a layer is to permute its rows, and the
    score of its subvectors does not depend on the order of rows.

    Args:
        model: the dense network.
        groups: which layers share a permutation.
        sizes: subvector length d of every layer that will be quantized, by name.
        spec: how to search; None: the defaults.
        seed: the run's seed; each group draws from its own stream.
        measure: estimates the distortion of a child's subvectors. With it `best` compares its candidates again, see
            `search_best`.
        show_progress: show a progress bar.
        finished: asked for the result of every group before it is searched, and given every new one.

    Raises:
        GroupError: a group does not fit the network.
        UnknownNameError: `spec.search` is unknown.
    """
    spec = spec or SearchSpec()
    SEARCHES.entry(spec.search)
    resolved = resolve(model, groups, spec.reshapes)
    search_one = _GroupSearch(sizes, spec, seed, measure)
    results = _search_all(resolved, search_one, show_progress, finished)
    for group, result in zip(resolved, results, strict=True):
        if result.permutation is not None:
            group.apply(result.permutation)
    return results


def _search_all(
    groups: Sequence[ResolvedGroup],
    search_one: Callable[[ResolvedGroup], GroupResult],
    show_progress: bool,
    finished: Searches | None,
) -> list[GroupResult]:
    """The results of all groups, in their order: those that `finished` has, the others searched in parallel threads."""
    by_number: dict[int, GroupResult] = {}
    if finished is not None:
        for number, group in enumerate(groups):
            earlier = finished.recall(number)
            if earlier is not None:
                by_number[number] = replace(earlier, label=group.label)
    missing = [number for number in range(len(groups)) if number not in by_number]
    longest_first = sorted(missing, key=lambda number: -groups[number].width * len(groups[number].children))
    # one thread of BLAS for each group: several teams of threads on the same processors would slow each other down
    with threadpool_limits(1, "blas"):
        workers = ThreadPoolExecutor(min(own_processors(), MOST_WORKERS))
        try:
            futures = {workers.submit(search_one, groups[number]): number for number in longest_first}
            for future in bar(as_completed(futures), "permute", len(groups), show_progress, "group", len(by_number)):
                number = futures[future]
                by_number[number] = future.result()
                if finished is not None:
                    finished.keep(number, by_number[number])
        finally:
            workers.shutdown(cancel_futures=True)  # after Ctrl-C only the groups under way are finished
    return [by_number[number] for number in range(len(groups))]


class _GroupSearch:
    """Searches one group; safe to call from several threads."""

    def __init__(self, sizes: Mapping[str, int], spec: SearchSpec, seed: int, measure: LayerMeasure | None) -> None:
        self._sizes, self._spec, self._seed, self._measure = sizes, spec, seed, measure
        self._deadline = None if spec.search_seconds is None else time.monotonic() + spec.search_seconds

    def __call__(self, group: ResolvedGroup) -> GroupResult:
        children = self._optimisable_children(group, most=SEARCHES.fact(self._spec.search, "children"))
        if not children:
            return GroupResult(label=group.label, children=(), before=0.0, after=0.0, permutation=None)
        names = tuple(child.name for child, _ in children)
        objective = _weighted([objective for _, objective in children])
        specs = [self._spec.permutation_specs[name] for name in names if name in self._spec.permutation_specs]
        steps = next((spec.optimization for spec in specs if spec.optimization), None)
        generator = stream(self._seed, "permutation", names[0])
        n_tries = self._spec.sls_iterations
        if steps:
            found = search(objective, group.n_blocks, n_tries, generator, steps)
        else:
            members = [child for child, _ in children]
            measure = None if self._measure is None else partial(_measured, members, self._sizes, self._measure)
            search_group = SEARCHES[self._spec.search]
            found = search_group(objective, group.n_blocks, n_tries, generator, self._deadline, measure)
        return GroupResult(
            label=group.label,
            children=names,
            before=found.before,
            after=found.after,
            permutation=found.permutation,
        )

    def _optimisable_children(self, group: ResolvedGroup, most: int | None) -> list[tuple[Member, ChildObjective]]:
        """The (first `most`) children that will be quantized and whose subvectors depend on the permutation, with their
        objectives."""
        found: list[tuple[Member, ChildObjective]] = []
        for child in group.children:
            if most is not None and len(found) == most:
                break
            d = self._sizes.get(child.name)
            if d is not None and is_optimisable(child.module, d, child.reshape):
                try:
                    found.append((child, child_objective(child.module, d, child.reshape)))
                except GroupError:  # a weight of zeros: all permutations are equally good
                    continue
        return found


def _measured(
    children: Sequence[Member], sizes: Mapping[str, int], measure: LayerMeasure, permutation: Ints
) -> Floats | None:
    """The estimates of all children's distortion after `permutation`, added up; None where `measure` has none for one
    of them."""
    total: Floats = np.zeros(1)
    for child in children:
        layer: Layer = copy.deepcopy(child.module)
        child.side.permute(layer, torch.from_numpy(permutation))
        found = measure(child.name, to_subvectors(layer.weight.detach(), sizes[child.name]))
        if found is None:
            return None
        total = total + found
    return total


def _weighted(children: Sequence[ChildObjective]) -> GroupObjective:
    """The children's scores added up so that the sum follows the change of their distortion.

    At a given rate the distortion of a child is about D = n d det(Cov)^(1/d) = n d exp(logdet / d), whose derivative
    with respect to logdet is D / d = n exp(logdet / d): the weight of the child, taken at the identity. The weights are
    divided by their sum, so that the score remains a log-determinant.
    """
    weights = [child.n_subvectors * math.exp(child.value / child.d) for child in children]
    total = sum(weights)
    return GroupObjective(children, [weight / total for weight in weights])

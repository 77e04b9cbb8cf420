"""Permuting a whole network: search the permutations of all groups, then apply them in place (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Protocol

from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...common.log import note
from ...common.progress import bar
from ...engines.machine import own_processors
from .binding import AnyGroup, BoundGroup, bind, chains
from .channels import named_tensor, permuted
from .group_search import GroupSearch, LayerMeasure
from .groups import ResolvedGroup
from .layout import moves_columns
from .operations import check_permutation
from .registry import SEARCHES
from .results import GroupResult, PermutationSpec, SearchSpec, group_result, group_row

MOST_WORKERS = 8
"""Groups searched at a time: each holds the Gram matrices of its children."""


class Searches(Protocol):
    """Stores the results of finished groups, so that a run that resumes does not search them again."""

    def recall(self, number: int) -> GroupResult | None:
        """The finished result of the group at `number` of the groups that `permute` was given; None: there is none."""

    def keep(self, number: int, result: GroupResult) -> None:
        """Store one; called in the thread of `permute`'s caller."""


def permute(
    model: nn.Module,
    groups: Sequence[AnyGroup],
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
    score of its subvectors does not depend on the order of rows. Only groups whose channels stand side by side in one
    weight follow each other (`binding.chains`).

    Args:
        model: the dense network.
        groups: which layers or channels share a permutation.
        sizes: subvector length d of every layer that will be quantized, by name; an `AlongOutputs` where the order of
            its outputs decides what stands together, and not that of its inputs.
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
    bound = bind(model, groups, spec.reshapes)
    search_one = GroupSearch(model, sizes, spec, seed, measure)
    results = _search_all([_Chain(numbers, bound) for numbers in chains(groups)], search_one, show_progress, finished)
    if search_one.too_wide:
        names = ", ".join(sorted(set(search_one.too_wide)))
        note(f"{names}: too wide to be scored, their order of channels is that which suits the other layers")
    for group, result in zip(bound, results, strict=True):
        if result.permutation is not None:
            group.apply(result.permutation)
    forget_computed(model)
    return results


def forget_computed(model: nn.Module) -> None:
    """Let modules that keep what they computed from their weights in evaluation (tables of attention's biases) compute
    it anew: they forget it when they change to training."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode


class _Chain:
    """Groups that are searched one after the other, each in the weights that those before it have permuted.

    Attributes:
        left: numbers of the groups that have no result yet.
        weights: what the groups so far made of tensors that a later one may permute too, by name.
    """

    def __init__(self, numbers: Sequence[int], groups: Sequence[ResolvedGroup | BoundGroup]) -> None:
        self.numbers, self.left = tuple(numbers), list(numbers)
        self.groups = {number: groups[number] for number in numbers}
        self.weights: dict[str, Tensor] = {}

    @property
    def work(self) -> int:
        """How long the rest may take, in any unit."""
        return sum(self.groups[number].width * len(self.groups[number].children) for number in self.left)

    def take(self, number: int, result: GroupResult) -> None:
        """Go on from the result of one of the groups."""
        self.left.remove(number)
        group, p = self.groups[number], result.permutation
        if p is None or not self.left or isinstance(group, ResolvedGroup):
            return
        check_permutation(p, group.width, group.n_blocks)
        for places in group.group.places:
            if moves_columns(places):
                own = self.weights.get(places.tensor, named_tensor(group.model, places.tensor).detach())
                self.weights[places.tensor] = permuted(own, places, p)


def _search_all(
    searched: Sequence[_Chain], search_one: GroupSearch, show_progress: bool, finished: Searches | None
) -> list[GroupResult]:
    """The results of all groups, in their order: those that `finished` has, the others searched in parallel threads."""
    by_number: dict[int, GroupResult] = {}
    for chain in searched if finished is not None else ():
        for number in chain.numbers:
            earlier = finished.recall(number) if finished is not None else None
            if earlier is not None:
                by_number[number] = replace(earlier, label=chain.groups[number].label)
    total = sum(len(chain.numbers) for chain in searched)
    # one thread of BLAS for each group: several teams of threads on the same processors would slow each other down
    with threadpool_limits(1, "blas"):
        workers = ThreadPoolExecutor(min(own_processors(), MOST_WORKERS))
        try:
            found = _each_result(workers, searched, search_one, dict(by_number))
            for number, result in bar(found, "permute", total, show_progress, "group", len(by_number)):
                by_number[number] = result
                if finished is not None:
                    finished.keep(number, result)
        finally:
            workers.shutdown(cancel_futures=True)  # after Ctrl-C only the groups under way are finished
    return [by_number[number] for number in sorted(by_number)]


def _each_result(
    workers: ThreadPoolExecutor, searched: Sequence[_Chain], search_one: GroupSearch, known: Mapping[int, GroupResult]
) -> Iterator[tuple[int, GroupResult]]:
    """Number and result of every group that is not `known`, as they are found; the longest chains are begun first."""
    under_way: dict[Future[GroupResult], _Chain] = {}

    def begin(chain: _Chain) -> None:
        while chain.left and chain.left[0] in known:
            chain.take(chain.left[0], known[chain.left[0]])
        if chain.left:
            future = workers.submit(search_one, chain.groups[chain.left[0]], chain.weights)
            under_way[future] = chain

    for chain in sorted(searched, key=lambda chain: -chain.work):
        begin(chain)
    while under_way:
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            chain = under_way.pop(future)
            number, result = chain.left[0], future.result()
            chain.take(number, result)
            begin(chain)
            yield number, result


__all__ = [
    "GroupResult", "LayerMeasure", "PermutationSpec", "SearchSpec", "Searches", "forget_computed", "group_result",
    "group_row", "permute",
]  # fmt: skip

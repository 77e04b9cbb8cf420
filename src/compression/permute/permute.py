"""Permuting a whole network: search each group, then reorder its channels in place (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...errors import GroupError
from ...progress import bar
from ...randomness import stream
from .groups import Group, Member, ResolvedGroup, resolve
from .objective import child_objective, is_optimisable
from .search import PUBLISHED, search


@dataclass(frozen=True)
class PermutationSpec:
    """How the permutation of one child's input is searched (`permutation_specs.<layer>`)."""

    reshape: tuple[int, ...] | None = None
    optimization: tuple[str, ...] = PUBLISHED


@dataclass(frozen=True)
class GroupResult:
    """What was done to one group.

    Attributes:
        label: names the group.
        child: the layer whose subvectors decided; None where no child depends on the order.
        before: log det(Cov) of that layer's subvectors before.
        after: the same afterwards.
        permutation: p (C,) as applied; None where the group was left as it was.
    """

    label: str
    child: str | None
    before: float
    after: float
    permutation: Tensor | None


def permute(
    model: nn.Module,
    groups: Sequence[Group],
    sizes: Mapping[str, int],
    *,
    n_tries: int = 10_000,
    specs: Mapping[str, PermutationSpec] | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> list[GroupResult]:
    """Choose and apply the permutation of every group, in place; the network's function stays the same.

    The first optimisable child of a group decides (the published scheme). Groups are searched in order, each on the weights
    that the previous ones left: reordering a layer's rows does not change its score.

    Args:
        model: the dense network.
        groups: which layers share a permutation.
        sizes: subvector length d of every layer that will be coded, by name.
        n_tries: swaps tried per group.
        specs: `permutation_specs` by name of the child.
        seed: the run's seed; each group draws from its own stream.
        show_progress: show a progress bar.

    Raises:
        GroupError: a group does not fit the network.
    """
    specs = specs or {}
    resolved = resolve(model, groups, {name: spec.reshape for name, spec in specs.items() if spec.reshape})
    return [_permute_group(group, sizes, n_tries, specs, seed) for group in bar(resolved, "permute", show=show_progress, unit="group")]


def _permute_group(
    group: ResolvedGroup, sizes: Mapping[str, int], n_tries: int, specs: Mapping[str, PermutationSpec], seed: int
) -> GroupResult:
    child = _deciding_child(group, sizes)
    if child is None:
        return GroupResult(group.label, None, 0.0, 0.0, None)
    try:
        objective = child_objective(child.module, sizes[child.name], child.reshape)
    except GroupError:  # a weight of zeros: every order is as good
        return GroupResult(group.label, None, 0.0, 0.0, None)
    steps = specs[child.name].optimization if child.name in specs else PUBLISHED
    result = search(objective, group.n_blocks, n_tries, stream(seed, "permutation", child.name), steps)
    group.apply(result.permutation)
    return GroupResult(group.label, child.name, result.before, result.after, result.permutation)


def _deciding_child(group: ResolvedGroup, sizes: Mapping[str, int]) -> Member | None:
    """The first child that will be coded and whose subvectors depend on the order of its input channels."""
    for child in group.children:
        if child.name in sizes and is_optimisable(child.module, sizes[child.name], child.reshape):
            return child
    return None

"""Searching one group of either form: which children are scored, with which objective, and by which search.

Of layers whose subvectors run along outputs it is the parents that are scored: of their weight turned around, whose
rows are inputs and whose columns are outputs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...common.errors import GroupError
from ...common.randomness import stream
from ..quantize.subvectors import AlongOutputs, Layer, to_subvectors
from ..quantize.weights import find_weight
from .binding import BoundGroup
from .channels import Places, named_tensor, permuted
from .group_objective import GroupObjective
from .groups import Member, ResolvedGroup
from .layout import RowClass, changes_subvectors, moves_columns, plain_groups, row_classes
from .objective import ChildObjective, Floats, Ints, child_objective, is_optimisable
from .placed_child import PlacedChild, table_entries
from .placed_objective import PlacedObjective
from .registry import SEARCHES
from .results import GroupResult, SearchSpec
from .search import search

LayerMeasure = Callable[[str, Tensor], Floats | None]
"""(name of a child, its subvectors (n, d)) -> estimates of its distortion, always as many; None: rely on the score
instead."""

SHARE_TO_LOOK = 0.5
"""A look at the distortion clusters whole weights. Where a group stands in fewer of their subvectors (children by their
weights in the score), what its permutation changes is lost in the noise of the looks, and the score decides alone."""

MOST_ENTRIES = 1 << 26
"""Inner products of columns that one child may need, half a gigabyte: a wider one is not scored."""


@dataclass(frozen=True)
class Candidate:
    """A child, or a parent along whose outputs subvectors run, that will be quantized and whose subvectors depend on
    the permutation.

    Attributes:
        name: of its weight in the plan.
        objective: its score.
        permuted: p (C,) -> its weight permuted, turned around where it is a parent.
        share: of its subvectors hold a channel of the group.
    """

    name: str
    objective: Any
    permuted: Callable[[Tensor], Tensor]
    share: float = 1.0


@dataclass(frozen=True)
class _Laid:
    """A child of a group of channels: its weight, where the channels stand in it, and d."""

    name: str
    weight: Tensor
    places: list[Places]
    classes: list[RowClass]
    d: int

    def entries(self, plain: bool) -> int:
        """Inner products of columns that its objective needs."""
        shape = self.weight.shape
        if not plain:
            return table_entries(self.classes, self.d)
        columns, n_groups = shape[1:].numel(), plain_groups(self.classes, shape)
        area = self._area()
        if n_groups == 1 and 1 < self.d <= area:  # see `ChildObjective`
            n_channels = columns // area
            return n_channels * area**2 + (n_channels * (self.d - 1)) ** 2
        return n_groups * columns**2

    def _area(self) -> int:
        one = self.classes[0]
        return int((one.block == one.block[0]).sum())

    def candidate(self, width: int, n_blocks: int, plain: bool) -> Candidate:
        """With an objective for channels that fill the rows one after the other, or for any."""
        matrix = self.weight.detach().reshape(self.weight.shape[0], -1).double().cpu().numpy()
        objective: ChildObjective | PlacedChild
        if plain:
            objective = ChildObjective(matrix, width, self.d, plain_groups(self.classes, self.weight.shape))
        else:
            objective = PlacedChild(matrix, self.d, self.classes, width, n_blocks)
        touched = sum(one.rows.size * np.unique(one.tracks // self.d).size for one in self.classes)
        move = partial(_permuted, self.weight, self.places)
        return Candidate(self.name, objective, move, touched * self.d / self.weight.numel())


def _permuted(weight: Tensor, places: Sequence[Places], p: Tensor) -> Tensor:
    for place in places:
        weight = permuted(weight, place, p)
    return weight


class GroupSearch:
    """Searches one group; safe to call from several threads."""

    def __init__(
        self, model: nn.Module, sizes: Mapping[str, int], spec: SearchSpec, seed: int, measure: LayerMeasure | None
    ) -> None:
        self._sizes, self._spec, self._seed, self._measure = sizes, spec, seed, measure
        self._deadline = None if spec.search_seconds is None else time.monotonic() + spec.search_seconds
        modules = dict(model.named_modules(remove_duplicate=False))
        found = {name: find_weight(modules, name) for name in sizes}
        self._plan_names = {id(place.parameter): name for name, place in found.items() if place is not None}
        self.too_wide: list[str] = []

    def __call__(self, group: ResolvedGroup | BoundGroup, weights: Mapping[str, Tensor]) -> GroupResult:
        """The result for one group; nothing is permuted.

        Args:
            group: to search.
            weights: tensors that earlier groups of its chain permuted, by name, where they are not the network's own.
        """
        most = SEARCHES.fact(self._spec.search, "children")
        if isinstance(group, ResolvedGroup):
            children = self._children_of_layers(group, most)
        else:
            children = self._children_of_channels(group, weights, most)
        if not children:
            return GroupResult(label=group.label, children=(), before=0.0, after=0.0, permutation=None)
        names = tuple(child.name for child in children)
        objective = _weighted([child.objective for child in children])
        specs = [self._spec.permutation_specs[name] for name in names if name in self._spec.permutation_specs]
        steps = next((spec.optimization for spec in specs if spec.optimization), None)
        generator = stream(self._seed, "permutation", *_own_names(group, names, objective))
        n_tries = self._spec.sls_iterations
        if steps:
            found = search(objective, group.n_blocks, n_tries, generator, steps)
        else:
            measure = None
            if self._measure is not None and np.dot(objective.weights, [c.share for c in children]) >= SHARE_TO_LOOK:
                measure = partial(_measured, children, self._sizes, self._measure)
            search_group = SEARCHES[self._spec.search]
            if not self._spec.thorough and SEARCHES.fact(self._spec.search, "may_be_brief"):
                search_group = partial(search_group, thorough=False)
            found = search_group(objective, group.n_blocks, n_tries, generator, self._deadline, measure)
        return GroupResult(
            label=group.label,
            children=names,
            before=found.before,
            after=found.after,
            permutation=found.permutation,
        )

    def _children_of_layers(self, group: ResolvedGroup, most: int | None) -> list[Candidate]:
        """The (first `most`) children that will be quantized and whose subvectors depend on the permutation."""
        found: list[Candidate] = []
        for parent in group.parents:
            if most is not None and len(found) == most:
                break
            if turned := self._parent_of_layers(parent, group.width):
                found.append(turned)
        for child in group.children:
            if most is not None and len(found) == most:
                break
            d = self._sizes.get(child.name)
            if d is not None and not isinstance(d, AlongOutputs) and is_optimisable(child.module, d, child.reshape):
                try:
                    objective = child_objective(child.module, d, child.reshape)
                except GroupError:  # a weight of zeros: all permutations are equally good
                    continue
                found.append(Candidate(child.name, objective, partial(_layer_permuted, child)))
        return found

    def _parent_of_layers(self, parent: Member, width: int) -> Candidate | None:
        d = self._sizes.get(parent.name)
        weight = getattr(parent.module, "weight", None)
        if not isinstance(d, AlongOutputs) or not isinstance(weight, Tensor) or weight.shape[0] != width:
            return None
        turned = turned_around(weight.detach())
        try:
            objective = ChildObjective(turned.double().cpu().numpy(), width, d)
        except GroupError:
            return None
        return Candidate(parent.name, objective, lambda p: turned[:, p.to(turned.device)])

    def _children_of_channels(
        self, group: BoundGroup, weights: Mapping[str, Tensor], most: int | None
    ) -> list[Candidate]:
        """The same of a group of channels; one that is too wide is left out."""
        laid = self._laid_out(group, weights)
        plain = all(plain_groups(child.classes, child.weight.shape) for child in laid)
        found: list[Candidate] = []
        for child in laid:
            if most is not None and len(found) == most:
                break
            if child.entries(plain) > MOST_ENTRIES:
                self.too_wide.append(child.name)
                continue
            try:
                found.append(child.candidate(group.width, group.n_blocks, plain))
            except GroupError:
                continue
        return found

    def _laid_out(self, group: BoundGroup, weights: Mapping[str, Tensor]) -> list[_Laid]:
        by_tensor: dict[str, list[Places]] = {}
        for place in group.group.places:
            by_tensor.setdefault(place.tensor, []).append(place)
        found = []
        for tensor, all_places in by_tensor.items():
            own = named_tensor(group.model, tensor)
            name = self._plan_names.get(id(own))
            if name is None:
                continue
            weight, d = weights.get(tensor, own.detach()), self._sizes[name]
            if isinstance(d, AlongOutputs):
                weight, places = turned_around(weight), [_turned(one) for one in all_places if not moves_columns(one)]
            else:
                places = [one for one in all_places if moves_columns(one)]
            classes = row_classes(weight.shape, places, group.n_blocks)
            if changes_subvectors(classes, d):
                found.append(_Laid(name, weight, places, classes, d))
        return found


def turned_around(weight: Tensor) -> Tensor:
    """A weight (R, ...) as (values of a row, R): its subvectors along outputs are those of this along inputs."""
    return weight.reshape(weight.shape[0], -1).t()


def _turned(place: Places) -> Places:
    """Rows of a weight as columns of the weight turned around."""
    return replace(place, shape=(1, place.shape[0]))


def _own_names(
    group: ResolvedGroup | BoundGroup, children: Sequence[str], objective: GroupObjective
) -> tuple[str | int, ...]:
    """What names the group's random stream: several groups can have the same child, but not the same first position."""
    if isinstance(group, ResolvedGroup) or not isinstance(objective, PlacedObjective):
        return (children[0],)
    first = group.group.places[0]
    return (first.tensor, *first.shape, int(first.positions[0, 0]))


def _layer_permuted(child: Member, p: Tensor) -> Tensor:
    layer: Layer = copy.deepcopy(child.module)
    child.side.permute(layer, p)
    return layer.weight.detach()


def _measured(
    children: Sequence[Candidate], sizes: Mapping[str, int], measure: LayerMeasure, permutation: Ints
) -> Floats | None:
    """The estimates of all children's distortion after `permutation`, added up; None where `measure` has none for one
    of them."""
    total: Floats = np.zeros(1)
    for child in children:
        weight = child.permuted(torch.from_numpy(permutation))
        found = measure(child.name, to_subvectors(weight, sizes[child.name]))
        if found is None:
            return None
        total = total + found
    return total


def _weighted(children: Sequence[Any]) -> GroupObjective:
    """The children's scores added up so that the sum follows the change of their distortion.

    At a given rate the distortion of a child is about D = n d det(Cov)^(1/d) = n d exp(logdet / d), whose derivative
    with respect to logdet is D / d = n exp(logdet / d): the weight of the child, taken at the identity. The weights are
    divided by their sum, so that the score remains a log-determinant.
    """
    weights = [child.n_subvectors * math.exp(child.value / child.d) for child in children]
    total = sum(weights)
    kind = PlacedObjective if isinstance(children[0], PlacedChild) else GroupObjective
    return kind(children, [weight / total for weight in weights])

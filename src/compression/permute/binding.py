"""Groups of either form, tied to the network that they permute, and which of them have to wait for each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...common.errors import GroupError
from .channels import ChannelGroup, Places, named_tensor
from .groups import Group, ResolvedGroup, resolve
from .layout import moves_columns

AnyGroup = Group | ChannelGroup
"""Layers by name, or channels as positions of tensors."""


@dataclass(frozen=True)
class BoundGroup:
    """A group of channels and the network that it permutes; it fits."""

    group: ChannelGroup
    model: nn.Module

    @property
    def label(self) -> str:
        """Names the group in messages."""
        return self.group.label

    @property
    def width(self) -> int:
        """Number of channels C."""
        return self.group.width

    @property
    def n_blocks(self) -> int:
        """A permutation must stay within this many equal blocks."""
        return self.group.n_blocks

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the modules that consume the channels."""
        return self.group.children

    def apply(self, p: Tensor) -> None:
        """Reorder the channels by p (C,), in place."""
        self.group.apply(self.model, p)


def bind(
    model: nn.Module, groups: Sequence[AnyGroup], reshapes: Mapping[str, Sequence[int]] | None = None
) -> list[ResolvedGroup | BoundGroup]:
    """Find the layers and tensors of all groups and check that they fit.

    Args:
        model: the dense network.
        groups: in any mixture.
        reshapes: as for `groups.resolve`.

    Raises:
        GroupError: a group names a layer or tensor that the network does not have, or that is not as the group says.
    """
    resolved = iter(resolve(model, [group for group in groups if isinstance(group, Group)], reshapes))
    bound: list[ResolvedGroup | BoundGroup] = []
    for group in groups:
        if isinstance(group, Group):
            bound.append(next(resolved))
        else:
            _check(model, group)
            bound.append(BoundGroup(group, model))
    return bound


def _check(model: nn.Module, group: ChannelGroup) -> None:
    """That every tensor of a group is there and large enough, and no position is listed twice."""
    if not group.places:
        raise GroupError(f"{group.label}: the group has no places")
    if group.n_blocks < 1 or group.width % group.n_blocks:
        raise GroupError(f"{group.label}: {group.width} channels are not {group.n_blocks} equal blocks")
    seen: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    for places in group.places:
        try:
            check_places(named_tensor(model, places.tensor), places, group.width)
        except GroupError as error:
            raise GroupError(f"{group.label}: {error}") from None
        seen.setdefault((places.tensor, places.shape), []).append(places.positions.reshape(-1))
    for (name, _), positions in seen.items():
        together = torch.cat(positions)
        if torch.unique(together).numel() < together.numel():
            raise GroupError(f"{group.label}: two channels stand at the same position of {name}")


def check_places(tensor: Tensor, places: Places, width: int) -> None:
    """Check that `places` of `width` channels are places of `tensor`.

    Raises:
        GroupError: they are not.
    """
    fits = len(places.shape) == tensor.dim() and all(
        counted in (1, size) for counted, size in zip(places.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise GroupError(f"{places.tensor} has the shape {tuple(tensor.shape)}, which does not fit {places.shape}")
    positions, n = places.positions, torch.Size(places.shape).numel()
    if positions.dim() != 2 or positions.shape[0] != width or positions.dtype != torch.int64 or not positions.numel():
        raise GroupError(
            f"{places.tensor}: expected positions of {width} channels as whole numbers (int64), got "
            f"{tuple(positions.shape)} of {positions.dtype}"
        )
    if int(positions.min()) < 0 or int(positions.max()) >= n:
        raise GroupError(f"{places.tensor}: positions must lie in 0 ... {n - 1} for {places.shape}")


def chains(groups: Sequence[AnyGroup]) -> list[list[int]]:
    """The numbers of all groups, rising; those that move columns of one tensor stand in one chain.

    The subvectors of such a tensor depend on the permutations of several groups, so that one is searched after the
    other, each given those before it. What a group that only permutes a tensor's rows does to it does not matter to
    others: the score does not depend on the order of rows.
    """
    owner: dict[str, int] = {}
    first = list(range(len(groups)))  # the first group of the chain that each is in

    def root(number: int) -> int:
        while first[number] != number:
            number = first[number]
        return number

    for number, group in enumerate(groups):
        if isinstance(group, ChannelGroup):
            for places in group.places:
                if moves_columns(places):
                    ends = root(owner.setdefault(places.tensor, number)), root(number)
                    first[max(ends)] = min(ends)
    found: dict[int, list[int]] = {}
    for number in range(len(groups)):
        found.setdefault(root(number), []).append(number)
    return list(found.values())

"""The groups of a network that nobody wrote down: found by following channels, and tried before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .channels import ChannelGroup, named_tensor, permuted
from .follow.find import find_groups
from .verification import check_groups, said_by_the_network

MOST_NAMED = 6


def groups_by_following(
    model: nn.Module, run: Callable[[nn.Module], Any], seed: int = 0
) -> tuple[list[ChannelGroup], list[str]]:
    """All groups of channels of a network that may be exchanged, and what a reader should know about them.

    Args:
        model: the dense network; it comes back as it was.
        run: one forward pass: network -> outputs that depend continuously on its weights.
        seed: of the permutations on which the groups are tried.

    Raises:
        GroupError: nothing can be compared (see `verification.Trial`).
    """
    run = said_by_the_network(run)
    found = find_groups(model, run)
    stored, unstored = stored_groups(model, found.groups)
    kept, dropped = check_groups(model, stored, run, seed)
    notes = list(found.notes)
    if unstored:
        labels = [group.label for group in unstored]
        notes.append(f"{_some(labels)}: not permuted, as their order is also that of a table which no file holds")
    if found.left_alone:
        notes.append(f"{_some(found.left_alone)}: no part of the pass that channels were followed through")
    if dropped:
        labels = [group.label for group in dropped]
        notes.append(f"{_some(labels)}: found, but permuting changes the network's output, so left as it is")
    return kept, notes


def stored_groups(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
    """The groups of which everything that they move is in the network's state dict, and the others.

    Buffers that are not persistent (rotary embeddings, for example) are computed when a network is built: one that is
    built anew for a file would have them in the old order. Where all their values along the channels are equal nothing
    is lost.
    """
    computed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    kept: list[ChannelGroup] = []
    others: list[ChannelGroup] = []
    for group in groups:
        backwards = group.backwards()
        moved = [place for place in group.places if place.tensor in computed]
        tensors = [(named_tensor(model, place.tensor), place) for place in moved]
        same = all(torch.equal(permuted(tensor, place, backwards), tensor) for tensor, place in tensors)
        (kept if same else others).append(group)
    return kept, others


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

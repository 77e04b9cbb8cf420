"""The groups of a network that nobody wrote down: found by following channels, and tried before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .channels import ChannelGroup
from .follow.find import find_groups
from .verification import check_groups

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
    found = find_groups(model, run)
    kept, dropped = check_groups(model, found.groups, run, seed)
    notes = list(found.notes)
    if found.left_alone:
        notes.append(f"{_some(found.left_alone)}: no part of the pass that channels were followed through")
    if dropped:
        labels = [group.label for group in dropped]
        notes.append(f"{_some(labels)}: found, but permuting changes the network's output, so left as it is")
    return kept, notes


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

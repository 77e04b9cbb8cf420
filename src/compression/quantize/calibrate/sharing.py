"""Calibrating in several processes: each shows its networks a share of the batches, and sums are those of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .passes import Item
from .uses import Convolution, Use


class Processes(Protocol):
    """The processes that share the batches: an `engines.engine.Engine` is one.

    All must call `sum` and `gather` in the same order.
    """

    rank: int
    world_size: int

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum of `values` over all processes, in their type and on their device."""

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of all processes, in the order of their ranks: objects that JSON can hold."""


@dataclass
class Alone:
    """One process."""

    rank: int = 0
    world_size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """`values` itself: there is nobody to add."""
        return values

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        """The rows themselves."""
        return list(rows)


def agreed(processes: Processes, items: Sequence[Item]) -> list[Item]:
    """The items of the first process, on all: what a network does may depend on how its values were rounded, and sums
    of different items must not be added."""
    if processes.world_size == 1:
        return list(items)
    return [_from_row(row) for row in processes.gather([_row(item) for item in items] if not processes.rank else [])]


def _row(item: Item) -> list[Any]:
    uses = []
    for use in item.uses:
        settings = None if use.convolution is None else asdict(use.convolution)
        uses.append([use.start, use.stop, list(use.inputs.shape), settings, use.paired])
    return [item.name, uses, item.calls, item.follows]


def _from_row(row: Sequence[Any]) -> Item:
    name, rows, calls, follows = row
    uses = []
    for start, stop, shape, settings, paired in rows:
        convolution = None if settings is None else Convolution(**settings)
        uses.append(Use(name, start, stop, torch.empty(shape), convolution, paired))
    return Item(name, uses, calls, follows)

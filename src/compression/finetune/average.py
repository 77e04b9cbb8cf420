"""A moving average of what is trained (Polyak and Juditsky 1992): codebooks, norms and dense layers. Codes stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """The average of the trained parameters and running statistics of a network over its steps.

    After n steps the average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the network's values, so that early
    ones are soon forgotten.

    Args:
        model: the network; its values now are the first average.
        decay: between 0 and 1; over about 1 / (1 - decay) steps is averaged.

    Attributes:
        values: the averages by name.
        steps: how many were averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self.steps = decay, 0
        trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._statistics = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self._own = {**trained, **self._statistics}
        self.values = {name: tensor.detach().clone() for name, tensor in self._own.items()}

    @property
    def statistics(self) -> list[Tensor]:
        """The averages of running statistics, which each process has of its own."""
        return [self.values[name] for name in self._statistics]

    @torch.no_grad()
    def restart(self) -> None:
        """The network's values now are the first average."""
        self.steps = 0
        for name, tensor in self._own.items():
            self.values[name].copy_(tensor)

    @torch.no_grad()
    def update(self) -> None:
        """A step was made."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self._own.values()], 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """The network gets the averages, and what it had is kept in their place; a second time undoes it."""
        for name, tensor in self._own.items():
            kept = tensor.detach().clone()
            tensor.copy_(self.values[name])
            self.values[name].copy_(kept)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The network has the averages meanwhile."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

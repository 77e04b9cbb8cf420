"""One process: an engine like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .launch import Launch


class SingleProcess:
    """The whole run in this process, on one device."""

    rank = 0
    world_size = 1
    local_size = 1
    is_main = True
    is_first_here = True

    def __init__(self, launch: Launch, device: torch.device) -> None:  # noqa: ARG002 (of Engine)
        self.device = device

    def sum(self, values: Tensor) -> Tensor:
        """`values` itself: there is nobody to add."""
        return values

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        """The rows themselves."""
        return list(rows)

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Nobody to send to."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """`model` itself."""
        return model

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:  # noqa: ARG002 (of Engine)
        """`optimizer` itself."""
        return optimizer

    def average_buffers(self, model: nn.Module) -> None:
        """There is only one model."""

    def lost_contact(self, error: Exception) -> bool:  # noqa: ARG002 (of Engine)
        """Never: there is nobody to lose."""
        return False

    def close(self) -> None:
        """Nothing is held."""

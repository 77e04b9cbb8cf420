"""What a run asks of the processes that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """How many processes work on the run, and how they talk. One process is an engine like any other.

    Every process must call `sum`, `gather`, `broadcast`, `barrier` and `average_buffers`, in the same order.
    """

    rank: int
    world_size: int
    local_size: int
    """Processes on this machine."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files, logs and bars."""

    @property
    def is_first_here(self) -> bool:
        """True on one process of each machine."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum of `values` over all processes."""

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of all processes, in the order of their ranks, on every process: objects that JSON can hold."""

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite `tensors` (same shapes and types everywhere) with those of the process `source`."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """The model to call in training steps, so that gradients are averaged over the processes."""

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer to step with."""

    def average_buffers(self, model: nn.Module) -> None:
        """Give the running statistics of all processes' models their mean."""

    def lost_contact(self, error: Exception) -> bool:
        """True if `error` says that another process went away."""

    def close(self) -> None:
        """Release what the engine holds, where all processes are done."""

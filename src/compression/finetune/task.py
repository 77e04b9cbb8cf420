"""What the training loop asks of a task; the loop does not know classification from detection.

A task owns its data, its loss and its metric. `Engine` is what both ask of the processes they run on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepLoss:
    """The loss of one batch.

    Attributes:
        loss: scalar, differentiable, mean over the images of the batch.
        scalars: further figures to log under `Train/<name>`, detached scalars.
        n_images: images in the batch.
    """

    loss: Tensor
    n_images: int
    scalars: dict[str, Tensor] = field(default_factory=dict)


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


class Task(Protocol):
    """Data, loss and metric."""

    metric_name: str
    """The key of `validate`'s result that says which epoch is best (higher is better)."""

    steps_per_epoch: int
    """Batches per epoch on this process."""

    position: int
    """Batches of the epoch that were taken so far, those included that were left out or had nothing readable in them."""

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of epoch `epoch` (from 1) after the first `start`, in an order that depends on the run's seed and the epoch alone."""

    def training_loss(self, model: nn.Module, batch: Any) -> StepLoss:
        """Loss of `model` (in training mode) on `batch`; moves the batch to the device itself."""

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:
        """Metrics of `model` (put into eval mode and restored) over the whole validation set and all processes."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module gets its own mode back, so that norms that were frozen stay frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

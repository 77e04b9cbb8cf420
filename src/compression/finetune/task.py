"""What the training loop asks of a task; the loop does not know classification from detection.

A task owns its data, its loss and its metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class Task(Protocol):
    """Data, loss and metric."""

    metric_name: str
    """The key of `validate`'s result that says which epoch is best (higher is better)."""

    steps_per_epoch: int
    """Batches per epoch on this process."""

    position: int
    """Batches of the epoch that were taken so far, those included that were left out or had nothing readable in
    them."""

    def in_words(self, batch: Any) -> str:
        """Which images the training batch holds that was taken last, and what makes such a batch smaller: "on ..."."""

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of epoch `epoch` (from 1) after the first `start`, in an order that depends on the run's seed and
        the epoch alone."""

    def inputs(self, batch: Any) -> Any:
        """What the network is given of a batch: a tensor, or a list of images, on the network's device."""

    def training_loss(self, model: nn.Module, batch: Any) -> StepLoss:
        """Loss of `model` (in training mode) on `batch`; moves the batch to the device itself."""

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:
        """Metrics of `model` (put into eval mode and restored) over the whole validation set and all processes."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module gets its own mode back, so that norms that were frozen stay
    frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

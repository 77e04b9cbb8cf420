"""What the training loop asks of those who run it: where figures, models and checkpoints go, and when to stop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from .checkpoint import Checkpoint


class Recorder(Protocol):
    """Where a run leaves its figures and models."""

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a training step, by name."""

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Metrics after `epoch` epochs (0: before training)."""

    def model(self, epoch: int, model: nn.Module) -> None:
        """The model after `epoch` epochs (0: compressed, before training)."""

    def best(self, epoch: int, model: nn.Module) -> None:
        """The model after `epoch` epochs has the highest metric so far."""


class Keeper(Protocol):
    """Where checkpoints go."""

    def keep(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint. Every process calls this."""


class StopSignals(Protocol):
    """Whether this process was asked to stop, and when it listens."""

    @property
    def wanted(self) -> bool:
        """This process was asked to stop."""

    def deferred(self) -> AbstractContextManager[None]:
        """In here a request to stop waits until the loop asks for it."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """In here no error of another process interrupts: a step that was begun is finished."""

    def leave(self, why: str = "") -> None:
        """Stop; a checkpoint has been saved. Raises."""


class NoCheckpoints:
    """For trainings that start over after a crash."""

    def keep(self, checkpoint: Checkpoint) -> None:
        """Nothing."""


class NeverStop:
    """For programs that handle signals themselves."""

    wanted = False

    def deferred(self) -> AbstractContextManager[None]:
        """Nothing waits."""
        return nullcontext()

    def undisturbed(self) -> AbstractContextManager[None]:
        """Nothing is held back."""
        return nullcontext()

    def leave(self, why: str = "") -> None:
        """Never called, as nobody asks for it."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to resume from.

    Attributes:
        checkpoint: as it was saved.
        same_schedule: False: settings of the schedule have changed since.
        batch: batches of the epoch under way that count as done, where that is another number than the checkpoint's.
    """

    checkpoint: Checkpoint
    same_schedule: bool = True
    batch: int | None = None

"""From batches to gradients, and from gradients to steps of the optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...common.errors import RunError
from .checkpoint import Training
from .gradients import GradientWatch, explain
from .spec import FinetuneSpec
from .task import StepLoss, Task


class Steps:
    """The steps of a training.

    Args:
        training: what changes.
        trained: its network as the engine wraps it.
        optimizer: its optimizer as the engine wraps it.
        task: gives the loss.
        spec: how the network is trained.

    Attributes:
        pending: batches whose gradients wait for further ones.
    """

    def __init__(
        self, training: Training, trained: nn.Module, optimizer: torch.optim.Optimizer, task: Task, spec: FinetuneSpec
    ) -> None:
        self._training, self._trained, self._optimizer = training, trained, optimizer
        self._task, self._spec = task, spec
        self._watch = GradientWatch(training.model)
        self.pending = 0
        self._first, self._images = 1, 0
        self._parameters = [p for p in training.model.parameters() if p.requires_grad]

    def take(self, batch: Any, number: int, last: bool) -> StepLoss:
        """Add the gradients of batch `number` (from 1), and make a step where it completes one, or is the `last`.

        Raises:
            RunError: the loss or a gradient is not a number; the network is as before.
        """
        if not self.pending:
            self._optimizer.zero_grad(set_to_none=True)
            self._images = 0
        loss = self._task.training_loss(self._trained, batch)
        self._backward(loss)
        if last or self.pending == self._spec.accumulate:
            self.complete(number, loss)
        elif not loss.loss.is_cuda and not math.isfinite(loss.loss.item()):
            self._watch.check(number)
            self.fail(number)
        return StepLoss(loss.loss.detach(), loss.n_images, loss.scalars)

    def _backward(self, loss: StepLoss) -> None:
        scaled = self._training.scaler.scale(loss.loss)
        if self._spec.accumulate > 1:  # gradients are to be means over all images, of which a last batch has fewer
            self._first = self._first if self.pending else max(1, loss.n_images)
            scaled = scaled * (loss.n_images / self._first)
        scaled.backward()
        self._watch.end_of_pass()
        self.pending += 1
        self._images += loss.n_images

    def complete(self, number: int, loss: StepLoss | None = None) -> None:
        """Make a step of the gradients that there are; `loss` is the last one, of batch `number`."""
        scaler = self._training.scaler
        if self.pending > 1:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_div_(gradients, self._images / self._first)
        self.pending = 0
        # where reading from the device costs no synchronisation every step is checked before it changes anything
        at_once = loss is not None and not loss.loss.is_cuda
        if scaler.is_enabled() and loss is not None:
            finite = torch.isfinite(loss.loss.detach())  # gradients of a scaled loss may overflow: see below
        else:
            finite = self._watch.check(number)
        if at_once and loss is not None and not (bool(finite) and math.isfinite(loss.loss.item())):
            if scaler.is_enabled():
                self._watch.check(number)
            self.fail(number)
        if self._spec.clip_gradients is not None:
            scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._spec.clip_gradients)
        scale = scaler.get_scale()
        scaler.step(self._optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # a lower one: the gradients overflowed, and the step was left out
            self._training.schedule.after_step()
            if self._training.average is not None:
                self._training.average.update()

    @property
    def spoilt(self) -> bool:
        """Whether a gradient was not finite; this waits for the device."""
        return self._watch.first() is not None

    def fail(self, number: int) -> None:
        """Raises the RunError that says which gradient went first."""
        cause = explain(self._watch.first(), dict(self._training.model.named_modules()))
        raise RunError(
            f"the loss is no longer a number at step {number}. {cause}The last checkpoint and model are kept. "
            "A smaller learning_rate, or amp: bf16 instead of fp16, usually helps."
        )

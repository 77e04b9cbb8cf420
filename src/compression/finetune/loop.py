"""The training loop (paper section 3.4). It knows neither the task, nor the processes, nor where results are kept."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ...errors import RunError
from ...progress import bar
from .optimizers import Schedule
from .task import Engine, StepLoss, Task


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


@dataclass
class Outcome:
    """What a run reached.

    Attributes:
        initial: the metric before training; None if it was not validated then.
        last: the metric after the last epoch.
        best: the highest metric.
        best_epoch: the epoch that reached it (0: before training).
        seconds_per_step: median over the run's steps, loading included.
        history: all metrics by epoch.
    """

    initial: float | None = None
    last: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    seconds_per_step: float = math.nan
    history: dict[int, dict[str, float]] = field(default_factory=dict)


def finetune(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    engine: Engine,
    recorder: Recorder,
    *,
    epochs: int,
    amp: str = "none",
    skip_initial_validation: bool = False,
    log_every: int = 10,
    show_progress: bool = True,
) -> Outcome:
    """Train `model` for `epochs` epochs, validating and saving after each.

    Args:
        model: on the engine's device.
        task: data, loss and metric.
        optimizer: over the trained parameters.
        schedule: of `optimizer`.
        engine: the processes.
        recorder: keeps figures and models.
        epochs: 0 only validates and saves.
        amp: `fp16` scales the loss; the task computes it under autocast.
        skip_initial_validation: do not validate before training.
        log_every: steps between figures.
        show_progress: show progress bars.

    Raises:
        RunError: the loss is not a number; the last saved model is kept.
    """
    outcome = Outcome()
    durations: list[float] = []
    optimizer = engine.wrap_optimizer(optimizer, model)
    trained = engine.wrap_model(model)
    scaler = torch.amp.GradScaler(engine.device.type, enabled=amp == "fp16")
    recorder.model(0, model)
    if not skip_initial_validation:
        _validate(0, 0, model, task, recorder, outcome)
    for epoch in range(1, epochs + 1):
        model.train()
        batches = bar(task.training_batches(epoch), f"epoch {epoch}/{epochs}", task.steps_per_epoch, show_progress, "batch")
        started = time.perf_counter()
        for number, batch in enumerate(batches, start=(epoch - 1) * task.steps_per_epoch + 1):
            rate = schedule.learning_rate
            loss = _step(trained, task, batch, optimizer, scaler, number)
            schedule.after_step()
            wanted = number % log_every == 0 or number == 1
            figures, n_images = _over_processes(loss, engine) if wanted else ({}, 0)
            if figures and not math.isfinite(figures["loss"]):
                _raise_not_finite(number)
            now = time.perf_counter()
            durations.append(now - started)
            if wanted:
                recorder.step(number, {**figures, "learning_rate": rate, "images_per_second": n_images / (now - started)})
            started = now
        engine.average_buffers(model)
        recorder.model(epoch, model)
        metrics = _validate(epoch, epoch * task.steps_per_epoch, model, task, recorder, outcome)
        schedule.after_epoch(metrics[task.metric_name])
    outcome.seconds_per_step = sorted(durations)[len(durations) // 2] if durations else math.nan
    return outcome


def _over_processes(loss: StepLoss, engine: Engine) -> tuple[dict[str, float], float]:
    """The figures of a step as means over the images of all processes, and the number of these images."""
    values = torch.stack([value.detach().cpu().double() for value in (loss.loss, *loss.scalars.values())])
    own = torch.cat([values, torch.ones(1, dtype=torch.float64)]) * loss.n_images
    *means, n_images = engine.sum(own).tolist()
    return dict(zip(("loss", *loss.scalars), (mean / n_images for mean in means), strict=True)), n_images


def _step(
    model: nn.Module, task: Task, batch: object, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, number: int
) -> StepLoss:
    optimizer.zero_grad(set_to_none=True)
    loss = task.training_loss(model, batch)
    scaler.scale(loss.loss).backward()
    if not loss.loss.is_cuda and not math.isfinite(loss.loss.item()):
        _raise_not_finite(number)  # where reading the loss costs no synchronisation it is looked at in every step
    scaler.step(optimizer)
    scaler.update()
    return StepLoss(loss.loss.detach(), loss.n_images, loss.scalars)


def _raise_not_finite(number: int) -> None:
    raise RunError(
        f"the loss is no longer a number at step {number}; the last saved model is kept. A smaller learning_rate, or amp: bf16 instead of fp16, usually helps."
    )


def _validate(epoch: int, step: int, model: nn.Module, task: Task, recorder: Recorder, outcome: Outcome) -> dict[str, float]:
    label = "validate before training" if epoch == 0 else f"validate epoch {epoch}"
    metrics = task.validate(model, label)
    value = metrics[task.metric_name]
    outcome.history[epoch] = metrics
    if epoch == 0:
        outcome.initial = value
    outcome.last = value
    recorder.validation(epoch, step, metrics)
    if outcome.best is None or value > outcome.best:
        outcome.best, outcome.best_epoch = value, epoch
        recorder.best(epoch, model)
    return metrics

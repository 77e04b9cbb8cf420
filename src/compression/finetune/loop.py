"""The training loop (paper section 3.4). It knows neither the task, nor the processes, nor where results are kept."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...common.errors import RunError
from ...common.memory import named_when_out_of_memory
from ...common.progress import bar
from ...engines.engine import Engine
from .checkpoint import Position, Training, restore, restore_own, take
from .gradients import GradientWatch, explain
from .hooks import Keeper, NeverStop, NoCheckpoints, Recorder, Resumed, StopSignals
from .optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from .outcome import Outcome
from .task import StepLoss, Task

TIMED_STEPS = 10_000
"""The last steps, whose median duration is reported."""


@dataclass(frozen=True)
class FinetuneSpec:
    """How a network is trained; the names are those of the settings.

    Attributes:
        epochs: passes over the training images; 0 only validates and saves.
        optimizer: over every parameter that is not frozen.
        lr_scheduler: of the learning rate.
        amp: `fp16` scales the loss; the task computes it under autocast.
        skip_initial_validation: do not validate before training.
        log_every_n_steps: steps between figures.
        checkpoint_every_n_steps: steps between two checkpoints within an epoch; 0: none.
        show_progress: show progress bars.
    """

    epochs: int
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    lr_scheduler: ScheduleSpec = field(default_factory=ScheduleSpec)
    amp: str = "none"
    skip_initial_validation: bool = False
    log_every_n_steps: int = 10
    checkpoint_every_n_steps: int = 0
    show_progress: bool = True


def finetune(
    model: nn.Module,
    task: Task,
    spec: FinetuneSpec,
    engine: Engine,
    recorder: Recorder,
    *,
    keeper: Keeper | None = None,
    signals: StopSignals | None = None,
    resumed: Resumed | None = None,
) -> Outcome:
    """Train `model`, validating and saving after each epoch.

    Args:
        model: on the engine's device.
        task: data, loss and metric.
        spec: how.
        engine: the processes.
        recorder: receives figures and models.
        keeper: receives a checkpoint before the first step, every `checkpoint_every_n_steps`, and before and after each
            validation. None: nothing is saved.
        signals: say when to stop. None: never.
        resumed: checkpoint to resume from; the result is that of a training that was never interrupted, bit by bit on
            the CPU.

    Raises:
        RunError: the loss or a gradient is not a number, or memory runs out; what was saved is kept.
        CheckpointError: `resumed` is the checkpoint of something else.
    """
    optimizer = make_optimizer(model, spec.optimizer)
    schedule = Schedule(optimizer, spec.lr_scheduler, spec.epochs, task.steps_per_epoch)
    scaler = torch.amp.GradScaler(engine.device.type, enabled=spec.amp == "fp16")
    training = Training(model, optimizer, schedule, scaler)
    if resumed is not None:
        restore(resumed.checkpoint, training, _where(resumed, task), same_schedule=resumed.same_schedule)
    # the optimizer's state goes to the other processes before the parameters: the other way round they would differ
    # afterwards
    optimizer = engine.wrap_optimizer(optimizer, model)
    trained = engine.wrap_model(model)
    if resumed is not None:
        restore_own(resumed.checkpoint, training, engine)
    loop = _Loop(
        training=training,
        trained=trained,
        optimizer=optimizer,
        task=task,
        spec=spec,
        engine=engine,
        recorder=recorder,
        keeper=keeper or NoCheckpoints(),
        signals=signals or NeverStop(),
    )
    if resumed is None:
        recorder.model(0, model)
        training.position = Position(validated=spec.skip_initial_validation)
        loop.keep()
    return loop.run()


def _where(resumed: Resumed, task: Task) -> Position:
    """The place to resume from, in the steps and batches of this run."""
    position = resumed.checkpoint.position
    if resumed.same_schedule and resumed.batch is None:
        return position
    batch = min(position.batch if resumed.batch is None else resumed.batch, task.steps_per_epoch)
    return replace(position, batch=batch, step=position.epoch * task.steps_per_epoch + batch)


@dataclass
class _Loop:
    training: Training
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    spec: FinetuneSpec
    engine: Engine
    recorder: Recorder
    keeper: Keeper
    signals: StopSignals

    def __post_init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=TIMED_STEPS)
        self.watch = GradientWatch(self.training.model)

    def run(self) -> Outcome:
        while True:
            if not self.training.position.validated:
                self._validate()
            if self.training.position.epoch >= self.spec.epochs:
                self._time()
                return self.training.outcome
            with self.signals.deferred():
                self._train_epoch()

    def keep(self) -> None:
        self._time()
        self.keeper.keep(take(self.training, self.engine))

    def _leave(self) -> None:
        self.signals.leave(f"the checkpoint is saved ({self.training.position}); the same command resumes from it")

    def _time(self) -> None:
        if self.durations:
            self.training.outcome.seconds_per_step = sorted(self.durations)[len(self.durations) // 2]

    def _train_epoch(self) -> None:
        training, task = self.training, self.task
        epoch, done = training.position.epoch + 1, training.position.batch
        training.model.train()
        label, total = f"epoch {epoch}/{self.spec.epochs}", task.steps_per_epoch
        with closing(
            bar(task.training_batches(epoch, done), label, total, self.spec.show_progress, "batch", done)
        ) as batches:
            self._train_on(batches, epoch, done)
        self.engine.average_buffers(training.model)
        self.recorder.model(epoch, training.model)
        training.position = Position(epoch, 0, False, epoch * task.steps_per_epoch)
        self.keep()
        if self.engine.world_size == 1 and self.signals.wanted:
            self._leave()

    def _train_on(self, batches: Iterator[Any], epoch: int, done: int) -> None:
        """Go through the batches of `epoch` of which `done` are behind."""
        training, task = self.training, self.task
        first, started = True, time.perf_counter()
        while (batch := self._next(batches)) is not None:
            with self.signals.undisturbed():
                number = (epoch - 1) * task.steps_per_epoch + task.position
                wanted = number % self.spec.log_every_n_steps == 0 or number == 1
                rate = training.schedule.learning_rate
                with named_when_out_of_memory(partial(task.in_words, batch)):
                    loss = self._step(batch, number)
                figures, n_images, stop = self._over_processes(loss) if wanted else ({}, 0, False)
                if (figures and not math.isfinite(figures["loss"])) or (wanted and self.watch.first()):
                    self._raise_not_finite(number)
                took = time.perf_counter() - started
                if not first or not done:  # the first step after a resume waits for the loader to start
                    self.durations.append(took)
                if wanted:
                    self.recorder.step(number, {**figures, "learning_rate": rate, "images_per_second": n_images / took})
                training.position = Position(epoch - 1, task.position, True, number)
                stop = stop or (self.engine.world_size == 1 and self.signals.wanted)
                due = (
                    self.spec.checkpoint_every_n_steps
                    and number % self.spec.checkpoint_every_n_steps == 0
                    and task.position < task.steps_per_epoch
                )
                if due or stop:
                    self.keep()
                if stop:
                    self._leave()
            first, started = False, time.perf_counter()

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None at the end. What was done before is saved if there is none to be had."""
        try:
            return next(batches, None)
        except Exception as error:
            with self.signals.undisturbed():
                if self.engine.world_size == 1:  # several processes would have to agree
                    try:
                        self.keep()
                    except (
                        Exception
                    ) as further:  # the first error says more; the checkpoint saved before is still there
                        raise error from further
                    if self.signals.wanted:  # the signal may have ended the loader's processes too
                        self._leave()
            raise

    def _step(self, batch: Any, number: int) -> StepLoss:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.training_loss(self.trained, batch)
        scaler = self.training.scaler
        scaler.scale(loss.loss).backward()
        self.watch.end_of_pass()
        # where reading from the device costs no synchronisation every step is checked before it changes anything
        at_once = not loss.loss.is_cuda
        if scaler.is_enabled():  # gradients of a scaled loss may overflow: the scaler leaves such steps out
            finite = torch.isfinite(loss.loss.detach())
        else:
            finite = self.watch.check(number)
        if at_once and not (bool(finite) and math.isfinite(loss.loss.item())):
            if scaler.is_enabled():
                self.watch.check(number)
            self._raise_not_finite(number)
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # a lower one: the gradients overflowed, and the step was left out
            self.training.schedule.after_step()
        return StepLoss(loss.loss.detach(), loss.n_images, loss.scalars)

    def _over_processes(self, loss: StepLoss) -> tuple[dict[str, float], float, bool]:
        """The figures of a step as means over the images of all processes, the number of these images, and whether one
        is to stop."""
        values = torch.stack([value.detach().cpu().double() for value in (loss.loss, *loss.scalars.values())])
        own = torch.cat([values, torch.ones(1, dtype=torch.float64)]) * loss.n_images
        stop = torch.tensor([float(self.signals.wanted)], dtype=torch.float64)
        *means, n_images, stopping = self.engine.sum(torch.cat([own, stop])).tolist()
        figures = dict(zip(("loss", *loss.scalars), (mean / n_images for mean in means), strict=True))
        return figures, n_images, stopping > 0

    def _raise_not_finite(self, number: int) -> None:
        cause = explain(self.watch.first(), dict(self.training.model.named_modules()))
        raise RunError(
            f"the loss is no longer a number at step {number}. {cause}The last checkpoint and model are kept. "
            "A smaller learning_rate, or amp: bf16 instead of fp16, usually helps."
        )

    def _validate(self) -> None:
        training, outcome = self.training, self.training.outcome
        epoch = training.position.epoch
        metrics = self.task.validate(
            training.model, "validate before training" if epoch == 0 else f"validate epoch {epoch}"
        )
        value = metrics[self.task.metric_name]
        outcome.history[epoch] = metrics
        if epoch == 0:
            outcome.initial = value
        outcome.last = value
        self.recorder.validation(epoch, training.position.step, metrics)
        if outcome.best is None or value > outcome.best:
            outcome.best, outcome.best_epoch = value, epoch
            self.recorder.best(epoch, training.model)
        if epoch:
            training.schedule.after_epoch(value)
        training.position = replace(training.position, validated=True)
        self.keep()


__all__ = ["FinetuneSpec", "Outcome", "finetune"]

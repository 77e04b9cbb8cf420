"""The training loop (paper section 3.4). It knows neither the task, nor the processes, nor where results are kept."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...common.log import log
from ...common.memory import named_when_out_of_memory
from ...common.progress import bar
from ...engines.engine import Engine
from .average import MovingAverage
from .checkpoint import Position, Training, restore, restore_own, take
from .hooks import Keeper, NeverStop, NoCheckpoints, Recorder, Resumed, StopSignals
from .optimizers import Schedule, make_optimizer
from .outcome import Outcome
from .spec import FinetuneSpec
from .steps import Steps
from .task import StepLoss, Task

TIMED_STEPS = 10_000
"""The last steps, whose median duration is reported."""


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
    schedule = Schedule(optimizer, spec.lr_scheduler, spec.epochs, task.steps_per_epoch, spec.accumulate)
    scaler = torch.amp.GradScaler(engine.device.type, enabled=spec.amp == "fp16")
    average = MovingAverage(model, spec.ema) if spec.ema else None
    training = Training(model, optimizer, schedule, scaler, average)
    if resumed is not None:
        restore(resumed.checkpoint, training, _where(resumed, task), same_schedule=resumed.same_schedule)
    # the optimizer's state goes to the other processes before the parameters: the other way round they would differ
    # afterwards
    optimizer = engine.wrap_optimizer(optimizer, model)
    trained = engine.wrap_model(model)
    if resumed is not None:
        restore_own(resumed.checkpoint, training, engine)
    elif average is not None:  # the network may have got another process's values
        average.restart()
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
        self.steps = Steps(self.training, self.trained, self.optimizer, self.task, self.spec)
        self.kept = self.training.position

    def run(self) -> Outcome:
        while True:
            if not self.training.position.validated:
                self._validate()
            if self.training.position.epoch >= self.spec.epochs or self._no_longer_better():
                self._time()
                if self.training.average is not None:  # what was validated and saved is what is handed back
                    self.training.average.exchange()
                return self.training.outcome
            with self.signals.deferred():
                self._train_epoch()

    def keep(self) -> None:
        self._time()
        self.keeper.keep(take(self.training, self.engine))
        self.kept = self.training.position

    def _leave(self) -> None:
        self.signals.leave(f"the checkpoint is saved ({self.kept}); the same command resumes from it")

    def _no_longer_better(self) -> bool:
        """Whether the metric did not rise for `early_stopping` epochs."""
        epoch, outcome, patience = self.training.position.epoch, self.training.outcome, self.spec.early_stopping
        if not patience or outcome.best_epoch is None or epoch - outcome.best_epoch < patience:
            return False
        log.info(
            "early stopping: no better %s in %d epochs; the best was that of epoch %d",
            self.task.metric_name,
            patience,
            outcome.best_epoch,
        )
        return True

    def _averaged(self) -> AbstractContextManager[None]:
        """In here the network has the moving averages, if they are taken."""
        return nullcontext() if self.training.average is None else self.training.average.shown()

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
        with self._averaged():
            if training.average is not None:
                self.engine.average_buffers(training.model)
            self.recorder.model(epoch, training.model)
        training.position = Position(epoch, 0, False, epoch * task.steps_per_epoch)
        self.keep()
        if self.engine.world_size == 1 and self.signals.wanted:
            self._leave()

    def _train_on(self, batches: Iterator[Any], epoch: int, done: int) -> None:
        """Go through the batches of `epoch` of which `done` are behind."""
        training, task = self.training, self.task
        first, started, number = True, time.perf_counter(), 0
        due = stop = False
        while (batch := self._next(batches)) is not None:
            with self.signals.undisturbed():
                number = (epoch - 1) * task.steps_per_epoch + task.position
                wanted = number % self.spec.log_every_n_steps == 0 or number == 1
                rate = training.schedule.learning_rate
                with named_when_out_of_memory(partial(task.in_words, batch)):
                    loss = self.steps.take(batch, number, task.position >= task.steps_per_epoch)
                figures, n_images, asked = self._over_processes(loss) if wanted else ({}, 0, False)
                if (figures and not math.isfinite(figures["loss"])) or (wanted and self.steps.spoilt):
                    self.steps.fail(number)
                took = time.perf_counter() - started
                if not first or not done:  # the first step after a resume waits for the loader to start
                    self.durations.append(took)
                if wanted:
                    self.recorder.step(number, {**figures, "learning_rate": rate, "images_per_second": n_images / took})
                stop = stop or asked or (self.engine.world_size == 1 and self.signals.wanted)
                every = self.spec.checkpoint_every_n_steps
                due = due or bool(every and number % every == 0)
                if not self.steps.pending:  # gradients that wait are in no checkpoint
                    training.position = Position(epoch - 1, task.position, True, number)
                    if (due and task.position < task.steps_per_epoch) or stop:
                        self.keep()
                    if stop:
                        self._leave()
                    due = False
            first, started = False, time.perf_counter()
        if self.steps.pending:  # the last batch of the epoch was left out
            self.steps.complete(number)

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None at the end. What was done before is saved if there is none to be had."""
        try:
            return next(batches, None)
        except Exception as error:
            with self.signals.undisturbed():
                if self.engine.world_size == 1 and not self.steps.pending:  # several processes would have to agree
                    try:
                        self.keep()
                    except (
                        Exception
                    ) as further:  # the first error says more; the checkpoint saved before is still there
                        raise error from further
                    if self.signals.wanted:  # the signal may have ended the loader's processes too
                        self._leave()
            raise

    def _over_processes(self, loss: StepLoss) -> tuple[dict[str, float], float, bool]:
        """The figures of a step as means over the images of all processes, the number of these images, and whether one
        is to stop."""
        values = torch.stack([value.detach().cpu().double() for value in (loss.loss, *loss.scalars.values())])
        own = torch.cat([values, torch.ones(1, dtype=torch.float64)]) * loss.n_images
        stop = torch.tensor([float(self.signals.wanted)], dtype=torch.float64)
        *means, n_images, stopping = self.engine.sum(torch.cat([own, stop])).tolist()
        figures = dict(zip(("loss", *loss.scalars), (mean / n_images for mean in means), strict=True))
        return figures, n_images, stopping > 0

    def _validate(self) -> None:
        training = self.training
        epoch = training.position.epoch
        with self._averaged():
            label = "validate before training" if epoch == 0 else f"validate epoch {epoch}"
            value = self._record(self.task.validate(training.model, label))
        if epoch:
            training.schedule.after_epoch(value)
        training.position = replace(training.position, validated=True)
        self.keep()

    def _record(self, metrics: dict[str, float]) -> float:
        """Keep the metrics after an epoch, and the network if it is the best so far; returns what counts."""
        training, outcome = self.training, self.training.outcome
        epoch, value = training.position.epoch, metrics[self.task.metric_name]
        outcome.history[epoch] = metrics
        if epoch == 0:
            outcome.initial = value
        outcome.last = value
        self.recorder.validation(epoch, training.position.step, metrics)
        if outcome.best is None or value > outcome.best:
            outcome.best, outcome.best_epoch = value, epoch
            self.recorder.best(epoch, training.model)
        return value


__all__ = ["FinetuneSpec", "Outcome", "finetune"]

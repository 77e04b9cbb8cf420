"""Optimizers and learning-rate schedules by name (paper section 4: Adam, cosine)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from .registry import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class OptimizerSpec:
    """`optimizer`, `learning_rate`, `momentum` (SGD) and `weight_decay` (both), and `codebook_learning_rate`: the rate
    of codebooks as a multiple of the others'."""

    name: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    codebook_learning_rate: float = 1.0


Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]
"""Parameters, or groups of them with rates of their own, as torch's optimizers take them."""


def sgd(parameters: Parameters, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum and weight decay."""
    return torch.optim.SGD(parameters, lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay)


def adam(parameters: Parameters, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Adam with weight decay."""
    return torch.optim.Adam(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)


MakeOptimizer = Callable[[Parameters, OptimizerSpec], torch.optim.Optimizer]
CODEBOOK = "codebook"
"""How the parameter is called that holds the codebook of a quantized weight."""


def make_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer over every parameter that is not frozen.

    Raises:
        ValueError: every parameter is frozen.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("the network has no trainable parameter")
    codebooks = [p for name, p in trained.items() if name.rpartition(".")[2] == CODEBOOK]
    if spec.codebook_learning_rate == 1 or not codebooks:
        return OPTIMIZERS[spec.name](list(trained.values()), spec)
    others = [p for name, p in trained.items() if name.rpartition(".")[2] != CODEBOOK]
    groups: list[dict[str, Any]] = [{"params": others}] if others else []
    groups.append({"params": codebooks, "lr": spec.learning_rate * spec.codebook_learning_rate})
    return OPTIMIZERS[spec.name](groups, spec)


@dataclass(frozen=True)
class ScheduleSpec:
    """The `lr_scheduler` section; see `Schedule`."""

    type: str = "cosine"
    min_lr: float = 1e-6
    patience: int = 3
    factor: float = 0.1
    milestones: Sequence[int] = ()
    last_epoch: int = -1
    warmup: float = 0.0


@dataclass(frozen=True)
class ScheduleParts:
    """torch's schedules that make up one of ours: told of every step, of every epoch, of every validation metric."""

    step: lrs.LRScheduler | None = None
    epoch: lrs.LRScheduler | None = None
    plateau: lrs.ReduceLROnPlateau | None = None


MakeSchedule = Callable[[torch.optim.Optimizer, ScheduleSpec, int], ScheduleParts]
"""Optimizer, spec, steps in all -> its parts."""


def cosine(optimizer: torch.optim.Optimizer, spec: ScheduleSpec, n_steps: int) -> ScheduleParts:
    """From the learning rate to `min_lr` over all batches, stepped every batch."""
    return ScheduleParts(
        step=lrs.CosineAnnealingLR(optimizer, T_max=n_steps, eta_min=spec.min_lr, last_epoch=spec.last_epoch)
    )


def plateau(optimizer: torch.optim.Optimizer, spec: ScheduleSpec, n_steps: int) -> ScheduleParts:  # noqa: ARG001 (of MakeSchedule)
    """Times `factor` (not below `min_lr`) when the metric, higher is better, did not rise for `patience` epochs."""
    return ScheduleParts(
        plateau=lrs.ReduceLROnPlateau(
            optimizer, mode="max", factor=spec.factor, patience=spec.patience, min_lr=spec.min_lr
        )
    )


def multistep(optimizer: torch.optim.Optimizer, spec: ScheduleSpec, n_steps: int) -> ScheduleParts:  # noqa: ARG001 (of MakeSchedule)
    """Times `factor` at each epoch in `milestones`."""
    return ScheduleParts(
        epoch=lrs.MultiStepLR(optimizer, list(spec.milestones), gamma=spec.factor, last_epoch=spec.last_epoch)
    )


def constant(optimizer: torch.optim.Optimizer, spec: ScheduleSpec, n_steps: int) -> ScheduleParts:  # noqa: ARG001 (of MakeSchedule)
    """The learning rate as it is."""
    return ScheduleParts()


MOVING = ("last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter")
"""What changes in torch's schedules from step to step."""


class Schedule:
    """A learning-rate schedule, told of every step and every epoch.

    `last_epoch` continues a schedule: the number of its last step (batches for cosine, epochs for multistep), -1 for a
    new one. In the first n steps, those of `warmup` epochs, its rate is multiplied by 1 / n, 2 / n, ..., 1.

    Args:
        optimizer: whose rates it sets.
        spec: which schedule.
        epochs: of the training.
        batches_per_epoch: of a process.
        accumulate: batches in a step of the optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        spec: ScheduleSpec,
        epochs: int,
        batches_per_epoch: int,
        accumulate: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self._batches, self._accumulate = batches_per_epoch, accumulate
        if spec.last_epoch >= 0:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        per_epoch = self._steps(batches_per_epoch)
        parts = SCHEDULES[spec.type](optimizer, spec, max(1, epochs * per_epoch))
        self._per_step, self._per_epoch, self._plateau = parts.step, parts.epoch, parts.plateau
        self._warm_steps, self._done = round(spec.warmup * per_epoch), 0
        self._full = [float(group["lr"]) for group in optimizer.param_groups]
        self._warm()

    def _steps(self, batches: int) -> int:
        """Steps of the optimizer in so many batches of an epoch."""
        return math.ceil(batches / self._accumulate)

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"step": self._per_step, "epoch": self._per_epoch, "plateau": self._plateau}
        return {name: part for name, part in parts.items() if part is not None}

    def state(self) -> dict[str, dict[str, Any]]:
        """What moves in the schedule, as JSON can hold it; the rest comes from the settings."""
        state = {
            name: {key: value for key, value in part.state_dict().items() if key in MOVING}
            for name, part in self._parts.items()
        }
        return {**state, "warmup": {"done": self._done, "full": self._full}} if self._warm_steps else state

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put back what `state` gave. Raises KeyError if it was another kind of schedule."""
        for name, part in self._parts.items():
            part.load_state_dict({**part.state_dict(), **state[name]})
        if self._warm_steps:
            self._done, self._full = int(state["warmup"]["done"]), list(state["warmup"]["full"])

    def go_to(self, batches: int, epoch: int) -> None:
        """Go to the rate after `batches` batches and `epoch` epochs of a new schedule (plateau: its first rate, as
        metrics are not repeated)."""
        whole, rest = divmod(batches, max(1, self._batches))
        self._done = whole * self._steps(self._batches) + rest // self._accumulate
        with self._at_full_rate(), _without_a_step():
            for part, times in ((self._per_step, self._done), (self._per_epoch, epoch)):
                for _ in range(times if part is not None else 0):
                    assert part is not None
                    part.step()

    @property
    def learning_rate(self) -> float:
        """The rate of the next step; of several groups of parameters that of the first."""
        return float(self.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Called after every optimizer step; not after one that a scaler left out."""
        self._done += 1
        with self._at_full_rate():
            if self._per_step is not None:
                self._per_step.step()

    def after_epoch(self, metric: float) -> None:
        """Called after every epoch's validation."""
        with self._at_full_rate():
            if self._plateau is not None:
                self._plateau.step(metric)
            if self._per_epoch is not None:
                with _without_a_step():  # a scaler may have left out every step
                    self._per_epoch.step()

    @contextmanager
    def _at_full_rate(self) -> Iterator[None]:
        """In here rates are those without a warm-up: torch's schedules go on from the rate that they find."""
        if self._warm_steps:
            for group, rate in zip(self.optimizer.param_groups, self._full, strict=True):
                group["lr"] = rate
        yield
        if self._warm_steps:
            self._full = [float(group["lr"]) for group in self.optimizer.param_groups]
            self._warm()

    def _warm(self) -> None:
        """Lower the rates while the warm-up lasts."""
        if self._done < self._warm_steps:
            for group, rate in zip(self.optimizer.param_groups, self._full, strict=True):
                group["lr"] = rate * ((self._done + 1) / self._warm_steps)


@contextmanager
def _without_a_step() -> Iterator[None]:
    """No warning of torch's that the optimizer has not stepped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield

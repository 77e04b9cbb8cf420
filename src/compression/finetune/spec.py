"""How a network is trained, as the settings say it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .optimizers import OptimizerSpec, ScheduleSpec


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
        accumulate: batches whose gradients make up one step of the optimizer; at the end of an epoch those that are
            left. Other numbers of steps count batches.
        clip_gradients: gradients whose norm over all parameters is larger are scaled down to it; None: never.
        ema: decay of the moving average of what is trained, which is then what is validated and saved; 0: none.
        early_stopping: epochs without a better metric after which training ends; 0: it goes on.
    """

    epochs: int
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    lr_scheduler: ScheduleSpec = field(default_factory=ScheduleSpec)
    amp: str = "none"
    skip_initial_validation: bool = False
    log_every_n_steps: int = 10
    checkpoint_every_n_steps: int = 0
    show_progress: bool = True
    accumulate: int = 1
    clip_gradients: float | None = None
    ema: float = 0.0
    early_stopping: int = 0

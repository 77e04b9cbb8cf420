"""Optimizers and learning-rate schedules by name. To add one: a function of the type
`optimizers.MakeOptimizer` or `optimizers.MakeSchedule` in a file, and its entry here."""

from __future__ import annotations

from typing import Any

from ...common.registry import Entry, Registry

OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    {
        "sgd": Entry(".compression.finetune.optimizers:sgd", "stochastic gradient descent with momentum"),
        "adam": Entry(".compression.finetune.optimizers:adam", "Adam"),
    },
)

SCHEDULES: Registry[Any] = Registry(
    "schedule",
    {
        "cosine": Entry(".compression.finetune.optimizers:cosine", "to min_lr over all batches"),
        "plateau": Entry(".compression.finetune.optimizers:plateau", "falls when the validation metric does not rise"),
        "multistep": Entry(".compression.finetune.optimizers:multistep", "falls at milestones"),
        "none": Entry(".compression.finetune.optimizers:constant", "constant"),
    },
)

"""Optimizers and learning-rate schedules by name. To add one: a function of the type
`optimizers.MakeOptimizer` or `optimizers.MakeSchedule` in a file, and its entry here. The fact `reads` says which
settings (of a schedule: of `lr_scheduler`) it reads."""

from __future__ import annotations

from typing import Any

from ...common.registry import Entry, Registry

OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    {
        "sgd": Entry(
            ".compression.finetune.optimizers:sgd",
            "stochastic gradient descent with momentum",
            {"reads": ("momentum",)},
        ),
        "adam": Entry(".compression.finetune.optimizers:adam", "Adam", {"reads": ()}),
    },
)

SCHEDULES: Registry[Any] = Registry(
    "schedule",
    {
        "cosine": Entry(
            ".compression.finetune.optimizers:cosine",
            "to min_lr over all batches",
            {"reads": ("min_lr", "last_epoch")},
        ),
        "plateau": Entry(
            ".compression.finetune.optimizers:plateau",
            "falls when the validation metric does not rise",
            {"reads": ("min_lr", "patience", "factor")},
        ),
        "multistep": Entry(
            ".compression.finetune.optimizers:multistep",
            "falls at milestones",
            {"reads": ("factor", "milestones", "last_epoch")},
        ),
        "none": Entry(".compression.finetune.optimizers:constant", "constant", {"reads": ()}),
    },
)

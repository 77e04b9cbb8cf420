"""What a run reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Outcome:
    """What a run reached.

    Attributes:
        initial: the metric before training; None if it was not validated then.
        last: the metric after the last epoch.
        best: the highest metric.
        best_epoch: the epoch that reached it (0: before training).
        seconds_per_step: median over the last steps (`loop.TIMED_STEPS`) of this process, loading included.
        history: all metrics by epoch.
    """

    initial: float | None = None
    last: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    seconds_per_step: float = math.nan
    history: dict[int, dict[str, float]] = field(default_factory=dict)

    def as_values(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "history": [[epoch, metrics] for epoch, metrics in self.history.items()]}

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Outcome:
        """From `as_values`."""
        return cls(**{**values, "history": {int(epoch): dict(metrics) for epoch, metrics in values["history"]}})

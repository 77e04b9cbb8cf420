"""What networks are calibrated with: batches of inputs in whatever form they are given, without their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....common.errors import DataError

BATCH = 64
"""Inputs of a part of a tensor that is given whole."""
FEW = 256
"""With fewer inputs, more is lost (`few_inputs`)."""


def batches_of(given: Tensor | Iterable[Any]) -> list[Any]:
    """The batches of a tensor (in parts of `BATCH`), a loader or an iterable; of pairs (inputs, labels) the inputs.

    Raises:
        DataError: there are none.
    """
    if isinstance(given, Tensor):
        batches: list[Any] = list(given.split(BATCH)) if given.numel() else []
    else:
        batches = [batch[0] if isinstance(batch, list | tuple) else batch for batch in given]
    if not batches:
        raise DataError("calibration: there are no inputs")
    return batches


def count(batches: Iterable[Any]) -> int:
    """Inputs in all batches."""
    return sum(len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch) for batch in batches)


def few_inputs(n: int) -> str | None:
    """What to expect from so few inputs; None: they are enough."""
    if n >= FEW:
        return None
    return (
        f"calibration: {n:,} inputs are few: a thousand keep more of what the network computes, and cost little more "
        "time"
    )


def run_on(device: torch.device, model: nn.Module, batch: Any) -> object:
    """The output of a network on the device for a batch: a tensor, a list of images, or keyword arguments."""
    batch = moved(batch, device)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return [moved(value, device) for value in batch] if isinstance(batch, list | tuple) else batch

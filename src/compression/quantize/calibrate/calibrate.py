"""Quantizing a network weight by weight, in the order in which it computes, with what each weight is given.

Two copies of the network run: the dense one, and the one whose earlier weights are quantized already. Their passes over
all batches wait at every weight until it is quantized (`arrivals`), so that the time grows with the depth, as that of
any pass. What is held is bounded: passes that do not fit are run anew for a weight, from the start, and then hold one
batch's activations; with them one weight's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ....common.errors import DataError
from ....common.progress import bar
from ..compress import check_weights, with_scales
from ..plan import Plan
from .found import Calibration, Part
from .inputs import run_on
from .passes import inspectable, telling
from .walk import Parts, Surroundings, Walk

MEMORY = 1 << 31
"""Bytes of activations that are held, at most."""


def calibrate(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = True,
    memory: int = MEMORY,
    within: Surroundings | None = None,
) -> Calibration:
    """Find codebooks and codes that keep what a network computes on some inputs.

    Args:
        model: the dense network; it is copied, not changed.
        plan: from `make_plan`.
        batches: of inputs, without labels; some are run through several times, so not a generator.
        seed: the run's seed; each layer draws from streams of its own.
        device: where to compute; None: where the network is.
        show_progress: show a progress bar.
        memory: bytes of activations that both networks hold, at most; with fewer more is computed anew, to the same
            result.
        within: the processes that share the batches, what keeps finished parts, and how a network is run; None: this
            process, nothing, and by calling it.

    Raises:
        DataError: there are no batches, the network fails on them, or needs more memory for the first one; or the
            inputs of a layer are not finite: names it.
        PlanError: a weight that cannot be clustered.
    """
    if not len(batches):
        raise DataError("calibration: there are no inputs")
    check_weights(model, plan)
    place = torch.device(device or next((p.device for p in model.parameters()), "cpu"))
    around = within or Surroundings()
    run = telling(around.run or partial(run_on, place))
    with inspectable():
        walk = Walk(model, with_scales(model, plan), batches, run, seed, place, memory, around)
        with walk.going():
            for item in bar(walk.items, "calibrate", len(walk.items), show_progress, "layer"):
                walk.pass_item(item)
    return walk.found


__all__ = ["MEMORY", "Calibration", "Part", "Parts", "Surroundings", "calibrate"]

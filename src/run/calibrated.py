"""Calibrating a network within a run: what was lost is logged and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..common.log import log, note
from ..compression.quantize.calibrate.calibrate import Calibration, calibrate
from ..compression.quantize.calibrate.inputs import count, few_inputs
from ..compression.quantize.plan import Plan
from .open_run import Run


def calibrated(run: Run, model: nn.Module, plan: Plan, seed: int, images: Sequence[Any]) -> Calibration:
    """Codebooks and codes of the weights of a plan that keep what the network computes from images.

    The running statistics of the model's batch norms are adjusted. Every process does all of it by itself; what the
    first one finds for the norms holds for all, and codes are sent by the process that owns the layer.
    """
    engine = run.engine
    found = calibrate(
        model,
        plan,
        images,
        seed=seed,
        device=engine.device,
        show_progress=engine.is_main,
        memory=run.settings.calibration.memory,
    )
    found.put_norms(model)
    if engine.world_size > 1:
        engine.broadcast(list(model.buffers()))
    n = count(images)
    log.info("%s", found.summary(n))
    for text in filter(None, [few_inputs(n), *found.notes()]):
        note(text)
    steps = ["weight", *found.lost_after()]
    rows = [[name or "(model)", *(f"{100 * share:.3f} %" for _, share in lost)] for name, lost in found.lost.items()]
    run.recorder.table("calibration: share of the outputs' energy lost after each step", steps, rows)
    return found

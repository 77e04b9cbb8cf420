"""What calibration lost, layer by layer: lines of the log and figures of TensorBoard."""

from __future__ import annotations

from ..common.log import log
from ..compression.quantize.calibrate.calibrate import Calibration
from .recorder import AnyRecorder

WORST = 3
"""Layers that the log names."""


def report_calibration(recorder: AnyRecorder, found: Calibration) -> None:
    """Log the share of the outputs' energy that is lost after each step, and in which layers it is most; TensorBoard
    has it for every layer."""
    if not found.lost:
        return
    steps = ", ".join(f"{step} {100 * share:.2f} %" for step, share in found.lost_after().items())
    log.info("energy of outputs lost after each step, on average: %s", steps)
    last = {name: steps[-1][1] for name, steps in found.lost.items()}
    worst = sorted(last, key=lambda name: -last[name])[:WORST]
    log.info("most in %s", ", ".join(f"{name or 'the model'} ({100 * last[name]:.2f} %)" for name in worst))
    for name, share in last.items():
        recorder.scalar(f"Calibration/{name or 'model'}", 100 * share)

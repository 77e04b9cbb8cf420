"""Calibrating a network within a run: what was lost is logged and recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import __version__
from ..common.log import log, note
from ..compression.quantize.calibrate.calibrate import Calibration, Surroundings, calibrate
from ..compression.quantize.calibrate.inputs import count, few_inputs
from ..compression.quantize.plan import Plan
from .agreement import digest_of
from .fingerprint import tensor_digest, weights_digest
from .open_run import Run


def calibrated(run: Run, model: nn.Module, plan: Plan, seed: int, images: Sequence[Any]) -> Calibration:
    """Codebooks and codes of the weights of a plan that keep what the network computes from images.

    The running statistics of the model's batch norms are adjusted. Each process shows its networks a share of the
    images, and all come to the same; what the first one finds for the norms holds for all, and codes are sent by the
    process that owns the layer. What is finished is kept, and taken from there when the run resumes.
    """
    engine = run.engine
    parts = run.checkpoints.calibration(_made_with(model, plan, seed, images))
    found = calibrate(
        model,
        plan,
        images,
        seed=seed,
        device=engine.device,
        show_progress=engine.is_main,
        within=Surroundings(processes=engine, parts=parts),
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


def _made_with(model: nn.Module, plan: Plan, seed: int, images: Sequence[Any]) -> str:
    """A digest of all that decides what calibrating finds."""
    return digest_of([__version__, weights_digest(model), repr(plan.layers), str(seed), *_digests(images)])


def _digests(batch: Any) -> Iterator[str]:
    if isinstance(batch, Tensor):
        yield f"{tuple(batch.shape)} {batch.dtype} {tensor_digest(batch)}"
    elif isinstance(batch, Mapping):
        yield from _digests([part for pair in sorted(batch.items()) for part in pair])
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        yield f"{len(batch)} parts"
        for part in batch:
            yield from _digests(part)
    else:
        yield repr(batch)

"""What is chosen for a wanted size within a run, with photos: measured once, the same on all processes, and kept for a
run that resumes.

resume/budget.json    the layers of the plan, and what was said of it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures.detector_outputs import batch_outputs
from ..common.paths import write_text
from ..compression.quantize.budget.loss import Losses
from ..compression.quantize.budget.sensitivity import first_inputs, losses_by_inputs
from ..compression.quantize.budget.tradeoff import Tradeoff
from ..compression.quantize.plan import LayerPlan, Plan
from .agreement import once
from .compression_specs import Sized
from .open_run import Job, Run

FILE = "budget.json"


def losses_by_photos(job: Job, tradeoff: Tradeoff, model: nn.Module, images: Sequence[Any]) -> Losses:
    """What distortions of the weights cost the outputs of a network; the processes share the photos.

    Args:
        job: what is done, by which processes.
        tradeoff: of the network.
        model: the dense network.
        images: batches, the same on every process.

    Raises:
        DataError: outputs are not finite, or cannot be compared.
    """
    engine = job.engine
    return losses_by_inputs(
        model,
        tradeoff,
        first_inputs(images, job.settings.compression.count),
        outputs=batch_outputs,
        seed=job.settings.seed,
        device=engine.device,
        show_progress=engine.is_main,
        processes=engine,
    )


def chosen_by_photos(run: Run, sized: Sized, model: nn.Module, images: Sequence[Any]) -> Plan:
    """The plan that costs the network's outputs least within the wanted size; the first process's choice holds.

    Args:
        run: the run, begun.
        sized: the wanted size, and what can be done with each weight.
        model: the dense network.
        images: batches, the same on every process.

    Raises:
        DataError: outputs are not finite, or cannot be compared.
    """
    engine, path, own = run.engine, run.checkpoints.folder / FILE, sized.tradeoff.plan
    known = once(engine, lambda: _read(path, own))
    if known is None:
        losses = losses_by_photos(run, sized.tradeoff, model, images)
        known = once(engine, lambda: _rows(sized.by(losses).plan()))
        if engine.is_main:
            write_text(path, json.dumps(known))
    layers = {row["name"]: LayerPlan(**row) for row in known["layers"]}
    return replace(own, layers=layers, notes=tuple(known["notes"]), about_sizes=())


def _rows(plan: Plan) -> dict[str, Any]:
    return {"layers": [asdict(layer) for layer in plan.layers.values()], "notes": list(plan.notes)}


def _read(path: Path, plan: Plan) -> dict[str, Any] | None:
    """What an earlier process of the run chose; None where it is not there, cannot be read, or is of other weights."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if [LayerPlan(**row).name for row in found["layers"]] == list(plan.layers) and all(
            isinstance(text, str) for text in found["notes"]
        ):
            return found
    return None

"""What is chosen for a wanted size within a run: found once, the same for all processes, kept for a run that resumes.

resume/budget.json         the layers of the plan that photos led to, what was said of it, and what it was chosen by
resume/budget_anew.json    the same of the plan for the room that the permutations left
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
from ..common.errors import PlanError
from ..common.paths import write_text
from ..compression.quantize.budget.loss import Losses
from ..compression.quantize.budget.sensitivity import losses_by_inputs, some_inputs
from ..compression.quantize.budget.tradeoff import Tradeoff
from ..compression.quantize.plan import LayerPlan, Plan
from ..model_files.metadata import AppliedPermutation
from .agreement import once
from .compression_specs import Sized
from .open_run import Job, Run

FILE = "budget.json"
FILE_ANEW = "budget_anew.json"


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
        some_inputs(images, job.settings.compression.count),
        outputs=batch_outputs,
        seed=job.settings.seed,
        device=engine.device,
        show_progress=engine.is_main,
        processes=engine,
    )


def chosen_by_photos(run: Run, sized: Sized, model: nn.Module, images: Sequence[Any]) -> tuple[Plan, Sized]:
    """The plan that costs the network's outputs least within the wanted size, and what it was chosen by; the first
    process's choice holds.

    Args:
        run: the run, begun.
        sized: the wanted size, and what can be done with each weight.
        model: the dense network.
        images: batches, the same on every process.

    Raises:
        DataError: outputs are not finite, or cannot be compared.
    """
    path, own = run.checkpoints.folder / FILE, sized.tradeoff.plan

    def read() -> dict[str, Any] | None:
        found = _read(path, own)
        return None if found is None or _losses(found) is None else found

    known = once(run.engine, read)
    if known is None:
        losses = losses_by_photos(run, sized.tradeoff, model, images)
        known = once(run.engine, lambda: {**_rows(sized.by(losses).plan()), "losses": asdict(losses)})
        if run.engine.is_main:
            write_text(path, json.dumps(known))
    found = _losses(known)
    assert found is not None
    return _plan(own, known), sized.by(found)


def chosen_anew(
    run: Run, sized: Sized, model: nn.Module, plan: Plan, permutations: tuple[AppliedPermutation, ...]
) -> Plan:
    """The plan for what is left of a wanted size once permutations are known, see `Sized.plan_anew`; the first
    process's choice holds, and is kept.

    Args:
        run: the run, begun.
        sized: the wanted size, and what can be done with each weight.
        model: the dense network.
        plan: what was chosen.
        permutations: those that were applied.
    """
    path = run.checkpoints.folder / FILE_ANEW
    known = once(run.engine, lambda: _read(path, plan))
    if known is None:
        known = once(run.engine, lambda: _rows(sized.plan_anew(model, plan, permutations)))
        if run.engine.is_main:
            write_text(path, json.dumps(known))
    return _plan(plan, known)


def _plan(own: Plan, known: dict[str, Any]) -> Plan:
    layers = {row["name"]: LayerPlan(**row) for row in known["layers"]}
    return replace(own, layers=layers, notes=tuple(known["notes"]), about_sizes=())


def _rows(plan: Plan) -> dict[str, Any]:
    return {"layers": [asdict(layer) for layer in plan.layers.values()], "notes": list(plan.notes)}


def _losses(known: dict[str, Any]) -> Losses | None:
    """What a plan was chosen by; None: it is not said, or cannot be read."""
    with suppress(ValueError, KeyError, TypeError, PlanError):
        found = Losses(**known["losses"])
        found.check()
        return found
    return None


def _read(path: Path, plan: Plan) -> dict[str, Any] | None:
    """What an earlier process of the run chose; None where it is not there, cannot be read, or is of other weights."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if [LayerPlan(**row).name for row in found["layers"]] == list(plan.layers) and all(
            isinstance(text, str) for text in found["notes"]
        ):
            return found
    return None

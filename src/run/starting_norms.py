"""Norms of which the starting weights hold scale and shift only: a warning, or running statistics from training
images."""

from __future__ import annotations

import math
from contextlib import closing
from itertools import islice

from torch import Tensor, nn

from ..common.log import log, note
from ..compression.finetune.task import Task
from ..model_files.norm_estimation import reestimate_norms
from ..model_files.norms import folded_norms, folded_text, set_told
from .open_run import Run

N_IMAGES = 2048
"""Training images of all processes together from which running statistics are rebuilt, or as many as there are."""


def warn_of_folded_norms(run: Run, model: nn.Module) -> None:
    """Say, before long work, that the norms of `model` will train as other layers than those that were saved, unless
    they are to be rebuilt."""
    names = list(folded_norms(model))
    wanted = run.settings.model.reestimate_norms
    if names and not wanted:
        log.warning("%s", folded_text(f"model.weights: {run.settings.model.weights}", names))
    elif wanted and not names:
        note("model.reestimate_norms has no effect: the starting weights say how their batch norms train")
    set_told(model)


def rebuild_folded_norms(run: Run, model: nn.Module, task: Task) -> None:
    """With `model.reestimate_norms`, make the folded norms of `model`, which is on the CPU, whole; in place."""
    if not run.settings.model.reestimate_norms or not folded_norms(model):
        return
    engine, batch_size = run.engine, run.settings.dataloader.batch_size
    n_batches = math.ceil(N_IMAGES / (batch_size * engine.world_size))
    seen = 0

    def forward(network: nn.Module) -> None:
        nonlocal seen
        with closing(task.training_batches(1)) as batches:  # type: ignore[type-var]
            for batch in islice(batches, n_batches):
                seen += task.training_loss(network, batch).n_images

    def total(sums: Tensor) -> Tensor:
        return engine.sum(sums.to(engine.device)).cpu()

    model.train().to(engine.device)
    names = reestimate_norms(model, forward, total if engine.world_size > 1 else None)
    model.to("cpu")
    images = sum(engine.gather([seen]))
    log.info("norms: running statistics of %d batch norms rebuilt from %s training images", len(names), f"{images:,}")

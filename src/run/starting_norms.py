"""Batch norms that a training starts from: a warning of those of which only scale and shift are known, and running
statistics from training images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..common.log import log, note
from ..compression.finetune.task import Task
from ..model_files.norm_estimation import reestimate_norms, retake_norms, retakeable_norms
from ..model_files.norms import folded_norms, folded_text, set_told
from .open_run import Run

N_IMAGES = 2048
"""Training images of all processes together from which running statistics are taken, or as many as there are."""


def warn_of_folded_norms(run: Run, model: nn.Module, compressed: bool) -> None:
    """Say, before long work, that the norms of `model` will train as other layers than those that were saved, unless
    they are to be rebuilt.

    Args:
        run: its settings say so.
        model: to train.
        compressed: it comes from a compressed file.
    """
    names = list(folded_norms(model))
    wanted = run.settings.model.reestimate_norms
    if names and not wanted:
        log.warning("%s", folded_text(f"model.weights: {run.settings.model.weights}", names))
    elif wanted and not names and not (compressed and retakeable_norms(model)):
        reason = (
            "the network has no batch norms with running statistics"
            if compressed
            else "the starting weights say how their batch norms train"
        )
        note(f"model.reestimate_norms has no effect: {reason}")
    set_told(model)


def reestimate_starting_norms(run: Run, model: nn.Module, task: Task, compressed: bool) -> None:
    """With `model.reestimate_norms`, take the running statistics of the batch norms of `model`, which is on the CPU,
    from training images; in place.

    Norms of which only scale and shift are known are made whole. The others are retaken where a compressed network is
    trained on, whose norms see something else than the dense one's did.
    """
    if not run.settings.model.reestimate_norms:
        return
    if compressed:
        _retake(run, model, task)
    if folded_norms(model):
        _rebuild(run, model, task)


def _retake(run: Run, model: nn.Module, task: Task) -> None:
    training = model.training
    n_images = 0

    def images() -> Iterator[Any]:
        nonlocal n_images
        for batch in _batches(run, task):
            n_images += len(batch)
            yield task.inputs(batch)

    names = retake_norms(model, images(), run.engine.device, _total(run))
    model.train(training)
    _tell(run, len(names), n_images, "taken anew")


def _rebuild(run: Run, model: nn.Module, task: Task) -> None:
    n_images = 0

    def forward(network: nn.Module) -> None:
        nonlocal n_images
        for batch in _batches(run, task):
            n_images += task.training_loss(network, batch).n_images

    model.train().to(run.engine.device)
    names = reestimate_norms(model, forward, _total(run))
    model.to("cpu")
    _tell(run, len(names), n_images, "rebuilt")


def _batches(run: Run, task: Task) -> Iterator[Any]:
    """Of training images, on this process."""
    n_batches = math.ceil(N_IMAGES / (run.settings.dataloader.batch_size * run.engine.world_size))
    with closing(task.training_batches(1)) as batches:  # type: ignore[type-var]
        yield from islice(batches, n_batches)


def _total(run: Run) -> Callable[[Tensor], Tensor] | None:
    engine = run.engine
    return (lambda sums: engine.sum(sums.to(engine.device)).cpu()) if engine.world_size > 1 else None


def _tell(run: Run, n_norms: int, n_images: int, what: str) -> None:
    images = sum(run.engine.gather([n_images]))
    if n_norms:
        log.info("norms: running statistics of %d batch norms %s from %s training images", n_norms, what, f"{images:,}")

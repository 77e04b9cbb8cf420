"""The two jobs on a classification network: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

from pathlib import Path

import torch

from ..architectures.architecture import Architecture, n_outputs
from ..common.log import log
from ..compression.quantize.layers import set_memory_format
from ..model_files.size import model_size
from ..run.agreement import first_here
from ..run.expected import verdict
from ..run.open_run import Run, open_evaluation
from ..settings import Settings
from ..tasks.classification import check_batch_norms, check_classes
from .data import classification_task, images_fingerprint, images_to_calibrate, read_images
from .initial_model import NEW_HEAD_ADVICE, model_to_evaluate, starting_model
from .train import Prepared, train


def train_classification(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a classification network; returns the exit status."""
    return train(settings, "classification", _prepare)


def _prepare(run: Run, architecture: Architecture, weights: str | Path) -> Prepared:
    train_images, validation = read_images(run, ("train", "val"))
    with first_here(run.engine):
        start = starting_model(run.settings, architecture, weights, len(train_images.classes), run.engine.is_main)
    model = start.model
    check_classes(len(train_images.classes), n_outputs(architecture, model), advice=NEW_HEAD_ADVICE)
    side = run.settings.dataloader.image_size
    task = classification_task(run, train_images, validation)
    joined = run.settings.sync_batch_norm and run.engine.world_size > 1  # its norms see the images of all processes
    if run.settings.epochs and not joined:
        check_batch_norms(model, task, side)
    return Prepared(
        model=model,
        task=task,
        example=torch.randn(2, 3, side, side),
        results={},
        images_digest=images_fingerprint(train_images, validation),
        compressed=start.compressed,
        calibration=images_to_calibrate(run, train_images, task.unreadable) if start.compressed is None else None,
    )


def evaluate_classification(settings: Settings) -> int:
    """Evaluate a compressed (or dense) classification network; returns status 1 if `expected` is missed."""
    with open_evaluation(settings) as run:
        found = model_to_evaluate(run, "classification")
        (validation,) = read_images(run, ("val",))
        check_classes(len(validation.classes), found.n_outputs)
        log.info("model: %s", found.source)
        log.info("size: %s", model_size(found.model).summary())
        model = set_memory_format(found.model.to(run.engine.device), settings.channels_last)
        metrics = classification_task(run, None, validation).validate(model, "evaluate")
    images, correct, top5 = (int(metrics[name]) for name in ("images", "correct", "correct_top5"))
    log.info("top-1 accuracy: %.2f %% (%s of %s)", metrics["accuracy"], f"{correct:,}", f"{images:,}")
    log.info("top-5 accuracy: %.2f %% (%s of %s)", metrics["accuracy_top5"], f"{top5:,}", f"{images:,}")
    log.info("cross entropy: %.4f", metrics["loss"])
    if metrics["skipped"]:
        log.info("skipped: %s unreadable images", f"{int(metrics['skipped']):,}")
    expected = settings.expected
    return verdict(metrics, {"accuracy": expected.accuracy}, expected.tolerance)

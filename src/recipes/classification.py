"""The two jobs on a classification network: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..architectures.architecture import Architecture, n_outputs
from ..common.hub import on_hub
from ..common.log import log
from ..compression.quantize.layers import set_memory_format
from ..model_files.size import model_size
from ..run.agreement import check_same, first_here
from ..run.expected import verdict
from ..run.inputs import unlabelled_folder
from ..run.open_run import Run, open_evaluation
from ..settings import Settings
from ..tasks import unlabelled
from ..tasks.checking import unreadable, warn_of_skipped
from ..tasks.classification import check_batch_norms, check_classes
from ..tasks.images import unreadable_error
from ..tasks.unlabelled import Unlabelled, read_unlabelled
from .data import (
    SAME_IMAGES,
    classification_task,
    images_fingerprint,
    images_to_calibrate,
    read_images,
)
from .initial_model import NEW_HEAD_ADVICE, model_to_evaluate, starting_model
from .train import Prepared, learn_from_teacher, train


def train_classification(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a classification network; returns the exit status."""
    return train(settings, "classification", _prepare)


def _prepare(run: Run, architecture: Architecture, weights: str | Path) -> Prepared:
    train_images, validation = read_images(run, ("train", "val"))
    with first_here(run.engine):
        start = starting_model(run.settings, architecture, weights, len(train_images.classes), run.engine.is_main)
    model = start.model
    called = train_images.called
    check_classes(len(train_images.classes), n_outputs(architecture, model), advice=NEW_HEAD_ADVICE, called=called)
    side = run.settings.dataloader.image_size
    more = _images_without_labels(run)
    task = classification_task(run, train_images, validation, more)
    task.distillation = learn_from_teacher(run, architecture, start, weights, torch.zeros(1, 3, side, side))
    joined = run.settings.sync_batch_norm and run.engine.world_size > 1  # its norms see the images of all processes
    if run.settings.epochs and not joined:
        check_batch_norms(model, task, side)
    return Prepared(
        model=model,
        task=task,
        example=torch.randn(2, 3, side, side),
        results={},
        images_digest=images_fingerprint(train_images, validation, *([] if more is None else [more.index])),
        compressed=start.compressed,
        calibration=images_to_calibrate(run, train_images, task.unreadable) if start.compressed is None else None,
        distillation=task.distillation,
    )


def _images_without_labels(run: Run) -> Unlabelled | None:
    """The images of `distillation.images`, checked like those of `read_images`; None where there are to be none.

    Raises:
        SettingsError: the folder is not there, or the processes see other images.
        DataError: it holds no image, or some cannot be read.
    """
    folder, settings, engine = unlabelled_folder(run.settings), run.settings, run.engine
    if folder is None:
        return None
    with first_here(engine) if on_hub(folder) else nullcontext():  # which fetches it
        found = read_unlabelled(folder)
    data = settings.dataloader
    check_same(engine, f"the list of images in {folder}", found.paths, SAME_IMAGES)
    bad = dict(unreadable(engine, found, data.verify_images, data.resize))
    kept = [path for path in found.paths if path not in bad]
    if bad and not (data.skip_unreadable and kept):
        raise unreadable_error(list(bad.items()), unlabelled.KEY)
    warn_of_skipped(list(bad.items()), folder, engine.is_main)
    per_batch = settings.distillation.images_per_batch or data.batch_size
    return Unlabelled(replace(found, paths=kept, labels=found.labels[: len(kept)]), per_batch)


def evaluate_classification(settings: Settings) -> int:
    """Evaluate a compressed (or dense) classification network; returns status 1 if `expected` is missed."""
    with open_evaluation(settings) as run:
        found = model_to_evaluate(run, "classification")
        (validation,) = read_images(run, ("val",))
        check_classes(len(validation.classes), found.n_outputs, called=validation.called)
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

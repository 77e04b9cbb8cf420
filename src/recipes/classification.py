"""The two jobs on a classification network: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

from pathlib import Path

import torch

from ..architectures.architecture import Architecture, n_outputs
from ..compression.quantize.layers import set_memory_format
from ..engines.engine import Engine
from ..model_files.size import model_size
from ..run.processes import first_here, printer, processes
from ..settings import Settings
from ..tasks.classification import check_classes
from .data import classification_task, images_fingerprint, read_images
from .initial_model import architecture_to_evaluate, dense_model, model_to_evaluate
from .train import Prepared, train, verdict


def train_classification(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a classification network; returns the exit status."""
    return train(settings, "classification", _prepare)


def _prepare(settings: Settings, architecture: Architecture, weights: str | Path, engine: Engine) -> Prepared:
    train_images, validation = read_images(settings, ("train", "val"), engine)
    with first_here(engine):
        model = dense_model(architecture, weights, len(train_images.classes), engine.is_main)
    check_classes(len(train_images.classes), n_outputs(architecture, model))
    side = settings.dataloader.image_size
    task = classification_task(settings, engine, train_images, validation)
    return Prepared(model, task, torch.randn(2, 3, side, side), {}, images_fingerprint(train_images, validation))


def evaluate_classification(settings: Settings) -> int:
    """Evaluate a compressed (or dense) classification network; returns status 1 if `expected` is missed."""
    with processes(settings) as engine:
        say = printer(engine)
        architecture = architecture_to_evaluate(settings, "classification")
        with first_here(engine):
            model, source = model_to_evaluate(settings, architecture, engine.is_main)
        (validation,) = read_images(settings, ("val",), engine)
        check_classes(len(validation.classes), n_outputs(architecture, model))
        say(f"model: {source}")
        say(f"size: {model_size(model).summary()}")
        model = set_memory_format(model.to(engine.device), settings.channels_last)
        metrics = classification_task(settings, engine, None, validation).validate(model, "evaluate")
    images, correct, top5 = (int(metrics[name]) for name in ("images", "correct", "correct_top5"))
    say(f"top-1 accuracy: {metrics['accuracy']:.2f} % ({correct:,} of {images:,})")
    say(f"top-5 accuracy: {metrics['accuracy_top5']:.2f} % ({top5:,} of {images:,})")
    say(f"cross entropy: {metrics['loss']:.4f}")
    if metrics["skipped"]:
        say(f"skipped: {int(metrics['skipped']):,} unreadable images")
    expected = settings.expected
    return verdict(metrics, {"accuracy": expected.accuracy}, expected.tolerance, say)

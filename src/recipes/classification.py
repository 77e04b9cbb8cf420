"""The two jobs on a classification network: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

import torch

from .. import architectures
from ..compression.files import save_compressed, save_dense
from ..compression.quantize.layers import set_memory_format
from ..compression.size import model_size
from ..settings import Settings
from ..tasks.classification import check_classes
from .compressing import carry_out, intend
from .images import classification_task, read_images
from .models import dense_model, model_to_evaluate, n_outputs, weights_source
from .running import Say, first_here, open_output, printer, processes, start_recording, train


def train_classification(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a classification network; returns the exit status.

    Everything that can be wrong with the input is found before anything is written.
    """
    with processes(settings) as engine:
        say = printer(engine)
        architecture = architectures.get(settings.model.arch, "classification")
        weights = weights_source(settings)
        output = open_output(settings, engine)
        training, validation = read_images(settings, ("train", "val"), engine)
        torch.manual_seed(settings.seed)  # initial weights and dropout; everything else draws from streams of its own
        with first_here(engine):
            model = dense_model(architecture, weights, len(training.classes), engine.is_main)
        check_classes(len(training.classes), n_outputs(architecture, model))
        task = classification_task(settings, engine, training, validation)
        compressed = settings.model.use_compression
        side = settings.dataloader.image_size
        intent = intend(settings, architecture, model, torch.randn(2, 3, side, side)) if compressed else None

        recorder = start_recording(settings, engine, output, save_compressed if compressed else save_dense, task.metric_name, say)
        try:
            size: dict[str, float] = {}
            if intent is not None:
                model, size = carry_out(intent, model, engine, recorder, say)
            model = set_memory_format(model.to(engine.device), settings.channels_last)
            outcome = train(settings, model, task, engine, recorder, say)
            skipped = set(engine.gather(sorted(task.unreadable)))
            recorder.finish(outcome, {**size, "skipped images": len(skipped)} if skipped else size)
        finally:
            recorder.close()
        say(f"results in {output.path / 'results.txt'}; models in {output.models}")
    return 0


def evaluate_classification(settings: Settings) -> int:
    """Evaluate a compressed (or dense) classification network; returns status 1 if `expected` is missed."""
    with processes(settings) as engine:
        say = printer(engine)
        architecture = architectures.get(settings.model.arch, "classification")
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
    return _verdict(settings, metrics["accuracy"], say)


def _verdict(settings: Settings, accuracy: float, say: Say) -> int:
    """0 if `accuracy` (percent) is within `expected`, or nothing is expected; else 1."""
    expected = settings.expected
    if expected.accuracy is None:
        return 0
    off = accuracy - expected.accuracy
    inside = abs(off) <= expected.tolerance + 1e-9
    say(
        f"{'as expected' if inside else 'NOT AS EXPECTED'}: {expected.accuracy:.2f} % +- {expected.tolerance:g} was expected, {off:+.2f} off"
    )
    return 0 if inside else 1

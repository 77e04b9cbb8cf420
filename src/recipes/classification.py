"""The two jobs on a classification network: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .. import architectures, engines
from ..compression.finetune.loop import Outcome, finetune
from ..compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from ..compression.finetune.task import Engine, Task
from ..compression.quantize.layers import set_memory_format
from ..compression.size import model_size
from ..paths import write_text
from ..recorder import OutputFolder, RunRecorder
from ..settings import Settings, require, to_yaml
from ..tasks.classification import check_classes
from .compressing import carry_out, intend
from .images import classification_task, read_images
from .models import dense_model, model_to_evaluate, n_outputs, weights_source
from .saving import ModelWriter
from .stored import architecture_to_evaluate


def train_classification(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a classification network; returns the exit status.

    Everything that can be wrong with the input is found before anything is written.
    """
    engine = engines.make(settings.engine, engines.pick_device(settings.device))
    say = _printer(engine)
    architecture = architectures.get(settings.model.arch, "classification")
    weights = weights_source(settings)
    require(settings, "output_path")
    output = OutputFolder(Path(settings.output_path), settings.overwrite)
    train, validation = read_images(settings, ("train", "val"), engine.is_main)
    torch.manual_seed(settings.seed)  # initial weights and dropout; everything else draws from streams of its own
    model = dense_model(architecture, weights, len(train.classes), engine.is_main)
    check_classes(len(train.classes), n_outputs(architecture, model))
    task = classification_task(settings, engine, train, validation)
    compressed = settings.model.use_compression
    side = settings.dataloader.image_size
    intent = intend(settings, architecture, model, torch.randn(2, 3, side, side)) if compressed else None

    output.begin()
    write_text(output.path / "config.yaml", to_yaml(settings))
    recorder = RunRecorder(output, ModelWriter(settings, architecture, output), task.metric_name, say)
    try:
        recorder.text("config", to_yaml(settings))
        size: dict[str, float] = {}
        if intent is not None:
            model, size = carry_out(intent, model, engine, recorder, say)
        model = set_memory_format(model.to(engine.device), settings.channels_last)
        outcome = _train(settings, model, task, engine, recorder)
        recorder.finish(outcome, {**size, "skipped images": len(task.unreadable)} if task.unreadable else size)
    finally:
        recorder.close()
        engine.close()
    say(f"results in {output.path / 'results.txt'}; models in {output.models}")
    return 0


def _train(settings: Settings, model: nn.Module, task: Task, engine: Engine, recorder: RunRecorder) -> Outcome:
    optimizer = make_optimizer(model, OptimizerSpec(settings.optimizer, settings.learning_rate, settings.momentum, settings.weight_decay))
    schedule = Schedule(optimizer, ScheduleSpec(**settings.lr_scheduler.model_dump()), settings.epochs, task.steps_per_epoch)
    return finetune(
        model,
        task,
        optimizer,
        schedule,
        engine,
        recorder,
        epochs=settings.epochs,
        amp=settings.amp,
        skip_initial_validation=settings.skip_initial_validation,
        log_every=settings.log_every_n_steps,
        show_progress=engine.is_main,
    )


def evaluate_classification(settings: Settings) -> int:
    """Evaluate a compressed (or dense) classification network; returns status 1 if `expected` is missed."""
    engine = engines.make(settings.engine, engines.pick_device(settings.device))
    say = _printer(engine)
    architecture = architecture_to_evaluate(settings, "classification")
    model, source = model_to_evaluate(settings, architecture, engine.is_main)
    (validation,) = read_images(settings, ("val",), engine.is_main)
    check_classes(len(validation.classes), n_outputs(architecture, model))
    say(f"model: {source}")
    say(f"size: {model_size(model).summary()}")
    model = set_memory_format(model.to(engine.device), settings.channels_last)
    metrics = classification_task(settings, engine, None, validation).validate(model, "evaluate")
    engine.close()
    images, correct, top5 = (int(metrics[name]) for name in ("images", "correct", "correct_top5"))
    say(f"top-1 accuracy: {metrics['accuracy']:.2f} % ({correct:,} of {images:,})")
    say(f"top-5 accuracy: {metrics['accuracy_top5']:.2f} % ({top5:,} of {images:,})")
    say(f"cross entropy: {metrics['loss']:.4f}")
    if metrics["skipped"]:
        say(f"skipped: {int(metrics['skipped']):,} unreadable images")
    return _verdict(settings, metrics["accuracy"], say)


def _verdict(settings: Settings, accuracy: float, say: Callable[[str], None]) -> int:
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


def _printer(engine: Engine) -> Callable[[str], None]:
    return lambda line: print(line, flush=True) if engine.is_main else None

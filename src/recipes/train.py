"""Compressing and fine-tuning a network, whatever its task: everything is checked first, then done, then reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import architectures
from ..architectures.architecture import Architecture
from ..compression.finetune.loop import Outcome, Resumed, finetune
from ..compression.finetune.optimizers import Schedule, make_optimizer
from ..compression.finetune.task import Task
from ..compression.quantize.compress import build_quantized
from ..compression.quantize.layers import set_memory_format
from ..engines.batch_norm import join_batch_norms
from ..engines.engine import Engine
from ..run.model_writer import ModelWriter
from ..run.output_folder import OutputFolder
from ..run.processes import Say, printer, processes
from ..run.recorder import AnyRecorder, NoRecorder, RunRecorder
from ..run.resume import IMAGES, PROCESSES, WEIGHTS, ResumableRun, open_run, weights_fingerprint
from ..run.signals import stopping
from ..settings import Settings, to_yaml
from .compress import CompressionPlan, plan_compression, report_size, run_compression
from .initial_model import weights_source
from .specs import rates, with_current_names


class WatchedTask(Task, Protocol):
    """A task that says which files it could not read, and why."""

    @property
    def unreadable(self) -> MutableMapping[str, str]:
        """Reason by path."""


@dataclass(frozen=True)
class Prepared:
    """What a recipe brings to the training.

    Attributes:
        model: the dense network, on the CPU.
        task: data, loss and metric.
        example: images (B, 3, H, W) to try permutations on.
        more: further entries of the results, known before training.
        mark: a digest of the lists of training and validation images.
    """

    model: nn.Module
    task: WatchedTask
    example: Tensor
    more: Mapping[str, Any]
    mark: str


Prepare = Callable[[Settings, Architecture, "str | Path", Engine], Prepared]
"""Settings, architecture, starting weights, engine -> network and data, checked."""


def train(settings: Settings, kind: str, prepare: Prepare) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a network for the task `kind`; returns the exit status.

    Everything that can be wrong with the input is found before anything is written.
    """
    with processes(settings) as engine, stopping() as stop:
        say = printer(engine)
        architecture = architectures.get(settings.model.arch, kind)
        settings = with_current_names(settings, architecture)
        weights = weights_source(settings)
        output, kept = open_run(settings, engine, stop, say)
        try:
            torch.manual_seed(
                settings.seed
            )  # initial weights and dropout; everything else draws from streams of its own
            prepared = prepare(settings, architecture, weights, engine)
            facts = {PROCESSES: engine.world_size, WEIGHTS: weights_fingerprint(prepared.model), IMAGES: prepared.mark}
            kept.check_fingerprint(facts, settings)
            coding = settings.model.use_compression
            intent = plan_compression(settings, architecture, prepared.model, prepared.example) if coding else None
            resumed = kept.latest()
            recorder: AnyRecorder = NoRecorder()
            if engine.is_main:
                kept.make_ready()
                recorder = _start_recording(
                    settings, architecture, output, prepared.task.metric_name, say, kept, resumed
                )
            try:
                kept.begin(recorder, prepared.task.unreadable)
                outcome, size = _carry_out(settings, intent, prepared, engine, recorder, say, kept, resumed)
                results = {**prepared.more, **size}
                skipped = set(engine.gather(sorted(prepared.task.unreadable)))
                if skipped:
                    results["skipped images"] = len(skipped)
                recorder.finish(outcome, results)
                kept.finish()
            finally:
                recorder.close()
        finally:
            output.close()
        say(f"results in {output.path / 'results.txt'}; models in {output.models}")
    return 0


def _carry_out(
    settings: Settings,
    intent: CompressionPlan | None,
    prepared: Prepared,
    engine: Engine,
    recorder: AnyRecorder,
    say: Say,
    kept: ResumableRun,
    resumed: Resumed | None,
) -> tuple[Outcome, dict[str, float]]:
    """Compress and fine-tune, or go on where the run stopped; returns what it reached and, where it compressed, the size."""
    model, size = prepared.model, {}
    if intent is not None:
        model = (
            run_compression(intent, model, engine, recorder, say, kept)
            if resumed is None
            else build_quantized(model, intent.plan)
        )
        size = report_size(model, recorder, say)
    model = set_memory_format(model.to(engine.device), settings.channels_last)
    return _train(settings, model, prepared.task, engine, recorder, say, kept, resumed), size


def _start_recording(
    settings: Settings,
    architecture: Architecture,
    output: OutputFolder,
    metric_name: str,
    say: Say,
    kept: ResumableRun,
    resumed: Resumed | None,
) -> RunRecorder:
    """Keep the settings in the folder of the run and open the log."""
    started = kept.stored.started if kept.stored else None
    after_step = resumed.checkpoint.position.step if resumed else 0 if kept.stored else None
    recorder = RunRecorder(output, ModelWriter(settings, architecture, output), metric_name, say, started, after_step)
    recorder.file("config.yaml", to_yaml(settings))
    recorder.text("config", to_yaml(settings))
    return recorder


def _train(
    settings: Settings,
    model: nn.Module,
    task: Task,
    engine: Engine,
    recorder: AnyRecorder,
    say: Say,
    kept: ResumableRun,
    resumed: Resumed | None,
) -> Outcome:
    """Fine-tune `model`, which is on the engine's device, as the settings say."""
    rate, schedule = rates(settings, engine.world_size)
    if engine.world_size > 1:
        say(f"{engine.world_size} processes: learning_rate {rate.learning_rate:g}, min_lr {schedule.min_lr:g}")
        if settings.sync_batch_norm:
            model = join_batch_norms(model, engine)
    optimizer = make_optimizer(model, rate)
    return finetune(
        model,
        task,
        optimizer,
        Schedule(optimizer, schedule, settings.epochs, task.steps_per_epoch),
        engine,
        recorder,
        epochs=settings.epochs,
        amp=settings.amp,
        skip_initial_validation=settings.skip_initial_validation,
        log_every=settings.log_every_n_steps,
        show_progress=engine.is_main,
        keeper=kept,
        resumed=resumed,
    )


def verdict(found: Mapping[str, float], expected: Mapping[str, float | None], tolerance: float, say: Say) -> int:
    """0 if every found value (percent) is within `tolerance` of what is expected of it, or nothing is; else 1."""
    status = 0
    for name, wanted in expected.items():
        if wanted is None:
            continue
        off = found[name] - wanted
        inside = abs(off) <= tolerance + 1e-9
        label = "" if len(expected) == 1 else f"{name}: "
        say(
            f"{'as expected' if inside else 'NOT AS EXPECTED'}: {label}{wanted:.2f} % +- {tolerance:g} was expected, {off:+.2f} off"
        )
        status = status if inside else 1
    return status

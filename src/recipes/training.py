"""Compressing and fine-tuning a network, whatever its task: everything is checked first, then done, then reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import architectures, engines
from ..architectures.architecture import Architecture
from ..compression.files import save_compressed, save_dense
from ..compression.finetune.loop import Outcome, finetune
from ..compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from ..compression.finetune.task import Engine, Task
from ..compression.quantize.layers import set_memory_format
from ..paths import write_text
from ..recorder import OutputFolder, RunRecorder
from ..settings import Settings, require, to_yaml
from .compressing import carry_out, intend
from .models import weights_source
from .names import with_current_names


class WatchedTask(Task, Protocol):
    """A task that says which files it could not read, and why."""

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Reason by path."""


@dataclass(frozen=True)
class Prepared:
    """What a recipe brings to the training.

    Attributes:
        model: the dense network, on the CPU.
        task: data, loss and metric.
        example: images (B, 3, H, W) to try permutations on.
        more: further entries of the results, known before training.
    """

    model: nn.Module
    task: WatchedTask
    example: Tensor
    more: Mapping[str, Any]


Prepare = Callable[[Settings, Architecture, "str | Path", Engine], Prepared]
"""Settings, architecture, starting weights, engine -> network and data, checked."""


def train(settings: Settings, kind: str, prepare: Prepare) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a network for the task `kind`; returns the exit status.

    Everything that can be wrong with the input is found before anything is written.
    """
    engine = engines.make(settings.engine, engines.pick_device(settings.device))
    say = printer(engine)
    architecture = architectures.get(settings.model.arch, kind)
    settings = with_current_names(settings, architecture)
    weights = weights_source(settings)
    require(settings, "output_path")
    output = OutputFolder(Path(settings.output_path), settings.overwrite)
    torch.manual_seed(settings.seed)  # initial weights and dropout; everything else draws from streams of its own
    prepared = prepare(settings, architecture, weights, engine)
    model, task = prepared.model, prepared.task
    compressed = settings.model.use_compression
    intent = intend(settings, architecture, model, prepared.example) if compressed else None

    output.begin()
    write_text(output.path / "config.yaml", to_yaml(settings))
    recorder = RunRecorder(output, save_compressed if compressed else save_dense, task.metric_name, say)
    try:
        recorder.text("config", to_yaml(settings))
        results: dict[str, Any] = dict(prepared.more)
        if intent is not None:
            model, size = carry_out(intent, model, engine, recorder, say)
            results.update(size)
        model = set_memory_format(model.to(engine.device), settings.channels_last)
        outcome = _train(settings, model, task, engine, recorder)
        if task.unreadable:
            results["skipped images"] = len(task.unreadable)
        recorder.finish(outcome, results)
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


def verdict(found: Mapping[str, float], expected: Mapping[str, float | None], tolerance: float, say: Callable[[str], None]) -> int:
    """0 if every found value (percent) is within `tolerance` of what is expected of it, or nothing is; else 1."""
    status = 0
    for name, wanted in expected.items():
        if wanted is None:
            continue
        off = found[name] - wanted
        inside = abs(off) <= tolerance + 1e-9
        label = "" if len(expected) == 1 else f"{name}: "
        say(f"{'as expected' if inside else 'NOT AS EXPECTED'}: {label}{wanted:.2f} % +- {tolerance:g} was expected, {off:+.2f} off")
        status = status if inside else 1
    return status


def printer(engine: Engine) -> Callable[[str], None]:
    """Prints a line, on the first process only."""
    return lambda line: print(line, flush=True) if engine.is_main else None

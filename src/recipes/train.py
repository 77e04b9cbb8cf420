"""Compressing and fine-tuning a network, whatever its task: everything is checked first, then done, then reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import architectures
from ..architectures.architecture import Architecture
from ..common.log import log
from ..compression.finetune.hooks import Resumed
from ..compression.finetune.loop import FinetuneSpec, Outcome, finetune
from ..compression.finetune.task import Task
from ..compression.quantize.layers import set_memory_format
from ..engines.batch_norm import join_batch_norms
from ..model_files.packed import ModelInfo
from ..run.fingerprint import IMAGES, WEIGHTS, weights_digest
from ..run.inputs import weights_source
from ..run.model_writer import ModelWriter
from ..run.open_run import Run, open_run
from ..run.starting_norms import reestimate_starting_norms, warn_of_folded_norms
from ..settings import Settings
from ..tasks.calibration import ImagesToShow
from .compress import CompressionPlan, compress_network, plan_compression, rebuild_network, report_size
from .data import calibration_fingerprint
from .specs import finetune_spec, with_current_names


class TaskOnFiles(Task, Protocol):
    """A task that says which files it could not read, and why."""

    @property
    def unreadable(self) -> MutableMapping[str, str]:
        """Reason by path."""


@dataclass(frozen=True)
class Prepared:
    """What a recipe brings to the training.

    Attributes:
        model: the dense network, or that of a compressed file, on the CPU.
        task: data, loss and metric.
        example: images (B, 3, H, W) to try permutations on.
        results: further entries of the results, known before training.
        images_digest: of the lists of training and validation images.
        compressed: what the file says that the network comes from, if that is a compressed one.
        calibration: images to quantize the network with; None: it is done without.
        files: further files of the output folder, by name.
    """

    model: nn.Module
    task: TaskOnFiles
    example: Tensor
    results: Mapping[str, Any]
    images_digest: str
    compressed: ModelInfo | None = None
    calibration: ImagesToShow | None = None
    files: Mapping[str, str] = field(default_factory=dict)


Prepare = Callable[[Run, Architecture, "str | Path"], Prepared]
"""Run, architecture, starting weights -> network and data, checked."""


def train(settings: Settings, task: str, prepare: Prepare) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a network for `task`; returns the exit status.

    Everything that can be wrong with the input is found before anything is written.
    """
    architecture = architectures.get(settings.model.arch, task)
    settings = with_current_names(settings, architecture)
    weights = weights_source(settings)
    with open_run(settings) as run:
        torch.manual_seed(settings.seed)  # initial weights and dropout; everything else draws from streams of its own
        prepared = prepare(run, architecture, weights)
        model, results = prepared.model, dict(prepared.results)
        of_calibration = calibration_fingerprint(prepared.calibration, run.settings)
        run.check_inputs({WEIGHTS: weights_digest(model), IMAGES: prepared.images_digest, **of_calibration})
        plan = (
            plan_compression(run.settings, architecture, model, prepared.example)
            if run.settings.model.use_compression and prepared.compressed is None
            else None
        )
        compressed = prepared.compressed is not None
        warn_of_folded_norms(run, model, compressed)
        save = ModelWriter(run.settings, architecture, run.output, prepared.compressed)
        resumed = run.begin(prepared.task.unreadable, save, prepared.task.metric_name)
        if resumed is None:
            reestimate_starting_norms(run, model, prepared.task, compressed)
        for name, text in prepared.files.items():
            run.recorder.file(name, text)
        if plan is not None:
            model = _compressed(run, plan, prepared, resumed)
        if run.settings.model.use_compression:
            results |= report_size(model, run.recorder)
        run.finish(_finetuned(run, model, prepared.task, resumed), results)
    return 0


def _compressed(run: Run, plan: CompressionPlan, prepared: Prepared, resumed: Resumed | None) -> nn.Module:
    """The quantized network; one whose training resumes is only built, as its checkpoint holds all values."""
    if resumed is not None:
        return rebuild_network(run, plan, prepared.model)
    images = prepared.calibration
    return compress_network(run, plan, prepared.model, None if images is None else images.read(run.engine.is_main))


def _finetuned(run: Run, model: nn.Module, task: Task, resumed: Resumed | None) -> Outcome:
    """Fine-tune `model` as the settings of the run say."""
    settings, engine = run.settings, run.engine
    model = set_memory_format(model.to(engine.device), settings.channels_last)
    spec: FinetuneSpec = finetune_spec(settings, engine.world_size, show_progress=engine.is_main)
    if engine.world_size > 1:
        rate, lowest = spec.optimizer.learning_rate, spec.lr_scheduler.min_lr
        log.info("%d processes: learning_rate %g, min_lr %g", engine.world_size, rate, lowest)
        if settings.sync_batch_norm:
            model = join_batch_norms(model, engine)
    return finetune(
        model,
        task,
        spec,
        engine,
        run.recorder,
        keeper=run.checkpoints,
        signals=run.signals,
        resumed=resumed,
    )

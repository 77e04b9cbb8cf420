"""Compressing and fine-tuning a network, whatever its task: everything is checked first, then done, then reported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import architectures
from ..architectures.architecture import Architecture, n_outputs
from ..architectures.found import first_line
from ..common.errors import GroupError, SettingsError, UserError
from ..common.log import log, note
from ..compression.finetune.distillation import Distillation, DistillationSpec, check_stages, find_stages
from ..compression.finetune.hooks import Resumed
from ..compression.finetune.loop import FinetuneSpec, Outcome, finetune
from ..compression.finetune.task import Task
from ..compression.quantize.layers import set_memory_format
from ..engines.batch_norm import join_batch_norms
from ..model_files.compression_report import FILE_NAME, permutations_in, permute_alike
from ..model_files.packed import ModelInfo
from ..model_files.pth import read_tensors
from ..run.agreement import first_here, once
from ..run.fingerprint import IMAGES, TEACHER, WEIGHTS, weights_digest
from ..run.inputs import teacher_source, weights_source
from ..run.model_writer import ModelWriter
from ..run.open_run import Run, open_run
from ..run.starting_norms import reestimate_starting_norms, warn_of_folded_norms
from ..run.summaries import report_size
from ..settings import Settings, explicit_keys
from ..tasks.calibration import ImagesToShow
from ..tasks.loading import amp_type
from .compress import CompressionPlan, compress_network, plan_compression, rebuild_network
from .data import calibration_fingerprint
from .initial_model import StartingModel, dense_model
from .specs import check_accumulation, finetune_spec, with_current_names


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
        distillation: what the task learns from, if there is a teacher.
    """

    model: nn.Module
    task: TaskOnFiles
    example: Tensor
    results: Mapping[str, Any]
    images_digest: str
    compressed: ModelInfo | None = None
    calibration: ImagesToShow | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    distillation: Distillation | None = None


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
        if run.is_over:
            return 0
        torch.manual_seed(settings.seed)  # initial weights and dropout; everything else draws from streams of its own
        prepared = prepare(run, architecture, weights)
        model, results = prepared.model, dict(prepared.results)
        check_accumulation(run.settings, prepared.task.steps_per_epoch)
        digests = {WEIGHTS: weights_digest(model), IMAGES: prepared.images_digest}
        if prepared.distillation is not None:
            digests[TEACHER] = weights_digest(prepared.distillation.teacher)
        run.check_inputs({**digests, **calibration_fingerprint(prepared.calibration)})
        compressed, plan = prepared.compressed is not None, None
        if run.settings.model.use_compression and not compressed:
            shown = prepared.calibration is not None
            plan = plan_compression(run.settings, architecture, model, prepared.example, calibrated=shown)
        warn_of_folded_norms(run, model, compressed)
        save = ModelWriter(run.settings, architecture, run.output, prepared.compressed)
        resumed = run.begin(prepared.task.unreadable, save, prepared.task.metric_name)
        if resumed is None:
            reestimate_starting_norms(run, model, prepared.task, compressed)
        for name, text in prepared.files.items():
            run.recorder.file(name, text)
        if plan is not None:
            model = _compressed(run, plan, prepared, resumed)
        if prepared.distillation is not None:
            _permute_teacher(run, prepared, prepared.distillation)
            prepared.distillation.make_fast()
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
        model, task, spec, engine, run.recorder, keeper=run.checkpoints, signals=run.signals, resumed=resumed
    )


def learn_from_teacher(
    run: Run,
    architecture: Architecture,
    start: StartingModel,
    weights: str | Path,
    example: Tensor | None,
    why_not: str = "",
) -> Distillation | None:
    """What `distillation` asks for, checked before long work. None: nothing is learnt from a teacher.

    The teacher is a copy of the dense network that the run starts from, which a run that resumes has too; or the one
    that `distillation.teacher` names.

    Args:
        run: the run.
        architecture: of the network that is trained.
        start: that network.
        weights: where it comes from.
        example: images (B, 3, H, W), to find stages with; None: the task itself knows what to compare, of networks of
            one architecture.
        why_not: why this network cannot learn from a teacher; empty: it can.

    Raises:
        SettingsError: there is no such teacher, or it does not fit; or there are no such stages.
        CheckpointError: its file cannot be read, or is compressed.
    """
    given, source = run.settings.distillation, teacher_source(run.settings, architecture.task)
    if not given.weight or not run.settings.epochs:
        return None
    why = why_not or (_nothing_to_teach(run.settings, architecture, start, weights) if source is None else "")
    if why and not any(key.startswith("distillation.") for key in explicit_keys(run.settings)):
        if run.settings.model.use_compression:
            note(f"nothing is learnt from a teacher: {why}")
        return None
    if why:
        raise SettingsError(
            f"distillation.weight: {why}; {'' if why_not else 'name a teacher with --distillation.teacher, or '}"
            "learn from labels alone with --distillation.weight 0"
        )
    other = architectures.get(source, architecture.task) if isinstance(source, str) else architecture
    if example is None and other.name != architecture.name:
        raise SettingsError(
            f"distillation.teacher: {source} is another architecture than {architecture.name}, whose heads cannot be "
            "compared; use a dense network's file of the same one"
        )
    if source is None:
        teacher = copy.deepcopy(start.model)
    else:
        teacher = _named_teacher(run, other, source, n_outputs(architecture, start.model))
    if isinstance(source, str) and example is not None:
        _try_teacher(teacher, other, source, example)
    stages = given.stages
    if given.features and example is not None:
        stages = stages or find_stages(teacher, example)
        for network in (teacher, start.model):
            check_stages(network, stages)
    spec = DistillationSpec(given.weight, given.temperature, given.labels, given.features, stages)
    set_memory_format(teacher.to(run.engine.device), run.settings.channels_last)
    return Distillation(teacher, spec, amp_type(given.amp))


def _nothing_to_teach(settings: Settings, architecture: Architecture, start: StartingModel, weights: str | Path) -> str:
    """Why the network that the run starts from is no teacher; empty: it is one."""
    if not settings.model.use_compression:
        return "model.use_compression is False, and the network that is trained would be its own teacher"
    if start.compressed is not None:
        return f"{weights} is a compressed model, which does not hold the dense network to learn from"
    if weights == "none":
        return "model.weights is none, and a network with random weights has nothing to teach"
    if settings.model.new_head:
        return "with model.new_head the network has a last layer of random weights, which has nothing to teach"
    if _is_classifier(architecture, weights):
        return f"{weights} is a classifier's, and layers of random weights behind it have nothing to teach"
    return ""


def _is_classifier(architecture: Architecture, source: str | Path) -> bool:
    """Whether a file holds only the backbone of the network."""
    return (
        isinstance(source, Path)
        and bool(architecture.backbone)
        and architecture.backbone_of(read_tensors(source)) is not None
    )


def _named_teacher(run: Run, architecture: Architecture, source: Path | str, n_classes: int) -> nn.Module:
    """The network that `distillation.teacher` names; it sees the same images and tells the same classes apart."""
    data, theirs = run.settings.dataloader, architecture.normalisation if isinstance(source, str) else None
    own = (*data.mean, *data.std)
    if theirs is not None and not torch.allclose(torch.tensor(own), torch.tensor([*theirs[0], *theirs[1]]), atol=5e-3):
        shown = "{} and {}".format(*(", ".join(f"{value:g}" for value in values) for values in theirs))
        raise SettingsError(
            f"distillation.teacher: {source} was trained on images of the mean and standard deviation {shown}, and "
            "here both networks see images of dataloader.mean and dataloader.std, which are others; use a teacher with "
            "the same preprocessing"
        )
    try:
        if _is_classifier(architecture, source):
            raise SettingsError(f"{source} is a classifier's; a whole {architecture.name} is wanted here")
        with first_here(run.engine):
            teacher = dense_model(architecture, source if isinstance(source, Path) else "pretrained", n_classes, False)
    except UserError as error:
        said = str(error).replace(", or start from random weights with --model.weights none", "")
        said = said.replace("model.weights", "distillation.teacher")
        key = "" if said.startswith("distillation.teacher") else "distillation.teacher: "
        raise type(error)(f"{key}{said}") from error
    found = n_outputs(architecture, teacher)
    if found != n_classes:
        raise SettingsError(
            f"distillation.teacher: {source} tells {found:,} classes apart, and the network that is trained "
            f"{n_classes:,}; use a teacher that was trained for the same classes, in the same order"
        )
    return teacher


def _try_teacher(teacher: nn.Module, architecture: Architecture, source: str, example: Tensor) -> None:
    """See that a teacher of another architecture can be shown these images; say where it was made for others."""
    side, made_for = example.shape[-1], architecture.image_size
    try:
        with torch.no_grad():
            teacher.eval()(example)
    except Exception as error:  # a network of any origin
        raise SettingsError(
            f"distillation.teacher: {source} cannot be shown images of {side} pixels (dataloader.image_size): "
            f"{first_line(error)}. It was made for {made_for}; use another teacher"
        ) from error
    if made_for != side:
        note(f"distillation.teacher: {source} was made for images of {made_for} pixels and is shown {side} here")


def _permute_teacher(run: Run, prepared: Prepared, learned: Distillation) -> None:
    """Bring the channels of the teacher into the order of the network that is trained, where stages are compared."""
    if not learned.spec.features or not run.settings.model.use_compression:
        return
    if prepared.compressed is not None:
        known = prepared.compressed.permutations
    else:  # as the run applied them, now or before it was interrupted
        report = run.output.path / FILE_NAME
        known = permutations_in(once(run.engine, lambda: report.read_text("utf-8") if report.exists() else ""))
    try:
        if known is None:
            raise GroupError("the permutations that were applied to it are not known")
        permute_alike(learned.teacher.to("cpu"), known)
    except GroupError as error:
        raise SettingsError(
            f"distillation.features: the teacher's channels cannot be put into the order of the network's: {error}. "
            "Use --distillation.features 0"
        ) from error
    set_memory_format(learned.teacher.to(run.engine.device), run.settings.channels_last)

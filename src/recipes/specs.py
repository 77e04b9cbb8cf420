"""From settings to what the other parts want: plain records without a settings object, layers under their present
names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..architectures.architecture import Architecture
from ..common.errors import SettingsError
from ..common.log import note
from ..compression.finetune.loop import FinetuneSpec
from ..compression.finetune.optimizers import OptimizerSpec, ScheduleSpec
from ..compression.permute.permute import SearchSpec
from ..compression.quantize.plan import QuantizationSpec
from ..run.compression_specs import quantization_of, search_of
from ..settings import GroupSettings, LayerSpec, Settings
from ..settings import PermutationSpec as PermutationSection

Spec = TypeVar("Spec", LayerSpec, PermutationSection)


def with_current_names(settings: Settings, architecture: Architecture) -> Settings:
    """The settings with every layer under the name it has in this version of torchvision.

    Users' files list old and new names of one layer: such a layer then stands there once, and what is said under its
    new name wins.
    """
    if not architecture.old_names:
        return settings
    model = settings.model
    parameters = model.compression_parameters.model_copy(
        update={
            "ignored_modules": _names(architecture, model.compression_parameters.ignored_modules),
            "layer_specs": _specs(architecture, model.compression_parameters.layer_specs),
        }
    )
    groups = model.permutations
    if isinstance(groups, tuple):
        groups = tuple(
            GroupSettings(parents=_names(architecture, group.parents), children=_names(architecture, group.children))
            for group in groups
        )
    update = {
        "compression_parameters": parameters,
        "permutations": groups,
        "permutation_specs": _specs(architecture, model.permutation_specs),
    }
    return settings.model_copy(update={"model": model.model_copy(update=update)})


def _names(architecture: Architecture, names: tuple[str, ...]) -> tuple[str, ...]:
    """Current names; a layer listed as old and as new stands there once. A name repeated as it is stays, to be
    complained about."""
    listed = set(names)
    return tuple(
        architecture.current_name(name)
        for name in names
        if name not in architecture.old_names or architecture.current_name(name) not in listed
    )


def _specs(architecture: Architecture, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    merged: dict[str, Spec] = {}
    for name in sorted(specs, key=lambda name: name not in architecture.old_names):  # old names first
        now = architecture.current_name(name)
        given = specs[name].model_dump(exclude_none=True)
        merged[now] = merged[now].model_copy(update=given) if now in merged else specs[name]
    return merged


def quantization_spec(settings: Settings) -> QuantizationSpec:
    """`model.compression_parameters` as the compression package wants it."""
    return quantization_of(settings.model)


def search_spec(settings: Settings, architecture: Architecture) -> SearchSpec:
    """How permutations are searched, with the architecture's reshapes where `model.permutation_specs` gives none."""
    return search_of(settings.model, architecture.reshapes)


def finetune_spec(settings: Settings, world_size: int, show_progress: bool = True) -> FinetuneSpec:
    """How a network is fine-tuned by `world_size` processes.

    learning_rate and min_lr are multiplied by their number (as the paper does), unless the settings say no.
    """
    factor = world_size if settings.scale_learning_rate else 1
    scheduler = settings.lr_scheduler.model_dump()
    return FinetuneSpec(
        epochs=settings.epochs,
        optimizer=OptimizerSpec(
            name=settings.optimizer,
            learning_rate=factor * settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            codebook_learning_rate=settings.codebook_learning_rate,
        ),
        lr_scheduler=ScheduleSpec(**{**scheduler, "min_lr": factor * settings.lr_scheduler.min_lr}),
        amp=settings.amp,
        skip_initial_validation=settings.skip_initial_validation,
        log_every_n_steps=settings.log_every_n_steps,
        checkpoint_every_n_steps=settings.checkpoint_every_n_steps,
        show_progress=show_progress,
        accumulate=settings.accumulate,
        clip_gradients=settings.clip_gradients,
        ema=settings.ema,
        early_stopping=settings.early_stopping,
    )


def check_accumulation(settings: Settings, batches: int) -> None:
    """Say which of the `batches` of an epoch make up no whole step of the optimizer.

    Raises:
        SettingsError: there are fewer than a step has.
    """
    each = settings.accumulate
    if not settings.epochs or not batches % each:
        return
    if each > batches:
        raise SettingsError(
            f"accumulate: a step of {each:,} batches is longer than an epoch, which has {batches:,} here; use at most "
            f"{batches:,}"
        )
    left = batches % each
    note(f"accumulate: the last step of each epoch is made of {left} instead of {each} batches, as it has {batches:,}")

"""Layer names in settings: the old names of a layer are replaced once, where settings meet an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..architectures.architecture import Architecture
from ..settings import GroupSettings, LayerSpec, PermutationSpec, Settings

Spec = TypeVar("Spec", LayerSpec, PermutationSpec)


def with_current_names(settings: Settings, architecture: Architecture) -> Settings:
    """The settings with every layer under the name it has in this version of torchvision.

    Users' files list old and new names of one layer: such a layer then stands there once, and what is said under its new name
    wins.
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
    if groups is not None:
        groups = tuple(
            GroupSettings(parents=_names(architecture, group.parents), children=_names(architecture, group.children)) for group in groups
        )
    update = {
        "compression_parameters": parameters,
        "permutations": groups,
        "permutation_specs": _specs(architecture, model.permutation_specs),
    }
    return settings.model_copy(update={"model": model.model_copy(update=update)})


def _names(architecture: Architecture, names: tuple[str, ...]) -> tuple[str, ...]:
    """Current names; a layer listed as old and as new stands there once. A name repeated as it is stays, to be complained about."""
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

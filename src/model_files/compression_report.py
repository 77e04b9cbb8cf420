"""The compression report of a run, `compression.json`: distortion per layer, what stays dense and why, and the
permutations as they were applied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compression.permute.binding import AnyGroup
from ..compression.permute.channels import ChannelGroup
from ..compression.permute.groups import Group, resolve
from ..compression.permute.permute import GroupResult
from ..compression.quantize.compress import LayerResult
from ..compression.quantize.plan import DenseWeight
from .metadata import OUTPUTS_LOST, AppliedPermutation, ModelInfo
from .stored_places import apply_stored, read_rows, stored

FILE_NAME = "compression.json"


def report_text(
    layers: Sequence[LayerResult],
    groups: Sequence[AnyGroup],
    permuted: Sequence[GroupResult],
    reshapes: Mapping[str, Sequence[int]],
    dense: Sequence[DenseWeight] = (),
    outputs_lost: Mapping[str, Sequence[tuple[str, float]]] | None = None,
) -> str:
    """The report as JSON.

    Args:
        layers: what became of each quantized layer.
        groups: of layers or channels that share a permutation.
        permuted: what became of each of them, in the same order.
        reshapes: of linear layers that read a flattened feature map, by name.
        dense: the weights that are not quantized.
        outputs_lost: of calibrated weights by name, after each step the share of their outputs' energy that is lost.
    """
    lost = {name: {OUTPUTS_LOST: dict(steps)} for name, steps in (outputs_lost or {}).items()}
    rows = [
        {
            "group": result.label,
            "parents": group.parents,
            "readers": group.children,
            "reshapes": {name: reshapes[name] for name in group.children if name in reshapes},
            "children": result.children,
            "before": result.before,
            "after": result.after,
            "permutation": None if result.permutation is None else result.permutation.tolist(),
            **_places(group),
        }
        for group, result in zip(groups, permuted, strict=True)
    ]
    n_values = sum(layer.n_subvectors * layer.d for layer in layers) + sum(weight.n_values for weight in dense)
    report = {
        "layers": [
            {**asdict(layer), "relative_error": layer.relative_error, **lost.get(layer.name, {})} for layer in layers
        ],
        "dense": [{**asdict(weight), "share": weight.n_values / n_values} for weight in dense],
        "groups": rows,
    }
    return json.dumps(report, indent=1) + "\n"


def _places(group: AnyGroup) -> dict[str, Any]:
    """Where the channels of a group stand; nothing where its layers say it."""
    if not isinstance(group, ChannelGroup):
        return {}
    return {"n_blocks": group.n_blocks, "places": [places.row() for places in stored(group)]}


def applied(
    groups: Sequence[AnyGroup], permuted: Sequence[GroupResult], reshapes: Mapping[str, tuple[int, ...]]
) -> tuple[AppliedPermutation, ...]:
    """The permutations that were applied, as files name them; arguments as `report_text`."""
    return tuple(
        AppliedPermutation(
            parents=tuple(group.parents),
            children=tuple(group.children),
            permutation=result.permutation,
            reshapes={name: tuple(reshapes[name]) for name in group.children if name in reshapes},
            places=stored(group) if isinstance(group, ChannelGroup) else None,
            n_blocks=group.n_blocks if isinstance(group, ChannelGroup) else 1,
        )
        for group, result in zip(groups, permuted, strict=True)
        if result.permutation is not None
    )


def read_settings(report: Path) -> dict[str, tuple[int, int, int]]:
    """d, k and bits of a codebook's value of every weight that a report lists, by name; nothing where it is missing."""
    try:
        layers = json.loads(report.read_text(encoding="utf-8"))["layers"]
        return {
            str(layer["name"]): (int(layer["d"]), int(layer["k"]), int(layer.get("codebook_bits", 16)))
            for layer in layers
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_outputs_lost(report: Path) -> dict[str, float] | None:
    """The share of the outputs' energy that calibrated weights lost in the end, by name; None: it is not known."""
    try:
        layers = json.loads(report.read_text(encoding="utf-8"))["layers"]
        found = {str(one["name"]): list(one[OUTPUTS_LOST].values()) for one in layers if one.get(OUTPUTS_LOST)}
        return {name: float(steps[-1]) for name, steps in found.items()} or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_permutations(report: Path) -> tuple[AppliedPermutation, ...] | None:
    """The permutations that a report lists; None where it is missing or does not name all layers."""
    try:
        return permutations_in(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def permutations_in(text: str) -> tuple[AppliedPermutation, ...] | None:
    """The permutations that the text of a report lists; None where it does not name all layers."""
    try:
        groups = json.loads(text)["groups"]
        return tuple(_read(group) for group in groups if group["permutation"] is not None)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def _read(group: dict[str, Any]) -> AppliedPermutation:
    permutation = torch.tensor(group["permutation"], dtype=torch.int64)
    return AppliedPermutation(
        parents=tuple(group["parents"]),
        children=tuple(group["readers"]),
        permutation=permutation,
        reshapes={name: tuple(shape) for name, shape in group["reshapes"].items()},
        places=read_rows(group["places"], permutation.numel()) if "places" in group else None,
        n_blocks=int(group.get("n_blocks", 1)),
    )


def known_of_run(model_file: Path) -> ModelInfo:
    """What the run that wrote `model_file` says of it beside the file, if it left its report."""
    if model_file.parent.name != "trained_models":
        return ModelInfo()
    report = model_file.parent.parent / FILE_NAME
    return ModelInfo(permutations=read_permutations(report), outputs_lost=read_outputs_lost(report))


def permute_alike(model: nn.Module, permutations: Sequence[AppliedPermutation]) -> None:
    """Apply permutations to the dense network that they were found for, in place; its function stays.

    Raises:
        GroupError: it is another network.
    """
    layers = [Group(p.parents, p.children) for p in permutations if p.places is None]
    reshapes = {name: shape for p in permutations for name, shape in p.reshapes.items()}
    resolved = iter(resolve(model, layers, reshapes))
    for one in permutations:
        if one.places is None:
            next(resolved).apply(one.permutation)
        else:
            apply_stored(model, one.places, one.permutation, one.n_blocks)

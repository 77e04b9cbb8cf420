"""The compression report of a run, `compression.json`: distortion per layer, what stays dense and why, and the
permutations as they were applied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..compression.permute.groups import Group
from ..compression.permute.permute import GroupResult
from ..compression.quantize.compress import LayerResult
from ..compression.quantize.plan import DenseWeight
from .metadata import AppliedPermutation

FILE_NAME = "compression.json"


def report_text(
    layers: Sequence[LayerResult],
    groups: Sequence[Group],
    permuted: Sequence[GroupResult],
    reshapes: Mapping[str, Sequence[int]],
    dense: Sequence[DenseWeight] = (),
) -> str:
    """The report as JSON.

    Args:
        layers: what became of each quantized layer.
        groups: of layers that share a permutation.
        permuted: what became of each of them, in the same order.
        reshapes: of linear layers that read a flattened feature map, by name.
        dense: the weights that are not quantized.
    """
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
        }
        for group, result in zip(groups, permuted, strict=True)
    ]
    n_values = sum(layer.n_subvectors * layer.d for layer in layers) + sum(weight.n_values for weight in dense)
    report = {
        "layers": [{**asdict(layer), "relative_error": layer.relative_error} for layer in layers],
        "dense": [{**asdict(weight), "share": weight.n_values / n_values} for weight in dense],
        "groups": rows,
    }
    return json.dumps(report, indent=1) + "\n"


def read_permutations(report: Path) -> tuple[AppliedPermutation, ...] | None:
    """The permutations that a report lists; None where it is missing or does not name all layers."""
    try:
        groups = json.loads(report.read_text(encoding="utf-8"))["groups"]
        return tuple(
            AppliedPermutation(
                parents=tuple(group["parents"]),
                children=tuple(group["readers"]),
                permutation=torch.tensor(group["permutation"], dtype=torch.int64),
                reshapes={name: tuple(shape) for name, shape in group["reshapes"].items()},
            )
            for group in groups
            if group["permutation"] is not None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def permutations_of_run(model_file: Path) -> tuple[AppliedPermutation, ...] | None:
    """The permutations that the run which wrote `model_file` applied, if it left its report."""
    return (
        read_permutations(model_file.parent.parent / FILE_NAME) if model_file.parent.name == "trained_models" else None
    )

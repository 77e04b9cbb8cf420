"""What a packed file takes beside what a network's size counts: names, shapes and settings, permutations, and what
batch norms need to be trained."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..compression.permute.binding import AnyGroup, bind
from ..compression.permute.permute import GroupResult
from ..compression.quantize.budget.wanted import Budget
from ..compression.quantize.compress import build_quantized, with_scales
from ..compression.quantize.placing import quantized_layers
from ..compression.quantize.plan import Plan
from .compression_report import applied
from .metadata import ModelInfo
from .packed import save_packed
from .size import model_size

LONG = 1 / 3
"""A number with as many digits as any."""
SCALE_ENTRY = len('".codebook_scale":{"dtype":"F32","shape":[],"data_offsets":[,]},')
"""Bytes of a scale's entry in the header of a file, beside the weight's name and the two places."""


def with_room(
    info: ModelInfo,
    model: nn.Module,
    plan: Plan,
    groups: Sequence[AnyGroup],
    reshapes: Mapping[str, tuple[int, ...]],
    *,
    calibrated: bool,
    n_figures: int,
) -> ModelInfo:
    """What a file will say, with numbers in the place of those that are not known before a network is compressed.

    Args:
        info: what is known.
        model: the dense network.
        plan: for it.
        groups: that may be permuted; here all are.
        reshapes: of flattened layers, by name.
        calibrated: whether the network will be calibrated: then the file says what its weights' outputs lost.
        n_figures: of a validation, that the file will hold at most.

    Raises:
        GroupError: a group does not fit.
    """
    permuted = [GroupResult(one.label, (), 0.0, 0.0, torch.arange(one.width)) for one in bind(model, groups, reshapes)]
    return replace(
        info,
        permutations=applied(groups, permuted, reshapes),
        metric={f"figure {number:02}": LONG for number in range(n_figures)},
        outputs_lost=dict.fromkeys(plan.layers, LONG) if calibrated else None,
    )


@torch.no_grad()
def bytes_beside(model: nn.Module, plan: Plan, info: ModelInfo) -> int:
    """Bytes of a packed file of the network that its size does not count.

    A file is written with all weights quantized, with zeros in the place of values.

    Args:
        model: the dense network; it is copied, not changed.
        plan: what does not count hardly depends on its d and k.
        info: what the file will say.
    """
    quantized = build_quantized(copy.deepcopy(model), with_scales(model, plan))
    for layer in quantized_layers(quantized, plan.layers).values():
        layer.codebook.zero_()
        layer.codes_matrix.zero_()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(quantized, path, info)
        return path.stat().st_size - model_size(quantized).bits // 8


def with_beside(budget: Budget | None, model: nn.Module, plan: Plan, info: ModelInfo) -> Budget | None:
    """A budget that knows what a packed file of the network needs beside what counts; a ratio is of what counts.

    Args:
        budget: what is wanted; None: nothing.
        model, plan, info: as for `bytes_beside`.
    """
    if budget is None or budget.size is None:
        return budget
    entry = SCALE_ENTRY + 2 * len(str(budget.size)) + max((len(name.encode()) for name in plan.layers), default=0)
    return replace(budget, beside=bytes_beside(model, plan, info), beside_scale=entry)

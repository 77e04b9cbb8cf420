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
from ..compression.quantize.compress import build_quantized
from ..compression.quantize.placing import quantized_layers
from ..compression.quantize.plan import Plan
from .compression_report import applied
from .metadata import ModelInfo
from .packed import save_packed
from .size import model_size

LONG = 1 / 3
"""A number with as many digits as any."""
SCALE_ENTRY = len('".codebook_scale":{"dtype":"F32","shape":[],"data_offsets":[99999,99999]},')
"""Bytes of a scale's entry in the header of a file, at most, beside the weight's name."""
METRICS = 8
"""Figures of a validation that a file may hold."""


@torch.no_grad()
def bytes_beside(
    model: nn.Module,
    plan: Plan,
    groups: Sequence[AnyGroup],
    reshapes: Mapping[str, tuple[int, ...]],
    info: ModelInfo,
) -> int:
    """Bytes of a packed file of the network that its size does not count, as far as is known before it is compressed.

    A file is written with all groups permuted and all weights quantized, with zeros in the place of values.

    Args:
        model: the dense network; it is copied, not changed.
        plan: with whatever d and k: what does not count hardly depends on them.
        groups: that may be permuted.
        reshapes: of flattened layers, by name.
        info: what the file will say, as far as it is known.

    Raises:
        GroupError: a group does not fit.
    """
    quantized = build_quantized(copy.deepcopy(model), plan)
    for layer in quantized_layers(quantized, plan.layers).values():
        layer.codebook.zero_()
        layer.codes_matrix.zero_()
    permuted = [GroupResult(one.label, (), 0.0, 0.0, torch.arange(one.width)) for one in bind(model, groups, reshapes)]
    info = replace(
        info,
        permutations=applied(groups, permuted, reshapes),
        metric={f"metric number {number}": LONG for number in range(METRICS)},
        outputs_lost=dict.fromkeys(plan.layers, LONG),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(quantized, path, info)
        return path.stat().st_size - model_size(quantized).bits // 8


def with_beside(
    budget: Budget,
    model: nn.Module,
    plan: Plan,
    groups: Sequence[AnyGroup],
    reshapes: Mapping[str, tuple[int, ...]],
    info: ModelInfo,
) -> Budget:
    """A budget that knows what a packed file of the network needs beside what counts; a ratio is of what counts.

    Args:
        budget: what is wanted.
        model, plan, groups, reshapes, info: as for `bytes_beside`.

    Raises:
        GroupError: a group does not fit.
    """
    if budget.size is None:
        return budget
    longest = max((len(name.encode()) for name in plan.layers), default=0)
    beside = bytes_beside(model, plan, groups, reshapes, info)
    return replace(budget, beside=beside, beside_scale=longest + SCALE_ENTRY)

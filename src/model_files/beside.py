"""What a packed file takes beside what a network's size counts: names, shapes and settings, permutations, and what
batch norms need to be trained."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..common.randomness import stream
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

LONG, SHARE = 1 / 3, 1.23e-05
"""A figure and a share of what is lost that take as many characters in a file as any."""
SCALE_ENTRY = len('".codebook_scale":{"dtype":"F32","shape":[],"data_offsets":[,]},')
"""Bytes of a scale's entry in the header of a file, beside the weight's name and the two places."""

MOVED, CHANNELS_PER_BYTE = 0.1, 8
"""How far norms are moved to see how many bytes they take then, and for how many channels one more is left."""
STATISTICS, PARAMETERS = frozenset({"running_mean", "running_var"}), frozenset({"weight", "bias"})
"""Of a batch norm: what calibrating changes, and what training does besides."""


@dataclass(frozen=True)
class LikelyFile:
    """A file that is not written yet.

    Attributes:
        info: what it will say, with numbers in the place of those that are not known.
        moved: what of its batch norms will have changed by then.
    """

    info: ModelInfo
    moved: frozenset[str]


def with_room(
    info: ModelInfo,
    model: nn.Module,
    plan: Plan,
    groups: Sequence[AnyGroup],
    reshapes: Mapping[str, tuple[int, ...]],
    *,
    calibrated: bool,
    n_figures: int,
    trained: bool,
) -> LikelyFile:
    """What a file will say, with numbers in the place of those that are not known before a network is compressed.

    Args:
        info: what is known.
        model: the dense network.
        plan: for it.
        groups: that may be permuted; here all are.
        reshapes: of flattened layers, by name.
        calibrated: whether the network will be calibrated: then the file says what its weights' outputs lost.
        n_figures: of a validation, that the file will hold at most.
        trained: whether it will be trained before it is written.

    Raises:
        GroupError: a group does not fit.
    """
    permuted = [GroupResult(one.label, (), 0.0, 0.0, torch.arange(one.width)) for one in bind(model, groups, reshapes)]
    info = replace(
        info,
        permutations=applied(groups, permuted, reshapes),
        metric=likely_figures(n_figures),
        outputs_lost=dict.fromkeys(plan.layers, SHARE) if calibrated else None,
    )
    moved = STATISTICS | PARAMETERS if trained else STATISTICS if calibrated else frozenset()
    return LikelyFile(info, moved)


def likely_figures(n: int) -> dict[str, float]:
    """So many figures of a validation, which take as much room as any."""
    return {f"figure {number:02}": LONG for number in range(n)}


@torch.no_grad()
def bytes_beside(model: nn.Module, plan: Plan, file: LikelyFile) -> int:
    """Bytes of a packed file of the network that its size does not count.

    A file is written with all weights quantized, with zeros in the place of values.

    Args:
        model: the dense network; it is copied, not changed.
        plan: what does not count hardly depends on its d and k.
        file: what is known of it.
    """
    quantized = build_quantized(copy.deepcopy(model), with_scales(model, plan))
    for layer in quantized_layers(quantized, plan.layers).values():
        layer.codebook.zero_()
        layer.codes_matrix.zero_()
    n_channels = _move_norms(quantized, file.moved) if file.moved else 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(quantized, path, file.info)
        return path.stat().st_size - model_size(quantized).bits // 8 + -(-n_channels // CHANNELS_PER_BYTE)


def _move_norms(model: nn.Module, moved: Collection[str]) -> int:
    """Change what of batch norms is `moved` a little, as calibrating and training do; returns their number of channels.

    Files hold norms compressed, those of a network that was never trained in hardly any bytes.
    """
    draw, n_channels = stream(0, "norms that move"), 0
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name in moved:
                    noise = MOVED * torch.randn(tensor.shape, generator=draw).to(tensor)
                    by_factor = name in ("weight", "running_var")
                    spread = tensor.std(correction=0).clamp(min=MOVED)
                    tensor.copy_(tensor * noise.exp() if by_factor else tensor + spread * noise)
            n_channels += module.num_features
    return n_channels


def with_beside(budget: Budget | None, model: nn.Module, plan: Plan, file: LikelyFile) -> Budget | None:
    """A budget that knows what a packed file of the network needs beside what counts; a ratio is of what counts.

    Args:
        budget: what is wanted; None: nothing.
        model, plan, file: as for `bytes_beside`.
    """
    if budget is None or budget.size is None:
        return budget
    entry = SCALE_ENTRY + 2 * len(str(budget.size)) + max((len(name.encode()) for name in plan.layers), default=0)
    return replace(budget, beside=bytes_beside(model, plan, file), beside_scale=entry)

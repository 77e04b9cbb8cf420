"""Batch norms and images: running statistics taken anew, and norms of which a file holds scale and shift only, made
whole; what those evaluate to stays as it is.

While images pass, mean m and variance v of each such norm's input are taken. With m and v as running statistics, gain
scale * sqrt(v + eps) and bias shift + m * scale the norm evaluates to the same; and in training, where a batch's
moments are near m and v, it is near what it evaluates to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.errors import DataError
from ..compression.quantize.calibrate.inputs import run_on
from ..compression.quantize.calibrate.norms import channel_sums
from .norms import fold_norm, folded_norms, scale_of, set_known_whole, unfold_norm


@torch.no_grad()
def reestimate_norms(
    model: nn.Module, forward: Callable[[nn.Module], object], total: Callable[[Tensor], Tensor] | None = None
) -> list[str]:
    """Rebuild the running statistics of the norms that a file held as scale and shift only; in place.

    Args:
        model: from a file, on any device.
        forward: runs images, some thousands better than some hundreds, through the model. Its norms are in evaluation
            mode meanwhile, everything else as it is.
        total: sums a vector over all processes, where there are several; float64, on the CPU.

    Returns:
        Names of the norms that are whole now: those that images reached.
    """
    norms = folded_norms(model)
    if not norms:
        return []
    sums = {name: torch.zeros(3, norm.running_mean.numel(), dtype=torch.float64) for name, norm in norms.items()}
    modes = {module: module.training for module in model.modules() if isinstance(module, _BatchNorm)}
    handles = [norm.register_forward_pre_hook(partial(_add, sums[name])) for name, norm in norms.items()]
    try:
        for module in modes:
            module.training = False
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    joined = torch.cat(list(sums.values()), dim=1)
    if total is not None:
        joined = total(joined)
    reached = []
    for (name, norm), found in zip(norms.items(), joined.split([s.shape[1] for s in sums.values()], 1), strict=True):
        if bool((found[0] > 0).all()) and bool(torch.isfinite(found).all()):
            _make_whole(norm, found[1] / found[0], found[2] / found[0])
            reached.append(name)
    return reached


def _add(sums: Tensor, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add count, sum and sum of squares of every channel of the input (B, C, ...) to `sums` (3, C)."""
    sums += channel_sums(inputs[0].detach()).cpu()


def _make_whole(norm: _BatchNorm, mean: Tensor, square: Tensor) -> None:
    device = norm.running_mean.device  # type: ignore[union-attr]
    norm.cpu()  # not every device has float64
    weight, bias = fold_norm(norm)
    deviation = ((square - mean**2).clamp_min(0) + norm.eps).sqrt()
    unfold_norm(norm, weight, bias, (deviation, bias.double() + mean * scale_of(norm, weight)))
    set_known_whole(norm)
    norm.to(device)


@torch.no_grad()
def retake_norms(
    model: nn.Module,
    inputs: Iterable[Any],
    device: torch.device | str = "cpu",
    total: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """Take the running statistics of all batch norms anew, as quantizing has changed what they see; in place.

    In one pass: mean and variance of what each norm sees over all inputs, with those before it already normalising by
    the batch. Norms of frozen statistics (`FrozenBatchNorm2d`) are part of the weights and stay, and so do those of
    which only scale and shift are known (`reestimate_norms`).

    Args:
        model: in evaluation mode; it is again afterwards, on the CPU.
        inputs: batches for the network: tensors, lists of images, or keyword arguments.
        device: where it runs meanwhile.
        total: as for `reestimate_norms`.

    Returns:
        Names of the norms that were reached.

    Raises:
        DataError: what a norm sees is not finite.
    """
    norms = retakeable_norms(model)
    if not norms:
        return []
    before = {name: [b.clone() for b in norm.buffers()] for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    model.eval().to(device)
    sums = {name: torch.zeros(3, norm.num_features, dtype=torch.float64) for name, norm in norms.items()}
    handles = [norm.register_forward_pre_hook(partial(_add_and_normalise, sums[name])) for name, norm in norms.items()]
    try:
        for norm in norms.values():
            norm.momentum = 0.0  # they are set at the end
        for batch in inputs:
            run_on(torch.device(device), model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.momentum, norm.training = momenta[name], False
        model.to("cpu")
        for name, norm in norms.items():
            for own, earlier in zip(norm.buffers(), before[name], strict=True):
                own.copy_(earlier)
    joined = torch.cat(list(sums.values()), dim=1)
    found = (joined if total is None else total(joined)).split([one.shape[1] for one in sums.values()], 1)
    return [name for (name, norm), one in zip(norms.items(), found, strict=True) if _retaken(name, norm, one)]


def retakeable_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms whose running statistics can be taken anew, by name."""
    folded = folded_norms(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and name not in folded
    }


def _add_and_normalise(sums: Tensor, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Take note of an input, by which the norm then normalises, where it is more than one value per channel."""
    _add(sums, norm, inputs)
    norm.training = inputs[0].numel() > inputs[0].shape[1]


def _retaken(name: str, norm: _BatchNorm, found: Tensor) -> bool:
    """Give a norm the statistics of count, sum and sum of squares (3, C); False: no input reached it."""
    n = float(found[0].max())
    if not n:
        return False
    if not bool(torch.isfinite(found).all()):
        raise DataError(f"what batch norm {name!r} sees is not finite (NaN or infinity): check the images")
    mean = found[1] / n
    variance = (found[2] / n - mean**2).clamp_min(0) * (n / max(n - 1, 1))  # unbiased, as in training
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    return True

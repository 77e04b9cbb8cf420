"""Running statistics of batch norms, put right by how quantizing changed what the norms see.

Mean and variance over the same images are taken in both networks: m, s² in the dense one, m', s'² in the quantized one.
With (x - m') s / s' + m the inputs have again the mean and variance that they had; before a norm with running mean μ
and variance σ² that is the norm with m' + (μ - m) s'/s and σ² (s'/s)². So the dense network's own statistics, from more
images than these, stay where nothing changed.

Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Statistics:
    """Mean and variance (C,) of what a norm sees."""

    mean: Tensor
    variance: Tensor


def wide(values: Tensor) -> Tensor:
    """In double precision, where the device has it: Apple's MPS has not."""
    return values if values.device.type == "mps" else values.double()


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Its batch norms with running statistics, by name, each once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


@torch.no_grad()
def move_norm(norm: _BatchNorm, dense: _BatchNorm, before: Statistics, after: Statistics) -> None:
    """Set the running statistics of a norm of the quantized network.

    Args:
        norm: it.
        dense: the same norm of the dense network.
        before, after: what the dense and the quantized network show them.
    """
    mean, variance = statistics_of(dense)
    ratio = (wide(after.variance) + norm.eps) / (wide(before.variance) + norm.eps)
    moved = wide(after.mean) + (wide(mean) - wide(before.mean)) * ratio.sqrt()
    new_mean, new_variance = statistics_of(norm)
    new_mean.copy_(moved)
    new_variance.copy_(((wide(variance) + norm.eps) * ratio - norm.eps).clamp_min(0))


def statistics_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of one of `norms_of`."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return mean, variance


def output_statistics(weight: Tensor, hessian: Tensor, mean: Tensor) -> Statistics:
    """Of what a weight (B, R, C) without bias makes of inputs with moments H (B, C, C) and mean (B, C)."""
    first = torch.einsum("brc,bc->br", wide(weight), wide(mean)).flatten()
    second = torch.einsum("brc,brc->br", wide(weight @ hessian), wide(weight)).flatten()
    return Statistics(mean=first, variance=(second - first.square()).clamp_min(0))


def seen_by(inputs: Iterable[Sequence[Tensor]]) -> Statistics | None:
    """Mean and variance over all (N, C, ...) that are given, those of one batch at a time; None: there were none."""
    sums = added([sums_of(given) for given in inputs])
    return None if sums is None else statistics(sums)


def sums_of(inputs: Sequence[Tensor]) -> Tensor | None:
    """(3, C): count, sum and sum of squares of all (N, C, ...); None: there are none."""
    return added(map(channel_sums, inputs))


def channel_sums(values: Tensor) -> Tensor:
    """(3, C): count, sum and sum of squares of the values (N, C, ...) of each channel."""
    channels = values.float().transpose(0, 1).flatten(1)
    variance, mean = (wide(one) for one in torch.var_mean(channels, dim=1, correction=0))
    return channels.shape[1] * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])


def added(sums: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of what is there; None: nothing is."""
    there = [one for one in sums if one is not None]
    return sum(there[1:], start=there[0]) if there else None


def statistics(sums: Tensor) -> Statistics:
    """Of what `sums_of` summed."""
    mean = sums[1] / sums[0]
    return Statistics(mean=mean, variance=(sums[2] / sums[0] - mean.square()).clamp_min(0))

"""Batch norms over the images of all processes together, on any device and under any engine.

torch.nn.SyncBatchNorm and Horovod's refuse tensors on the CPU. In training the mean and variance of a channel are taken
over the batches of all processes (Ioffe and Szegedy 2015, equations 1 to 4 on the joint batch), and their gradients
flow back to all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .engine import Engine


class _Sum(torch.autograd.Function):
    """The sum over all processes; what one process puts in reaches all of their losses, so the gradient is a sum
    too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, engine: Engine) -> Tensor:
        ctx.engine = engine
        return engine.sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.engine.sum(gradient), None


class JointBatchNorm(_BatchNorm):
    """A batch norm whose statistics in training are those of all processes' batches; same state dict, same
    evaluation."""

    engine: Engine

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (batch, channels), got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        own = torch.cat([x.sum(axes), x.new_tensor([x.numel() / x.shape[1]])])
        total = _Sum.apply(own, self.engine)
        mean, count = total[:-1] / total[-1], total[-1].item()
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes), self.engine) / count
        self._follow(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normal = normal * self.weight.to(x.dtype).view(shape)
        if self.bias is not None:
            normal = normal + self.bias.to(x.dtype).view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics (C,) towards those of this batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def join_batch_norms(model: nn.Module, engine: Engine) -> nn.Module:
    """Let every batch norm of `model` (frozen ones left out) count over all processes, in place; parameters stay the
    same objects."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _joint(child, engine))
    return _joint(model, engine) if isinstance(model, _BatchNorm) else model


def _joint(norm: _BatchNorm, engine: Engine) -> JointBatchNorm:
    twin = copy.copy(norm)
    twin.__class__ = JointBatchNorm
    assert isinstance(twin, JointBatchNorm)
    twin.engine = engine
    return twin

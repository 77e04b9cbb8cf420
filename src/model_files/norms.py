"""Batch norms as two vectors, as files hold them and sizes count them.

Folding. With mean mu, variance v, eps e, weight g, bias b a norm computes (x - mu) / sqrt(v + e) * g + b. The file
holds w = g * sqrt(1 + e) / sqrt(v + e) and b - mu * g / sqrt(v + e), so that the layer with its own eps, mean 0 and
variance 1 computes the same. torchvision sets eps to 0 in frozen norms and builds plain ones with 1e-5 otherwise; a
layer with eps 0 is therefore folded for, and loaded from, a plain layer's eps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from ..compression.quantize.subvectors import Layer

PLAIN_EPS = 1e-5
"""eps of a norm built by default; also the convention for norms whose own eps is 0."""

NORM_VECTORS = ("weight", "bias")
NORM_STATISTICS = ("running_mean", "running_var")


def is_folded_norm(module: Layer) -> bool:
    """A batch norm with running statistics: a file holds it as two vectors."""
    return isinstance(module, FrozenBatchNorm2d) or (isinstance(module, _BatchNorm) and module.running_mean is not None)


def fold_norm(norm: Layer) -> tuple[Tensor, Tensor]:
    """The two vectors (C,) that stand for a norm with running statistics."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = norm.weight.detach().double() if norm.weight is not None else torch.ones_like(mean)
    bias = norm.bias.detach().double() if norm.bias is not None else torch.zeros_like(mean)
    scale = gain / (variance + norm.eps).sqrt()
    width = norm.running_mean.dtype
    return (scale * (1 + (norm.eps or PLAIN_EPS)) ** 0.5).to(width), (bias - mean * scale).to(width)


def norm_problem(norm: Layer, weight: Tensor, bias: Tensor) -> str | None:
    """Why `norm` cannot compute what the two vectors (C,) of a file stand for; None: it can."""
    if norm.weight is None and not bool((weight > 0).all()):
        return "a batch norm without weight and bias cannot hold a scale that is not positive"
    if norm.bias is None and bool(((weight == 0) & (bias != 0)).any()):
        return "a batch norm without bias cannot hold a constant channel"
    return None


def unfold_norm(norm: Layer, weight: Tensor, bias: Tensor) -> None:
    """Make `norm`, which has no `norm_problem` with them, compute what the two vectors (C,) of a file stand for; in
    place."""
    eps = float(norm.eps)
    scale = weight.double() / (1 + (eps or PLAIN_EPS)) ** 0.5
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        if norm.weight is None:
            norm.running_var.copy_(scale**-2 - eps)
        else:
            norm.weight.copy_(scale * (1 + eps) ** 0.5)
        if norm.bias is None:
            norm.running_mean.copy_(torch.where(scale == 0, 0, -bias.double() / scale))
        else:
            norm.bias.copy_(bias)
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()

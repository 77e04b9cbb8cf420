"""Batch norms as two vectors, as files hold them and sizes count them, and what makes them whole again.

Folding. With mean mu, variance v, eps e, weight g, bias b a norm computes (x - mu) / sqrt(v + e) * g + b. The file
holds w = g * sqrt(1 + e) / sqrt(v + e) and b - mu * g / sqrt(v + e), so that the layer with its own eps, mean 0 and
variance 1 computes the same. torchvision sets eps to 0 in frozen norms and builds plain ones with 1e-5 otherwise; a
layer with eps 0 is therefore folded for, and loaded from, a plain layer's eps.

Training. In training mode a norm uses the moments of the batch: (x - mu_B) / sqrt(v_B + e) * g + b. The two vectors
do not say g and b. With the deviation s = sqrt(v + e) of the norm's input and b they do: g is scale * s, and mu is
(b - bias) / scale. Files of ours hold s and b as well (`norm_training`); a norm from a file without them evaluates
right, and is another layer when it is trained: it warns then.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from ..compression.quantize.subvectors import Layer

PLAIN_EPS = 1e-5
"""eps of a norm built by default; also the convention for norms whose own eps is 0."""

NORM_VECTORS = ("weight", "bias")
NORM_STATISTICS = ("running_mean", "running_var")
TRAINING_VECTORS = ("input_std", "own_bias")
"""s of a norm's input and the norm's own b, beside `NORM_VECTORS` in the tensors that were read from a file."""
_UNFOLDED = "_pqf_unfolded"
"""Attribute of a loaded norm: an `_Unfolded`."""
LARGEST_DEVIATION = 1e19
"""Whose square a 32-bit float holds."""


def is_folded_norm(module: Layer) -> bool:
    """A batch norm with running statistics: a file holds it as two vectors."""
    return isinstance(module, FrozenBatchNorm2d) or (isinstance(module, _BatchNorm) and module.running_mean is not None)


def fold_norm(norm: Layer) -> tuple[Tensor, Tensor]:
    """The two vectors (C,) that stand for a norm with running statistics: to the last bit those of the file that it was
    loaded from, as long as it has not changed since."""
    width = norm.running_mean.dtype
    unfolded: _Unfolded | None = getattr(norm, _UNFOLDED, None)
    if unfolded is not None and unfolded.is_still(norm):
        return unfolded.weight.to(norm.running_mean), unfolded.bias.to(norm.running_mean)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = norm.weight.detach().double() if norm.weight is not None else torch.ones_like(mean)
    bias = norm.bias.detach().double() if norm.bias is not None else torch.zeros_like(mean)
    scale = gain / (variance + norm.eps).sqrt()
    return (scale * (1 + (norm.eps or PLAIN_EPS)) ** 0.5).to(width), (bias - mean * scale).to(width)


def norm_problem(norm: Layer, weight: Tensor, bias: Tensor, training: tuple[Tensor, Tensor] | None) -> str | None:
    """Why `norm` cannot be what the vectors (C,) of a file stand for (see `unfold_norm`); None: it can."""
    if training is not None and not bool(((training[0] > 0) & (training[0] < LARGEST_DEVIATION)).all()):
        return "the deviation of its input is not a number above zero"
    if norm.weight is None and not bool((weight > 0).all()):
        return "a batch norm without weight and bias cannot hold a scale that is not positive"
    if norm.bias is None and bool(((weight == 0) & (bias != 0)).any()):
        return "a batch norm without bias cannot hold a constant channel"
    return None


def training_vectors(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Deviation s of the input and own bias (C,) of a norm; None: it has none that a file must hold.

    Frozen norms are the same layer in training; one without weight and bias follows from the two vectors; of one that
    was loaded without them they are not known.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_var is None or norm.weight is None or is_known_folded(norm):
        return None
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    bias = torch.zeros_like(deviation) if norm.bias is None else norm.bias.detach().double()
    usable = bool(((deviation > 0) & (deviation < LARGEST_DEVIATION)).all()) and bool(torch.isfinite(bias).all())
    return (deviation, bias) if usable else None


def scale_of(norm: Layer, weight: Tensor) -> Tensor:
    """What `norm` multiplies its input with in evaluation, from the first vector (C,) of a file; float64."""
    return weight.double() / (1 + (float(norm.eps) or PLAIN_EPS)) ** 0.5


def unfold_norm(norm: Layer, weight: Tensor, bias: Tensor, training: tuple[Tensor, Tensor] | None = None) -> None:
    """Make `norm`, which has no `norm_problem` with them, compute what the two vectors (C,) of a file stand for; in
    place.

    Args:
        norm: with running statistics.
        weight: the first vector.
        bias: the second one.
        training: deviation of its input and own bias (C,), with which it is the same layer in training too.
    """
    eps = float(norm.eps)
    scale = scale_of(norm, weight)
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        if norm.weight is None:
            norm.running_var.copy_(scale**-2 - eps)
        else:
            if training is not None:
                norm.running_var.copy_((training[0].to(scale) ** 2 - eps).clamp_min(0))
            norm.weight.copy_(scale * (norm.running_var.double() + eps).sqrt())
        if norm.bias is None:
            norm.running_mean.copy_(torch.where(scale == 0, 0, -bias.double() / scale))
        elif training is None or norm.weight is None:
            norm.bias.copy_(bias)
        else:
            scale = norm.weight.double() / (norm.running_var.double() + eps).sqrt()
            norm.running_mean.copy_(torch.where(scale == 0, 0, (training[1].to(scale) - bias.double()) / scale))
            norm.bias.copy_(bias.double() + norm.running_mean.double() * scale)
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
    values = [value.clone() for value in _values(norm)]
    setattr(norm, _UNFOLDED, _Unfolded(weight=weight.cpu(), bias=bias.cpu(), eps=eps, values=values))


@dataclass(frozen=True)
class _Unfolded:
    """The two vectors of a file, and what a norm was made of them: 32-bit floats do not always lead back to the last
    bit."""

    weight: Tensor
    bias: Tensor
    eps: float
    values: list[Tensor]

    def is_still(self, norm: Layer) -> bool:
        """Whether `norm` has not changed since."""
        return norm.eps == self.eps and all(
            now.dtype == then.dtype and torch.equal(now, then)
            for now, then in zip(_values(norm), self.values, strict=True)
        )


def _values(norm: Layer) -> list[Tensor]:
    own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [tensor.detach().cpu() for tensor in own if tensor is not None]


class FoldedNormWarning:
    """A hook of norms whose file does not say how they train: the first one that is trained warns, once for all."""

    def __init__(self, source: str, names: Sequence[str]) -> None:
        """`names` are the norms in the file `source`."""
        self.source, self.names, self.told = source, tuple(names), False

    def __call__(self, norm: nn.Module, _: object) -> None:
        """Before the forward pass of `norm`."""
        if not norm.training or torch.compiler.is_compiling():
            return
        if not self.told:
            self.told = True
            warnings.warn(folded_text(self.source, self.names), stacklevel=2)
        set_known_whole(norm)  # what it learns from here on is its own


def folded_text(source: str, names: Sequence[str]) -> str:
    """What to say when the norms called `names` of the file `source` are trained."""
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"{source} holds {len(names)} batch norms folded into scale and shift ({listed}): they evaluate right, but in "
        "training mode they are other layers than those that were saved, so that training starts from a worse "
        "network. Rebuild their running statistics from training images first (train_* with "
        "--model.reestimate_norms True, or reestimate_norms of src.model_files.norm_estimation), or keep them in "
        "evaluation mode"
    )


def set_known_folded(norms: Mapping[str, Layer], source: str) -> None:
    """Have the norms of `source`, by name, warn when they are trained."""
    hook = FoldedNormWarning(source, list(norms))
    for norm in norms.values():
        set_known_whole(norm)
        norm.register_forward_pre_hook(hook)


def set_told(model: nn.Module) -> None:
    """The folded norms of `model` need not warn any more."""
    for norm in folded_norms(model).values():
        for hook in norm._forward_pre_hooks.values():
            if isinstance(hook, FoldedNormWarning):
                hook.told = True


def set_known_whole(norm: nn.Module) -> None:
    """`norm` does not warn (any more) when it is trained."""
    for key, hook in list(norm._forward_pre_hooks.items()):
        if isinstance(hook, FoldedNormWarning):
            del norm._forward_pre_hooks[key]


def is_known_folded(norm: nn.Module) -> bool:
    """Whether `norm` was loaded from its two vectors alone, and has not been trained since."""
    return any(isinstance(hook, FoldedNormWarning) for hook in norm._forward_pre_hooks.values())


def folded_norms(model: nn.Module) -> dict[str, Layer]:
    """The norms of `model` that are known to be folded, by name."""
    return {name: module for name, module in model.named_modules() if is_known_folded(module)}

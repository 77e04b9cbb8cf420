"""An architecture from nothing but what builds the network: its head is found by asking for other numbers of classes.

A layer that is sized by the classes has more rows in a network for more of them. The last such layer is the head; rows
are counted per class, as heads of detectors have several for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..common.errors import SettingsError
from .architecture import Architecture
from .structure import without_weights

Build = Callable[[int], nn.Module]


def with_heads(architecture: Architecture) -> Architecture:
    """`architecture` with the names of the layers that are sized by the classes.

    Raises:
        SettingsError: the network cannot be built, or has no layer of which its outputs could come.
    """
    n = architecture.n_classes
    small, large = (built_without_weights(architecture, number) for number in (n, n + 1))
    rows = {name: p.shape[0] for name, p in small.named_parameters() if p.dim() > 0}
    found: dict[str, tuple[int, int]] = {}
    for name, p in large.named_parameters():
        if p.dim() > 0 and rows.get(name, p.shape[0]) != p.shape[0]:
            found[name.rpartition(".")[0]] = (rows[name], p.shape[0] - rows[name])
    if not found:
        return _with_fixed_head(architecture, small)
    *beside, head = found
    count, per_class = found[head]
    return replace(
        architecture, head=head, heads_beside=tuple(beside), rows_per_class=per_class, more_rows=count - per_class * n
    )


def built_without_weights(architecture: Architecture, n_classes: int) -> nn.Module:
    """The network for `n_classes`, with shapes only.

    Raises:
        SettingsError: it cannot be built.
    """
    name = architecture.name
    try:
        model = without_weights(lambda: architecture.build(n_classes))
    except SettingsError:
        raise
    except Exception as error:  # what a user's own code or a package raises
        said = f"{type(error).__name__}: {first_line(error)}"
        raise SettingsError(f"model.arch: {name!r} cannot be built: {said}") from error
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model.arch: {name!r} makes a {type(model).__name__}, expected a torch module")
    return model


def first_line(error: BaseException) -> str:
    """What an exception says, in one short line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def _with_fixed_head(architecture: Architecture, model: nn.Module) -> Architecture:
    """The last layer with a weight, of a network whose number of classes nobody can choose."""
    layers = [
        (name, module.weight.shape[0])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d | nn.Conv3d)
    ]
    if not layers:
        raise SettingsError(f"model.arch: {architecture.name!r} has no linear layer and no convolution")
    head, n_classes = layers[-1]
    return replace(architecture, head=head, n_classes=n_classes, sizes_by_classes=False)


def frozen(build: Build) -> Build:
    """The same network with frozen batch norms of eps 0, as torchvision's detectors are published."""

    def make(n_classes: int) -> nn.Module:
        model = build(n_classes)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=0.0))
        return model

    return make

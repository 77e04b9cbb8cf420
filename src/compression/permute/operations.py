"""What a permutation of channels does to each type of layer: one table, keyed by type.

A *parent* produces the permuted channels: its output axis (and bias, and a norm's statistics) is indexed by p.
A *child* consumes them: its input axis is indexed by p. A depthwise convolution and a norm map channel i to channel i,
so they stand among the parents. A convolution with groups can take part where p leaves every channel within its group
(`blocks` gives their number). All indexing is done in place and without gradients: parameters stay the same objects,
with the same `requires_grad`, device and dtype.

Shapes: C_out, C_in channels, h, w kernel; F = C_in*h*w inputs of a linear layer that consumes a flattened feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from ...common.errors import GroupError
from ..quantize.subvectors import Layer

Reshape = tuple[int, ...] | None
"""(C_out, C_in, h, w) of a linear layer that consumes a flattened feature map; None for all other layers."""


def _one_block(_module: Layer) -> int:
    return 1


@dataclass(frozen=True)
class Side:
    """One side (output or input) of a layer type.

    Attributes:
        width: number of channels on this side.
        permute: index the channels by p (width,), in place.
        blocks: number of equal consecutive blocks that a permutation must not leave.
    """

    width: Callable[[Layer], int]
    permute: Callable[[Layer, Tensor], None]
    blocks: Callable[[Layer], int] = _one_block


def is_depthwise(module: Layer) -> bool:
    """A convolution that maps channel i to channel i."""
    return (
        isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        and module.groups == module.in_channels == module.out_channels
    )


def _index(tensor: Tensor | None, axis: int, p: Tensor) -> None:
    if tensor is not None:
        tensor.data.copy_(tensor.data.index_select(axis, p.to(tensor.device)))


def _index_within_groups(weight: Tensor, p: Tensor, groups: int) -> None:
    """Index axis 1 of a grouped weight: the rows of group g have channels g*C/G ... of that axis to themselves."""
    width = p.numel() // groups
    rows = weight.shape[0] // groups
    for g in range(groups):
        local = p[g * width : (g + 1) * width] - g * width
        part = weight.data[g * rows : (g + 1) * rows]
        part.copy_(part.index_select(1, local.to(part.device)))


def _weight_and_bias_out(module: Layer, p: Tensor) -> None:
    _index(module.weight, 0, p)
    _index(module.bias, 0, p)


def _conv_in(module: Layer, p: Tensor) -> None:
    if module.groups == 1:
        _index(module.weight, 1, p)
    else:
        _index_within_groups(module.weight, p, module.groups)


def _transposed_out(module: Layer, p: Tensor) -> None:
    if is_depthwise(module):
        _index(module.weight, 0, p)
    else:
        _conv_in(
            module, p
        )  # the weight is (C_in, C_out, h, w): the output axis is where a convolution has its input axis
    _index(module.bias, 0, p)


def _weight_rows(module: Layer, p: Tensor) -> None:
    _index(module.weight, 0, p)


def _linear_in(module: Layer, p: Tensor) -> None:
    _index(module.weight, 1, p)


def _norm_out(module: Layer, p: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _index(getattr(module, name, None), 0, p)


def _norm_width(module: Layer) -> int:
    return int((module.running_mean if module.running_mean is not None else module.weight).numel())


def _groups(module: Layer) -> int:
    """Blocks that a permutation must not leave; one for a depthwise convolution, whose rows follow its channels."""
    return 1 if is_depthwise(module) else int(module.groups)


def _attribute(name: str) -> Callable[[Layer], int]:
    return lambda module: int(getattr(module, name))


_NORM = Side(width=_norm_width, permute=_norm_out)

OUTPUT_SIDE: dict[type, Side] = {
    nn.Conv2d: Side(width=_attribute("out_channels"), permute=_weight_and_bias_out, blocks=_groups),
    nn.ConvTranspose2d: Side(width=_attribute("out_channels"), permute=_transposed_out, blocks=_groups),
    nn.Linear: Side(width=_attribute("out_features"), permute=_weight_and_bias_out),
    nn.PReLU: Side(width=_attribute("num_parameters"), permute=_weight_rows),
    FrozenBatchNorm2d: _NORM,
    _BatchNorm: _NORM,
}
INPUT_SIDE: dict[type, Side] = {
    nn.Conv2d: Side(width=_attribute("in_channels"), permute=_conv_in, blocks=_groups),
    nn.ConvTranspose2d: Side(width=_attribute("in_channels"), permute=_weight_rows, blocks=_groups),
    nn.Linear: Side(width=_attribute("in_features"), permute=_linear_in),
}


def flattened_input(reshape: tuple[int, ...]) -> Side:
    """The input of a linear layer that consumes a flattened feature map: h*w neighbouring inputs move with each
    channel."""

    def permute(module: Layer, p: Tensor) -> None:
        view = module.weight.data.view(reshape)
        view.copy_(view.index_select(1, p.to(view.device)))

    return Side(width=lambda _module: reshape[1], permute=permute)


def side_of(name: str, module: Layer, role: str) -> Side:
    """The table row of `module` as a `parent` or a `child`.

    Raises:
        GroupError: layers of this type cannot take that role.
    """
    table = OUTPUT_SIDE if role == "parent" else INPUT_SIDE
    for kind, side in table.items():
        if isinstance(module, kind):
            if role == "child" and is_depthwise(module):
                raise GroupError(
                    f"{name} is a depthwise convolution: it maps channel i to channel i, so list it (and its norm) "
                    "under parents"
                )
            return side
    known = ", ".join(sorted({"BatchNorm" if kind is _BatchNorm else kind.__name__ for kind in table}))
    raise GroupError(f"{name} is a {type(module).__name__}, which cannot be a {role}; possible: {known}")


def check_reshape(name: str, module: Layer, reshape: tuple[int, ...]) -> None:
    """Check that `reshape` (C_out, C_in, h, w) describes the weight of a linear layer.

    Raises:
        GroupError: it does not.
    """
    if not isinstance(module, nn.Linear):
        raise GroupError(
            f"permutation_specs.{name}.reshape is for linear layers that read a flattened map; {name} is a "
            f"{type(module).__name__}"
        )
    if len(reshape) < 3 or reshape[0] != module.out_features or math.prod(reshape[1:]) != module.in_features:
        raise GroupError(
            f"permutation_specs.{name}.reshape: {list(reshape)} does not fit the weight ({module.out_features}, "
            f"{module.in_features}) of {name}; "
            f"expected [{module.out_features}, channels, height, width] with channels*height*width = "
            f"{module.in_features}"
        )


def check_permutation(p: Tensor, width: int, n_blocks: int) -> None:
    """Check that p is a permutation of `width` channels that stays within `n_blocks` equal blocks.

    Raises:
        GroupError: it is not.
    """
    if p.shape != (width,) or not torch.equal(p.sort().values, torch.arange(width)):
        raise GroupError(f"expected a permutation of {width} channels, got a tensor of shape {tuple(p.shape)}")
    size = width // n_blocks
    if not torch.equal(p // size, torch.arange(width) // size):
        raise GroupError(f"the permutation moves channels out of the {n_blocks} blocks of a convolution with groups")

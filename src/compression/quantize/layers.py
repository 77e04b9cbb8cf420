"""Layers whose weight is a codebook and codes.

The codebook is the only trained parameter of a quantized layer besides its bias; the codes are a buffer and never
change. In training the weight is dequantized in every forward pass, and the gradient of a centroid is the sum of the
gradients of the subvectors that use it (paper section 3.4). Where no gradient is needed the dequantized weight is kept,
so that inference runs at the speed of the dense layer.

Shapes: R rows, m subvectors per row, d subvector length, k centroids. codes_matrix (R, m), codebook (k, d).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .members import Dequantize, Members
from .subvectors import Layer, bits_per_code, from_subvectors

CODES_DTYPE = torch.int32


def _version(tensor: Tensor) -> tuple[Any, ...]:
    """Equal as long as nothing was written into `tensor` and it was not moved or replaced."""
    # tensors made in inference mode cannot be changed outside it and count no versions
    return (
        id(tensor),
        tensor.data_ptr(),
        tensor.dtype,
        tensor.device,
        -1 if tensor.is_inference() else tensor._version,
    )


class QuantizedLayer(nn.Module):
    """What quantized layers share: codebook, codes, and the dequantized weight, which is kept in evaluation.

    Attributes:
        codebook: parameter (k, d).
        codes_matrix: buffer (R, m) int32, values below k.
        weight_shape: shape of the dequantized weight.
    """

    codebook: nn.Parameter
    codes_matrix: Tensor
    bias: nn.Parameter | None
    # geometry of the dense layer, as far as its type has it
    in_channels: int
    out_channels: int
    kernel_size: Any
    stride: Any
    padding: Any
    output_padding: Any
    dilation: Any
    groups: int
    padding_mode: str

    def _set_up(self, dense: Layer, d: int, k: int) -> None:
        """Make room for codes and codebook of `dense`'s shape; the values come from `set_codes` or a file."""
        bits_per_code(k)
        weight: Tensor = dense.weight
        self.weight_shape = tuple(weight.shape)
        row = weight.shape[1:].numel()
        if row % d:
            raise ValueError(f"subvector size {d} does not divide the row length {row}")
        self.codebook = nn.Parameter(
            torch.zeros(k, d, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad
        )
        self.register_buffer(
            "codes_matrix", torch.zeros(weight.shape[0], row // d, dtype=CODES_DTYPE, device=weight.device)
        )
        self.register_parameter("bias", dense.bias)
        self.channels_last = False
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        self._members: tuple[tuple[Any, ...], Members] | None = None
        self.training = dense.training

    @property
    def k(self) -> int:
        """Number of centroids."""
        return self.codebook.shape[0]

    @property
    def d(self) -> int:
        """Length of a subvector."""
        return self.codebook.shape[1]

    @property
    def memory_format(self) -> torch.memory_format:
        """How a 4-d weight is laid out when it is dequantized."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def set_codes(self, codebook: Tensor, codes: Tensor) -> None:
        """Copy a codebook (k, d) and codes (R*m,) or (R, m) in.

        Raises:
            ValueError: a shape does not fit, or a code is not below k.
        """
        if codebook.shape != self.codebook.shape or codes.numel() != self.codes_matrix.numel():
            raise ValueError(
                f"expected codebook {tuple(self.codebook.shape)} and {self.codes_matrix.numel()} codes, got "
                f"{tuple(codebook.shape)} and {codes.numel()}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.k):
            raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} for {self.k} centroids")
        with torch.no_grad():
            self.codebook.copy_(codebook)
            self.codes_matrix.copy_(codes.reshape(self.codes_matrix.shape))
        self._kept = None

    def dequantize(self) -> Tensor:
        """The weight with the codebook as it is trained; differentiable with respect to the codebook."""
        return self._dequantize(self.codebook)

    def _dequantize(self, codebook: Tensor) -> Tensor:
        members = self.members() if torch.is_grad_enabled() and codebook.requires_grad else None
        weight = from_subvectors(Dequantize.apply(codebook, self.codes_matrix.view(-1), members), self.weight_shape)
        return weight.contiguous(memory_format=self.memory_format) if weight.dim() == 4 else weight

    def members(self) -> Members:
        """The subvectors of each centroid, sorted when first asked for and again if the codes were replaced."""
        key = _version(self.codes_matrix)
        if self._members is None or self._members[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._members = (key, Members.of(self.codes_matrix.reshape(-1), self.k))
        return self._members[1]

    @property
    def weight(self) -> Tensor:
        """The weight to compute with.

        Training: dequantized anew. Eval: dequantized from the codebook as a file stores it (16-bit floats), so that
        what is measured is what is saved, and kept while codebook and codes do not change.
        """
        if self.training:
            self._kept = None
            return self.dequantize()
        if torch.is_grad_enabled() and self.codebook.requires_grad:
            self._kept = None  # a step may follow, and fused optimizers count no versions
            return self.dequantize_stored()
        key = (*_version(self.codebook), *_version(self.codes_matrix), self.memory_format)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # free the old one before the new one is made
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (key, self.dequantize_stored())
        return self._kept[1]

    def dequantize_stored(self) -> Tensor:
        """The weight with the codebook rounded to 16-bit floats; the gradient passes the rounding unchanged."""
        rounded = self.codebook.to(torch.float16).to(self.codebook.dtype)
        codebook = (
            self.codebook + (rounded - self.codebook).detach()
            if self.codebook.requires_grad and torch.is_grad_enabled()
            else rounded
        )
        return self._dequantize(codebook)

    def train(self, mode: bool = True) -> QuantizedLayer:
        """Set the mode; the kept weight is dropped."""
        self._kept = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_kept"] = state["_members"] = None
        return state

    def _coded_repr(self) -> str:
        return f"k={self.k}, d={self.d}, codes={tuple(self.codes_matrix.shape)}"


class QuantizedConv2d(QuantizedLayer):
    """A convolution with a quantized weight; same geometry as the dense layer it replaces."""

    def __init__(self, dense: nn.Conv2d, d: int, k: int) -> None:
        super().__init__()
        self._set_up(dense, d, k)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            setattr(self, name, getattr(dense, name))
        self._reversed_padding = list(dense._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        weight, bias = self.weight, self.bias
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding, mode=self.padding_mode)
            return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Geometry and coding."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}, "
            f"{self._coded_repr()}"
        )


class QuantizedConvTranspose2d(QuantizedLayer):
    """A transposed convolution with a quantized weight, cut as it is stored (first axis = input channels)."""

    def __init__(self, dense: nn.ConvTranspose2d, d: int, k: int) -> None:
        super().__init__()
        self._set_up(dense, d, k)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "output_padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            setattr(self, name, getattr(dense, name))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        # torch's own method; it reads nothing of the layer but `output_padding`
        geometry: Any = self
        padding = nn.ConvTranspose2d._output_padding(
            geometry, x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )

    def extra_repr(self) -> str:
        """Geometry and coding."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}, "
            f"{self._coded_repr()}"
        )


class QuantizedLinear(QuantizedLayer):
    """A linear layer with a quantized weight."""

    def __init__(self, dense: nn.Linear, d: int, k: int) -> None:
        super().__init__()
        self._set_up(dense, d, k)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Geometry and coding."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._coded_repr()}"


QUANTIZED_LAYERS: dict[type, Any] = {
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
}
"""The quantized form of each dense layer type."""


def set_memory_format(model: nn.Module, channels_last: bool) -> nn.Module:
    """Lay out the weights of 4-d convolutions, dequantized ones included, channels last or contiguous; in place."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.channels_last = channels_last
            module._kept = None
    return model.to(memory_format=layout)

"""Bits of a network, dense or quantized (paper section 4; the golden figures of the tables).

Counted: codebooks at 16 bits per value, or at 8 with a scale of 32, codes at log2(k) bits, a batch norm as two vectors,
everything else at its own width. MB are 2^20 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..compression.quantize.layers import QuantizedLayer, own_tensors
from ..compression.quantize.subvectors import Layer, bits_per_code, codebook_size
from .norms import is_folded_norm


@dataclass(frozen=True)
class ModelSize:
    """Bits of a network by what they hold, and of the dense network it came from."""

    codes: int
    codebooks: int
    other: int
    original: int

    @property
    def bits(self) -> int:
        """All bits."""
        return self.codes + self.codebooks + self.other

    @property
    def megabytes(self) -> float:
        """MB = 2^20 bytes."""
        return self.bits / 8 / 2**20

    @property
    def ratio(self) -> float:
        """Original / compressed."""
        return self.original / self.bits

    def summary(self) -> str:
        """One line with the exact bits, MB and ratio."""
        return (
            f"{self.bits:,} bits (codes {self.codes:,}; codebooks {self.codebooks:,}; other {self.other:,}) "
            f"= {self.megabytes:.2f} MB, {self.ratio:.2f}x smaller than {self.original:,} bits "
            f"({self.original / 8 / 2**20:.2f} MB)"
        )


def tensor_bits(tensor: Tensor) -> int:
    """Bits of a tensor at its own width."""
    return tensor.numel() * tensor.element_size() * 8


def model_size(model: nn.Module) -> ModelSize:
    """Count the bits of `model`. Tensors that are shared count once; buffers that are not saved do not count."""
    codes = codebooks = other = original = 0
    seen: set[int] = set()

    def first_time(tensor: Tensor) -> bool:
        new = id(tensor) not in seen
        seen.add(id(tensor))
        return new

    module: Layer
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            if first_time(module.codebook):
                codebooks += codebook_size(module.codebook.numel(), module.codebook_bits, module.has_scale)
                codes += module.codes_matrix.numel() * bits_per_code(module.k)
                original += module.codes_matrix.numel() * module.d * module.codebook.element_size() * 8
        elif is_folded_norm(module):
            width = module.running_mean
            if first_time(width):
                other += 2 * tensor_bits(width)
                original += 2 * tensor_bits(width)
            continue
        for tensor in own_tensors(module).values():
            if first_time(tensor):
                other += tensor_bits(tensor)
                original += tensor_bits(tensor)
    return ModelSize(codes=codes, codebooks=codebooks, other=other, original=original)

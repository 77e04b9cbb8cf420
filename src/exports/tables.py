"""A quantized weight as Core ML stores it: a table of vectors that run along one axis, and codes of whole bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..compression.quantize.layers import QuantizedLayer

CODE_BITS = (1, 2, 3, 4, 6, 8)
"""What a code may take in a package."""
LARGEST_K = 1 << CODE_BITS[-1]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """A quantized weight.

    Attributes:
        bits: of a code.
        codes: uint8, the shape of the weight with the vectors' axis divided by their length d.
        values: (2^bits, d) float16, float32 or int8: the codebook, filled up with zeros.
        factor: what the values are multiplied by; None: nothing.
        axis: along which the vectors run.
        shape: what the decoded array has to be reshaped to; None: it has the weight's shape.
    """

    bits: int
    codes: Array
    values: Array
    factor: np.float32 | None
    axis: int
    shape: tuple[int, ...] | None


def bits_of_code(k: int) -> int:
    """Bits that a code takes where there are k centroids, of which there are at most `LARGEST_K`."""
    return next(bits for bits in CODE_BITS if k <= 1 << bits)


def vector_axis(layer: QuantizedLayer) -> int | None:
    """The axis of the weight along which its subvectors run; None: they are kernels of several values, and run along
    the second axis of a matrix (rows, values of a row)."""
    if layer.layout == "output":
        return 0
    shape = layer.weight_shape
    last = max((axis for axis, size in enumerate(shape) if size > 1), default=1)
    return last if last >= 1 and shape[last] % layer.d == 0 else None


def table_of(layer: QuantizedLayer) -> Table:
    """Table and codes of a layer with at most `LARGEST_K` centroids; they decode to its weight to the last bit."""
    stored, scale = layer.stored_codebook().cpu(), layer.stored_scale()
    if scale is not None and layer.codebook_bits == 16:
        stored, scale = stored.float() * scale.cpu(), None
    bits = bits_of_code(layer.k)
    values = torch.zeros(1 << bits, layer.d, dtype=stored.dtype)
    values[: layer.k] = stored
    axis, shape = vector_axis(layer), layer.weight_shape
    if axis is None:
        codes_shape = tuple(layer.codes_matrix.shape)
    else:
        codes_shape = (*shape[:axis], shape[axis] // layer.d, *shape[axis + 1 :])
    return Table(
        bits=bits,
        codes=layer.codes_matrix.cpu().numpy().reshape(codes_shape).astype(np.uint8),
        values=values.numpy(),
        factor=None if scale is None else np.float32(float(scale)),
        axis=1 if axis is None else axis,
        shape=shape if axis is None else None,
    )

"""Names of a network that share a tensor: a packed file holds it once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..compression.quantize.layers import QuantizedLayer
from .norms import NORM_VECTORS, is_folded_norm
from .pth import key_of


def tied_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of `state` whose tensor another name holds already -> that name."""
    first: dict[Any, str] = {}
    tied = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own: dict[str, Any]
        if is_folded_norm(module):
            own = {name: (id(module.running_mean), id(module), name) for name in NORM_VECTORS}
        else:
            own = {
                name: id(tensor)
                for name, tensor in [*module._parameters.items(), *module._buffers.items()]
                if tensor is not None
            }
        if isinstance(module, QuantizedLayer):
            own.setdefault("codebook_scale", (id(module.codebook), "scale"))  # of 8-bit values, which no buffer holds
        for name, key in own.items():
            full = key_of(prefix, name)
            if full in state and first.setdefault(key, full) != full:
                tied[full] = first[key]
    return tied

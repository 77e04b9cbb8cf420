"""The dense network that a quantized one stands for."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import QuantizedLayer
from .placing import dense_name


def dequantized_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the dense network that computes what `model` computes in evaluation: every codebook and its
    codes as a weight."""
    state = dict(model.state_dict())
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            start = f"{prefix}." if prefix else ""
            for own in ("codebook", "codes_matrix", "codebook_scale"):
                state.pop(start + own, None)
            state[dense_name(prefix, module)] = module.dequantize_stored().detach().contiguous()
    return state

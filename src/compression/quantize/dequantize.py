"""The dense network that a quantized one stands for."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import QuantizedLayer, dense_type
from .placing import QuantizedHost, QuantizedParameter, dense_name
from .weights import SUFFIX

_OWN = (
    *("layout", "weight_shape", "quantized_kind", "has_scale", "codebook_bits", "channels_last"),
    "keeps_weight",
    *("_kept", "_seen", "_members", "_has_zeros"),
)


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


def dense_again(model: nn.Module) -> nn.Module:
    """Turn a quantized network into the dense one that computes the same in evaluation, in place; weights that were
    tied are tied again."""
    made: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, QuantizedLayer):
            continue
        if id(layer.codebook) not in made:
            weight = layer.dequantize_stored().detach().clone()
            made[id(layer.codebook)] = nn.Parameter(weight, layer.codebook.requires_grad)
        parameter = made[id(layer.codebook)]
        if isinstance(layer, QuantizedParameter):
            prefix, _, leaf = name.rpartition(".")
            _put_back_below(model.get_submodule(prefix), leaf, parameter)
        else:
            _put_back(layer, parameter)
    return model


def _put_back(layer: QuantizedLayer, weight: nn.Parameter) -> None:
    """Make the module what it was, with `weight`."""
    parameters = dict(layer._parameters)
    del parameters["codebook"]
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, **parameters})
    for name in ("codes_matrix", "codebook_scale"):
        layer._buffers.pop(name, None)
    for name in _OWN:
        layer.__dict__.pop(name, None)
    layer.__class__ = dense_type(layer)


def _put_back_below(host: nn.Module, holder: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the module that held it quantized."""
    del host._modules[holder]
    host._parameters[holder.removesuffix(SUFFIX)] = parameter
    if any(isinstance(child, QuantizedParameter) for child in host.children()):
        return
    if isinstance(host, QuantizedHost):
        host.__class__ = dense_type(host)
    if isinstance(host, nn.RNNBase):
        host._init_flat_weights()

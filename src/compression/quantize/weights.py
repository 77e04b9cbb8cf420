"""Which parameters of a network are weights, and where they live.

A weight is a parameter of two axes or more that its module multiplies inputs with, or looks up: of convolutions,
transposed ones, linear and bilinear layers, embeddings, attention and recurrent layers, and of any subclass of these.
Any other parameter is quantized only where it is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from .subvectors import Layer

_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag), "weight"),
    ((nn.MultiheadAttention,), "in_proj_weight|[qkv]_proj_weight"),
    ((nn.RNNBase, nn.RNNCellBase), "weight_(ih|hh|hr)(_l[0-9]+(_reverse)?)?"),
)
"""Kinds of modules, and the names of their weights."""


@dataclass(frozen=True)
class WeightPlace:
    """Where a parameter lives.

    Attributes:
        host: the module whose parameter it is.
        attribute: its name there.
        name: what the plan and files call it: that of the module for its `weight`, else `module.attribute`.
        below: whether codebook and codes get a module of their own below the host, named `attribute` + `SUFFIX`.
    """

    host: Layer
    attribute: str
    name: str
    below: bool

    @property
    def parameter(self) -> Tensor:
        """The parameter."""
        return self.host._parameters[self.attribute]

    @property
    def kernel_area(self) -> int:
        """Values of a kernel per pair of channels; 1 for everything but convolutions."""
        return math.prod(self.host.kernel_size) if isinstance(self.host, _ConvNd) else 1

    @property
    def is_convolution(self) -> bool:
        """Whether it is the weight of a convolution."""
        return isinstance(self.host, _ConvNd)

    @property
    def kind(self) -> str:
        """The type of its module, with the parameter's name where that is not `weight`."""
        own = getattr(type(self.host), "_dense_type", type(self.host)).__name__
        return own if self.attribute == "weight" else f"{own}.{self.attribute}"


def matrices(model: nn.Module) -> Iterator[WeightPlace]:
    """Every parameter of two axes or more, each place once, in the network's order; parameters that share a tensor are
    places of their own."""
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, UninitializedParameter) or parameter.dim() < 2:
                continue
            below = attribute != "weight" or bool(taken_names(module))
            name = ".".join(filter(None, (prefix, attribute))) if below else prefix
            yield WeightPlace(host=module, attribute=attribute, name=name, below=below)


SUFFIX = "_quantized"
"""Ends the name of a module that holds codebook and codes of one of its host's parameters."""

RESERVED = frozenset(
    (
        *(
            "k",
            "d",
            "layout",
            "weight_shape",
            "quantized_kind",
            "channels_last",
            "codebook",
            "codes_matrix",
            "set_codes",
        ),
        "keeps_weight",
        *(
            "forget",
            "codebook_scale",
            "has_scale",
            "codebook_bits",
            "stored_codebook",
            "stored_scale",
            "dequantize",
            "dequantize_stored",
            "check_codes",
            "members",
            "computed",
        ),
    )
)
"""What a quantized layer adds to its module."""


def taken_names(module: nn.Module) -> set[str]:
    """Names that a quantized layer would add, but that the module has already for something of its own."""
    own = set(vars(module)) | set(module._parameters) | set(module._buffers) | set(module._modules)
    return {name for name in RESERVED if name in own or hasattr(type(module), name)}


def find_weight(modules: Mapping[str, nn.Module], name: str) -> WeightPlace | None:
    """The parameter that a plan or file calls `name`; None: there is no such parameter.

    Args:
        modules: of the network by name (`named_modules`, without duplicates or with).
        name: of a module, for its `weight`, or `module.attribute`, with or without `SUFFIX`.
    """
    module = modules.get(name)
    attribute = "weight"
    if module is None:
        prefix, _, attribute = name.removesuffix(SUFFIX).rpartition(".")
        module = modules.get(prefix)
    parameter = None if module is None else module._parameters.get(attribute)
    if module is None or parameter is None or isinstance(parameter, UninitializedParameter) or parameter.dim() < 2:
        return None
    return WeightPlace(host=module, attribute=attribute, name=name, below=name not in modules)


def why_dense(place: WeightPlace) -> str | None:
    """Why a parameter is not quantized unless it is named; None: it is."""
    host, attribute = place.host, place.attribute
    if not place.parameter.is_floating_point():
        return f"holds {str(place.parameter.dtype).removeprefix('torch.')}"
    if isinstance(host, torch.jit.ScriptModule):
        return "belongs to a compiled TorchScript module"
    if getattr(host, "max_norm", None) is not None and isinstance(host, nn.Embedding | nn.EmbeddingBag):
        return "is rescaled in place by max_norm"
    if getattr(host, "sparse", False) and isinstance(host, nn.Embedding | nn.EmbeddingBag):
        return "is trained with sparse gradients"
    for types, names in _KINDS:
        if isinstance(host, types) and re.fullmatch(names, attribute):
            return None
    if re.fullmatch("weight_(orig|g|v)", attribute) or isinstance(host, ParametrizationList):
        return "is what another weight is computed from"
    return f"is a parameter of a {type(host).__name__}, which is quantized only where layer_specs names it"

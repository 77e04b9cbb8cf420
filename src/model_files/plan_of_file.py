"""Which layers a published file has quantized, and how: every codebook says its k and d, and the shape of the codes
along what subvectors run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ..common.errors import CheckpointError
from ..compression.quantize.plan import LayerPlan, Plan
from ..compression.quantize.weights import find_weight
from .pth import scaled


def plan_of(model: nn.Module, state: Mapping[str, Tensor], source: str) -> Plan:
    """Which layers of `model` a published file has quantized, and how: every codebook says its k and d.

    Raises:
        CheckpointError: the file quantizes something that the network cannot quantize so.
    """
    modules = dict(model.named_modules())
    layers = {}
    for key in state:
        name, _, leaf = key.rpartition(".")
        host, _, _ = name.rpartition(".")
        if leaf != "codes_matrix" or (name not in modules and host not in modules):
            continue  # a layer that the network does not have is reported with all keys that do not fit
        if name in modules and _has(modules[name], leaf):
            continue  # a layer that the network does not have is reported with all keys that do not fit
        codebook = state.get(f"{name}.codebook")
        place = find_weight(modules, name)
        fits = codebook is not None and codebook.dim() == 2 and min(codebook.shape) >= 1
        k, d = codebook.shape if fits and codebook is not None else (0, 1)
        layout = None if place is None else _layout(tuple(place.parameter.shape), d, state[key])
        if place is None or k < 2 or k & (k - 1) or layout is None:
            kind = type(modules.get(name, modules.get(host))).__name__ if place is None else place.kind
            raise CheckpointError(
                f"{source} does not fit the network: layer {name!r} cannot be a quantized {kind} with the codebook "
                "that the file holds"
            )
        layers[name] = LayerPlan(name=name, d=d, k=k, k_means_type="kmeans", k_means_n_iters=0, layout=layout)
    return scaled(Plan(layers=layers, notes=()), state, source)


def _layout(shape: tuple[int, ...], d: int, codes: Tensor) -> str | None:
    """Along what the subvectors of a weight of this shape run, told by the rows of its codes; None: d does not fit."""
    rows, row = shape[0], math.prod(shape[1:])
    if rows % d == 0 and d > 1 and tuple(codes.shape) == (rows // d, row):
        return "output"
    return "input" if row % d == 0 else None


def _has(module: nn.Module, name: str) -> bool:
    """Whether a tensor of the module itself bears the name."""
    return name in module._parameters or name in module._buffers

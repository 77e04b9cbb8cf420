"""When the weights of a quantized network are decoded in evaluation: once, at every use, or in a compiled graph."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from ..architectures.detector_outputs import is_detector
from ..common.compiler import check_compiler
from ..common.errors import SettingsError
from ..compression.quantize.layers import QuantizedLayer

Decode = Literal["kept", "each_forward", "compiled"]
"""kept: each weight is decoded once and kept, as large as the dense one. each_forward: a weight is decoded when its
module runs and given up after that, so that codebooks, codes and the weight of one module are all that is held.
compiled: torch.compile puts the decoding into the network's graph, which keeps no weight either; of torchvision's
detectors the backbone is compiled, and the rest decodes as with each_forward."""


def check_decode(decode: str, device: torch.device | str, key: str = "decode") -> None:
    """Check that weights can be decoded so.

    Args:
        decode: when.
        device: where the network will run.
        key: what the user calls it, for messages.

    Raises:
        SettingsError: it is none of the three, or there is no compiler for `compiled`.
    """
    if decode not in get_args(Decode):
        raise SettingsError(f"{key} = {decode!r}: expected one of {', '.join(get_args(Decode))}")
    if decode == "compiled":
        check_compiler(f"{key} compiled", device, f"Install a C++ compiler, or use {key} each_forward or kept")


def set_decode(model: nn.Module, decode: Decode) -> nn.Module:
    """Choose when the weights of a network are decoded in evaluation; in place. Training always decodes anew.

    What is computed does not depend on it, but for the rounding of what a compiler fuses. Codes that were averaged in
    place are noticed by `kept` only: seeing that takes a copy of them.

    Args:
        model: the network; its dense parts stay as they are.
        decode: when.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.keeps_weight = decode == "kept"
            module.forget()
    if decode == "compiled":
        # which boxes a detector goes on with depends on values, and no graph holds that
        part: Any = model.backbone if is_detector(model) else model
        part.compile()
    return model

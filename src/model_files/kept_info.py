"""What files say about a network, remembered beside it in memory."""

from __future__ import annotations

from torch import nn

from .metadata import ModelInfo


def keep_info(model: nn.Module, info: ModelInfo) -> None:
    """Remember `info` beside a network; copies of it keep it too."""
    vars(model)["_pqf_info"] = info


def info_of(model: nn.Module) -> ModelInfo:
    """What is remembered beside a network; an empty one where nothing is."""
    found = vars(model).get("_pqf_info")
    return found if isinstance(found, ModelInfo) else ModelInfo()

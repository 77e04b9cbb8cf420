"""Engines by name, and the device a run computes on. To add an engine: one file, and its name here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..compression.finetune.task import Engine
from ..errors import SettingsError
from .single import SingleProcess

ENGINES: dict[str, Callable[[torch.device], Engine]] = {"single": SingleProcess}


def pick_device(name: str) -> torch.device:
    """The device called `name`: `auto` (CUDA, else Apple's MPS, else CPU), `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        SettingsError: this machine or this torch build does not have it.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    missing = {"cuda": not torch.cuda.is_available(), "mps": not has_mps}.get(device.type, False)
    if missing:
        raise SettingsError(
            f"device: {name} was asked for, but torch {torch.__version__} finds no {device.type} device here; use --device auto or cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device: {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices (numbered from 0)")
    return device


def make(name: str, device: torch.device) -> Engine:
    """The engine called `name` (`auto` picks by how the process was launched; there is one way so far)."""
    return ENGINES["single" if name == "auto" else name](device)

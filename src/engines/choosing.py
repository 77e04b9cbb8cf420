"""The engine of a run, and the device it computes on."""

from __future__ import annotations

import torch

from ..common.errors import SettingsError
from . import launch
from .engine import Engine
from .registry import ENGINES


def pick_device(name: str) -> torch.device:
    """The device called `name`: `auto` (CUDA, else Apple's MPS, else CPU), `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        SettingsError: this machine or this torch build does not have it.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        several = launch.here().world_size > 1  # MPS serves one process only
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps and not several else "cpu")
    device = torch.device(name)
    missing = {"cuda": not torch.cuda.is_available(), "mps": not has_mps}.get(device.type, False)
    if missing:
        raise SettingsError(
            f"device: {name} was asked for, but torch {torch.__version__} finds no {device.type} device here; use "
            "--device auto or cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device: {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices (numbered from 0)"
        )
    return device


def make(name: str, device: torch.device) -> Engine:
    """The engine called `name`; `auto` picks by how the process was launched.

    Raises:
        SettingsError: there is no such engine, it does not fit how this process was launched, or it cannot start.
    """
    started = launch.here()
    if name not in ("auto", *ENGINES):
        raise ENGINES.unknown(name, "engine:", more=("auto",))
    if name not in ("auto", started.engine):
        how = (
            f"by {started.engine}, as one of {started.world_size}"
            if ENGINES.fact(started.engine, "launchers")
            else "on its own, without a launcher"
        )
        raise SettingsError(
            f"engine: {name} was asked for, but this process was started {how}. Start it with "
            f"`{ENGINES.fact(name, 'start')}`, or use --engine auto"
        )
    return ENGINES[started.engine](started, device)

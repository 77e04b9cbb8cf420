"""Architectures by name. To add one: a file with its `Architecture`s, and their names here."""

from __future__ import annotations

from ..common.errors import SettingsError
from .architecture import Architecture
from .maskrcnn import MASKRCNN
from .resnet import RESNETS

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in (*RESNETS, MASKRCNN)}


def get(name: str, task: str) -> Architecture:
    """The architecture called `name`, for `task` ("classification" or "detection").

    Raises:
        SettingsError: unknown, or for another task; lists what exists.
    """
    known = sorted(a.name for a in ARCHITECTURES.values() if a.task == task)
    if name not in ARCHITECTURES or ARCHITECTURES[name].task != task:
        raise SettingsError(f"model.arch: {name!r} is not known for {task}; known: {', '.join(known)}")
    return ARCHITECTURES[name]

"""Architectures by name. To add one: a file with its `Architecture`, and its entry here."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import SettingsError
from ..common.registry import Entry, Registry, did_you_mean

if TYPE_CHECKING:
    from .architecture import Architecture

CLASSIFICATION, DETECTION = {"task": "classification"}, {"task": "detection"}

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    {
        "resnet18": Entry(".architectures.resnet:RESNET18", "ResNet-18", CLASSIFICATION),
        "resnet34": Entry(".architectures.resnet:RESNET34", "ResNet-34", CLASSIFICATION),
        "resnet50": Entry(".architectures.resnet:RESNET50", "ResNet-50", CLASSIFICATION),
        "resnet101": Entry(".architectures.resnet:RESNET101", "ResNet-101", CLASSIFICATION),
        "resnet50ssl": Entry(".architectures.resnet:RESNET50SSL", "ResNet-50, semi-supervised weights", CLASSIFICATION),
        "maskrcnn": Entry(".architectures.maskrcnn:MASKRCNN", "Mask R-CNN with ResNet-50 and FPN", DETECTION),
    },
)


def check(name: str, task: str | None) -> None:
    """Check as far as possible without loading anything that `name` is an architecture for `task` (None: any).

    Raises:
        SettingsError: unknown, or for another task; lists what exists.
    """
    if name in ARCHITECTURES:
        if task in (None, ARCHITECTURES.fact(name, "task")):
            return
    elif ":" in name or name in _torchvisions():
        return
    known = sorted(ARCHITECTURES if task is None else ARCHITECTURES.names(task=task))
    others = "torchvision's models, timm:NAME, package.module:callable"
    near = "" if name in ARCHITECTURES else did_you_mean(name, [*known, *_torchvisions()])
    raise SettingsError(
        f"model.arch: {name!r} is not known{f' for {task}' if task else ''}; known: {', '.join(known)}, {others}{near}"
    )


def _torchvisions() -> list[str]:
    """The names of torchvision's models, read from its sources: importing it takes seconds, as it loads torch."""
    found = importlib.util.find_spec("torchvision")
    sources = Path(found.origin).parent.glob("models/**/*.py") if found is not None and found.origin else ()
    names = [
        given or function
        for source in sorted(sources)
        for given, function in _REGISTERED.findall(source.read_text(encoding="utf-8"))
    ]
    if names:
        return sorted(names)
    from torchvision.models import list_models  # installed without sources

    return list_models()


_REGISTERED = re.compile(r'^@register_model\((?:name="(\w+)")?\)\n(?:[@ )].*\n)*def (\w+)', re.MULTILINE)


def get(name: str, task: str) -> Architecture:
    """The architecture called `name`, for `task`. Raises SettingsError as `check`, or it cannot be built."""
    from .named import find

    check(name, task)
    return find(name, task)

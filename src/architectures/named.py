"""Architectures by any name: ours, torchvision's, timm's, or what builds a user's own network.

`resnet18`; `torchvision:mobilenet_v2`, or `mobilenet_v2` where no architecture of ours has the name; `timm:NAME`;
`package.module:callable`, called with `num_classes=` where it takes that. Who names a callable runs its code: names
from files are not looked up so unless the user said the same name (`is_code`).
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ..common.errors import SettingsError
from ..common.registry import did_you_mean
from . import ARCHITECTURES
from .architecture import Architecture
from .found import first_line, frozen, with_heads

TORCHVISION, TIMM = "torchvision:", "timm:"
_TASKS = {"detection": "detection", "segmentation": "segmentation"}
_FROZEN_WITHOUT_EPS = (
    "fasterrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn",
)  # fmt: skip
"""Networks whose published weights torchvision loads into frozen norms with an eps of 0. No file says which eps its
norms had; other frozen norms of torchvision keep theirs."""
_OTHER_PARTS = ("video", "optical_flow", "quantization")


def find(name: str, task: str | None = None) -> Architecture:
    """The architecture that `name` means.

    Args:
        name: as `model.arch` takes it.
        task: what it is wanted for; None: anything. A callable is taken to be for that.

    Raises:
        SettingsError: there is none of that name, it cannot be built, or it is for another task.
    """
    if name in ARCHITECTURES:
        architecture = ARCHITECTURES[name]
    elif name.startswith(TIMM):
        architecture = _timm(name)
    elif name.startswith(TORCHVISION):
        architecture = _torchvision(name, name.removeprefix(TORCHVISION))
    elif is_code(name):
        architecture = _callable(name, task or "classification")
    else:
        architecture = _torchvision(name, name)
    if task is not None and architecture.task != task:
        known = sorted(ARCHITECTURES.names(task=task))
        raise SettingsError(
            f"model.arch: {name!r} is a network for {architecture.task}, and one for {task} is wanted here; known: "
            f"{', '.join(known)}, and torchvision's"
        )
    return architecture


def is_code(name: str) -> bool:
    """Whether a name is that of a callable, which has to be imported and run."""
    return ":" in name and not name.startswith((TORCHVISION, TIMM))


def canonical(name: str) -> str:
    """The name under which files remember an architecture: torchvision's with their prefix."""
    return name if name in ARCHITECTURES or ":" in name else TORCHVISION + name


def _torchvision(name: str, own_name: str) -> Architecture:
    from torchvision import models

    if own_name not in models.list_models():
        ours, theirs = list(ARCHITECTURES), models.list_models()
        near = did_you_mean(own_name, [*ours, *theirs])
        raise SettingsError(
            f"model.arch: {name!r} is not known; there are {', '.join(ours)}, torchvision's models (such as "
            f"mobilenet_v2), timm:NAME, and package.module:callable{near}"
        )
    builder = models.get_model_builder(own_name)
    part = builder.__module__.split(".")[2]
    if part in _OTHER_PARTS:
        raise SettingsError(
            f"model.arch: {name!r} is one of torchvision's models for {part.replace('_', ' ')}; classification, "
            "detection and segmentation models go by name, others through the Python interface"
        )
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if own_name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # it takes most of a minute, and a warning asks for a choice
        options["transform_input"] = True  # as the published ones, which take other means and deviations inside
    weights = models.get_model_weights(own_name)
    if own_name.startswith("vit_"):  # as large as its table of positions
        options["image_size"] = _side_of_torchvision(next(iter(weights), None) and weights.DEFAULT)
    best = next(iter(weights), None) and weights.DEFAULT
    build = partial(_built_by_torchvision, builder, options)
    task = _TASKS.get(part, "classification")
    architecture = Architecture(
        name=TORCHVISION + own_name,
        task=task,
        build=build,
        weights_url="" if best is None else best.url,
        n_classes=len(best.meta["categories"]) if best is not None else 91 if task == "detection" else 1000,
        head="",
        groups=None,
        build_frozen=frozen(build, 0.0 if own_name in _FROZEN_WITHOUT_EPS else None) if task == "detection" else None,
        image_size=_side_of_torchvision(best),
        normalisation=_normalisation(None if best is None else best.transforms()),
        download=None if best is None or task == "detection" else partial(_torchvision_weights, builder, best),
    )
    return with_heads(architecture)


def _torchvision_weights(builder: Callable[..., nn.Module], best: Any, progress: bool) -> dict[str, Tensor]:
    """The published weights under the names of today's layers: the builder renames those of older files."""
    try:
        return dict(builder(weights=best, progress=progress).state_dict())
    except (URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = getattr(error, "reason", None) or first_line(error)
        raise SettingsError(
            f"model.weights: pretrained: cannot load {best.url} ({why})."
            f"\n  Put the file into {Path(torch.hub.get_dir()) / 'checkpoints'} by hand, or name a state dict of your "
            "own with --model.weights PATH, or start from random weights with --model.weights none."
        ) from error


def _built_by_torchvision(builder: Callable[..., nn.Module], options: dict[str, Any], n_classes: int) -> nn.Module:
    return builder(num_classes=n_classes, **options)


def _side_of_torchvision(weights: Any) -> int:
    """The side of the images that published weights were measured on."""
    found = None if weights is None else getattr(weights.transforms(), "crop_size", None)
    return int(found[0]) if isinstance(found, list | tuple) and found else 224


def _normalisation(source: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that torchvision's transforms, or timm's description of weights, say."""
    mean, std = getattr(source, "mean", None), getattr(source, "std", None)
    return None if mean is None or std is None else (tuple(map(float, mean)), tuple(map(float, std)))


def _timm(name: str) -> Architecture:
    try:
        import timm
    except ImportError as error:
        raise SettingsError(
            f"model.arch: {name!r} needs timm ({error}). Install it with: pip install 'pqf[timm]', or pip install timm"
        ) from error
    own_name = name.removeprefix(TIMM)
    known = timm.list_models()
    if own_name.partition(".")[0] not in known:
        raise SettingsError(f"model.arch: timm has no model {own_name!r}{did_you_mean(own_name, known)}")
    config = timm.get_pretrained_cfg(own_name)
    size = getattr(config, "input_size", None) or (3, 224, 224)
    n_classes = int(getattr(config, "num_classes", 0) or 1000)
    return with_heads(
        Architecture(
            name=name,
            task="classification",
            build=lambda n: timm.create_model(own_name, pretrained=False, num_classes=n),
            weights_url="",
            n_classes=n_classes,
            head="",
            groups=None,
            image_size=int(size[-1]),
            normalisation=_normalisation(config),
            download=lambda _progress: _timm_weights(name, own_name),
        )
    )


def _timm_weights(name: str, own_name: str) -> dict[str, Tensor]:
    import timm

    try:
        model = timm.create_model(own_name, pretrained=True)
    except Exception as error:  # no network, no such weights, a damaged file: every library below has its own
        raise SettingsError(
            f"model.weights: pretrained: timm cannot load the weights of {name} ({first_line(error)}). Name a state "
            "dict of your own with --model.weights PATH, or start from random weights with --model.weights none."
        ) from error
    return dict(model.state_dict())


def _callable(name: str, task: str) -> Architecture:
    make = _imported(name)
    takes_classes = _takes_classes(make)
    build: Callable[[int], nn.Module] = (lambda n: make(num_classes=n)) if takes_classes else (lambda _: make())
    architecture = Architecture(
        name=name, task=task, build=build, weights_url="", n_classes=_default_classes(make), head="", groups=None
    )
    return with_heads(architecture)


def _imported(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module_name) or not re.fullmatch(r"\w+(\.\w+)*", attribute):
        raise SettingsError(f"model.arch: {name!r}: expected package.module:callable")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise SettingsError(
            f"model.arch: {name!r}: cannot import {module_name} ({error}). Start the command from the folder that "
            "holds it, or install it"
        ) from error
    except AttributeError as error:
        raise SettingsError(f"model.arch: {name!r}: {module_name} has no {attribute}") from error
    if not callable(found):
        raise SettingsError(f"model.arch: {name!r} is a {type(found).__name__}, expected a function or class")
    return found


def _takes_classes(make: Callable[..., nn.Module]) -> bool:
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _default_classes(make: Callable[..., nn.Module]) -> int:
    try:
        default = inspect.signature(make).parameters["num_classes"].default
    except (TypeError, ValueError, KeyError):
        return 1000
    return default if type(default) is int and default > 0 else 1000

"""Questions about loaded settings: is a path still a placeholder, which keys take no effect, how do they look as
text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from ..architectures import ARCHITECTURES
from ..common.errors import SettingsError
from .keys import Path, walk
from .model_schema import CompressionSettings
from .overrides import locate
from .reach import CLASSIFICATION, DETECTION, unread
from .schema import Settings

_PLACEHOLDER = re.compile(r"<your_\w+_here>")


def is_placeholder(value: object) -> bool:
    """True for `<your_imagenet_path_here>` and its like."""
    return isinstance(value, str) and bool(_PLACEHOLDER.fullmatch(value))


def value_of(settings: Settings, dotted_key: str) -> Any:
    """The value of a dotted key; layer names in it may contain dots.

    Raises:
        KeyError: there is no such key, or the layer is not in its map.
    """
    here: Any = settings
    for part in locate(dotted_key):
        here = here[part] if isinstance(here, dict) else getattr(here, part)
    return here


def require(settings: Settings, dotted_key: str) -> str:
    """The text that a key holds, which the job cannot do without.

    Raises:
        SettingsError: the key is null or still a placeholder; the message says where and how to set it.
    """
    value = value_of(settings, dotted_key)
    if value is not None and not is_placeholder(value):
        return str(value)
    state = "is not set" if value is None else f"is still the placeholder {value}"
    where = f"in {settings.file}" if settings.file else "in the settings file"
    raise SettingsError(f"{dotted_key} {state}: set it {where}, or add --{dotted_key} VALUE to the command")


def ineffective(settings: Settings, job: str | None = None) -> list[str]:
    """One warning for each key that differs from its default and yet has no effect beside the other settings.

    Files are shared by jobs: what only another job than `job` reads is mentioned where the command line gives it.
    """
    changed = []
    for reason, keys in _without_effect(settings):
        for key in keys:
            value, default = value_of(settings, key), value_of(_DEFAULTS, key)
            if value != default and not is_placeholder(value):
                changed.append(f"{key} has no effect: {reason}")
    if job is not None:
        other = [key for key in unread(job, None) if given_on_command_line(settings, key)]
        changed += [f"{key} has no effect: it is not read by this command" for key in other]
    return list({line.partition(" ")[0]: line for line in reversed(changed)}.values())[::-1]


_DEFAULTS = Settings()


def _without_effect(settings: Settings) -> Iterator[tuple[str, list[str]]]:
    schedule, model = settings.lr_scheduler.type, settings.model
    if settings.optimizer == "adam":
        yield "only optimizer sgd has a momentum", ["momentum"]
    idle = {
        "cosine": ["patience", "factor", "milestones"],
        "plateau": ["milestones", "last_epoch"],
        "multistep": ["min_lr", "patience"],
        "none": ["min_lr", "patience", "factor", "milestones", "last_epoch"],
    }
    yield f"lr_scheduler.type {schedule} does not use it", [f"lr_scheduler.{key}" for key in idle[schedule]]
    task = ARCHITECTURES.fact(model.arch, "task") or CLASSIFICATION
    trained_on = {CLASSIFICATION: "images in folders", DETECTION: "COCO"}
    yield f"{model.arch} is trained on {trained_on[task]}", unread(None, task)
    search = [
        "model.search",
        "model.search_seconds",
        "model.sls_iterations",
        "model.permutations",
        "model.permutation_specs",
    ]
    if not model.use_compression:
        compression = [f"model.compression_parameters.{key}" for key in CompressionSettings.model_fields]
        yield "model.use_compression is False", [*compression, *search]
    elif not model.use_permutations:
        yield "model.use_permutations is False", search
    elif model.search == "published":
        yield "model.search is published", ["model.search_seconds"]
    if settings.engine == "single":
        yield "engine single is one process", ["scale_learning_rate", "sync_batch_norm"]
    expected, values = settings.expected, ("accuracy", "box_ap", "mask_ap")
    # where one was set to null on purpose, the check was switched off, and its tolerance with it
    if all(getattr(expected, name) is None and name not in expected.model_fields_set for name in values):
        yield "no expected value is set", ["expected.tolerance"]


def to_yaml(settings: Settings) -> str:
    """All settings, defaults included, as a settings file that loads back to equal ones."""
    tree = settings.model_dump(mode="json")
    model = tree["model"]
    for specs in (model["compression_parameters"]["layer_specs"], model["permutation_specs"]):
        for layer, spec in specs.items():
            specs[layer] = {key: value for key, value in spec.items() if value is not None}
    if model["permutations"] is not None:
        model["permutations"] = [
            [{"parents": group["parents"]}, {"children": group["children"]}] for group in model["permutations"]
        ]
    text = _dump(tree, allow_unicode=True)
    # PyYAML leaves these three characters bare inside quotes, where reading them back makes them line breaks
    return _dump(tree, allow_unicode=False) if re.search("[\x85\u2028\u2029]", text) else text


def _dump(tree: dict[str, Any], allow_unicode: bool) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120, allow_unicode=allow_unicode)


def given_on_command_line(settings: Settings, dotted_key: str) -> bool:
    """Whether the command line set a key, or one below it, or the section that holds it."""
    wanted = tuple(dotted_key.split("."))
    return any(path[: len(wanted)] == wanted[: len(path)] for path in settings.command_line)


def explicit_keys(settings: Settings) -> list[str]:
    """Dotted keys that the file or the command line set, layers' own keys left out."""

    def was_set(path: Path) -> bool:
        here: Any = settings
        for part in path:
            if part not in here.model_fields_set:
                return False
            here = getattr(here, part)
        return True

    return [".".join(path) for path, _ in walk() if "<layer>" not in path and was_set(path)]

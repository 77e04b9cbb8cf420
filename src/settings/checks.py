"""Questions about loaded settings: is a path still a placeholder, which keys take no effect, how do they look as
text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from ..architectures import ARCHITECTURES
from ..common.errors import SettingsError
from ..compression.finetune.registry import OPTIMIZERS, SCHEDULES
from ..compression.permute.registry import SEARCHES
from ..engines.registry import ENGINES
from .data_schema import CalibrationSettings
from .finetune_schema import DistillationSettings
from .keys import LAYER, Path, walk
from .model_schema import BudgetSettings, CompressionSettings
from .overrides import locate
from .reach import CLASSIFICATION, COMPRESS, DETECTION, EVALUATE, unread
from .reach import keys as keys_and_readers
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


def ineffective(settings: Settings, job: str | None = None, task: str | None = None) -> list[str]:
    """One warning for each key that differs from its default and yet has no effect beside the other settings.

    Files are shared by jobs: what `job` (on `task`) does not read is mentioned only where the command line gives it.
    """
    reasons = dict.fromkeys(_given_in_vain(settings, job, task), "it is not read by this command")
    defaults = Settings(recipe=settings.recipe)
    for reason, keys in _without_effect(settings, job, task):
        for key in keys:
            value = value_of(settings, key)
            differs = value != value_of(defaults, key) or (key == USE and given_on_command_line(settings, key))
            if differs and not is_placeholder(value):
                reasons.setdefault(key, reason)
    return [f"{key} has no effect: {reason}" for key, reason in reasons.items()]


def _given_in_vain(settings: Settings, job: str | None, task: str | None) -> Iterator[str]:
    """The keys that the command line gives and the job does not read, although another job on the task does."""
    for key in keys_and_readers():
        if key.is_read_by(job, task) or not key.is_read_by(None, task):
            continue
        if LAYER not in key.path:
            if given_on_command_line(settings, key.dotted):
                yield key.dotted
            continue
        *above, layer = key.path.index(LAYER), key.path[-1]
        for path in sorted(settings.command_line):
            if len(path) == len(key.path) and path[: above[0]] == key.path[: above[0]] and path[-1] == layer:
                yield ".".join(path)


USE = "calibration.use"
"""Its default asks for something, and so does whoever gives it."""
CHOSEN_BY_SIZE = ("k", "fc_subvector_size", "pw_subvector_size", "large_subvectors")


def _without_effect(settings: Settings, job: str | None, task: str | None) -> Iterator[tuple[str, list[str]]]:
    schedule, model = settings.lr_scheduler.type, settings.model
    for key in OPTIMIZERS.unread(settings.optimizer):
        yield f"only optimizer {' or '.join(OPTIMIZERS.readers(key))} has a {key}", [key]
    yield (
        f"lr_scheduler.type {schedule} does not use it",
        [f"lr_scheduler.{key}" for key in SCHEDULES.unread(schedule)],
    )
    task = ARCHITECTURES.fact(model.arch, "task") or task or CLASSIFICATION
    trained_on = {CLASSIFICATION: "images in folders", DETECTION: "COCO"}
    if job != COMPRESS:
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
        budget = [f"compression.{key}" for key in BudgetSettings.model_fields]
        unused = [*compression, *search, *budget, "codebook_learning_rate", "model.decode"]
        yield "model.use_compression is False", unused
    elif not model.use_permutations:
        yield "model.use_permutations is False", search
    else:
        yield f"model.search is {model.search}", [f"model.{key}" for key in SEARCHES.unread(model.search)]
    wanted = settings.compression
    if wanted.size is None and wanted.ratio is None:
        if not wanted.plan:
            yield "neither compression.size nor compression.ratio is given", ["compression.count"]
    elif model.use_compression:
        by = "size" if wanted.size is not None else "ratio"
        yield f"compression.{by} chooses it", [f"model.compression_parameters.{key}" for key in CHOSEN_BY_SIZE]
    yield from _without_effect_on_calibration(settings, job)
    yield from _of_distillation(settings)
    if settings.dataloader.crop == "random_resized":
        yield "dataloader.crop is random_resized", ["dataloader.crop_padding"]
    yield f"engine {settings.engine} is one process", ENGINES.unread(settings.engine)
    expected, values = settings.expected, ("accuracy", "box_ap", "mask_ap")
    # where one was set to null on purpose, the check was switched off, and its tolerance with it
    if all(getattr(expected, name) is None and name not in expected.model_fields_set for name in values):
        yield "no expected value is set", ["expected.tolerance"]


def _of_distillation(settings: Settings) -> Iterator[tuple[str, list[str]]]:
    given = settings.distillation
    if not given.weight:
        unused = [key for key in DistillationSettings.model_fields if key != "weight"]
        yield "distillation.weight is 0", [f"distillation.{key}" for key in unused]
        return
    if not given.labels:
        yield "distillation.labels is 0, so that labels are not learnt from", ["label_smoothing"]
    if not given.features:
        yield "distillation.features is 0", ["distillation.stages"]
    if given.images is None:
        yield "distillation.images is not set", ["distillation.images_per_batch"]


def _without_effect_on_calibration(settings: Settings, job: str | None) -> Iterator[tuple[str, list[str]]]:
    given = settings.calibration
    keys = [f"calibration.{key}" for key in CalibrationSettings.model_fields if key != "image_size"]
    if job == EVALUATE:  # which does not read them
        return
    if not settings.model.use_compression and job != COMPRESS:
        yield "model.use_compression is False", keys
    elif not given.use:
        yield "calibration.use is False", [key for key in keys if key != USE]
    elif given.images is None and job == COMPRESS:
        yield "calibration.images is not set", [key for key in keys if key != USE]


def to_yaml(settings: Settings) -> str:
    """All settings, defaults included, as a settings file that loads back to equal ones."""
    tree = settings.model_dump(mode="json")
    model = tree["model"]
    for specs in (model["compression_parameters"]["layer_specs"], model["permutation_specs"]):
        for layer, spec in specs.items():
            specs[layer] = {key: value for key, value in spec.items() if value is not None}
    if isinstance(model["permutations"], list):
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

    return [".".join(path) for path, _ in walk() if LAYER not in path and was_set(path)]

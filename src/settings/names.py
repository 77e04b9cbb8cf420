"""The types of keys that hold a name from a registry."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ..architectures import ARCHITECTURES
from ..common.registry import Entry, Registry
from ..compression.finetune.registry import OPTIMIZERS, SCHEDULES
from ..compression.permute.registry import SEARCHES, STEPS
from ..compression.quantize.registry import QUANTIZERS
from ..engines.registry import ENGINES
from ..tasks.augmentation_names import AUGMENTATIONS
from ..tasks.coco.backends import BACKENDS
from ..tasks.sources import BY_TASK
from .values import listed, names_of


def told(registry: Registry[Any]) -> str:
    """What each name in a registry is, as a sentence."""
    return "; ".join(f"{name}: {entry.about}" for name, entry in registry.entries.items()) + "."


def _architectures(task: str | None) -> Mapping[str, Entry]:
    names = ARCHITECTURES if task is None else ARCHITECTURES.names(task=task)
    return {name: ARCHITECTURES.entries[name] for name in names}


def _sources(task: str | None) -> Mapping[str, Entry]:
    wanted = [sources for of_task, sources in BY_TASK.items() if task in (None, of_task)]
    return {name: entry for sources in reversed(wanted) for name, entry in sources.entries.items()}


if TYPE_CHECKING:
    ArchitectureName: TypeAlias = str
    AugmentationName: TypeAlias = str
    BackendName: TypeAlias = str
    EngineName: TypeAlias = str
    OptimizerName: TypeAlias = str
    QuantizerName: TypeAlias = str
    ScheduleName: TypeAlias = str
    SearchName: TypeAlias = str
    SourceName: TypeAlias = str
    StepName: TypeAlias = str
else:
    ArchitectureName = listed(_architectures)
    AugmentationName = names_of(AUGMENTATIONS)
    BackendName = names_of(BACKENDS)
    EngineName = names_of(ENGINES, "auto")
    OptimizerName = names_of(OPTIMIZERS)
    QuantizerName = names_of(QUANTIZERS)
    ScheduleName = names_of(SCHEDULES)
    SearchName = names_of(SEARCHES)
    SourceName = listed(_sources)
    StepName = names_of(STEPS)

"""Which commands read which keys: a command's help lists what it reads, and what has no effect on it is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from .keys import LAYER, Path, layer_section_of, section_of, walk
from .read_by import CLASSIFICATION, COMPRESS, DETECTION, EVALUATE, JOBS, TASKS, TRAIN, ReadBy
from .schema import Section, Settings

__all__ = ["CLASSIFICATION", "COMPRESS", "DETECTION", "EVALUATE", "JOBS", "TASKS", "TRAIN", "Key", "keys", "unread"]


@dataclass(frozen=True)
class Key:
    """A key of the settings and who reads it.

    Attributes:
        path: its parts; `<layer>` holds the place of a layer's name.
        field: type, default and meaning.
        jobs: `train`, `evaluate`, `compress`.
        tasks: `classification`, `detection`.
        but_not: pairs of them that do not read it all the same.
    """

    path: Path
    field: FieldInfo
    jobs: tuple[str, ...]
    tasks: tuple[str, ...]
    but_not: tuple[tuple[str, str], ...] = ()

    @property
    def dotted(self) -> str:
        """As it is written on a command line."""
        return ".".join(self.path)

    def is_read_by(self, job: str | None, task: str | None) -> bool:
        """Whether a command reads it; None stands for any job or task."""
        of_job, of_task = job is None or job in self.jobs, task is None or task in self.tasks
        return of_job and of_task and (job, task) not in self.but_not


def keys() -> Iterator[Key]:
    """Every key, in the order of the schema."""
    for path, field in walk():
        marks = list(_marks(path))
        yield Key(
            path=path,
            field=field,
            jobs=tuple(job for job in JOBS if all(job in mark.jobs for mark in marks)),
            tasks=tuple(task for task in TASKS if all(task in mark.tasks for mark in marks)),
            but_not=tuple(pair for mark in marks for pair in mark.but_not),
        )


def _marks(path: Path) -> Iterator[ReadBy]:
    """The marks of a key and of the sections that it is in."""
    section: type[Section] | None = Settings
    for part in path:
        if part == LAYER or section is None:
            continue
        field = section.model_fields[part]
        yield from (mark for mark in field.metadata if isinstance(mark, ReadBy))
        section = section_of(field) or layer_section_of(field)


def unread(job: str | None, task: str | None) -> list[str]:
    """The keys that a command does not read, layers' own keys left out."""
    return [key.dotted for key in keys() if LAYER not in key.path and not key.is_read_by(job, task)]

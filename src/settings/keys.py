"""The tree of keys that the schema spans: finding a dotted key in it, and the nearest key to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from .schema import Settings
from .section import Section

LAYER = "<layer>"
Path = tuple[str, ...]


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section a key opens, or None for a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def layer_section_of(field: FieldInfo) -> type[Section] | None:
    """The section that every layer has in a map from layer names, or None for anything else."""
    if get_origin(field.annotation) is not dict:
        return None
    kind = get_args(field.annotation)[1]
    return kind if kind is not NoneType and issubclass(kind, Section) else None


def walk(section: type[Section] = Settings, prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every value's path and field, a section's own values first; a layer's place is held by `<layer>`."""
    inner: list[tuple[type[Section], Path]] = []
    for name, field in section.model_fields.items():
        below, layers = section_of(field), layer_section_of(field)
        if below or layers:
            inner.append((below, (*prefix, name)) if below else (layers or Section, (*prefix, name, LAYER)))
        else:
            yield (*prefix, name), field
    for below, place in inner:
        yield from walk(below, place)


@cache
def leaves() -> tuple[str, ...]:
    """Every dotted key that holds a value."""
    return tuple(".".join(path) for path, _ in walk())


def resolve(path: Path) -> tuple[type[Section] | None, FieldInfo | None]:
    """What stands at a path whose layer names are single parts.

    Returns:
        The section and no field where the path ends at a section (or at a layer's); no section and the field where it
        ends at a value or at a map of layers; twice None where the schema has no such key.
    """
    section: type[Section] | None = Settings
    field: FieldInfo | None = None
    for part in path:
        if section is not None:
            field = section.model_fields.get(part)
            if field is None:
                return None, None
            section = section_of(field)
        elif field is not None and (section := layer_section_of(field)):
            field = None
        else:
            return None, None
    return (section, None) if section else (None, field)


def advice(path: Path) -> str:
    """`did you mean ...?` for a path that the schema does not have, or the keys that exist beside it."""
    nearest = _nearest(path)
    if nearest:
        return f"did you mean {nearest}?"
    section, _ = resolve(path[:-1])
    return "known keys here: " + ", ".join((section or Settings).model_fields)


def _nearest(path: Path) -> str | None:
    dotted, name = ".".join(path), path[-1]

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, dotted, key).ratio()

    same_name = [key for key in leaves() if key.rpartition(".")[2] == name]
    if same_name:
        return max(same_name, key=likeness)
    section, _ = resolve(path[:-1])
    if section:
        close = difflib.get_close_matches(name, section.model_fields, n=1)
        if close:
            return ".".join((*path[:-1], close[0]))
    close = difflib.get_close_matches(dotted, leaves(), n=1)
    if close and not section:  # beside known keys the shared beginning would make anything look alike
        return close[0]
    names = {key.rpartition(".")[2]: key for key in reversed(leaves())}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return names[close[0]] if close else None

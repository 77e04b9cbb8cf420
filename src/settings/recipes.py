"""What `recipe` stands for: the defaults of some keys. A key that the file or the command line sets wins.

To let a recipe decide about another key, enter it here; its default in the schema is that of `best`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .section import Section

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "best": {
        "model.search": "best",
        "calibration.use": True,
        "distillation.weight": 1.0,
        "codebook_learning_rate": 0.5,
    },
    "published": {
        "model.search": "published",
        "calibration.use": False,
        "distillation.weight": 0.0,
        "codebook_learning_rate": 1.0,
    },
}
"""By recipe: dotted key -> its default."""


def told() -> str:
    """The recipes in words, for the help."""
    parts = (
        f"of {recipe}: " + ", ".join(f"{key} {value}" for key, value in keys.items())
        for recipe, keys in RECIPES.items()
    )
    return f"Defaults {'; '.join(parts)}."


def put_defaults(settings: Section, recipe: str) -> None:
    """Give keys that nobody set the defaults of a recipe; sections that somebody else may hold are copied first.

    Such a key still counts as one that nobody set.
    """
    for dotted, value in RECIPES[recipe].items():
        *sections, name = dotted.split(".")
        if name in _at(settings, sections).model_fields_set or getattr(_at(settings, sections), name) == value:
            continue
        here = settings
        for section in sections:
            vars(here)[section] = getattr(here, section).model_copy()  # they are frozen
            here = getattr(here, section)
        vars(here)[name] = value


def _at(settings: Section, sections: list[str]) -> Section:
    for section in sections:
        settings = getattr(settings, section)
    return settings

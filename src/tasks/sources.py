"""Where images come from, by name (`dataloader.source`). To add a dataset: a function that writes it as a folder, and
its entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..common.registry import Entry, Registry

Sources = Registry[Callable[[Path], None]]
"""Functions that fill a folder where it is not yet there. The fact `written`: they do; the user's own folder must
exist."""

FOLDER = Entry(".tasks.sources:use_folder", "read the path as it is")
WRITTEN = {"written": True}

SOURCES: Sources = Registry(
    "dataset",
    {
        "folder": FOLDER,
        "digits": Entry(".tasks.demo_data.digits:write_digits", "scikit-learn's digits", WRITTEN),
        "digit_crops": Entry(".tasks.demo_data.digit_crops:write_digit_crops", "digits cut out of scenes", WRITTEN),
    },
)
"""One folder per class."""
SCENES: Sources = Registry(
    "dataset",
    {
        "folder": FOLDER,
        "digits": Entry(".tasks.demo_data.digit_scenes:write_digit_scenes", "scenes of digits", WRITTEN),
    },
)
"""COCO's layout."""
BY_TASK = {"classification": SOURCES, "detection": SCENES}


def use_folder(root: Path) -> None:
    """The user's own folder: there is nothing to prepare."""


def check(source: str, key: str = "dataloader.source", sources: Sources = SOURCES) -> None:
    """Raises SettingsError: there is no such source."""
    if source not in sources:
        raise sources.unknown(source, f"{key}:")


def prepare(source: str, root: str | Path, key: str = "dataloader.source", sources: Sources = SOURCES) -> None:
    """Have the folder `root` filled by the source of that name, where it is not yet there. Raises SettingsError as
    `check`."""
    check(source, key, sources)
    sources[source](Path(root))

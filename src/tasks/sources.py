"""Where images come from. To add a dataset: one function that writes it as a folder, and its name here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..common.errors import SettingsError
from .demo_data.digit_crops import write_digit_crops
from .demo_data.digit_scenes import write_digit_scenes
from .demo_data.digits import write_digits


def use_folder(root: Path) -> None:
    """The user's own folder: there is nothing to prepare."""


Sources = Mapping[str, Callable[[Path], None]]

SOURCES: Sources = {"folder": use_folder, "digits": write_digits, "digit_crops": write_digit_crops}
"""One folder per class."""
SCENES: Sources = {"folder": use_folder, "digits": write_digit_scenes}
"""COCO's layout."""


def prepare(source: str, root: str | Path, key: str = "dataloader.source", sources: Sources = SOURCES) -> None:
    """Have the folder `root` filled by the source of that name, where it is not yet there.

    Raises:
        SettingsError: there is no such source.
    """
    if source not in sources:
        raise SettingsError(f"{key}: {source!r} is not known; there are {', '.join(sources)}")
    sources[source](Path(root))

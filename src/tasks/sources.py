"""Where an image folder comes from. To add a dataset: one function that writes it as an image folder, and its name here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import SettingsError
from .digits import write_digits


def use_folder(root: Path) -> None:
    """The user's own folder: there is nothing to prepare."""


SOURCES: dict[str, Callable[[Path], None]] = {"folder": use_folder, "digits": write_digits}


def prepare(source: str, root: str | Path, key: str = "dataloader.source") -> None:
    """Have the folder `root` filled by the source of that name, where it is not yet there.

    Raises:
        SettingsError: there is no such source.
    """
    if source not in SOURCES:
        raise SettingsError(f"{key}: {source!r} is not known; there are {', '.join(SOURCES)}")
    SOURCES[source](Path(root))

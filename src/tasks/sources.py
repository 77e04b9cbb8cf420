"""Where images come from, by name (`dataloader.source`). To add a dataset: a function that writes it as a folder, and
its entry here.

What a folder of the user's own holds (folders of classes, shards, a data set that was saved) is seen by looking at it;
`hf:NAME` in its place is a data set of the Hugging Face hub.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from ..common.errors import SettingsError
from ..common.hub import on_hub
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


HUB_NAME = re.compile(r"hf:[\w.-]+(/[\w.-]+){0,2}", re.ASCII)
SAVED_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev", "test")}
"""What the splits are called in data sets of the `datasets` package, the first that is there."""
PACKAGE = "datasets"
INSTALL = f"pip install 'pqf[huggingface]', or pip install {PACKAGE}"


def is_saved(folder: Path) -> bool:
    """Whether the `datasets` package saved a data set there, or several splits of one (`save_to_disk`)."""
    splits = (folder / name for names in SAVED_SPLITS.values() for name in names)
    return (folder / "dataset_dict.json").is_file() or any(map(is_saved_split, (folder, *splits)))


def is_saved_split(folder: Path) -> bool:
    """Whether the `datasets` package saved a data set there, and not several splits."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def check_package(path: str | Path, key: str) -> None:
    """Whatever is at `path` can be read, as far as packages are concerned.

    Args:
        path: a folder, or the name of a data set on the hub.
        key: of the settings that names it.

    Raises:
        SettingsError: it is no name that the hub can have, or needs a package that is not installed.
    """
    if on_hub(path):
        if not HUB_NAME.fullmatch(str(path)):
            raise SettingsError(
                f"{key}: {path} is no name of a data set; expected hf:OWNER/NAME, or hf:OWNER/NAME/CONFIGURATION"
            )
    elif not is_saved(Path(path)):
        return
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:  # a folder of that name that is no package
        raise SettingsError(f"{key}: {path} is a data set of the package {PACKAGE}, which is not installed: {INSTALL}")

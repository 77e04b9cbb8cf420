"""Image data sets of Hugging Face's `datasets`, saved in a folder (`save_to_disk`) or from the hub: the one file that
imports that package.

Its tables are Arrow files on the disk, also those that come from the hub. They are listed once, with the place of every
image, and then read by row as they were stored: what decodes an image is the same as for folders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..common.errors import DataError, SettingsError
from ..common.hub import HUB, on_hub
from .places import inside
from .sources import INSTALL, PACKAGE, SAVED_SPLITS, is_saved_split
from .tables import images_in, open_table

OFFLINE = (
    "Where there is no network: on a machine with one, datasets.load_dataset(NAME).save_to_disk(FOLDER), copy that, "
    "and name the folder"
)


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None: the only one of its type.

    Attributes:
        image, label: the names.
    """

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Rows:
    """The images of one split.

    Attributes:
        folder: that all tables are in.
        places: of the images.
        labels: whole numbers; below 0 or None: there is none.
        classes: their names; empty: the data set has none.
    """

    folder: Path
    places: list[str]
    labels: list[int | None]
    classes: tuple[str, ...] = ()


def list_rows(where: Path | str, splits: Sequence[str], columns: Columns, key: str) -> list[Rows]:
    """The images of the wanted splits, with their labels.

    Args:
        where: a folder, or a name on the hub.
        splits: `train`, `val`.
        columns: to read.
        key: of the settings that names it.

    Raises:
        DataError: it cannot be read or fetched, there is no such split, or no such columns.
        SettingsError: the package is not installed.
    """
    found = _load(where, key)
    rows = []
    for split in splits:
        name = next((name for name in SAVED_SPLITS[split] if name in found), None)
        if name is None:
            raise DataError(
                f"{key}: {where} has no split for {split}; expected {' or '.join(SAVED_SPLITS[split])}, and there are: "
                f"{', '.join(found)}. datasets' train_test_split makes two of one."
            )
        rows.append(_rows(found[name], f"{where} ({name})", columns, key, labelled=True))
    return rows


def list_unlabelled(where: Path | str, key: str) -> Rows:
    """The images of a data set, without labels: those of its split `train`, or of all where it has none called so;
    raises as `list_rows`."""
    found = _load(where, key)
    names = ["train"] if "train" in found else list(found)
    rows = [_rows(found[name], f"{where} ({name})", Columns(), key, labelled=False) for name in names]
    places = list(chain.from_iterable(one.places for one in rows))
    return Rows(Path(os.path.commonpath([one.folder for one in rows])), places, [])


def _load(where: Path | str, key: str) -> dict[str, Any]:
    """The splits of a data set, by name."""
    try:
        import datasets

        load, fetch = datasets.load_from_disk, datasets.load_dataset
    except (ImportError, AttributeError) as error:  # another module of that name
        raise SettingsError(f"{key}: {where} needs the package {PACKAGE}, which is not installed: {INSTALL}") from error
    hub = isinstance(where, str) and on_hub(where)
    try:
        if hub:
            owner, _, rest = str(where).removeprefix(HUB).partition("/")
            name, _, configuration = rest.partition("/")
            found = fetch(f"{owner}/{name}" if name else owner, configuration or None)
        else:
            folder = Path(where)
            one = {"train": folder} if is_saved_split(folder) else {}
            several = {split.name: split for split in sorted(folder.iterdir()) if is_saved_split(split)}
            found = {name: load(str(place), keep_in_memory=False) for name, place in (one or several).items()}
    except MemoryError:
        raise
    except Exception as error:  # of the network, the hub, or files: the package promises no kinds
        said = " ".join(str(error).split()) or type(error).__name__
        what = "cannot be fetched" if hub else "cannot be read"
        raise DataError(f"{key}: {where} {what}: {said.rstrip('.')}. {OFFLINE if hub else 'Save it again'}.") from error
    return dict(found)


def _rows(split: Any, name: str, columns: Columns, key: str, labelled: bool) -> Rows:
    import datasets

    image = _one_column(split, name, columns, "image", key, labelled)
    files = [one["filename"] for one in split.cache_files]
    try:
        tables = [open_table(file) for file in files]
    except OSError as error:
        raise DataError(f"{key}: {name} cannot be read: {error}. Save it again.") from error
    if not files or sum(table.num_rows for table in tables) != len(split):
        raise DataError(f"{key}: {name} is not stored row by row; save it with save_to_disk and name that folder")
    places = [place for file, table in zip(files, tables, strict=True) for place in _places(file, table, image, key)]
    folder = Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
    if not labelled:
        return Rows(folder, places, [])
    label = _one_column(split, name, columns, "label", key, labelled)
    feature = split.features[label]
    numbers = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    if not (numbers or isinstance(feature, datasets.ClassLabel)):
        raise DataError(
            f"{key}: column {label!r} of {name} holds no labels but {feature}; expected ClassLabel or whole numbers. "
            "datasets' class_encode_column makes such of names."
        )
    labels = list(chain.from_iterable(table.column(label).to_pylist() for table in tables))
    return Rows(folder, places, labels, tuple(getattr(feature, "names", None) or ()))


def _one_column(split: Any, name: str, columns: Columns, what: str, key: str, labelled: bool) -> str:
    """The name of the column of images (`what`: `image`), or of labels (`label`)."""
    import datasets

    wanted, kind = (columns.image, datasets.Image) if what == "image" else (columns.label, datasets.ClassLabel)
    features = split.features
    listed = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
    setting = f"dataloader.{what}_column"
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"{setting}: {name} has no column {wanted!r}; there are: {listed}")
        if what == "image" and not isinstance(features[wanted], kind):
            raise DataError(f"{setting}: column {wanted!r} of {name} is not of the type Image; there are: {listed}")
        return wanted
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    problem = "several columns" if found else "no column"
    advice = f"Name it: --{setting} NAME"
    if what == "image" and not found:
        advice = "datasets' cast_column(NAME, Image()) makes one"
    elif not labelled:
        advice = "datasets' remove_columns leaves one"
    raise DataError(f"{key}: {name} has {problem} of the type {kind.__name__}; there are: {listed}. {advice}.")


def _places(file: str, table: Any, image: str, key: str) -> list[str]:
    """Of the images of one table: inside it, or the files that it names instead."""
    found = images_in(table, image)
    if found is None:
        raise DataError(f"{key}: {file} was saved by an old version of the package {PACKAGE}: load and save it again")
    pairs = enumerate(zip(*found, strict=True))
    return [path if size is None and path else inside(file, image, row, size or 0) for row, (size, path) in pairs]

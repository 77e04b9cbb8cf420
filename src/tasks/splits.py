"""The images of a data set, whatever it is stored as: folders of classes, shards, a data set saved by `datasets` or
from the hub. Which of these a folder is, is seen by looking at it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..common.errors import DataError
from ..common.log import log
from .folders import files_below, images_below, is_leaving, tell_others
from .images import KEY, ImageFolderIndex, read_folder, some
from .places import ARCHIVE, TABLE, describe, holder
from .saved_datasets import Columns, list_rows, list_unlabelled
from .shards import COMPRESSED, NO_LABEL, NO_NUMBER, UNPACK, archives_in, list_shards
from .sources import is_saved

CLASSES_FILE = "classes.txt"
COMPRESSED_TOO = "compressed files, which are not looked into: unpack them"
WORDS = {"train": {"train", "training"}, "val": {"val", "validation", "valid"}}
"""One of these is in the name of a shard that is not in a folder of its split."""


def list_splits(
    root: Path | str,
    splits: Sequence[str],
    *,
    n_classes: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    show_progress: bool = True,
) -> list[ImageFolderIndex]:
    """The images of the wanted splits.

    Args:
        root: the folder that holds them, or the name of a data set on the hub.
        splits: `train`, `val`.
        n_classes: how many classes there are, where only numbers say which.
        image_column, label_column: of a saved data set; None: the only ones of their types.
        show_progress: show progress bars.

    Raises:
        DataError: it does not hold what it should.
        SettingsError: a package that reads it is not installed.
    """
    if isinstance(root, str) or is_saved(root):
        rows = list_rows(root, splits, Columns(image_column, label_column), KEY)
        found = [labelled(one.folder, one.places, one.labels, one.classes, n_classes) for one in rows]
    else:
        for key, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None:
                log.warning("dataloader.%s has no effect: %s is no saved data set, which has columns", key, root)
        found = [_of_folder(root, split, n_classes, show_progress) for split in splits]
    return _with_classes(found)


def unlabelled(where: Path | str, key: str) -> tuple[Path, list[str]]:
    """All images of a folder of images, shards, or a saved data set, or of a data set on the hub; and the folder that
    they are in.

    Args:
        where: the folder, or the name on the hub.
        key: of the settings that names it.

    Raises:
        DataError: it cannot be read, or there is no image.
        SettingsError: a package that reads it is not installed.
    """
    if isinstance(where, str) or is_saved(where):
        rows = list_unlabelled(where, key)
        if not rows.places:
            raise DataError(f"{key}: there are no images in {where}")
        return rows.folder, rows.places
    others: Counter[str] = Counter()
    try:
        paths = images_below(where, others)
        archives = [] if paths else files_below(where, (ARCHIVE,), Counter())
    except OSError as error:
        raise DataError(f"{key}: {error.filename} cannot be read: {error.strerror}. Allow it.") from error
    if archives:
        return where, list_shards(list(map(Path, archives)), where, key).places
    if not paths:
        packed = f", but {COMPRESSED_TOO}" if others.keys() & {".gz", ".tgz", ".bz2", ".xz", ".zst"} else ""
        raise DataError(f"{key}: there are no images below {where}; expected some, in whatever folders{packed}")
    tell_others(where, others)
    return where, paths


def labelled(
    root: Path, places: list[str], labels: Sequence[int | None], classes: tuple[str, ...], n_classes: int | None
) -> ImageFolderIndex:
    """Images with numbers for labels.

    Args:
        root: the folder that they are in.
        places: of the images.
        labels: for each its number; below 0 or None: there is none.
        classes: their names; empty: not known.
        n_classes: how many there are where no names are known; None: as many as the labels say.

    Raises:
        DataError: there are none, or some have no label, or one beyond the classes.
    """
    if not places:
        raise DataError(f"{KEY}: there are no images in {root}")
    numbers = [NO_LABEL if label is None else label for label in labels]
    without = [place for place, label in zip(places, numbers, strict=True) if label < 0]
    if without:
        wrong = " that is a whole number from 0" if NO_NUMBER in numbers else ""
        expected = "for 0001.jpg the number of its class in 0001.cls, or under label in 0001.json"
        if holder(without[0]).endswith(TABLE):
            expected = "the number of a class in every row; those that are meant for tests have often none"
        raise DataError(
            f"{KEY}: {len(without):,} of {len(places):,} images in {root} have no label{wrong}: "
            f"{some(map(describe, without))}. Expected {expected}."
        )
    known = len(classes) or n_classes
    if known is not None and max(numbers, default=0) >= known:
        pairs = zip(places, numbers, strict=True)
        beyond = [f"{describe(place)} ({label:,})" for place, label in pairs if label >= known]
        given_by = "dataloader.num_classes" if not classes else f"{CLASSES_FILE}, or the data set,"
        raise DataError(
            f"{KEY}: {len(beyond):,} labels in {root} are beyond the {known:,} classes that {given_by} says there are, "
            f"which have the numbers 0 to {known - 1:,}: {some(beyond)}"
        )
    names = classes or tuple(map(str, range(n_classes or 0)))
    return ImageFolderIndex(root, names, places, numbers, "classes")


def _of_folder(root: Path, split: str, n_classes: int | None, show: bool) -> ImageFolderIndex:
    """A split in folders of classes, or in shards: in its own folder, or beside those of other splits."""
    root = Path(os.path.abspath(root.expanduser()))
    folder = root / split
    archives, folders = _content(folder)
    if not archives and not folder.exists():
        folder, beside = root, _content(root)[0]
        archives = [path for path in beside if set(re.split(r"[^a-z]+", path.name.lower())) & WORDS[split]]
    compressed = [path for path in archives if COMPRESSED.search(path.name)]
    archives = [path for path in archives if path not in compressed]
    if not archives and not compressed:
        return read_folder(root, split, show)
    if folders and archives:
        raise DataError(
            f"{KEY}: {folder} holds shards ({some(path.name for path in archives)}) and folders ({some(folders)}); "
            "expected either. Move the ones that are not meant elsewhere."
        )
    if folders:
        return read_folder(root, split, show)
    if compressed:
        raise DataError(f"{KEY}: {some(map(str, compressed))}: compressed. {UNPACK.format('gunzip, unxz, unzstd')}")
    found = list_shards(archives, folder, KEY, show)
    return labelled(folder, found.places, found.labels, _class_names((folder, root)), n_classes)


def _content(folder: Path) -> tuple[list[Path], list[str]]:
    """The archives and the names of the folders in a folder; none where it cannot be read, which is told elsewhere."""
    try:
        return archives_in(folder), sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_leaving(entry.name)
        )
    except OSError:
        return [], []


def _class_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The lines of the first `classes.txt`; none where there is no such file."""
    for file in (folder / CLASSES_FILE for folder in folders):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{KEY}: {file} cannot be read: {error}. Expected a name in every line.") from error
        names = tuple(line.strip() for line in lines)
        if not names or not all(names) or len(set(names)) < len(names):
            raise DataError(
                f"{KEY}: {file}: expected the name of a class in every line, each once, that of class 0 first"
            )
        return names
    return ()


def _with_classes(found: list[ImageFolderIndex]) -> list[ImageFolderIndex]:
    """Where nothing names the classes or says how many there are: those of all splits, by number."""
    unnamed = [index for index in found if not index.classes]
    labels = {label for index in unnamed for label in index.labels}
    missing = sorted(set(range(max(labels, default=-1) + 1)) - labels)
    if missing:
        raise DataError(
            f"{KEY}: the labels in {unnamed[0].root} go up to {max(labels):,}, but no image has the label "
            f"{some(map(str, missing))}. If these are all classes, say how many there are (--dataloader.num_classes "
            f"{max(labels) + 1}), or name them in {CLASSES_FILE}."
        )
    names = tuple(map(str, range(len(labels))))
    return [index if index.classes else replace(index, classes=names) for index in found]

"""The images of a split, folders of them in ImageNet's layout, and whether they can be read.

`<root>/<split>/<class>/*.jpg`: one folder per class, the label of a class is its place in the sorted list of names (as
in torchvision's `ImageFolder`). What systems and programs leave behind is passed over.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..common import progress
from ..common.errors import DataError
from .decoding import full_check, load_rgb, looks, quick_check, reason
from .folders import EXTENSIONS, images_below, is_leaving, tell_others
from .places import below, describe
from .shapes import too_long

__all__ = [
    "KEY", "BadFiles", "ImageFolderIndex", "check_images", "check_same_classes", "full_check", "leave_out", "load_rgb",
    "quick_check", "read_folder", "reason", "require_readable", "some", "unreadable_error",
]  # fmt: skip

KEY = "dataloader.imagenet_path"
FOLDERS = "class folders"
NAMED_AT_MOST = 5
BadFiles = list[tuple[str, str]]
"""(path, reason) of files that cannot be read."""


@dataclass(frozen=True)
class ImageFolderIndex:
    """The images of one split.

    Attributes:
        root: the folder that they are in (of folders the split's own, `<root>/<split>`), absolute.
        classes: their names (of folders sorted).
        paths: the images: files (class after class, sorted within a class), or places inside larger files
            (`tasks.places`).
        labels: for each image its position in `classes`.
        called: what says the classes, in messages.
    """

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    called: str = FOLDERS

    def __len__(self) -> int:
        return len(self.paths)

    def listed(self) -> Iterator[str]:
        """What tells these images from others: their paths below the root; where these do not say the class, with the
        label."""
        for path, label in zip(below(self.paths, self.root), self.labels, strict=True):
            yield path if self.called == FOLDERS else f"{path} {label}"


def some(names: Iterable[str], separator: str = ", ") -> str:
    """The first five of `names`, and how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - NAMED_AT_MOST:,} more"] if len(listed) > NAMED_AT_MOST else []
    return separator.join(listed[:NAMED_AT_MOST] + more)


def read_folder(root: str | Path, split: str, show_progress: bool = True) -> ImageFolderIndex:
    """The images of `<root>/<split>/<class>/`; says how many other files there are.

    Raises:
        DataError: the folder is missing or is a file, has no class folders, or a class folder holds no image or cannot
            be read.
    """
    folder = Path(os.path.abspath(Path(root).expanduser())) / split
    classes = _class_names(folder)
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(progress.bar(classes, f"listing {split}", show=show_progress, unit="class")):
        try:
            found = images_below(folder / name, others)
        except OSError as error:
            raise DataError(f"{KEY}: {error.filename} cannot be read: {error.strerror}. Allow it.") from error
        if not found:
            empty.append(name)
        paths += found
        labels += [label] * len(found)
    if empty:
        raise DataError(
            f"{KEY}: {len(empty):,} of the {len(classes):,} class folders in {folder} hold no image: {some(empty)}. "
            f"Expected files ending in {', '.join(EXTENSIONS)}. Add the images, or remove the empty folders from every "
            "split."
        )
    tell_others(folder, others)
    return ImageFolderIndex(folder, tuple(classes), paths, labels)


def _class_names(folder: Path) -> list[str]:
    expected = (
        f"Expected one folder per class: {folder}/<class>/*.jpg. Set {KEY} to the folder that holds train/ and val/."
    )
    for place in (folder.parent, folder):
        if not place.exists():
            raise DataError(f"{KEY}: {place} does not exist. {expected}")
        if not place.is_dir():
            raise DataError(f"{KEY}: {place} is a file, not a folder. {expected}")
    try:
        entries = [entry for entry in os.scandir(folder) if not is_leaving(entry.name)]
    except OSError as error:
        raise DataError(f"{KEY}: {folder} cannot be read: {error.strerror}. {expected}") from error
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        loose = sum(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
        hint = f" It holds {loose:,} images directly: sort them into one folder per class." if loose else ""
        raise DataError(f"{KEY}: {folder} has no class folders. {expected}{hint}")
    return classes


def check_images(
    index: ImageFolderIndex, how: str = "quick", show: bool = True, *, resize: int | None = None, part: str = "all"
) -> BadFiles:
    """(path, reason) of every file that cannot be read.

    Args:
        index: of the files.
        how: `quick`, `full` (decodes everything) or `none`.
        show: show a progress bar.
        resize: what the short side is brought to; images that would become huge then count as unreadable.
        part: name of this process's part of the images.
    """
    bad = []
    for path, look in looks(index.paths, how, show, index.root, part):
        why = look.problem or (None if resize is None else too_long(look.size, resize))
        if why is not None:
            bad.append((path, why))
    return bad


def unreadable_error(bad: BadFiles, key: str = KEY) -> DataError:
    """The error that names unreadable files and tells how to continue without them."""
    listing = some([f"{describe(path)} ({why})" for path, why in bad], "\n  ")
    return DataError(
        f"{key}: {len(bad):,} unreadable image{'s' if len(bad) > 1 else ''}:\n  {listing}\n"
        "Replace or remove them, or continue without them: --dataloader.skip_unreadable True"
    )


def require_readable(
    index: ImageFolderIndex, how: str = "quick", skip_unreadable: bool = False, show: bool = True
) -> tuple[ImageFolderIndex, BadFiles]:
    """The index of the readable images, and what was left out of it (always empty unless `skip_unreadable`).

    Raises:
        DataError: there are unreadable images and `skip_unreadable` is False, or leaving them out empties a class.
    """
    return leave_out(index, check_images(index, how, show), skip_unreadable)


def leave_out(index: ImageFolderIndex, bad: BadFiles, skip_unreadable: bool) -> tuple[ImageFolderIndex, BadFiles]:
    """The index without the files `bad`, and these; raises as `require_readable`."""
    if not bad:
        return index, []
    if not skip_unreadable:
        raise unreadable_error(bad)
    left_out = {path for path, _ in bad}
    kept = [(path, label) for path, label in zip(index.paths, index.labels, strict=True) if path not in left_out]
    emptied = sorted(set(index.labels) - {label for _, label in kept})
    if emptied:
        raise DataError(
            f"{KEY}: without its unreadable images nothing is left of {len(emptied):,} class(es) in {index.root}: "
            f"{some(index.classes[label] for label in emptied)}. For example {describe(bad[0][0])}: {bad[0][1]}. "
            "Replace these images."
        )
    return replace(index, paths=[path for path, _ in kept], labels=[label for _, label in kept]), bad


def check_same_classes(train: ImageFolderIndex, validation: ImageFolderIndex) -> None:
    """Labels are positions in the list of classes, so both splits need the same list.

    Raises:
        DataError: a class exists in one split only, or they are in another order.
    """
    if train.classes == validation.classes:
        return
    differences = []
    for one, other in ((train, validation), (validation, train)):
        alone = sorted(set(one.classes) - set(other.classes))
        if alone:
            differences.append(f"  only in {one.root}: {some(alone)}")
    if not differences:
        differences.append("  they have other places in the list")
    raise DataError(
        f"{KEY}: the {train.called} of the two splits differ ({len(train.classes):,} and {len(validation.classes):,}), "
        "so their labels would not mean the same classes.\n"
        + "\n".join(differences)
        + f"\nGive both splits the same {train.called}."
    )

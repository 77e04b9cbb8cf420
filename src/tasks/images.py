"""Folders of images in ImageNet's layout, and whether their files can be read.

`<root>/<split>/<class>/*.jpg`: one folder per class, the label of a class is its place in the sorted list of names (as
in torchvision's `ImageFolder`). Names that begin with a dot are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import make_dataset

from ..common import progress
from ..common.errors import DataError

KEY = "dataloader.imagenet_path"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL_BYTES = 4096
NAMED_AT_MOST = 5
FILES_PER_JOB = 64

BadFiles = list[tuple[str, str]]
"""(path, reason) of files that cannot be read."""


@dataclass(frozen=True)
class ImageFolderIndex:
    """The images of one split.

    Attributes:
        root: the split's own folder (`<root>/<split>`), absolute.
        classes: names of the class folders, sorted.
        paths: the images, class after class, sorted within a class.
        labels: for each image its position in `classes`.
    """

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)


def some(names: Iterable[str], separator: str = ", ") -> str:
    """The first five of `names`, and how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - NAMED_AT_MOST:,} more"] if len(listed) > NAMED_AT_MOST else []
    return separator.join(listed[:NAMED_AT_MOST] + more)


def read_folder(root: str | Path, split: str, show_progress: bool = True) -> ImageFolderIndex:
    """The images of `<root>/<split>/<class>/`.

    Raises:
        DataError: the folder is missing or is a file, has no class folders, or a class folder holds no image.
    """
    folder = Path(os.path.abspath(Path(root).expanduser())) / split
    classes = _class_names(folder)
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(progress.bar(classes, f"listing {split}", show=show_progress, unit="class")):
        samples = make_dataset(folder, {name: 0}, extensions=EXTENSIONS, allow_empty=True)
        found = [path for path, _ in samples if not os.path.basename(path).startswith(".")]
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
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{KEY}: {folder} cannot be read: {error.strerror}. {expected}") from error
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        loose = sum(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
        hint = f" It holds {loose:,} images directly: sort them into one folder per class." if loose else ""
        raise DataError(f"{KEY}: {folder} has no class folders. {expected}{hint}")
    return classes


def load_rgb(path: str | Path) -> Image.Image:
    """The decoded image as 8-bit RGB, whatever it was stored as. Raises whatever the decoder raises: see `reason`."""
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys to white instead of scaling them
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:  # the same colours, without Pillow's warning
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why a file could not be decoded, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def full_check(path: str) -> str | None:
    """Decode the whole image; the reason why that failed, or None."""
    try:
        load_rgb(path)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for bad files
        return reason(error)
    return None


def quick_check(path: str) -> str | None:
    """Check the file's header and end only. A file without its end marker is decoded, so nothing that decodes is
    refused."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return "the file is empty"
            with Image.open(file) as image:
                marker = END_MARKERS.get(image.format or "")
            if marker is None:
                return None
            file.seek(max(0, size - TAIL_BYTES))
            if marker in file.read():
                return None
    except Exception as error:  # as in full_check
        return reason(error)
    return full_check(path)


CHECKS: dict[str, Callable[[str], str | None] | None] = {"none": None, "quick": quick_check, "full": full_check}


def check_images(index: ImageFolderIndex, how: str = "quick", show: bool = True) -> BadFiles:
    """(path, reason) of every file that cannot be read. `how` is `quick`, `full` (decodes everything) or `none`."""
    if how not in CHECKS:
        raise DataError(f"checking images: {how!r} is not known; there are {', '.join(CHECKS)}")
    check = CHECKS[how]
    if check is None:
        return []
    return [
        (path, why) for path, why in in_threads(check, index.paths, f"checking images ({how})", show) if why is not None
    ]


def in_threads(
    check: Callable[[str], str | None], paths: list[str], label: str, show: bool
) -> Iterator[tuple[str, str | None]]:
    """(path, what `check` finds) for all paths, in their order."""

    def check_some(start: int) -> list[tuple[str, str | None]]:
        return [(path, check(path)) for path in paths[start : start + FILES_PER_JOB]]

    pool = ThreadPoolExecutor()
    try:
        results = chain.from_iterable(pool.map(check_some, range(0, len(paths), FILES_PER_JOB)))
        yield from progress.bar(results, label, total=len(paths), show=show, unit="image")
    finally:  # an interrupted check does not first finish its queue
        pool.shutdown(cancel_futures=True)


def unreadable_error(bad: BadFiles, key: str = KEY) -> DataError:
    """The error that names unreadable files and tells how to continue without them."""
    listing = some([f"{path} ({why})" for path, why in bad], "\n  ")
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
    emptied = sorted(set(range(len(index.classes))) - {label for _, label in kept})
    if emptied:
        raise DataError(
            f"{KEY}: without its unreadable images nothing is left of {len(emptied):,} class(es) in {index.root}: "
            f"{some(index.classes[label] for label in emptied)}. For example {bad[0][0]}: {bad[0][1]}. Replace these "
            "images."
        )
    return ImageFolderIndex(index.root, index.classes, [path for path, _ in kept], [label for _, label in kept]), bad


def check_same_classes(train: ImageFolderIndex, validation: ImageFolderIndex) -> None:
    """Labels are positions in the list of class folders, so both splits need the same list.

    Raises:
        DataError: a class folder exists in one split only.
    """
    if train.classes == validation.classes:
        return
    differences = []
    for one, other in ((train, validation), (validation, train)):
        alone = sorted(set(one.classes) - set(other.classes))
        if alone:
            differences.append(f"  only in {one.root}: {some(alone)}")
    raise DataError(
        f"{KEY}: the class folders of the two splits differ ({len(train.classes):,} and {len(validation.classes):,}), "
        "so their labels would not mean the same classes.\n"
        + "\n".join(differences)
        + "\nGive both splits the same class folders."
    )

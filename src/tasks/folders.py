"""Which files of a folder are images to work on: by their endings, without what systems and programs leave behind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..common.log import log, note

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
"""Endings of the images that are read, in lower case."""

# fmt: off
OTHER_IMAGES = frozenset({
    ".jfif", ".jpe", ".jif", ".gif", ".apng", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".dib", ".pbm",
    ".pnm", ".pam", ".pfm", ".tga", ".ico", ".psd", ".svg", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef",
    ".arw", ".orf", ".dcm",
})
"""Endings of images that are not read."""

LEAVINGS = frozenset({
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information",
    "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
})
"""Files and folders left behind by systems and programs, in lower case; names that begin with a dot are such too."""
# fmt: on


def is_leaving(name: str) -> bool:
    """Whether a file or folder of this name was left behind by a system or a program (`.ipynb_checkpoints`,
    `__MACOSX`, `._1.jpg`): nothing in it is meant as an image."""
    return name.startswith(".") or name.lower() in LEAVINGS


def images_below(folder: Path, others: Counter[str]) -> list[str]:
    """The paths of all images below `folder`, whatever the depth, sorted folder by folder.

    Args:
        folder: looked through, links followed unless they lead back.
        others: receives how many files of each other ending there are.

    Raises:
        OSError: a folder cannot be read.
    """
    return files_below(folder, EXTENSIONS, others)


def files_below(folder: Path, endings: tuple[str, ...], others: Counter[str]) -> list[str]:
    """As `images_below`, for files of other endings (in lower case)."""
    found = []
    for root, names in sorted(_walk(folder)):
        for name in sorted(names):
            if name.lower().endswith(endings):
                found.append(os.path.join(root, name))
            else:
                others[os.path.splitext(name)[1].lower()] += 1
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders below `folder`, itself included, each with the names of its files; without leavings."""

    def fail(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not is_leaving(name) and not _leads_back(os.path.join(root, name))]
        yield root, [name for name in names if not is_leaving(name)]


def _leads_back(path: str) -> bool:
    """Whether `path` is a link to a folder that it lies in."""
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return here == target or here.startswith(target.rstrip(os.sep) + os.sep)


def tell_others(folder: Path, others: Counter[str]) -> None:
    """Say how many files below `folder` are not used because of their endings."""
    images = {ending: count for ending, count in others.items() if ending in OTHER_IMAGES}
    rest = {ending: count for ending, count in others.items() if ending not in OTHER_IMAGES}
    if images:
        log.warning(
            "%s of %s are not used, as images are read from files ending in %s: convert or rename them",
            _counted(images),
            folder,
            ", ".join(EXTENSIONS),
        )
    if rest:
        note(f"{_counted(rest)} of {folder} are not used, as they are no images by their endings")


def _counted(endings: dict[str, int]) -> str:
    listing = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in sorted(endings.items()))
    return f"{sum(endings.values()):,} files ({listing})"

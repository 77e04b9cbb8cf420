"""Images that were found to be readable are remembered, so that a large data set is not read through at every start.

What is remembered holds for a file of the same path, size and time of change, and the same version of Pillow; a file
with a problem is looked at again each time. It lies in the user's cache folder; where that cannot be written, nothing
is remembered.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from ..common.errors import RunError
from ..common.paths import write_atomically
from .places import holder

WORTH = 1000
"""With fewer images than this, checking is faster than it is worth remembering."""

RULES = 1
"""To be raised when a check becomes stricter."""

KEPT_DAYS = 180
"""Records that nobody used for so long are removed."""

ROW = np.dtype([("key", "<u8"), ("width", "<i4"), ("height", "<i4"), ("orientation", "<i4")])


@dataclass(frozen=True)
class Look:
    """What looking at an image file told.

    Attributes:
        problem: why it cannot be used; None: it can.
        size: (width, height) as stored.
        orientation: EXIF's, 1 to 8: how the image is to be turned to be seen upright (1: not at all).
    """

    problem: str | None
    size: tuple[int, int] = (0, 0)
    orientation: int = 1


def cache_folder() -> Path | None:
    """Where this program may keep what it can find out again; None: the user has no such place."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "pqf"
    try:
        return Path.home() / ".cache" / "pqf"
    except RuntimeError:  # no home
        return None


class Remembered:
    """The readable images of a data set, as one process remembers them.

    Args:
        place: the data set's folder.
        how: the kind of check.
        part: name of the part of the data set that this process looks at; it knows what all have found.

    Attributes:
        n_checked: files that were not known.
    """

    def __init__(self, place: Path, how: str, part: str) -> None:
        self._known: dict[int, tuple[int, int, int]] = {}
        self._looks: dict[int, Look] = {}
        self._file: Path | None = None
        self.n_checked = 0
        folder = cache_folder()
        if folder is None:
            return
        about = f"{RULES} {PIL.__version__} {how} {place}"
        name = hashlib.blake2b(os.fsencode(about), digest_size=12).hexdigest()
        self._file = folder / "checked_images" / f"{name}.{part}.npy"
        with suppress(OSError):
            for file in sorted(self._file.parent.glob(f"{name}.*.npy")):
                for key, *look in _rows(file).tolist():
                    self._known[key] = tuple(look)

    def look(self, path: str, check: Callable[[str], Look]) -> Look:
        """What `check` finds out about the file at `path`, or found when it was the same before."""
        try:
            key = _key(path)
        except OSError:  # not there: the check says so
            return check(path)
        if key in self._known:
            width, height, orientation = self._known[key]
            found = Look(None, (width, height), orientation)
        else:
            found = check(path)
            self.n_checked += 1
        self._looks[key] = found
        return found

    def keep(self) -> None:
        """Remember the readable ones of all that was looked at, and no others any more; if that is impossible, nothing
        is."""
        looks = dict(self._looks)
        if self._file is None or not self.n_checked or len(looks) < WORTH:
            return
        rows = [(key, *look.size, look.orientation) for key, look in looks.items() if look.problem is None]
        file, values = self._file, np.array(rows, dtype=ROW)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as target:
                np.save(target, values)

        with suppress(OSError, RunError):
            write_atomically(file, write)
            forget_unused(file.parent, "*.npy")


def forget_unused(folder: Path, pattern: str) -> None:
    """Remove the records in `folder` that nobody used for `KEPT_DAYS`. Raises OSError."""
    for record in folder.glob(pattern):
        if time.time() - record.stat().st_mtime > KEPT_DAYS * 86_400:
            record.unlink(missing_ok=True)


def _key(path: str) -> int:
    """Of the file at `path`, or of what lies there in a larger file, as it is now."""
    found = os.stat(holder(path))
    about = os.fsencode(f"{path}\0{found.st_size}\0{found.st_mtime_ns}")
    return int.from_bytes(hashlib.blake2b(about, digest_size=8).digest(), "little")


def _rows(file: Path) -> np.ndarray:
    """The rows of a file that `keep` wrote; none where it is damaged."""
    try:
        rows = np.load(file, allow_pickle=False)
        os.utime(file)
    except (OSError, ValueError, EOFError):
        return np.empty(0, dtype=ROW)
    return rows if rows.dtype == ROW and rows.ndim == 1 else np.empty(0, dtype=ROW)

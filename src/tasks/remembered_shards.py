"""What archives hold is remembered, as whether images are readable is: listing a large one means reading through it.

It holds for an archive of the same path, size and time of change, and lies in the user's cache folder; where that
cannot be written, nothing is remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from ..common.errors import RunError
from ..common.paths import write_atomically
from . import remembered
from .remembered import cache_folder

RULES = 1
"""To be raised when archives are listed in another way."""
ARRAYS = ("starts", "sizes", "labels")

S = TypeVar("S")


class RememberedShards:
    """What the archives of one folder hold.

    Args:
        folder: that holds them.

    Attributes:
        n_read: archives that were not known.
    """

    def __init__(self, folder: Path) -> None:
        self.n_read = 0
        self._found: dict[str, Any] = {}
        self._file: Path | None = None
        self._known: dict[str, tuple[slice, dict[str, int]]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._names: list[str] = []
        cache = cache_folder()
        if cache is None:
            return
        name = hashlib.blake2b(os.fsencode(f"{RULES} {folder}"), digest_size=12).hexdigest()
        self._file = cache / "listed_shards" / f"{name}.npz"
        with suppress(OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile):
            self._read(self._file)

    def samples(self, archive: Path, read: Callable[[Path], S], record: Callable[..., S]) -> S:
        """What `read` finds in an archive, or found when it was the same before: as a `record`."""
        key = _key(archive)
        if key in self._known:
            part, others = self._known[key]
            arrays = {name: self._arrays[name][part] for name in ARRAYS}
            found = record(names=self._names[part], others=Counter(others), **arrays)
        else:
            found = read(archive)
            self.n_read += 1
        self._found[key] = found
        return found

    def keep(self) -> None:
        """Remember what was listed, and no other archives any more; if that is impossible, nothing is."""
        found = list(self._found.values())
        total = sum(len(samples.names) for samples in found)
        if self._file is None or not self.n_read or total < remembered.WORTH:
            return
        table = [[key, len(samples.names), samples.others] for key, samples in self._found.items()]
        names = "\0".join(name for samples in found for name in samples.names)
        arrays: dict[str, Any] = {"table": _bytes(json.dumps(table)), "names": _bytes(names)}
        arrays |= {name: np.concatenate([getattr(samples, name) for samples in found]) for name in ARRAYS}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as target:
                np.savez(target, **arrays)

        with suppress(OSError, RunError):
            write_atomically(self._file, write)
            remembered.forget_unused(self._file.parent, "*.npz")

    def _read(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
            names = _text(stored["names"]).split("\0")
            table = json.loads(_text(stored["table"]))
        if {len(names), *map(len, arrays.values())} != {sum(count for _, count, _ in table)}:
            return
        self._arrays, self._names = arrays, names
        start = 0
        for key, count, others in table:
            self._known[key] = slice(start, start + count), others
            start += count
        os.utime(file)


def _key(archive: Path) -> str:
    """Of an archive as it is now."""
    found = os.stat(archive)
    about = os.fsencode(f"{archive}\0{found.st_size}\0{found.st_mtime_ns}")
    return hashlib.blake2b(about, digest_size=12).hexdigest()


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _text(values: np.ndarray) -> str:
    return values.tobytes().decode("utf-8", "surrogateescape")

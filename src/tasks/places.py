"""Images inside larger files: what the texts that name them mean, and how their bytes are read.

`<file>.tar#<name>@<start>+<size>` is a member of an archive, `<file>.arrow#<column>@<row>+<size>` a row of a table;
every other text is the path of a file of its own. A place says all that is needed to read it, so that any process can,
in any order. The larger file is opened anew for every image, as files of a folder are: there may be thousands of them,
more than a process may hold open, and nothing is shared by processes that were forked.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

ARCHIVE, TABLE = ".tar", ".arrow"
INSIDE = re.compile(r"(?is)(?P<file>.+(?P<kind>\.tar|\.arrow))#(?P<name>.*)@(?P<start>\d+)\+(?P<size>\d+)")
CHANGED = "is shorter than when it was listed: it was cut off or changed meanwhile"


def inside(file: str | Path, name: str, start: int, size: int) -> str:
    """The place of `size` bytes: of member `name` of an archive from byte `start`, or of row `start` of the column
    `name` of a table."""
    return f"{file}#{name}@{start}+{size}"


def is_inside(place: str) -> bool:
    """Whether it is in a larger file."""
    return _parts(place) is not None


def holder(place: str) -> str:
    """The file that holds it: a larger one, or its own."""
    found = _parts(place)
    return place if found is None else found["file"]


def describe(place: str) -> str:
    """For people: the file, and what in it."""
    found = _parts(place)
    if found is None:
        return place
    return f"{found['file']}#{found['name'] if found['kind'].lower() == ARCHIVE else 'row ' + found['start']}"


def below(places: Iterable[str], folder: str | Path) -> Iterator[str]:
    """The places as seen from `folder`, which need not be called the same everywhere."""
    return (os.path.relpath(place, folder) for place in places)


def open_file(place: str | Path) -> BinaryIO:
    """Its bytes, to read from.

    Raises:
        OSError: the file cannot be opened, or no longer holds them.
        DataError: it is a table, and what reads those is not installed.
    """
    found = _parts(os.fspath(place))
    if found is None:
        return open(place, "rb")
    start, size = int(found["start"]), int(found["size"])
    if found["kind"].lower() == TABLE:
        from .tables import bytes_of_row  # which needs packages that folders do not

        return io.BytesIO(bytes_of_row(found["file"], found["name"], start))
    with open(found["file"], "rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{found['file']} {CHANGED}")
    return io.BytesIO(content)


def _parts(place: str) -> re.Match[str] | None:
    return INSIDE.fullmatch(place) if "#" in place else None

"""Shards in WebDataset's layout: tar archives in which the files of a sample have one name and several endings.

`0001.jpg` is the image and `0001.cls` its label, a whole number as text; or `0001.json` has it under `label`. An
archive is listed once, with the place of every image, and then read at these places like a folder: in any order, the
same for a seed, by any process, and from where a run stopped.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..common import progress
from ..common.errors import DataError
from .folders import EXTENSIONS, is_leaving, tell_others
from .places import ARCHIVE, inside
from .remembered_shards import RememberedShards

NO_LABEL, NO_NUMBER = -1, -2
"""In the place of a label: the sample has none, or something else than a whole number from 0."""
LABELS = ("cls", "json")
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""What a compressed file begins with, and what unpacks it."""
BLOCK, AFTER_THE_END = 512, 1 << 20
"""Bytes: of a tar archive's blocks; how much behind its end mark is looked at."""
UNPACK = (
    "Images are read at their place in an archive, which they do not have in a compressed one, and are compressed "
    "themselves: unpack it to .tar ({})"
)


@dataclass(frozen=True)
class Samples:
    """The images of one archive.

    Attributes:
        names: of the members, as stored.
        starts, sizes: (n,) int64 each: where their bytes are.
        labels: (n,) int64, from 0; `NO_LABEL`, `NO_NUMBER`.
        others: how many members of other endings there are.
    """

    names: list[str]
    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    others: Counter[str]


@dataclass(frozen=True)
class Listed:
    """The images of several archives: places and labels (as in `Samples`)."""

    places: list[str]
    labels: list[int]


def archives_in(folder: Path) -> list[Path]:
    """The tar archives in a folder (not below it), sorted; compressed ones too."""
    names = [name for name in os.listdir(folder) if not is_leaving(name)]
    return [folder / name for name in sorted(names) if name.lower().endswith(ARCHIVE) or COMPRESSED.search(name)]


def list_shards(archives: list[Path], folder: Path, key: str, show: bool = True) -> Listed:
    """The images of archives, one after the other; says what else they hold. What was listed before is remembered.

    Args:
        archives: their paths.
        folder: that holds them.
        key: of the settings that names it.
        show: show a progress bar.

    Raises:
        DataError: an archive is compressed, damaged, cut off or holds no images.
    """
    memory = RememberedShards(folder)
    places: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for archive in progress.bar(archives, "listing shards", show=show, unit="shard"):
        found = memory.samples(archive, lambda path: read_shard(path, key), Samples)
        numbers = zip(found.names, found.starts.tolist(), found.sizes.tolist(), strict=True)
        places += [inside(archive, *each) for each in numbers]
        labels += found.labels.tolist()
        others += found.others
    memory.keep()
    tell_others(folder, others)
    return Listed(places, labels)


def read_shard(path: Path, key: str) -> Samples:
    """List one archive. Raises DataError as `list_shards`."""
    try:
        with open(path, "rb") as file:
            _check_beginning(file, path, key)
            samples, others = _members(file, path, key)
            samples = {name: endings for name, endings in samples.items() if any(map(_is_image, endings))}
            if not samples:
                listed = ", ".join(sorted({ending or "without an ending" for ending in others})) or "nothing"
                raise DataError(
                    f"{key}: {path} holds no images, but {listed}. Expected samples such as 0001.jpg with 0001.cls or "
                    f"0001.json: images end in {', '.join(EXTENSIONS)}, and the name of a sample ends at its first dot."
                )
            images = [_image(endings, path, name, key) for name, endings in samples.items()]
            labels = [_label(file, endings) for endings in samples.values()]
    except (OSError, tarfile.TarError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{key}: {path} cannot be read as a tar archive: {reason}. {_AGAIN}") from error
    return Samples(
        names=[member.name for member in images],
        starts=np.array([member.offset_data for member in images], dtype=np.int64),
        sizes=np.array([member.size for member in images], dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        others=others,
    )


_AGAIN = "It is damaged, or was not copied to its end: copy or write it again."


def _check_beginning(file: BinaryIO, path: Path, key: str) -> None:
    start = file.read(BLOCK)
    for mark, program in COMPRESSIONS.items():
        if start.startswith(mark):
            raise DataError(f"{key}: {path} is compressed. {UNPACK.format(program)}")
    file.seek(0)


def _members(file: BinaryIO, path: Path, key: str) -> tuple[dict[str, dict[str, tarfile.TarInfo]], Counter[str]]:
    """By name of a sample and ending: its images and labels; and how many members of other endings there are."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    others: Counter[str] = Counter()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _each(archive):
            if member.isdir() or any(is_leaving(part) for part in member.name.split("/") if part.strip(".")):
                continue
            place, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            ending = ending.lower()
            if not (member.isreg() and not member.issparse() and (ending in LABELS or _is_image(ending))):
                others["." + ending if ending else ""] += 1
                continue
            sample = samples.setdefault(f"{place}/{stem}", {})
            if ending in sample:
                raise DataError(f"{key}: {path} holds {member.name} twice. Write it again with every file once.")
            sample[ending] = member
        end = archive.offset
    _check_end(file, end, path, key)
    return samples, others


def _each(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members; the archive itself forgets them, of which there may be millions."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        yield member


def _check_end(file: BinaryIO, end: int, path: Path, key: str) -> None:
    """An archive ends in a block of zeros. Python's reader takes whatever it does not understand for the end."""
    file.seek(end)
    rest = file.read(AFTER_THE_END)
    if len(rest) < BLOCK:
        raise DataError(f"{key}: {path} is cut off: it has no end mark after its {end:,} bytes. {_AGAIN}")
    if rest.strip(b"\0"):
        raise DataError(
            f"{key}: {path} goes on behind its end, at byte {end:,}: it is damaged, or several archives were put "
            "together. Write it again, or keep them as files of their own."
        )


def _is_image(ending: str) -> bool:
    return f".{ending}" in EXTENSIONS


def _image(endings: dict[str, tarfile.TarInfo], path: Path, sample: str, key: str) -> tarfile.TarInfo:
    """The one image of a sample."""
    found = [ending for ending in endings if _is_image(ending)]
    if len(found) > 1:
        raise DataError(
            f"{key}: sample {sample.lstrip('/')} of {path} has several images ({', '.join(found)}); expected one"
        )
    return endings[found[0]]


def _label(file: BinaryIO, endings: dict[str, tarfile.TarInfo]) -> int:
    """The label of a sample, from 0, or why there is none."""
    ending = next((ending for ending in LABELS if ending in endings), None)
    if ending is None:
        return NO_LABEL
    file.seek(endings[ending].offset_data)
    content = file.read(endings[ending].size)
    try:
        if ending == "cls":
            return _from_zero(int(content))
        found = json.loads(content)
    except (ValueError, RecursionError):
        return NO_NUMBER
    if not isinstance(found, dict) or found.get("label") is None:
        return NO_LABEL
    return _from_zero(found["label"])


def _from_zero(label: object) -> int:
    return label if type(label) is int and 0 <= label < 1 << 31 else NO_NUMBER

"""The images of folders, stored in other ways: as shards, and as a data set of the package `datasets`."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from src.tasks.decoding import open_file
from src.tasks.images import ImageFolderIndex, read_folder

SPLITS = ("train", "val")


def file_bytes(place: str) -> bytes:
    """All bytes of an image, wherever it is stored."""
    with open_file(place) as file:
        return file.read()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """An archive of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(number: int, path: str, label: int, as_json: bool = False) -> list[tuple[str, bytes]]:
    """The files of a sample."""
    labelled = ("json", json.dumps({"label": label, "of": path}).encode()) if as_json else ("cls", f"{label}".encode())
    return [(f"{number:05d}{Path(path).suffix}", Path(path).read_bytes()), (f"{number:05d}.{labelled[0]}", labelled[1])]


def as_shards(images: Path, to: Path, each: int = 7) -> Path:
    """Both splits of a folder of images as shards of `each`, in the same order."""
    for split in SPLITS:
        index = read_folder(images, split, False)
        for number, start in enumerate(range(0, len(index), each)):
            part = range(start, min(start + each, len(index)))
            files = [one for i in part for one in sample(i, index.paths[i], index.labels[i], as_json=bool(number % 2))]
            write_tar(to / split / f"{split}-{number:06d}.tar", files)
    return to


def need_datasets() -> None:
    """Skip where the package is not installed."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("the package datasets is not installed: pip install datasets")


def as_saved(images: Path, to: Path, names: tuple[str, str] = ("train", "validation")) -> Path:
    """Both splits of a folder of images as a data set that was saved, in the same order."""
    need_datasets()
    import datasets

    def split(index: ImageFolderIndex) -> datasets.Dataset:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*index.classes])})
        rows = {"image": [{"bytes": Path(path).read_bytes(), "path": None} for path in index.paths]}
        return datasets.Dataset.from_dict({**rows, "label": index.labels}, features=features)

    found = {name: split(read_folder(images, of, False)) for name, of in zip(names, SPLITS, strict=True)}
    datasets.DatasetDict(found).save_to_disk(str(to))
    return to

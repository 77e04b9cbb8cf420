"""Images in: the folders of the settings, checked, and the classification task on them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..compression.finetune.task import Engine
from ..errors import SettingsError
from ..machine import available_processors
from ..paths import candidates, find
from ..settings import Settings, require
from ..tasks.classification import Classification
from ..tasks.images import BadFiles, ImageFolderIndex, check_same_classes, read_folder, require_readable, some
from ..tasks.sources import SOURCES, Sources, prepare


def read_images(settings: Settings, splits: Sequence[str], is_main: bool) -> list[ImageFolderIndex]:
    """The wanted splits of `dataloader.imagenet_path`, checked: folders, classes, readable files.

    Raises:
        SettingsError: the path is not set or not there, or there are not `num_classes` classes.
        DataError: the folders do not hold what they should.
    """
    data = settings.dataloader
    root = data_root(settings, "dataloader.imagenet_path", "Set it to the folder that holds train/ and val/.", SOURCES)
    indices = [read_folder(root, split, is_main) for split in splits]
    for index in indices:
        if data.num_classes is not None and len(index.classes) != data.num_classes:
            raise SettingsError(
                f"dataloader.num_classes: {data.num_classes} were expected, but {index.root} has {len(index.classes)} class folders"
            )
    if len(indices) == 2:
        check_same_classes(*indices)
    readable = []
    for index in indices:
        kept, bad = require_readable(index, data.verify_images, data.skip_unreadable, is_main)
        warn_of_skipped(bad, index.root, is_main)
        readable.append(kept)
    return readable


def data_root(settings: Settings, key: str, advice: str, sources: Sources) -> Path:
    """The folder that the setting `key` names, filled by `dataloader.source` if that is not a folder of the user's own.

    Raises:
        SettingsError: the path is not set or not there.
        DataError: the source cannot write it.
    """
    path, source = require(settings, key), settings.dataloader.source
    if source == "folder":
        return find(path, key, advice)
    places = candidates(path)
    root = next((place for place in places if place.exists()), places[0])
    prepare(source, root, sources=sources)
    return root


def warn_of_skipped(bad: BadFiles, folder: Path, is_main: bool) -> None:
    """One line on standard error about the files that are left out."""
    if bad and is_main:
        names = some(path for path, _ in bad)
        print(f"warning: skipped {len(bad):,} unreadable images of {folder}: {names}", file=sys.stderr)


def classification_task(settings: Settings, engine: Engine, train: ImageFolderIndex | None, validation: ImageFolderIndex) -> Classification:
    """The task with the loader settings of the file; without `train` it can only validate."""
    data = settings.dataloader
    return Classification(
        engine,
        train,
        validation,
        batch_size=data.batch_size,
        num_workers=workers(data.num_workers, engine.is_main),
        train_shuffle=data.train_shuffle,
        validation_shuffle=data.validation_shuffle,
        resize=data.resize,
        image_size=data.image_size,
        crop_padding=data.crop_padding,
        horizontal_flip=data.horizontal_flip,
        mean=data.mean,
        std=data.std,
        skip_unreadable=data.skip_unreadable,
        seed=settings.seed,
        amp=settings.amp,
        channels_last=settings.channels_last,
        show_progress=engine.is_main,
    )


def workers(wanted: int, is_main: bool) -> int:
    """`num_workers`, or the number of processors where there are fewer; results do not depend on it."""
    processors = available_processors()
    if wanted > processors and is_main:
        print(
            f"note: dataloader.num_workers: {processors} instead of {wanted}, as this machine has {processors} processors", file=sys.stderr
        )
    return min(wanted, processors)

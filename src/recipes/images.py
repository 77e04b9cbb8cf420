"""Images in: the folders of the settings, checked, and the classification task on them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from ..compression.finetune.task import Engine
from ..errors import SettingsError
from ..paths import candidates, find
from ..settings import Settings, require
from ..tasks.classification import Classification
from ..tasks.images import BadFiles, ImageFolderIndex, check_images, check_same_classes, leave_out, read_folder, some
from ..tasks.sources import prepare
from .running import check_same, first_here


def read_images(settings: Settings, splits: Sequence[str], engine: Engine) -> list[ImageFolderIndex]:
    """The wanted splits of `dataloader.imagenet_path`, checked: folders, classes, readable files.

    Raises:
        SettingsError: the path is not set or not there, there are not `num_classes` classes, or the processes see other images.
        DataError: the folders do not hold what they should.
    """
    data = settings.dataloader
    require(settings, "dataloader.imagenet_path")
    if data.source == "folder":
        root = find(data.imagenet_path, "dataloader.imagenet_path", "Set it to the folder that holds train/ and val/.")
    else:
        places = candidates(data.imagenet_path)
        root = next((place for place in places if place.exists()), places[0])
        with first_here(engine):
            prepare(data.source, root)
    indices = [read_folder(root, split, engine.is_main) for split in splits]
    for index in indices:
        listed = (os.path.relpath(path, index.root) for path in index.paths)
        check_same(engine, f"the list of images in {index.root}", listed, "Give every machine the same images, under the same path.")
        if data.num_classes is not None and len(index.classes) != data.num_classes:
            raise SettingsError(
                f"dataloader.num_classes: {data.num_classes} were expected, but {index.root} has {len(index.classes)} class folders"
            )
    if len(indices) == 2:
        check_same_classes(*indices)
    readable = []
    for index in indices:
        kept, bad = leave_out(index, _check_together(index, data.verify_images, engine), data.skip_unreadable)
        if bad and engine.is_main:
            names = some(path for path, _ in bad)
            print(f"warning: skipped {len(bad):,} unreadable images of {index.root}: {names}", file=sys.stderr)
        readable.append(kept)
    return readable


def _check_together(index: ImageFolderIndex, how: str, engine: Engine) -> BadFiles:
    """`check_images`, each process looking at its share of the files; the unreadable ones of all, in the order of the index."""
    share = replace(index, paths=index.paths[engine.rank :: engine.world_size], labels=index.labels[engine.rank :: engine.world_size])
    bad = dict(engine.gather(check_images(share, how, engine.is_main)))
    return [(path, bad[path]) for path in index.paths if path in bad] if bad else []


def classification_task(settings: Settings, engine: Engine, train: ImageFolderIndex | None, validation: ImageFolderIndex) -> Classification:
    """The task with the loader settings of the file; without `train` it can only validate."""
    data = settings.dataloader
    return Classification(
        engine,
        train,
        validation,
        batch_size=data.batch_size,
        num_workers=_workers(data.num_workers, engine),
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


def _workers(wanted: int, engine: Engine) -> int:
    """`num_workers`, or this process's share of the processors where that is less; results do not depend on it."""
    share = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // engine.local_size)
    if wanted > share and engine.is_main:
        among = f", shared by {engine.local_size} processes" if engine.local_size > 1 else ""
        print(
            f"note: dataloader.num_workers: {share} instead of {wanted}, as this machine has {share * engine.local_size} processors{among}",
            file=sys.stderr,
        )
    return min(wanted, share)

"""COCO's images and annotations in: the folder of the settings, checked, and the detection task on it."""

from __future__ import annotations

from collections.abc import Sequence

from ..compression.finetune.task import Engine
from ..settings import Settings
from ..tasks.coco_data import CocoSplit, read_coco, require_images
from ..tasks.detection import Detection
from ..tasks.sources import SCENES
from .images import data_root, warn_of_skipped, workers

ADVICE = "Set it to the folder that holds annotations/, train2017/ and val2017/."


def read_splits(settings: Settings, splits: Sequence[str], is_main: bool, look_at_images: bool = True) -> list[CocoSplit]:
    """The wanted splits of `dataloader.coco_path`, checked: files, annotations, readable images of the right size.

    Raises:
        SettingsError: the path is not set or not there.
        DataError: the folder does not hold what it should.
    """
    data = settings.dataloader
    root = data_root(settings, "dataloader.coco_path", ADVICE, SCENES)
    found = []
    for split in [read_coco(root, name) for name in splits]:
        kept, bad = require_images(split, data.verify_images, data.skip_unreadable, is_main) if look_at_images else (split, [])
        warn_of_skipped(bad, split.folder, is_main)
        found.append(kept)
    return found


def detection_task(settings: Settings, engine: Engine, train: CocoSplit | None, validation: CocoSplit) -> Detection:
    """The task with the loader settings of the file; without `train` it can only validate."""
    data = settings.dataloader
    return Detection(
        engine,
        train,
        validation,
        batch_size=data.batch_size,
        num_workers=workers(data.num_workers, engine.is_main),
        train_shuffle=data.train_shuffle,
        validation_shuffle=data.validation_shuffle,
        group_by_aspect_ratio=data.group_by_aspect_ratio,
        horizontal_flip=data.horizontal_flip,
        skip_unreadable=data.skip_unreadable,
        seed=settings.seed,
        amp=settings.amp,
        backend=settings.evaluation.backend,
        show_progress=engine.is_main,
    )

"""COCO's images and annotations in: the folder of the settings, checked, and the detection task on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..architectures.detectors import finds_masks, image_sizes, memory_settings
from ..run.agreement import check_same, digest_of
from ..run.open_run import Job
from ..tasks.coco.data import CocoSplit, read_coco, require_masks
from ..tasks.coco.image_checks import too_narrow_images, unusable_images, without
from ..tasks.detection import Detection
from ..tasks.images import BadFiles
from .data import SAME_IMAGES, check_together, data_root, loader_spec, part_name, warn_of_skipped


def read_splits(job: Job, splits: Sequence[str], network: nn.Module | None) -> list[CocoSplit]:
    """The wanted splits of `dataloader.coco_path`, checked: files, annotations, readable images of the right size.

    Args:
        job: its settings say where they are.
        splits: `train`, `val`.
        network: that will see the images, set up by the settings; its weights do not matter. None: only the
            annotations are needed, and of them the boxes.

    Raises:
        SettingsError: the path is not set or not there, or the processes see other images or annotations.
        DataError: the folder does not hold what it should.
    """
    data, engine = job.settings.dataloader, job.engine
    root = data_root(job, "detection")
    masks = network is not None and finds_masks(network)
    sizes = None if network is None else image_sizes(network)
    found = []
    for name, split in [(name, read_coco(root, name, masks)) for name in splits]:
        if masks and name == "val":
            require_masks(split)
        check_same(engine, f"the list of images and objects in {split.source}", _listed(split), SAME_IMAGES)

        def check(share: slice, split: CocoSplit = split) -> BadFiles:
            part = split.keeping(split.image_ids[share])
            bad = [] if sizes is None or sizes.fixed else too_narrow_images(part, sizes.min_size, sizes.max_size)
            return bad + unusable_images(part, data.verify_images, engine.is_main, part_name(engine))

        bad = check_together(engine, split.paths, check) if network is not None else []
        kept, bad = without(split, bad, data.skip_unreadable)
        warn_of_skipped(bad, split.folder, engine.is_main)
        found.append(kept)
    return found


def _listed(split: CocoSplit) -> Iterator[str]:
    """Images and numbers of objects."""
    return (f"{image_id} {len(objects)}" for image_id, objects in zip(split.image_ids, split.annotations, strict=True))


def splits_fingerprint(*splits: CocoSplit) -> str:
    """A digest of which images there are, and of their numbers of objects."""
    return digest_of(line for split in splits for line in _listed(split))


def detection_task(job: Job, network: nn.Module, train: CocoSplit | None, validation: CocoSplit) -> Detection:
    """The task for `network` with the loader settings of the file; without `train` it can only validate."""
    data = job.settings.dataloader
    return Detection(
        job.engine,
        train,
        validation,
        loader_spec(job),
        group_by_aspect_ratio=data.group_by_aspect_ratio,
        horizontal_flip=data.horizontal_flip,
        backend=job.settings.evaluation.backend,
        memory_settings=memory_settings(network),
    )

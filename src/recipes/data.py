"""Images in: the folders of the settings, checked, and the tasks on them; COCO's with their annotations."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from ..architectures.architecture import Architecture
from ..architectures.detectors import finds_masks, image_sizes, memory_settings
from ..common.errors import SettingsError
from ..common.log import note
from ..engines.engine import Engine
from ..engines.machine import available_processors, own_processors
from ..run.agreement import check_same, digest_of, first_here
from ..run.fingerprint import CALIBRATION
from ..run.inputs import calibration_folder, data_folder, hub_name
from ..run.open_run import Job
from ..settings import Settings
from ..tasks.calibration import MEAN, STD, CalibrationImages, CalibrationSpec, ImagesToShow, training_images
from ..tasks.checking import check_together, part_name, unreadable, warn_of_skipped
from ..tasks.classification import Classification, ImageSpec
from ..tasks.coco.calibration import training_images as coco_images
from ..tasks.coco.data import CocoSplit, read_coco, require_masks
from ..tasks.coco.image_checks import too_narrow_images, unusable_images, without
from ..tasks.detection import Detection
from ..tasks.images import BadFiles, ImageFolderIndex, check_same_classes, leave_out
from ..tasks.loading import LoaderSpec
from ..tasks.sources import prepare
from ..tasks.splits import list_splits
from ..tasks.unlabelled import Unlabelled

AT_A_TIME = 2
"""Images that a detector sees at a time, at most, where nothing says how many it can be trained on."""
SAME_IMAGES = "Give every machine the same images, under the same path."


def read_images(job: Job, splits: Sequence[str]) -> list[ImageFolderIndex]:
    """The wanted splits of `dataloader.imagenet_path`, checked: what it holds, classes, readable images.

    Raises:
        SettingsError: the path is not set or not there, there are not `num_classes` classes, or the processes see other
            images.
        DataError: it does not hold what it should.
    """
    data, engine = job.settings.dataloader, job.engine
    name = hub_name(job.settings, "classification")
    root = data_root(job, "classification") if name is None else name
    with first_here(engine) if name else nullcontext():  # which fetches it
        indices = list_splits(
            root,
            splits,
            n_classes=data.num_classes,
            image_column=data.image_column,
            label_column=data.label_column,
            show_progress=engine.is_main,
        )
    for index in indices:
        check_same(engine, f"the list of images in {index.root}", index.listed(), SAME_IMAGES)
        if data.num_classes is not None and len(index.classes) != data.num_classes:
            raise SettingsError(
                f"dataloader.num_classes: {data.num_classes} were expected, but {index.root} has {len(index.classes)} "
                f"{index.called}"
            )
    if len(indices) == 2:
        check_same_classes(*indices)
    readable = []
    for index in indices:
        kept, bad = leave_out(index, unreadable(engine, index, data.verify_images, data.resize), data.skip_unreadable)
        warn_of_skipped(bad, index.root, engine.is_main)
        readable.append(kept)
    return readable


def images_fingerprint(*indices: ImageFolderIndex) -> str:
    """A digest of which images there are, by their paths below the folders of their splits."""
    return digest_of(line for index in indices for line in index.listed())


def data_root(job: Job, task: str) -> Path:
    """The folder of the data, filled by `dataloader.source` if that is not a folder of the user's own.

    Raises:
        SettingsError: the path is not set or not there, or there is no such source.
        DataError: the source cannot write it.
    """
    root, sources = data_folder(job.settings, task)
    with first_here(job.engine):
        prepare(job.settings.dataloader.source, root, sources=sources)
    return root


def classification_task(
    job: Job, train: ImageFolderIndex | None, validation: ImageFolderIndex, more: Unlabelled | None = None
) -> Classification:
    """The task with the loader settings of the file; without `train` it can only validate, `more` are trained on
    too."""
    data = job.settings.dataloader
    images = ImageSpec(
        resize=data.resize,
        image_size=data.image_size,
        crop_padding=data.crop_padding,
        horizontal_flip=data.horizontal_flip,
        mean=data.mean,
        std=data.std,
        channels_last=job.settings.channels_last,
        crop=data.crop,
        augmentation=data.augmentation,
        decoding=data.decoding,
    )
    smoothing = job.settings.label_smoothing
    return Classification(
        job.engine, train, validation, images, loader_spec(job), label_smoothing=smoothing, unlabelled=more
    )


def loader_spec(job: Job) -> LoaderSpec:
    """How images are loaded, on one process."""
    data = job.settings.dataloader
    return LoaderSpec(
        batch_size=data.batch_size,
        num_workers=workers(data.num_workers, job.engine),
        train_shuffle=data.train_shuffle,
        validation_shuffle=data.validation_shuffle,
        skip_unreadable=data.skip_unreadable,
        seed=job.settings.seed,
        amp=job.settings.amp,
        show_progress=job.engine.is_main,
    )


def workers(wanted: int, engine: Engine) -> int:
    """`num_workers`, or this process's share of the processors where that is less; results do not depend on it."""
    share = own_processors()
    if wanted > share and engine.is_main:
        among = f", shared by {engine.local_size} processes" if engine.local_size > 1 else ""
        note(
            f"dataloader.num_workers: {share} instead of {wanted}, as this machine has {available_processors()} "
            f"processors{among}"
        )
    return min(wanted, share)


def images_to_calibrate(
    run: Job, training: ImageFolderIndex | CocoSplit, unreadable: MutableMapping[str, str]
) -> ImagesToShow | None:
    """What a training calibrates with: training images, or those of `calibration.images`, as a validation shows them;
    None where it does not. Nothing is read yet.

    Args:
        run: its settings say which.
        training: the training images.
        unreadable: reason by path of the files that the run leaves out; further ones are put in.

    Raises:
        SettingsError: the folder is not there.
        DataError: it holds no image that can be read.
    """
    given, data, engine = run.settings.calibration, run.settings.dataloader, run.engine
    if not (given.use and run.settings.model.use_compression):
        return None
    of_several_sizes = isinstance(training, CocoSplit)
    spec = CalibrationSpec(
        count=given.count,
        # as many images of a detector's as a training step can take
        batch_size=min(given.batch_size, data.batch_size) if of_several_sizes else given.batch_size,
        num_workers=min(data.num_workers, own_processors()),
        image_size=None if of_several_sizes else data.image_size,
        resize=data.resize,
        mean=data.mean,
        std=data.std,
        seed=run.settings.seed,
    )
    folder = calibration_folder(run.settings)
    if folder is not None:
        return CalibrationImages(folder, spec, engine.is_main)
    if isinstance(training, CocoSplit):
        return coco_images(training, spec, data.skip_unreadable, unreadable)
    return training_images(training, spec, data.skip_unreadable, unreadable)


def images_of_folder(settings: Settings, architecture: Architecture, show_progress: bool) -> CalibrationImages | None:
    """The images of `calibration.images` for a network that is not trained, as it is made to see them; None where none
    are named. Nothing is read yet.

    Raises:
        SettingsError: the folder is not there, or the crop is larger than the image.
        DataError: it holds no image that can be read.
    """
    folder, given = calibration_folder(settings), settings.calibration
    if folder is None:
        return None
    of_several_sizes = architecture.task == "detection"
    side = given.image_size or architecture.image_size
    known = architecture.normalisation or (MEAN, STD)
    spec = CalibrationSpec(
        count=given.count,
        batch_size=min(given.batch_size, AT_A_TIME) if of_several_sizes else given.batch_size,
        num_workers=min(given.num_workers, own_processors()),
        image_size=None if of_several_sizes else side,
        resize=given.resize or round(side * 8 / 7),
        mean=given.mean or known[0],
        std=given.std or known[1],
        seed=settings.seed,
    )
    if spec.resize < side:
        raise SettingsError(
            f"calibration.image_size {side} is larger than calibration.resize {spec.resize}: the crop would not fit"
        )
    return CalibrationImages(folder, spec, show_progress)


def calibration_fingerprint(images: ImagesToShow | None) -> dict[str, str]:
    """A digest of the images of `calibration.images`, by their paths below it; training images are known."""
    if not isinstance(images, CalibrationImages):
        return {}
    return {CALIBRATION: digest_of(images.listed())}


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

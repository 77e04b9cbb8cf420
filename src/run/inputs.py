"""The files and folders that a command needs, found and checked before anything heavy is loaded; nothing here loads
torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .. import architectures
from ..common.errors import SettingsError
from ..common.hub import find_model, on_hub
from ..common.paths import candidates, find
from ..settings import Settings, require
from ..settings.reach import COMPRESS, DETECTION, TRAIN
from ..tasks.sources import BY_TASK, Sources, check, check_package
from .wandb_sink import check_wandb

PAPER_MODELS_ADVICE = "The authors' models are downloaded and verified by: make paper-models"
TEACHERS = (
    "expected a dense network's file of the architecture that is trained, or the name of an architecture with weights "
    "of its own"
)
DATA = {
    "classification": ("dataloader.imagenet_path", "Set it to the folder that holds train/ and val/."),
    "detection": ("dataloader.coco_path", "Set it to the folder that holds annotations/, train2017/ and val2017/."),
}
"""By task: the key of the data's folder, and advice."""


def check_inputs(settings: Settings, job: str, task: str | None) -> None:
    """Check what a command needs before anything is loaded: architecture, starting weights or model file, output
    folder, data.

    Raises:
        SettingsError: one is not set, not there, or not known.
    """
    if job in (TRAIN, COMPRESS):
        check_wandb(settings.wandb_project)
    if job == COMPRESS:
        architectures.check(settings.model.arch, None)
        weights_source(settings)
        if not settings.compression.plan:  # which writes no run
            require(settings, "output_path")
        calibration_folder(settings)
        _check_use(settings)
        return
    compressed = settings.model.use_compression
    assert task is not None
    if job == TRAIN:
        architectures.check(settings.model.arch, task)
        weights_source(settings)
        require(settings, "output_path")
        if compressed:
            calibration_folder(settings)
        warmup = settings.lr_scheduler.warmup
        if warmup > settings.epochs > 0:
            raise SettingsError(
                f"lr_scheduler.warmup: {warmup:g} epochs of warm-up are more than the training has (epochs: "
                f"{settings.epochs}); use fewer, or a part of one such as 0.1"
            )
        teacher_source(settings, task)
        unlabelled_folder(settings)
    elif task == DETECTION and settings.evaluation.detections is not None:
        detections_file(settings)
    else:
        file = compressed_file(settings) if compressed else weights_source(settings)
        if not (compressed and isinstance(file, Path) and file.suffix == ".safetensors"):  # that says itself what it is
            architectures.check(settings.model.arch, task)
    if hub_name(settings, task) is None:
        folder, _ = data_folder(settings, task)
        if task != DETECTION:
            check_package(folder, DATA[task][0])


def weights_source(settings: Settings) -> str | Path:
    """`pretrained`, `none`, or the existing path of a model file.

    Raises:
        SettingsError: `model.weights` is a placeholder or a path that does not exist.
    """
    weights = settings.model.weights
    if weights in ("pretrained", "none"):
        return weights
    require(settings, "model.weights")
    return find_model(
        weights,
        "model.weights",
        "Expected pretrained, none, the path of a state dict (.pth or .safetensors), or hf:OWNER/NAME",
    )


def calibration_folder(settings: Settings) -> Path | str | None:
    """The folder of `calibration.images`, or the name of a data set on the hub; None where none is given, or where
    there is no calibration.

    Raises:
        SettingsError: it is not there, no folder, or cannot be read without a package that is not there.
    """
    if settings.calibration.images is None or not settings.calibration.use:
        return None
    return _images_without_labels(settings, "calibration.images")


def _images_without_labels(settings: Settings, key: str) -> Path | str:
    """The folder that a key names, or the name on the hub; raises as `calibration_folder`."""
    given = require(settings, key)
    if on_hub(given):
        check_package(given, key)
        return given
    folder = find(given, key, "Expected a folder with images")
    if not folder.is_dir():
        raise SettingsError(f"{key}: {folder} is a file, expected a folder with images")
    check_package(folder, key)
    return folder


def teacher_source(settings: Settings, task: str) -> Path | str | None:
    """What `distillation.teacher` names: a file, or else an architecture; None: the network that is compressed.

    Raises:
        SettingsError: it is neither.
    """
    given = settings.distillation.teacher
    if given is None or not settings.distillation.weight:
        return None
    named = require(settings, "distillation.teacher")
    if on_hub(named):
        return find_model(named, "distillation.teacher")
    is_path = named.endswith((".pth", ".pt", ".safetensors"))
    with suppress(SettingsError):
        file = find(named, "distillation.teacher")
        if file.is_file():
            return file
        is_path = is_path or named != file.name  # a folder, which may happen to be called like an architecture
    if is_path:
        raise SettingsError(f"distillation.teacher: there is no file {named}; {TEACHERS}")
    try:
        architectures.check(named, task)
    except SettingsError as error:
        said = str(error).removeprefix("model.arch: ")
        raise SettingsError(f"distillation.teacher: there is no file {named}, and as an architecture {said}") from error
    return named


def unlabelled_folder(settings: Settings) -> Path | str | None:
    """The folder of `distillation.images`, or the name of a data set on the hub; None where none is given, or nothing
    is learnt from it; raises as `calibration_folder`."""
    if settings.distillation.images is None or not settings.distillation.weight:
        return None
    return _images_without_labels(settings, "distillation.images")


def _check_use(settings: Settings) -> None:
    """Raises SettingsError where somebody asked for a calibration, and there are no images for it."""
    given = settings.calibration
    if given.use and given.images is None and "use" in given.model_fields_set:
        raise SettingsError(
            "calibration.use is True, and calibration.images is not set: name a folder with images of the kind that "
            "the network will see (--calibration.images FOLDER; they need no labels), or leave calibration.use out"
        )


def compressed_file(settings: Settings) -> Path:
    """The existing file to evaluate.

    Raises:
        SettingsError: `model.state_dict_compressed` is not set or not there.
    """
    given = settings.model.state_dict_compressed
    if given is None:
        raise SettingsError(
            "model.state_dict_compressed: the file to evaluate is not set; use --model.state_dict_compressed PATH"
        )
    require(settings, "model.state_dict_compressed")
    packed_advice = "python -m src.convert makes packed files from others"
    advice = packed_advice if given.endswith(".safetensors") else PAPER_MODELS_ADVICE
    return find_model(given, "model.state_dict_compressed", advice)


def detections_file(settings: Settings) -> Path:
    """The existing file of detections to score. Raises SettingsError: `evaluation.detections` is not set or not
    there."""
    return find(
        require(settings, "evaluation.detections"), "evaluation.detections", "Expected a COCO result file (JSON)"
    )


def hub_name(settings: Settings, task: str) -> str | None:
    """The name of the data set on the Hugging Face hub that stands in the place of the data's folder; None: a folder
    does.

    Raises:
        SettingsError: the path is not set, no name that the hub can have, or the package is not there that reads it.
    """
    key, _ = DATA[task]
    if task == DETECTION or settings.dataloader.source != "folder" or not on_hub(require(settings, key)):
        return None
    name = require(settings, key)
    check_package(name, key)
    return name


def data_folder(settings: Settings, task: str) -> tuple[Path, Sources]:
    """The folder of the data, which exists unless `dataloader.source` writes it, and the data sets that can be written
    there.

    Raises:
        SettingsError: the path is not set or not there, or there is no such source.
    """
    (key, advice), sources = DATA[task], BY_TASK[task]
    path, source = require(settings, key), settings.dataloader.source
    check(source, "dataloader.source", sources)
    if not sources.fact(source, "written"):
        return find(path, key, advice), sources
    places = candidates(path)
    return next((place for place in places if place.exists()), places[0]), sources

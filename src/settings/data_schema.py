"""Keys about images, the schedule of the learning rate, and what an evaluation checks: type, default and meaning of
each."""

from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
)

from ..tasks.augmentation_names import AUGMENTATIONS
from .names import AugmentationName, BackendName, ScheduleName, SourceName, told
from .read_by import COCO, COMPRESSION, EVALUATION, IMAGES_IN_FOLDERS, TRAINING
from .section import Section
from .values import Flag, Natural, Positive, Real, RealAboveZero, RealFromZero, Size, Text, Whole


class CalibrationSettings(Section):
    """Images that show a network what it sees; they need no labels."""

    use: Flag = Field(
        True,
        description=(
            "Quantize so that what the network computes from images is kept (calibration); False: so that its weights "
            "are. Without images there is none."
        ),
    )
    images: Text | None = Field(
        None,
        description=(
            "Folder with images, in whatever folders below it, in shards or in a saved data set; or hf:OWNER/NAME; "
            "null: the training images, without their labels, and none where nothing is trained."
        ),
    )
    count: Positive = Field(1024, description="Images that are drawn from them, at most.")
    batch_size: Positive = Field(
        64,
        description="Images at a time; of a detector at most dataloader.batch_size, or 2 where it is not trained.",
    )
    memory: Size = Field(
        2**31,
        description="Memory for what the network computes from images, at most; with more, calibration is faster.",
    )
    num_workers: Annotated[Natural, COMPRESSION] = Field(
        4, description="Processes that read images; 0 reads in the main process."
    )
    image_size: Annotated[Positive | None, COMPRESSION] = Field(
        None, description="Side in pixels of the square crop that the network sees; null: what it is made for."
    )
    resize: Annotated[Positive | None, COMPRESSION] = Field(
        None, description="Length in pixels to which the short side is scaled before; null: 8/7 of image_size."
    )
    mean: Annotated[tuple[Real, Real, Real] | None, COMPRESSION] = Field(
        None,
        description=(
            "Mean of each colour channel, subtracted from images in 0..1; null: what the network is made for where "
            "that is known, else ImageNet's."
        ),
    )
    std: Annotated[tuple[RealAboveZero, RealAboveZero, RealAboveZero] | None, COMPRESSION] = Field(
        None,
        description="Standard deviation of each colour channel, by which images are divided; null: as for the mean.",
    )


class DataSettings(Section):
    """Where images come from and how they reach the network."""

    imagenet_path: Annotated[Text, IMAGES_IN_FOLDERS] = Field(
        "<your_imagenet_path_here>",
        description=(
            "Folder with train/ and val/, each with one folder per class or with shards (*.tar); or with a data set "
            "that the package datasets saved; or hf:OWNER/NAME, one of the Hugging Face hub."
        ),
    )
    coco_path: Annotated[Text, COCO] = Field(
        "<your_coco_path_here>", description="Folder with COCO's annotations, train2017 and val2017."
    )
    source: SourceName = Field(
        "folder", description="Where images come from; all but folder are written to the path first, once."
    )
    image_column: Annotated[Text | None, IMAGES_IN_FOLDERS] = Field(
        None, description="Column of a saved data set that holds the images; null: the only one of the type Image."
    )
    label_column: Annotated[Text | None, IMAGES_IN_FOLDERS] = Field(
        None, description="Column of a saved data set that holds the labels; null: the only one of the type ClassLabel."
    )
    num_workers: Natural = Field(4, description="Processes that read images; 0 reads in the main process.")
    batch_size: Positive = Field(128, description="Images per batch and process.")
    train_shuffle: Annotated[Flag, TRAINING] = Field(
        True, description="Draw the training images in a new order every epoch."
    )
    validation_shuffle: Flag = Field(
        False, description="Shuffle the validation images too; the result does not depend on it."
    )
    resize: Annotated[Positive, IMAGES_IN_FOLDERS] = Field(
        256, description="Length in pixels to which the short side of an image is scaled."
    )
    image_size: Annotated[Positive, IMAGES_IN_FOLDERS] = Field(
        224, validate_default=True, description="Side in pixels of the square crop that the network sees."
    )
    crop_padding: Annotated[Natural, TRAINING, IMAGES_IN_FOLDERS] = Field(
        0, description="Pixels of padding on every side before the random training crop."
    )
    crop: Annotated[Literal["random", "random_resized"], TRAINING, IMAGES_IN_FOLDERS] = Field(
        "random",
        description=(
            "Training crop: random, of image_size out of the image scaled to resize; or random_resized, of 8 to 100 % "
            "of the image's area scaled to image_size, which helps long trainings on many images."
        ),
    )
    augmentation: Annotated[tuple[AugmentationName, ...], TRAINING, IMAGES_IN_FOLDERS] = Field(
        (),
        description=(
            "What is done to training images after crop and flip, one after the other; it helps long trainings on few "
            f"images. {told(AUGMENTATIONS)}"
        ),
    )
    decoding: Annotated[Literal["fast", "exact"], TRAINING, IMAGES_IN_FOLDERS] = Field(
        "fast",
        description=(
            "How training images are decoded and scaled: fast, to within 1 of 255 of exact, but for JPEGs of at least "
            "four times the size needed, which are decoded smaller; or exact, to the last bit as torchvision does it. "
            "Validation is always exact."
        ),
    )
    min_size: Annotated[Positive | None, COCO] = Field(
        None,
        description=(
            "Detection: length in pixels to which the short side of an image is scaled; null: the network's own "
            "(Mask R-CNN: 800)."
        ),
    )
    max_size: Annotated[Positive | None, COCO] = Field(
        None,
        description=(
            "Detection: most pixels of the long side; such an image becomes smaller than min_size. null: the network's "
            "own (Mask R-CNN: 1333)."
        ),
    )
    group_by_aspect_ratio: Annotated[Flag, TRAINING, COCO] = Field(
        True, description="Detection: training batches of images of like aspect ratio, which need less padding."
    )
    horizontal_flip: Annotated[Flag, TRAINING] = Field(True, description="Mirror training images at random.")
    mean: Annotated[tuple[Real, Real, Real], IMAGES_IN_FOLDERS] = Field(
        (0.485, 0.456, 0.406), description="Mean of each colour channel, subtracted from images in 0..1."
    )
    std: Annotated[tuple[RealAboveZero, RealAboveZero, RealAboveZero], IMAGES_IN_FOLDERS] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of each colour channel, by which images are divided."
    )
    num_classes: Annotated[Whole, Ge(2)] | None = Field(
        None,
        description=(
            "Number of class folders to expect (detection: outputs of a random network's head, categories + 1 or "
            "highest category id + 1); null: what is there."
        ),
    )
    skip_unreadable: Flag = Field(
        False, description="Leave unreadable images out, with a warning, instead of stopping."
    )
    verify_images: Literal["quick", "full", "none"] = Field(
        "quick", description="Check of the images before the run: quick reads their headers, full decodes every one."
    )

    @field_validator("image_size")
    @classmethod
    def _crop_fits(cls, image_size: int, info: ValidationInfo) -> int:
        resize = info.data.get("resize")
        if resize is not None and image_size > resize:
            raise ValueError(f"at most dataloader.resize ({resize}): a crop cannot be larger than the resized image")
        return image_size

    @field_validator("max_size")
    @classmethod
    def _not_below_the_short_side(cls, max_size: int | None, info: ValidationInfo) -> int | None:
        min_size = info.data.get("min_size")
        if min_size is not None and max_size is not None and max_size < min_size:
            raise ValueError(
                f"at least dataloader.min_size ({min_size}): the long side cannot be shorter than the short one"
            )
        return max_size


class SchedulerSettings(Section):
    """How the learning rate changes during training."""

    type: ScheduleName = Field("cosine", description="Schedule of the learning rate.")
    min_lr: RealFromZero = Field(1e-6, description="Lowest learning rate (cosine, plateau).")
    patience: Natural = Field(
        3, description="Epochs without a better validation metric before the rate falls (plateau)."
    )
    factor: Annotated[Real, Gt(0), Lt(1)] = Field(
        0.1, description="What the rate is multiplied by when it falls (plateau, multistep)."
    )
    milestones: tuple[Natural, ...] = Field((), description="Rising epochs at which the rate falls (multistep).")
    last_epoch: Annotated[Whole, Ge(-1)] = Field(
        -1, description="Last step already done (cosine: batches, multistep: epochs); -1: none."
    )
    warmup: RealFromZero = Field(
        0.0,
        description=(
            "Epochs, or a part of one, in which the rate rises step by step to what the schedule says; it helps where "
            "the first steps of a high rate undo what was there."
        ),
    )

    @field_validator("milestones")
    @classmethod
    def _rising(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in pairwise(milestones)):
            raise ValueError("rising epochs, each once")
        return milestones


class ExpectedSettings(Section):
    """What an evaluation should find; it leaves with status 1 otherwise."""

    accuracy: Annotated[Annotated[Real, Ge(0), Le(100)] | None, IMAGES_IN_FOLDERS] = Field(
        None, description="Expected top-1 accuracy in percent; null: no check."
    )
    box_ap: Annotated[Annotated[Real, Ge(0), Le(100)] | None, COCO] = Field(
        None, description="Expected box AP in percent; null: no check."
    )
    mask_ap: Annotated[Annotated[Real, Ge(0), Le(100)] | None, COCO] = Field(
        None, description="Expected mask AP in percent; null: no check."
    )
    tolerance: RealFromZero = Field(0.5, description="Accepted difference from what is expected, in percentage points.")


class EvaluationSettings(Section):
    """How detections are scored and kept."""

    backend: BackendName = Field("pycocotools", description="What computes COCO's figures.")
    per_category: Annotated[Flag, EVALUATION] = Field(False, description="Box AP and mask AP of every category too.")
    detections: Annotated[Text | None, EVALUATION] = Field(
        None, description="COCO result JSON to evaluate instead of running a network."
    )
    visualized_images: Annotated[Natural, EVALUATION] = Field(
        16, description="Most images that --visualize draws; 0: all."
    )

"""Every key of a settings file: its type, its default and its meaning. Nothing here reads files."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..compression.finetune.registry import OPTIMIZERS, SCHEDULES
from ..compression.permute.registry import SEARCHES, STEPS
from ..compression.quantize.registry import QUANTIZERS
from ..engines.registry import ENGINES
from ..tasks.coco.backends import BACKENDS
from .values import Centroids, Flag, Natural, Positive, Real, RealAboveZero, RealFromZero, Text, Whole, names_of

if TYPE_CHECKING:
    BackendName: TypeAlias = str
    EngineName: TypeAlias = str
    OptimizerName: TypeAlias = str
    QuantizerName: TypeAlias = str
    ScheduleName: TypeAlias = str
    SearchName: TypeAlias = str
    StepName: TypeAlias = str
else:
    BackendName = names_of(BACKENDS)
    EngineName = names_of(ENGINES, "auto")
    OptimizerName = names_of(OPTIMIZERS)
    QuantizerName = names_of(QUANTIZERS)
    ScheduleName = names_of(SCHEDULES)
    SearchName = names_of(SEARCHES)
    StepName = names_of(STEPS)

Names = Annotated[tuple[Text, ...], MinLen(1)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors, and an empty section (YAML null) means its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, data: Any) -> Any:
        return {} if data is None else data


def _empty_map(value: Any) -> Any:
    return {} if value is None else value


class DataSettings(Section):
    """Where images come from and how they reach the network."""

    imagenet_path: Text = Field(
        "<your_imagenet_path_here>", description="Folder with train/ and val/, each with one folder per class."
    )
    coco_path: Text = Field(
        "<your_coco_path_here>", description="Folder with COCO's annotations, train2017 and val2017."
    )
    source: Text = Field(
        "folder", description="folder: read the path as it is; digits: write scikit-learn's digits there first, once."
    )
    num_workers: Natural = Field(4, description="Processes that read images; 0 reads in the main process.")
    batch_size: Positive = Field(128, description="Images per batch and process.")
    train_shuffle: Flag = Field(True, description="Draw the training images in a new order every epoch.")
    validation_shuffle: Flag = Field(
        False, description="Shuffle the validation images too; the result does not depend on it."
    )
    resize: Positive = Field(256, description="Length in pixels to which the short side of an image is scaled.")
    image_size: Positive = Field(
        224, validate_default=True, description="Side in pixels of the square crop that the network sees."
    )
    crop_padding: Natural = Field(0, description="Pixels of padding on every side before the random training crop.")
    min_size: Positive = Field(
        800, description="Detection: length in pixels to which the short side of an image is scaled."
    )
    max_size: Positive = Field(
        1333,
        validate_default=True,
        description="Detection: most pixels of the long side; such an image becomes smaller than min_size.",
    )
    group_by_aspect_ratio: Flag = Field(
        True, description="Detection: training batches of images of like aspect ratio, which need less padding."
    )
    horizontal_flip: Flag = Field(True, description="Mirror training images at random.")
    mean: tuple[Real, Real, Real] = Field(
        (0.485, 0.456, 0.406), description="Mean of each colour channel, subtracted from images in 0..1."
    )
    std: tuple[RealAboveZero, RealAboveZero, RealAboveZero] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of each colour channel, by which images are divided."
    )
    num_classes: Annotated[Whole, Ge(2)] | None = Field(
        None,
        description="Number of class folders to expect (detection: highest category id + 1 of a random network); null: what is there.",
    )
    skip_unreadable: Flag = Field(
        False, description="Leave unreadable images out, with a warning, instead of stopping."
    )
    verify_images: Literal["quick", "full", "none"] = Field(
        "quick", description="Check of the images before the run: quick looks at their headers, full decodes every one."
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
    def _not_below_the_short_side(cls, max_size: int, info: ValidationInfo) -> int:
        min_size = info.data.get("min_size")
        if min_size is not None and max_size < min_size:
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

    @field_validator("milestones")
    @classmethod
    def _rising(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in pairwise(milestones)):
            raise ValueError("rising epochs, each once")
        return milestones


class ExpectedSettings(Section):
    """What an evaluation should find; it leaves with status 1 otherwise."""

    accuracy: Annotated[Real, Ge(0), Le(100)] | None = Field(
        None, description="Expected top-1 accuracy in percent; null: no check."
    )
    box_ap: Annotated[Real, Ge(0), Le(100)] | None = Field(
        None, description="Expected box AP in percent; null: no check."
    )
    mask_ap: Annotated[Real, Ge(0), Le(100)] | None = Field(
        None, description="Expected mask AP in percent; null: no check."
    )
    tolerance: RealFromZero = Field(0.5, description="Accepted difference from what is expected, in percentage points.")


class EvaluationSettings(Section):
    """How detections are scored and kept."""

    backend: BackendName = Field(
        "pycocotools",
        description="What computes COCO's figures: pycocotools, or faster (faster-coco-eval, the same figures).",
    )
    per_category: Flag = Field(False, description="Box AP and mask AP of every category too.")
    detections: Text | None = Field(None, description="COCO result JSON to evaluate instead of running a network.")
    visualized_images: Natural = Field(16, description="Most images that --visualize draws; 0: all.")


class LayerSpec(Section):
    """Compression settings of one layer; null: those of the whole model."""

    k: Centroids | None = Field(None, description="Centroids of this layer.")
    k_means_type: QuantizerName | None = Field(None, description="Clustering of this layer.")
    k_means_n_iters: Natural | None = Field(None, description="Clustering iterations of this layer.")
    subvector_size: Positive | None = Field(None, description="Block length of a linear layer or 1x1 convolution.")
    large_subvectors: Flag | None = Field(None, description="Large or small blocks for a convolution.")


class CompressionSettings(Section):
    """How weights are cut into blocks and clustered."""

    k: Centroids = Field(256, description="Centroids per layer; fewer where a layer has too few blocks.")
    k_means_type: QuantizerName = Field("src", description="Clustering: plain k-means, or annealed k-means (src).")
    k_means_n_iters: Natural = Field(1000, description="Clustering iterations.")
    k_means_tolerance: RealFromZero = Field(
        0.0,
        description="Share of the distortion: stop when 10 iterations of kmeans, or one of the short annealings that src then makes, gain less; 0: never.",
    )
    fc_subvector_size: Positive = Field(4, description="Block length in linear layers.")
    pw_subvector_size: Positive = Field(4, description="Block length in 1x1 convolutions.")
    large_subvectors: Flag = Field(False, description="Blocks of two kernels instead of one in other convolutions.")
    ignored_modules: tuple[Text, ...] = Field((), description="Layers to leave uncompressed.")
    layer_specs: Annotated[dict[str, LayerSpec], BeforeValidator(_empty_map)] = Field(
        default_factory=dict, description="Settings of single layers."
    )


class GroupSettings(Section):
    """Layers that share one permutation: the outputs of `parents` are what `children` read."""

    parents: Names = Field(description="Layers whose output channels are permuted.")
    children: Names = Field(description="Layers whose input channels are permuted alike.")

    @model_validator(mode="before")
    @classmethod
    def _two_maps_are_one(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        parts = data if isinstance(data, list | tuple) else [data]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("a group: [{parents: [names]}, {children: [names]}]")
        keys = [key for part in parts for key in part]
        if sorted(keys) != ["children", "parents"]:
            raise ValueError(
                "a group with the keys parents and children, each once: [{parents: [names]}, {children: [names]}]"
            )
        return {key: value for part in parts for key, value in part.items()}


class PermutationSpec(Section):
    """How the permutation of one layer's inputs is searched."""

    reshape: tuple[Positive, ...] | None = Field(
        None, description="Shape in which a linear layer's weight reads a flattened feature map."
    )
    optimization: tuple[StepName, ...] | None = Field(
        None, description="Searches to run, in this order; null: the usual ones."
    )


class ModelSettings(Section):
    """The network, its permutation and its compression."""

    arch: Text = Field(
        "resnet50", description="Architecture: resnet18, resnet50, resnet50ssl or another registered name."
    )
    weights: Text = Field(
        "pretrained", description="Starting weights: pretrained, none (random), or a checkpoint's path."
    )
    use_compression: Flag = Field(True, description="Compress the network; False trains or evaluates it as it is.")
    state_dict_compressed: Text | None = Field(None, description="Compressed model to evaluate.")
    compression_parameters: CompressionSettings = Field(
        default_factory=CompressionSettings, description="How weights are compressed."
    )
    boxes_per_image: Positive = Field(
        512, description="Detection: proposed boxes of an image that a training step learns from, at most."
    )
    proposals: Positive = Field(
        1000,
        description="Detection: boxes of an image that are proposed to the heads, at most; twice as many in training.",
    )
    use_permutations: Flag = Field(True, description="Permute channels before compressing.")
    search: SearchName = Field(
        "best",
        description="best: all children of a group, until nothing is gained; published: the paper's search, first child only.",
    )
    search_seconds: RealAboveZero | None = Field(
        None, description="Stop the best search after so long; the result then depends on the machine. null: no limit."
    )
    sls_iterations: Natural = Field(
        10_000, description="Swaps tried per group by search: published, and by the first of best's own searches."
    )
    permutations: tuple[GroupSettings, ...] | None = Field(
        None, description="Groups of layers; null: those of the architecture."
    )
    permutation_specs: Annotated[dict[str, PermutationSpec], BeforeValidator(_empty_map)] = Field(
        default_factory=dict, description="Search settings of single layers."
    )


class Settings(Section):
    """Everything a job reads."""

    dataloader: DataSettings = Field(default_factory=DataSettings, description="Images.")
    epochs: Natural = Field(9, description="Passes over the training images.")
    optimizer: OptimizerName = Field("adam", description="Optimizer.")
    learning_rate: RealAboveZero = Field(1e-3, description="Learning rate at the start, per process.")
    momentum: Annotated[Real, Ge(0), Lt(1)] = Field(0.9, description="Momentum (sgd).")
    weight_decay: RealFromZero = Field(0.0, description="Weight of the L2 penalty.")
    lr_scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings, description="Learning rate schedule.")
    skip_initial_validation: Flag = Field(False, description="Do not validate before the first epoch.")
    output_path: Text = Field("<your_output_path_here>", description="Folder that receives everything a run writes.")
    overwrite: Flag = Field(False, description="Replace a run that output_path already holds.")
    resume: Text = Field(
        "auto",
        description="auto: go on with an unfinished run in output_path; none: never; or the folder (or saved state) of a run to go on from.",
    )
    resume_with_changes: Flag = Field(
        False, description="Go on with a run although settings of its training have changed since."
    )
    checkpoint_every_n_steps: Natural = Field(
        500, description="Training steps between two saved states to go on from; 0: only before and after validations."
    )
    save_format: Literal["pth", "safetensors", "both"] = Field(
        "pth",
        description="Files of trained models: pth (as published), safetensors (packed: smaller, says how it was made), or both.",
    )
    log_every_n_steps: Positive = Field(10, description="Training steps between two entries in TensorBoard.")
    seed: Natural = Field(0, description="Seed of every random choice.")
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    engine: EngineName = Field(
        "auto", description="How processes work together; auto finds out how the run was started."
    )
    scale_learning_rate: Flag = Field(True, description="Multiply learning_rate and min_lr by the number of processes.")
    sync_batch_norm: Flag = Field(
        False, description="Batch norms count over the images of all processes together in training."
    )
    amp: Literal["none", "bf16", "fp16"] = Field("none", description="Mixed precision.")
    channels_last: Flag = Field(
        False, description="Keep images in channels-last memory order, which is faster on some GPUs."
    )
    expected: ExpectedSettings = Field(
        default_factory=ExpectedSettings, description="Result that an evaluation checks."
    )
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="Scoring of detections.")
    visualize: Text | None = Field(
        None, description="Folder that receives images with what an evaluation detected; null: none."
    )
    model: ModelSettings = Field(default_factory=ModelSettings, description="The network.")

    _file: str = PrivateAttr(default="")
    _command_line: frozenset[tuple[str, ...]] = PrivateAttr(default=frozenset())

    def __eq__(self, other: object) -> bool:
        """Equal values are equal settings, from whichever file and in however many keys they were written."""
        return isinstance(other, Settings) and self.model_dump() == other.model_dump()

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", device):
            raise ValueError("one of auto, cpu, cuda, cuda:N (N a number), mps")
        return device

    @property
    def file(self) -> str:
        """Absolute path of the file these settings came from; empty if there was none."""
        return self._file

    @property
    def command_line(self) -> frozenset[tuple[str, ...]]:
        """Paths of the keys that the command line set."""
        return self._command_line

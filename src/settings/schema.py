"""Every key of a settings file, with those of `data_schema` and `model_schema`: its type, its default and its meaning.
Nothing here reads files."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import (
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from .data_schema import CalibrationSettings, DataSettings, EvaluationSettings, ExpectedSettings, SchedulerSettings
from .finetune_schema import DistillationSettings
from .model_schema import BudgetSettings, ModelSettings
from .names import EngineName, OptimizerName
from .read_by import COCO, COMPRESSING, EVALUATION, IMAGES_IN_FOLDERS, TRAINING, WITH_DATA, WRITES_A_FOLDER
from .recipes import put_defaults, told
from .section import Section
from .values import Flag, Natural, Positive, Real, RealAboveZero, RealFromZero, Text


class Settings(Section):
    """Everything a job reads."""

    recipe: Annotated[Literal["best", "published"], COMPRESSING] = Field(
        "best",
        description=(
            "What is done where single keys do not say it: best, what keeps most; published, what the paper does. "
            f"{told()}"
        ),
    )
    dataloader: Annotated[DataSettings, WITH_DATA] = Field(default_factory=DataSettings, description="Images.")
    calibration: Annotated[CalibrationSettings, COMPRESSING] = Field(
        default_factory=CalibrationSettings, description="Images without labels."
    )
    compression: BudgetSettings = Field(default_factory=BudgetSettings, description="A size instead of settings.")
    epochs: Annotated[Natural, TRAINING] = Field(9, description="Passes over the training images.")
    optimizer: Annotated[OptimizerName, TRAINING] = Field("adam", description="Optimizer.")
    learning_rate: Annotated[RealAboveZero, TRAINING] = Field(
        1e-3, description="Learning rate at the start, per process."
    )
    momentum: Annotated[Real, Ge(0), Lt(1), TRAINING] = Field(0.9, description="Momentum (sgd).")
    weight_decay: Annotated[RealFromZero, TRAINING] = Field(0.0, description="Weight of the L2 penalty.")
    codebook_learning_rate: Annotated[RealAboveZero, TRAINING] = Field(
        0.5,
        description=(
            "Learning rate of codebooks as a multiple of learning_rate; below 1 it helps where the codes fit well "
            "already and norms have most to learn."
        ),
    )
    accumulate: Annotated[Positive, TRAINING] = Field(
        1,
        description=(
            "Batches that make up one step of the optimizer; it helps where batches are small because memory is. What "
            "is left at the end of an epoch makes up a step of its own."
        ),
    )
    clip_gradients: Annotated[RealAboveZero | None, TRAINING] = Field(
        None,
        description=(
            "Largest norm of a step's gradients together; longer ones are scaled down to it, which helps where single "
            "batches throw a training back. null: no limit."
        ),
    )
    ema: Annotated[Real, Ge(0), Lt(1), TRAINING] = Field(
        0.0,
        description=(
            "Decay (such as 0.999) of the moving average of codebooks, norms and dense layers that is validated and "
            "saved; it helps where the metric goes up and down between epochs. 0: none."
        ),
    )
    early_stopping: Annotated[Natural, TRAINING] = Field(
        0,
        description=(
            "Epochs without a better validation metric after which training ends; it helps with a plateau or constant "
            "schedule and many epochs. 0: it goes on."
        ),
    )
    lr_scheduler: Annotated[SchedulerSettings, TRAINING] = Field(
        default_factory=SchedulerSettings, description="Learning rate schedule."
    )
    distillation: Annotated[DistillationSettings, TRAINING] = Field(
        default_factory=DistillationSettings, description="Learning from the dense network."
    )
    label_smoothing: Annotated[Real, Ge(0), Lt(1), TRAINING, IMAGES_IN_FOLDERS] = Field(
        0.0,
        description=(
            "Share of each label's weight that is spread over all classes; it helps long trainings on labels, some of "
            "which are wrong."
        ),
    )
    skip_initial_validation: Annotated[Flag, TRAINING] = Field(
        False, description="Do not validate before the first epoch."
    )
    output_path: Annotated[Text, WRITES_A_FOLDER] = Field(
        "<your_output_path_here>", description="Folder that receives everything a run writes."
    )
    overwrite: Annotated[Flag, WRITES_A_FOLDER] = Field(
        False, description="Replace a run that output_path already holds."
    )
    resume: Annotated[Text, COMPRESSING] = Field(
        "auto",
        description=(
            "auto: resume an unfinished run in output_path; none: never; or the folder (or a checkpoint) of a run to "
            "resume from."
        ),
    )
    resume_with_changes: Annotated[Flag, COMPRESSING] = Field(
        False, description="Resume a run although settings of its training have changed since."
    )
    checkpoint_every_n_steps: Annotated[Natural, TRAINING] = Field(
        500, description="Training steps between two checkpoints; 0: only before and after validations."
    )
    save_format: Annotated[Literal["pth", "safetensors", "both"], COMPRESSING] = Field(
        "pth",
        description=(
            "Files of trained models: pth (as published), safetensors (packed: smaller, says how it was made), or both."
        ),
    )
    log_every_n_steps: Annotated[Positive, TRAINING] = Field(
        10, description="Training steps between two entries in TensorBoard."
    )
    wandb_project: Annotated[Text | None, COMPRESSING] = Field(
        None,
        description=(
            "Project of Weights & Biases (PROJECT or ENTITY/PROJECT) that receives a run's figures too, besides "
            "TensorBoard; null: none."
        ),
    )
    seed: Natural = Field(0, description="Seed of every random choice.")
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    engine: EngineName = Field(
        "auto", description="How processes work together; auto finds out how the run was started."
    )
    scale_learning_rate: Annotated[Flag, TRAINING] = Field(
        True, description="Multiply learning_rate and min_lr by the number of processes."
    )
    sync_batch_norm: Annotated[Flag, TRAINING] = Field(
        False, description="Batch norms count over the images of all processes together in training."
    )
    amp: Annotated[Literal["none", "bf16", "fp16"], TRAINING] = Field("none", description="Mixed precision.")
    channels_last: Annotated[Flag, WITH_DATA] = Field(
        False, description="Keep images in channels-last memory order, which is faster on some GPUs."
    )
    expected: Annotated[ExpectedSettings, EVALUATION] = Field(
        default_factory=ExpectedSettings, description="Result that an evaluation checks."
    )
    evaluation: Annotated[EvaluationSettings, COCO, WITH_DATA] = Field(
        default_factory=EvaluationSettings, description="Scoring of detections."
    )
    visualize: Annotated[Text | None, EVALUATION, COCO] = Field(
        None, description="Folder that receives images with what an evaluation detected; null: none."
    )
    model: ModelSettings = Field(default_factory=ModelSettings, description="The network.")

    _file: str = PrivateAttr(default="")
    _command_line: frozenset[tuple[str, ...]] = PrivateAttr(default=frozenset())

    @model_validator(mode="after")
    def _defaults_of_the_recipe(self) -> "Settings":
        put_defaults(self, self.recipe)
        return self

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

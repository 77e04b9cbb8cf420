"""Which commands read which keys: a command's help lists what it reads, and what has no effect on it is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from .keys import Path, walk

TRAIN, EVALUATE = "train", "evaluate"
JOBS = (TRAIN, EVALUATE)
CLASSIFICATION, DETECTION = "classification", "detection"
TASKS = (CLASSIFICATION, DETECTION)

# a key, or a section with a dot at its end; the longest one that fits counts, and what fits none is read by all
OF_A_JOB = {
    TRAIN: (
        "epochs", "optimizer", "learning_rate", "momentum", "weight_decay", "lr_scheduler.", "skip_initial_validation",
        "resume",
        "resume_with_changes", "checkpoint_every_n_steps", "save_format", "log_every_n_steps", "scale_learning_rate",
        "sync_batch_norm", "amp", "dataloader.train_shuffle", "dataloader.crop_padding",
        "dataloader.group_by_aspect_ratio",
        "dataloader.horizontal_flip", "model.boxes_per_image", "model.use_permutations", "model.search",
        "model.search_seconds",
        "model.sls_iterations", "model.permutations", "model.permutation_specs.",
        "model.compression_parameters.k_means_type",
        "model.compression_parameters.k_means_n_iters", "model.compression_parameters.k_means_tolerance",
        "model.compression_parameters.layer_specs.<layer>.k_means_type",
        "model.compression_parameters.layer_specs.<layer>.k_means_n_iters",
    ),
    EVALUATE: (
        "expected.", "evaluation.per_category", "evaluation.detections", "evaluation.visualized_images", "visualize",
        "model.state_dict_compressed",
    ),
}  # fmt: skip
OF_A_TASK = {
    CLASSIFICATION: (
        "dataloader.imagenet_path", "dataloader.resize", "dataloader.image_size", "dataloader.crop_padding",
        "dataloader.mean",
        "dataloader.std", "expected.accuracy",
    ),
    DETECTION: (
        "dataloader.coco_path", "dataloader.min_size", "dataloader.max_size", "dataloader.group_by_aspect_ratio",
        "evaluation.",
        "visualize", "expected.box_ap", "expected.mask_ap", "model.boxes_per_image", "model.proposals",
    ),
}  # fmt: skip
OF_BOTH = {(EVALUATE, CLASSIFICATION): ("output_path", "overwrite")}
"""What one job on one task does not read."""


@dataclass(frozen=True)
class Key:
    """A key of the settings and who reads it.

    Attributes:
        path: its parts; `<layer>` holds the place of a layer's name.
        field: type, default and meaning.
        jobs: `train`, `evaluate`.
        tasks: `classification`, `detection`.
    """

    path: Path
    field: FieldInfo
    jobs: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def dotted(self) -> str:
        """As it is written on a command line."""
        return ".".join(self.path)

    def is_read_by(self, job: str | None, task: str | None) -> bool:
        """Whether a command reads it; None stands for any job or task."""
        left_out = (job, task) in OF_BOTH and _among(self.dotted, OF_BOTH[job, task])  # type: ignore[index]
        return (job is None or job in self.jobs) and (task is None or task in self.tasks) and not left_out


def keys() -> Iterator[Key]:
    """Every key, in the order of the schema."""
    for path, field in walk():
        dotted = ".".join(path)
        yield Key(path, field, _owners(dotted, OF_A_JOB) or JOBS, _owners(dotted, OF_A_TASK) or TASKS)


def unread(job: str | None, task: str | None) -> list[str]:
    """The keys that a command does not read, layers' own keys left out."""
    return [key.dotted for key in keys() if "<layer>" not in key.path and not key.is_read_by(job, task)]


def _owners(dotted: str, table: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(owner for owner, listed in table.items() if _among(dotted, listed))


def _among(dotted: str, listed: tuple[str, ...]) -> bool:
    return any(dotted == one or (one.endswith(".") and dotted.startswith(one)) for one in listed)

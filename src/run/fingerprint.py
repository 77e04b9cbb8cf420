"""What a run, or a checkpoint of it, was made with: its settings, and digests of what it works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import Settings
from .agreement import flat

WITHOUT_INFLUENCE = (
    "calibration.images", "calibration.memory", "calibration.num_workers", "checkpoint_every_n_steps",
    "dataloader.coco_path", "dataloader.image_column", "dataloader.imagenet_path", "dataloader.label_column",
    "dataloader.num_workers", "dataloader.source", "dataloader.verify_images", "device", "distillation.images",
    "distillation.teacher", "engine", "evaluation.detections", "evaluation.per_category",
    "evaluation.visualized_images", "expected.", "log_every_n_steps", "model.weights", "output_path", "overwrite",
    "recipe", "resume", "resume_with_changes", "visualize", "wandb_project",
)  # fmt: skip
"""Keys (with a dot at the end: sections) that may differ: they do not change what is trained. For paths it is what they
hold that counts."""
PROCESSES, WEIGHTS, IMAGES = "(processes)", "(starting weights)", "(training and validation images)"
CALIBRATION, TEACHER = "(calibration images)", "(teacher's weights)"
OF_THE_NETWORK = ("model.", "compression.", "seed", "optimizer", "codebook_learning_rate", "ema", WEIGHTS)
"""Keys that cannot change in a run: its network, or the kind of its checkpoints, was made with them."""
OF_THE_SCHEDULE = (
    "accumulate", "epochs", "learning_rate", "lr_scheduler.", "scale_learning_rate", "dataloader.batch_size", PROCESSES,
)  # fmt: skip


@dataclass(frozen=True)
class RunFingerprint:
    """What a run, or a checkpoint of it, was made with.

    Attributes:
        settings: by dotted key.
        inputs: what it works on: number of processes, digests of the starting weights and of the lists of images.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Settings, inputs: Mapping[str, Any] | None = None) -> RunFingerprint:
        """The fingerprint of a run with these settings; without `inputs` where they are not known yet."""
        return cls(dict(flat(settings.model_dump(mode="json"))), inputs or {})

    @classmethod
    def from_values(cls, found: Mapping[str, Any]) -> RunFingerprint:
        """From `as_values`, read from a file.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        fingerprint = cls(dict(found["settings"]), dict(found["inputs"]))
        if fingerprint.images_per_step < 1:
            raise ValueError("no images in a step")
        return fingerprint

    def as_values(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"settings": dict(self.settings), "inputs": dict(self.inputs)}

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return int(self.settings["dataloader.batch_size"]) * int(self.inputs[PROCESSES])

    def differences(self, other: RunFingerprint) -> list[str]:
        """Keys that count and have another value in `other`; of inputs those that `other` gives."""
        keys = sorted({*self.settings, *other.settings})
        differ = [
            key
            for key in keys
            if not is_among(key, WITHOUT_INFLUENCE) and self.settings.get(key) != other.settings.get(key)
        ]
        return differ + [key for key in other.inputs if self.inputs.get(key) != other.inputs[key]]

    def value(self, key: str) -> str:
        """The value of a key for a message."""
        value = self.inputs.get(key, self.settings.get(key))
        text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."


def other_number(then: RunFingerprint, now: RunFingerprint) -> str:
    """What another number of processes changes in a run, for a note; empty where it is the same number."""
    before, here = (int(one.inputs[PROCESSES]) for one in (then, now))
    if before == here:
        return ""
    rates = [
        float(one.settings["learning_rate"]) * (number if one.settings["scale_learning_rate"] else 1)
        for one, number in ((then, before), (now, here))
    ]
    return (
        f"the run goes on with {here} process{'' if here == 1 else 'es'} instead of {before}: a batch of all together "
        f"has {now.images_per_step} images instead of {then.images_per_step}, learning_rate is {rates[1]:g} instead of "
        f"{rates[0]:g} (scale_learning_rate: {now.settings['scale_learning_rate']}), and the result will not be that "
        f"of {before}"
    )


def is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` is one of `keys`, or in one of the sections among them."""
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in keys)


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's values."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest of all values of a network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor_digest(tensor)}\n".encode())
    return digest.hexdigest()

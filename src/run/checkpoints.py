"""What an unfinished run has said about itself: its settings, what it works on, and the states it saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..common.errors import CheckpointError
from ..common.paths import write_text
from ..compression.finetune.checkpoint import Checkpoint
from ..model_files.safetensors_file import read_container, write_container
from .finished_parts import tensor_digest

FORMAT = 1
WITHOUT_INFLUENCE = (
    "checkpoint_every_n_steps", "dataloader.coco_path", "dataloader.imagenet_path", "dataloader.num_workers", "dataloader.source",
    "dataloader.verify_images", "device", "engine", "evaluation.detections", "evaluation.per_category", "evaluation.visualized_images",
    "expected.", "log_every_n_steps", "model.weights", "output_path", "overwrite", "resume", "resume_with_changes", "visualize",
)  # fmt: skip
"""Keys (with a dot at the end: sections) that may differ: they do not change what is trained. For paths it is what they hold that counts."""
OF_THE_NETWORK = ("model.", "seed", "optimizer")
"""Keys that cannot change in a run: its network, or the kind of its state, was made with them."""
OF_THE_SCHEDULE = (
    "epochs",
    "learning_rate",
    "lr_scheduler.",
    "scale_learning_rate",
    "dataloader.batch_size",
    PROCESSES := "(processes)",
)
WEIGHTS, IMAGES = "(starting weights)", "(training and validation images)"


def is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` is one of `keys`, or in one of the sections among them."""
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in keys)


def weights_fingerprint(model: nn.Module) -> str:
    """A digest of all values of a network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor_digest(tensor)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class About:
    """What a run, or a state of it, was made with.

    Attributes:
        settings: by dotted key.
        facts: what it works on.
    """

    settings: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return int(self.settings["dataloader.batch_size"]) * int(self.facts[PROCESSES])

    def differences(self, other: About) -> list[str]:
        """Keys that count and have another value in `other`; of facts those that `other` gives."""
        keys = sorted({*self.settings, *other.settings})
        differ = [
            key
            for key in keys
            if not is_among(key, WITHOUT_INFLUENCE) and self.settings.get(key) != other.settings.get(key)
        ]
        return differ + [key for key in other.facts if self.facts.get(key) != other.facts[key]]

    def value(self, key: str) -> str:
        """The value of a key for a message."""
        value = self.facts.get(key, self.settings.get(key))
        text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class StoredRun:
    """What stands in run.json.

    Attributes:
        folder: the run's resume folder.
        about: settings and facts.
        started: when it began.
        versions: of this program and of torch.
        origin: output folder of the run that it went on from, if that was another one.
    """

    folder: Path
    about: About
    started: datetime
    versions: Sequence[str]
    origin: str | None = None

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """Read the run.json of the resume folder `folder`.

        Raises:
            CheckpointError: it cannot be read, or is of a later format.
        """
        path = folder / "run.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] > FORMAT:
                raise CheckpointError(
                    f"resume: {path} was written by a later version of pqf ({found['versions'][0]}); use that one"
                )
            started, told = datetime.fromisoformat(found["started"]), [str(version) for version in found["versions"]]
            return cls(folder, _about(found), started, told, found.get("origin"))
        except OSError as error:
            raise CheckpointError(f"resume: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"resume: {path} is damaged. --overwrite True begins the run anew") from error

    def write(self) -> None:
        """Write it. Raises RunError: the disk is full."""
        about = {"settings": dict(self.about.settings), "facts": dict(self.about.facts)}
        run = {
            "format": FORMAT,
            "versions": list(self.versions),
            "started": self.started.isoformat(timespec="seconds"),
            "origin": self.origin,
        }
        write_text(self.folder / "run.json", json.dumps({**run, **about}, indent=1) + "\n")


def _about(found: Mapping[str, Any]) -> About:
    about = About(dict(found["settings"]), dict(found["facts"]))
    if about.images_per_step < 1:
        raise ValueError
    return about


@dataclass(frozen=True)
class StoredCheckpoint:
    """A state of a training, and what it was made with: settings may have changed since the run began, and again since.

    Attributes:
        checkpoint: the state.
        about: what it was made with.
        unreadable: reason by path of the images that were left out until then, on all processes.
    """

    checkpoint: Checkpoint
    about: About
    unreadable: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> StoredCheckpoint | CheckpointError:
        """The state in a file, or why there is none."""
        try:
            tensors, metadata = read_container(path)
            checkpoint = Checkpoint(tensors, json.loads(metadata["values"]))
            position = checkpoint.position
            if min(position.epoch, position.batch, position.step) < 0:
                raise ValueError
            unreadable = {str(path): str(reason) for path, reason in json.loads(metadata["unreadable"]).items()}
            return cls(checkpoint, _about(json.loads(metadata["about"])), unreadable)
        except CheckpointError as error:
            return error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return CheckpointError(f"{path} is damaged: it holds no state of a training.")

    def write(self, path: Path) -> None:
        """Write it. Raises RunError: the disk is full."""
        about = {"settings": dict(self.about.settings), "facts": dict(self.about.facts)}
        parts = {"values": self.checkpoint.values, "about": about, "unreadable": dict(self.unreadable)}
        texts = {name: json.dumps(part, separators=(",", ":")) for name, part in parts.items()}
        write_container(path, self.checkpoint.tensors, {"format": str(FORMAT), **texts})


def versions() -> list[str]:
    """Of this program and of torch."""
    return [__version__, torch.__version__]


def checkpoints_in(folder: Path) -> list[Path]:
    """The states in a resume folder, the oldest first."""
    return sorted(folder.glob("state-*.safetensors"), key=checkpoint_number)


def checkpoint_number(path: Path) -> int:
    """Which one it is, from its name; -1 for another file."""
    digits = path.name.partition("-")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else -1

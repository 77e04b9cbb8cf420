"""The checkpoints of a training run, and the finished parts of its compression, in the folder <output_path>/resume.

groups/<n>.json               finished groups of the permutation search
layers/<n>.safetensors        finished clusterings
calibration/<n>.safetensors   finished parts of a calibration
checkpoint-<n>.safetensors    the last two checkpoints of the training (see compression.finetune.checkpoint)

Each file is written to a temporary one and renamed; the safetensors files have checksums.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import CheckpointError
from ..compression.finetune.checkpoint import Checkpoint
from ..engines.engine import Engine
from ..model_files.safetensors_file import read_container, write_container
from .fingerprint import RunFingerprint
from .finished_parts import FinishedCalibration, FinishedClusterings, FinishedSearches

FORMAT = 2
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint, and what it was made with: settings may have changed since the run began, and again since.

    Attributes:
        checkpoint: the state of the training.
        fingerprint: what it was made with.
        unreadable: reason by path of the images that were left out until then, on all processes.
    """

    checkpoint: Checkpoint
    fingerprint: RunFingerprint
    unreadable: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> StoredCheckpoint | CheckpointError:
        """The checkpoint in a file, or why there is none."""
        try:
            tensors, metadata = read_container(path)
            checkpoint = Checkpoint(tensors, json.loads(metadata["values"]))
            position = checkpoint.position
            if min(position.epoch, position.batch, position.step) < 0:
                raise ValueError
            unreadable = {str(path): str(reason) for path, reason in json.loads(metadata["unreadable"]).items()}
            return cls(checkpoint, RunFingerprint.from_values(json.loads(metadata["fingerprint"])), unreadable)
        except CheckpointError as error:
            return error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return CheckpointError(f"{path} is damaged: it holds no checkpoint of a training.")

    def write(self, path: Path) -> None:
        """Write it. Raises RunError: the disk is full."""
        parts = {
            "values": self.checkpoint.values,
            "fingerprint": self.fingerprint.as_values(),
            "unreadable": dict(self.unreadable),
        }
        texts = {name: json.dumps(part, separators=(",", ":")) for name, part in parts.items()}
        write_container(path, self.checkpoint.tensors, {"format": str(FORMAT), **texts})


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a resume folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), key=checkpoint_number)


def checkpoint_number(path: Path) -> int:
    """Which one it is, from its name; -1 for another file."""
    digits = path.name.partition("-")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else -1


class CheckpointFolder:
    """Where a run saves its checkpoints and the finished parts of its compression."""

    def __init__(self, folder: Path, engine: Engine, fingerprint: RunFingerprint) -> None:
        """Nothing is written yet.

        Args:
            folder: the run's resume folder.
            engine: its processes; the first one writes checkpoints, each writes the groups and layers that it finished.
            fingerprint: of the run.
        """
        self.folder = folder
        self._engine = engine
        self._fingerprint = fingerprint
        self.unreadable: MutableMapping[str, str] = {}
        """Reason by path of the images that this process leaves out."""
        self.before_keeping: Callable[[], None] = lambda: None
        """Called on the first process before a checkpoint is written: what was logged until then goes to the disk
        first."""

    def keep(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint, and remove all but the last two."""
        unreadable = dict(self._engine.gather(sorted(self.unreadable.items())))
        if not self._engine.is_main:
            return
        self.before_keeping()
        earlier = checkpoints_in(self.folder)
        path = self.folder / f"checkpoint-{checkpoint_number(earlier[-1]) + 1 if earlier else 1:06d}.safetensors"
        StoredCheckpoint(checkpoint, self._fingerprint, unreadable).write(path)
        for old in [*earlier, path][:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)

    @property
    def clusterings(self) -> FinishedClusterings:
        """Where finished layers are kept."""
        return FinishedClusterings(self.folder / "layers")

    def calibration(self, made_with: str) -> FinishedCalibration:
        """Where finished parts of a calibration are kept, told a digest of what it is made with."""
        return FinishedCalibration(self.folder / "calibration", made_with, self._engine.is_main)

    def searches(self, numbers: Sequence[int]) -> FinishedSearches:
        """Where finished groups are kept, told which of all groups the search works on."""
        return FinishedSearches(self.folder / "groups", numbers)

    def remove(self) -> None:
        """The run has ended: there is nothing to resume from."""
        if self._engine.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

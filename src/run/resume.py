"""Whether a run resumes from an earlier one that did not finish, in its own output folder or in another, and from
where.

<output_path>/resume/run.json holds the fingerprint of the unfinished run and when it began; checkpoints lie beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from .. import __version__
from ..common.errors import CheckpointError, RunError, SettingsError
from ..common.log import log, note
from ..common.paths import find, write_text
from ..compression.finetune.hooks import Resumed
from .checkpoints import StoredCheckpoint, checkpoint_number, checkpoints_in
from .fingerprint import OF_THE_NETWORK, OF_THE_SCHEDULE, PROCESSES, RunFingerprint, is_among, other_number
from .output_folder import FINISHED, STARTED, TRAINING_FILES, OutputFolder, is_half_copied, is_unfinished, take

FORMAT = 2


def versions() -> list[str]:
    """Of this program and of torch."""
    return [__version__, torch.__version__]


@dataclass(frozen=True)
class UnfinishedRun:
    """What stands in run.json.

    Attributes:
        folder: the run's resume folder.
        fingerprint: what the run was made with.
        started: when it began.
        versions: of this program and of torch.
        origin: output folder of the run that it resumed from, if that was another one.
    """

    folder: Path
    fingerprint: RunFingerprint
    started: datetime
    versions: Sequence[str]
    origin: str | None = None

    @property
    def output_path(self) -> Path:
        """The run's output folder."""
        return self.folder.parent

    @classmethod
    def read(cls, folder: Path) -> UnfinishedRun:
        """Read the run.json of the resume folder `folder`.

        Raises:
            CheckpointError: it cannot be read, or is of another format.
        """
        path = folder / "run.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version = str(found["versions"][0])
            if found["format"] != FORMAT:
                other = "a later" if found["format"] > FORMAT else "an earlier"
                raise CheckpointError(
                    f"resume: {path} was written by {other} version of pqf ({version}); use that one, or --overwrite "
                    "True to start over"
                )
            return cls(
                folder=folder,
                fingerprint=RunFingerprint.from_values(found["fingerprint"]),
                started=datetime.fromisoformat(found["started"]),
                versions=[str(version) for version in found["versions"]],
                origin=found.get("origin"),
            )
        except OSError as error:
            raise CheckpointError(f"resume: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"resume: {path} is damaged. --overwrite True starts the run over") from error

    def write(self) -> None:
        """Write it. Raises RunError: the disk is full."""
        run = {
            "format": FORMAT,
            "versions": list(self.versions),
            "started": self.started.isoformat(timespec="seconds"),
            "origin": self.origin,
            "fingerprint": self.fingerprint.as_values(),
        }
        write_text(self.folder / "run.json", json.dumps(run, indent=1) + "\n")


class Resume:
    """The decision whether a run resumes, and from which checkpoint."""

    def __init__(
        self,
        output: OutputFolder,
        earlier: UnfinishedRun | None,
        last: str | None,
        may_change: bool,
        any_number: bool = False,
    ) -> None:
        """Nothing is written yet.

        Args:
            output: of this run.
            earlier: the run to resume, in this folder or in another one; None: the run is a new one.
            last: name of the checkpoint to resume from; None: the last one.
            may_change: the user allows that settings of the training differ (`resume_with_changes`).
            any_number: the launcher decides how many processes go on with the run.
        """
        self.earlier = earlier
        self._output = output
        self._last = last
        self._may_change = may_change
        self._any_number = any_number
        self._elsewhere = earlier is not None and earlier.folder != output.resume.resolve()

    def check(self, now: RunFingerprint) -> None:
        """Compare this run's fingerprint with that of the run to resume.

        Raises:
            SettingsError: something differs that cannot, or that may only where `resume_with_changes` says so. The
                message names it.
        """
        keys = [] if self.earlier is None else self.earlier.fingerprint.differences(now)
        keys = [key for key in keys if key != PROCESSES or not self._any_number]
        fixed = [key for key in keys if is_among(key, OF_THE_NETWORK)]
        if self.earlier is None or not keys or (self._may_change and not fixed):
            return
        then, shown = self.earlier.fingerprint, fixed or keys
        listing = [f"  {key}: {then.value(key)} then, {now.value(key)} now" for key in shown[:10]]
        listing += [f"  and {len(shown) - 10} more"] if len(shown) > 10 else []
        which = " that made its network, or the state of its training" if fixed else ""
        way = "" if fixed else "add --resume_with_changes True to resume with the changes, "
        raise SettingsError(
            "\n".join(
                [
                    f"resume: the unfinished run in {self.earlier.output_path} has other settings{which}:",
                    *listing,
                    f"Use the run's own (its config.yaml), {way}--overwrite True to start over, or another "
                    "output_path.",
                ]
            )
        )

    def latest(self, now: RunFingerprint) -> tuple[Resumed, StoredCheckpoint] | None:
        """The last checkpoint that can be read, or None where there is none yet.

        The schedule, and the place in the epoch, are those that settings ask for which changed since it was saved.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        if self.earlier is None:
            return None
        if list(self.earlier.versions) != versions():
            then, this = (" and torch ".join(found) for found in (self.earlier.versions, versions()))
            note(f"the run began with pqf {then}; this is pqf {this}")
        found: StoredCheckpoint | CheckpointError | None = None
        for path in reversed(self._usable(self.earlier.folder)):
            found = StoredCheckpoint.read(path)
            if isinstance(found, StoredCheckpoint):
                _tell_of_number(found.fingerprint, now)
                return _resumed(found, now), found
            log.warning("%s The checkpoint before it is used.", found)
        if found is not None:
            raise CheckpointError(f"{found} There is no other checkpoint; --overwrite True starts the run over.")
        _tell_of_number(self.earlier.fingerprint, now)
        return None

    def _usable(self, folder: Path) -> list[Path]:
        """The checkpoints in a resume folder up to the one that `resume` names."""
        last = None if self._last is None else checkpoint_number(Path(self._last))
        return [path for path in checkpoints_in(folder) if last is None or checkpoint_number(path) <= last]

    def prepare_folder(self) -> None:
        """Clear the output folder for a new run; one that resumes finds there what the earlier one left.

        Raises:
            SettingsError: the earlier run, in another folder, is still going on.
            RunError: it cannot be copied.
        """
        if self.earlier is None:
            self._output.begin()
        elif self._elsewhere:
            _adopt(self.earlier.output_path, self._output)
        self._output.continue_run()
        usable = self._usable(self._output.resume)
        for path in checkpoints_in(self._output.resume):
            if path not in usable:
                path.unlink(missing_ok=True)

    def start(self, fingerprint: RunFingerprint) -> None:
        """Write run.json into the output folder, from where this run can be resumed from now on."""
        started, origin = datetime.now().astimezone(), None
        if self.earlier is not None:
            started = self.earlier.started
            origin = str(self.earlier.output_path) if self._elsewhere else self.earlier.origin
        UnfinishedRun(
            folder=self._output.resume,
            fingerprint=fingerprint,
            started=started,
            versions=versions(),
            origin=origin,
        ).write()
        self._output.copied()


def _tell_of_number(then: RunFingerprint, now: RunFingerprint) -> None:
    if text := other_number(then, now):
        note(text)


def _resumed(stored: StoredCheckpoint, now: RunFingerprint) -> Resumed:
    position = stored.checkpoint.position
    same_schedule = not any(is_among(key, OF_THE_SCHEDULE) for key in stored.fingerprint.differences(now))
    then, per_step = stored.fingerprint.images_per_step, now.images_per_step
    # images are common to all processes: those of the first batches are the first ones of the epoch's order
    batch = None if then == per_step else position.batch * then // per_step
    more = f" (batch {batch} with the new batch size)" if batch is not None else ""
    log.info("resume: resumes %s%s", position, more)
    return Resumed(stored.checkpoint, same_schedule, batch)


def came_from(own: Path, folder: Path) -> bool:
    """Whether the unfinished run in the output folder `own` resumed from that in `folder`."""
    return is_unfinished(own) and UnfinishedRun.read(own / "resume").origin == str(folder)


def source_of(given: str) -> tuple[Path, str | None]:
    """The output folder that `resume` leads to, and the name of the checkpoint if it names one.

    Raises:
        SettingsError: it is not there, or holds no unfinished run.
    """
    expected = "the output folder of an unfinished run, or a checkpoint in its resume folder"
    found = find(given, "resume", f"Expected auto, none, {expected}")
    folder, last = (found.parent.parent.resolve(), found.name) if found.is_file() else (found.resolve(), None)
    if not (folder / STARTED).exists() or is_half_copied(folder):
        finished = (folder / FINISHED).exists()
        why = "holds a run that has ended" if finished else "holds no unfinished run"
        raise SettingsError(f"resume: {folder} {why}; expected {expected}")
    return folder, last


@contextmanager
def alone(source: Path) -> Iterator[None]:
    """Nobody writes into the output folder `source` of another run meanwhile.

    Raises:
        SettingsError: that run is still going on.
    """
    lock = None
    with suppress(OSError):  # a folder that can only be read: nobody writes there
        lock = take(source / ".lock", "resume: wait until it has ended")
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                (source / ".lock").unlink()
            lock.close()


def _adopt(source: Path, output: OutputFolder) -> None:
    """Copy the run in `source` to the folder of this one."""
    with alone(source):
        output.begin()
        try:
            output.copying()
            for name in TRAINING_FILES:
                place, target = source / name, output.path / name
                if place.is_dir():
                    shutil.copytree(place, target, dirs_exist_ok=True)
                elif place.exists():
                    shutil.copy2(place, target)
        except OSError as error:
            raise RunError(
                f"cannot copy {source} to {output.path}: {error.strerror or error}; {source} is unchanged"
            ) from error


__all__ = ["Resume", "UnfinishedRun", "alone", "came_from", "source_of", "versions"]

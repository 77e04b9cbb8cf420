"""The folder of a run: checked before any work, held by one run at a time, cleared only when the work begins."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..common.errors import SettingsError
from ..common.paths import holds_something, remove_half_written
from .launched import Launched

fcntl: Any
try:
    import fcntl
except ImportError:  # not on this system: two runs in one folder are not noticed there
    fcntl = None

TRAINING_FILES = (
    "tensorboard",
    "wandb",
    "trained_models",
    "results.txt",
    "results.json",
    "config.yaml",
    "compression.json",
    "categories.json",
    "resume",
)
EVALUATION_FILES = ("results.json", "detections.json")
FINISHED = "results.json"
"""What a training run writes last."""
STARTED = "resume/run.json"
"""What a training run writes first."""
COPYING = ".copying"
"""There while the run of another folder is copied into this one: after a crash what is there is not whole."""


PATIENCE_SECONDS = 2.0
"""A process that was just killed may take so long to let go of its folder."""
LOST_PATIENCE_SECONDS = 300.0
"""The same for one whose agent was lost, and that has yet to notice, or whose machine was, and the disk has."""


class OutputFolder:
    """The folder of a run; only this run writes into it until it is closed."""

    def __init__(
        self,
        path: Path,
        overwrite: bool,
        files: Sequence[str] = TRAINING_FILES,
        is_main: bool = True,
        may_resume: bool = False,
        launched: Launched | None = None,
    ) -> None:
        """Take the folder, and check that the run can be written to it.

        Args:
            path: of the folder, made if it is not there.
            overwrite: accept a folder that holds a run.
            files: names in the folder that a run writes, and replaces.
            is_main: False where another process writes; nothing is checked then.
            may_resume: accept a folder with a run that did not finish.
            launched: how the processes of the run came to be; one that they go on with is accepted, finished or not.

        Raises:
            SettingsError: it cannot be written, another run is going on in it, or it already holds a run.
        """
        self.path = path.expanduser().absolute()
        self.files = files
        self._launched = Launched() if launched is None else launched
        self._lock: IO[str] | None = None
        if not is_main:
            return
        probe = self.path / ".write_test"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = take(
                self.path / ".lock",
                "output_path: choose another one, or wait until that run has ended",
                LOST_PATIENCE_SECONDS if self._launched.again else PATIENCE_SECONDS,
            )
            probe.write_bytes(b"pqf")
            probe.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                probe.unlink()
            self.close()
            raise SettingsError(
                f"output_path: {self.path} cannot be written ({error.strerror}). Choose a folder where you may write"
            ) from error
        held = [] if is_half_copied(self.path) else [name for name in files if holds_something(self.path / name)]
        accepted = overwrite or self._launched.again or (may_resume and self.is_unfinished)
        if held and not accepted:
            self.close()
            resume = "resume it: --resume auto, or " if self.is_unfinished and files == TRAINING_FILES else ""
            raise SettingsError(
                f"output_path: {self.path} already holds a run ({', '.join(held)}). Choose another output_path, or "
                f"{resume}replace that run with --overwrite True"
            )

    @property
    def is_unfinished(self) -> bool:
        """Whether the folder holds a training run that began and did not end."""
        return is_unfinished(self.path)

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds a training run that ended."""
        return (self.path / FINISHED).exists()

    def begin(self) -> None:
        """Remove what an earlier run left (only the files and folders of a run), and make the folder of this one."""
        for name in self.files:
            place = self.path / name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            elif place.exists():
                place.unlink()
        self.copied()
        self._launched.mark(self.path)
        if "trained_models" in self.files:
            self.models.mkdir(parents=True)

    def copying(self) -> None:
        """From now on, until it is `copied`, what is here is part of another run."""
        (self.path / COPYING).touch()

    def copied(self) -> None:
        """What is here is a run of its own, or nothing."""
        (self.path / COPYING).unlink(missing_ok=True)

    def continue_run(self) -> None:
        """Leave what the run that resumes wrote, but for half-written files."""
        for place in (self.path, self.models, self.resume):
            place.mkdir(exist_ok=True)
        for place in (self.path, self.models, self.resume, *self.resume.glob("*/")):
            remove_half_written(place)
        self._launched.mark(self.path)

    def forget(self) -> None:
        """Remove what nothing resumes from any more, as the run has ended."""
        shutil.rmtree(self.resume, ignore_errors=True)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                Path(self._lock.name).unlink()
            self._lock.close()
            self._lock = None

    @property
    def models(self) -> Path:
        """Where models go."""
        return self.path / "trained_models"

    @property
    def resume(self) -> Path:
        """Where a run saves what it needs to resume after a crash."""
        return self.path / "resume"


def is_unfinished(folder: Path) -> bool:
    """Whether an output folder holds a training run that began and did not end."""
    return (folder / STARTED).exists() and not (folder / FINISHED).exists() and not is_half_copied(folder)


def is_half_copied(folder: Path) -> bool:
    """Whether an output folder holds what was copied from another one before that was interrupted: no run."""
    return (folder / COPYING).exists()


def take(path: Path, advice: str, patience: float = PATIENCE_SECONDS) -> IO[str] | None:
    """Lock a file, made for it, for as long as it is open and this process lives; waits `patience` seconds for it.

    The lock is the operating system's own: it ends with the process, however that ends, and is not handed down to
    loader processes. None where the system or the disk has no locks.

    Raises:
        SettingsError: another process holds it.
        OSError: the file cannot be made.
    """
    if fcntl is None:
        return None
    deadline = time.monotonic() + patience
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() < deadline:
                file.close()
                time.sleep(0.05)
                continue
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise SettingsError(f"{path.parent} is in use: a run is going on in it ({holder}). {advice}") from error
        except OSError:  # a network disk without locks
            return file
        try:
            same = os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            same = False
        if same:  # else the run before removed it between opening and locking
            with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder's name is missing
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()

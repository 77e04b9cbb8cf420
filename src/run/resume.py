"""What a run keeps in <output_path>/resume to go on after a crash, and the decision whether it may go on from it.

run.json                   settings, what the run works on, when it began
groups/<n>.json            finished groups of the permutation search
layers/<n>.safetensors     finished clusterings
state-<n>.safetensors      the last two states of the training (see compression.finetune.checkpoint)

Each file is written to a temporary one and renamed; the containers have checksums. When the run ends the folder is removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError, RunError, SettingsError
from ..common.paths import find
from ..compression.finetune.checkpoint import Checkpoint
from ..compression.finetune.loop import Resumed
from ..engines.engine import Engine
from ..settings import Settings, require
from .checkpoints import (
    IMAGES,
    OF_THE_NETWORK,
    OF_THE_SCHEDULE,
    PROCESSES,
    WEIGHTS,
    About,
    StoredCheckpoint,
    StoredRun,
    checkpoint_number,
    checkpoints_in,
    is_among,
    versions,
    weights_fingerprint,
)
from .finished_parts import FinishedClusterings, FinishedSearches
from .output_folder import FINISHED, LEAVINGS, STARTED, OutputFolder, take
from .processes import Say, flat, open_output
from .recorder import AnyRecorder
from .signals import Stop, undisturbed

KEPT_STATES = 2


class ResumableRun:
    """The resume folder of a run, and the keeper of its training's states."""

    def __init__(
        self,
        output: OutputFolder,
        engine: Engine,
        every: int,
        stop: Stop,
        say: Say,
        stored: StoredRun | None,
        last: str | None = None,
    ) -> None:
        """Nothing is written before `begin`.

        Args:
            output: of this run.
            engine: its processes; the first one writes states, each writes the groups and layers that it finished.
            every: steps from one state to the next.
            stop: signals.
            say: prints on the first process.
            stored: the run to go on with, in this folder or in another one; None: a new one.
            last: name of the state to go on from; None: the last one.
        """
        self._output, self.folder = output, output.resume
        self.every = every
        self.stored = stored
        self._last = last
        self._elsewhere = stored is not None and stored.folder != output.resume.resolve()
        self._engine, self._stop, self._say = engine, stop, say
        self._recorder: AnyRecorder | None = None
        self._about = About({}, {})
        self._position = ""
        self._unreadable: MutableMapping[str, str] = {}
        self._left_out_before: Mapping[str, str] = {}

    # --- may it go on? ---

    def check_settings(self, settings: Settings) -> None:
        """Compare the settings with those of the run to go on with.

        Raises:
            SettingsError: some differ that cannot, or that may only where `resume_with_changes` says so. The message names them.
        """
        self._refuse_other(About(dict(flat(settings.model_dump(mode="json"))), {}), settings.resume_with_changes)

    def check_fingerprint(self, facts: Mapping[str, Any], settings: Settings) -> None:
        """The same for what the run works on: starting weights, images, number of processes.

        Raises:
            SettingsError: as `check_settings`.
        """
        self._about = About(dict(flat(settings.model_dump(mode="json"))), facts)
        self._refuse_other(self._about, settings.resume_with_changes)
        if self.stored is not None and list(self.stored.versions) != versions():
            then, now = (" and torch ".join(found) for found in (self.stored.versions, versions()))
            self._say(f"note: the run began with pqf {then}; this is pqf {now}")

    def _refuse_other(self, now: About, told: bool) -> None:
        keys = [] if self.stored is None else self.stored.about.differences(now)
        fixed = [key for key in keys if is_among(key, (*OF_THE_NETWORK, WEIGHTS))]
        if self.stored is None or not keys or (told and not fixed):
            return
        shown = fixed or keys
        listing = [f"  {key}: {self.stored.about.value(key)} then, {now.value(key)} now" for key in shown[:10]]
        listing += [f"  and {len(shown) - 10} more"] if len(shown) > 10 else []
        which = " that made its network, or the state of its training" if fixed else ""
        way = "" if fixed else "add --resume_with_changes True to go on with the changes, "
        raise SettingsError(
            "\n".join(
                [
                    f"resume: the unfinished run in {self.stored.folder.parent} has other settings{which}:",
                    *listing,
                    f"Use the run's own (its config.yaml), {way}--overwrite True to begin anew, or another output_path.",
                ]
            )
        )

    # --- what is kept ---

    def make_ready(self) -> None:
        """On the first process: a new run clears the output folder; one that goes on finds there what it left."""
        if self.stored is None:
            self._output.begin()
        elif self._elsewhere:
            _adopt(self.stored.folder.parent, self._output)
        self._output.go_on()
        for path in checkpoints_in(self.folder):
            if path not in self._usable(self.folder):
                path.unlink(missing_ok=True)

    def begin(self, recorder: AnyRecorder, unreadable: MutableMapping[str, str]) -> None:
        """Write run.json. The others wait until all is there.

        Args:
            recorder: states are written after what it logged until then.
            unreadable: the images that this process leaves out, by path; those that the run left out before are put in.
        """
        self._recorder, self._unreadable = recorder, unreadable
        unreadable.update(self._left_out_before)
        if self._engine.is_main:
            started = self.stored.started if self.stored else datetime.now().astimezone()
            origin = (
                str(self.stored.folder.parent)
                if self.stored and self._elsewhere
                else self.stored.origin
                if self.stored
                else None
            )
            StoredRun(self.folder, self._about, started, versions(), origin).write()
        self._engine.barrier()

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write a state, and remove all but the last two."""
        self._position = str(checkpoint.position)
        unreadable = dict(self._engine.gather(sorted(self._unreadable.items())))
        if not self._engine.is_main:
            return
        if self._recorder is not None:
            self._recorder.flush()
        states = checkpoints_in(self.folder)
        path = self.folder / f"state-{checkpoint_number(states[-1]) + 1 if states else 1:06d}.safetensors"
        StoredCheckpoint(checkpoint, self._about, unreadable).write(path)
        for old in [*states, path][:-KEPT_STATES]:
            old.unlink(missing_ok=True)

    def deferred(self) -> AbstractContextManager[None]:
        """Signals wait in here."""
        return self._stop.deferred()

    def undisturbed(self) -> AbstractContextManager[None]:
        """No word of loader processes that end in here."""
        return undisturbed()

    @property
    def stop_wanted(self) -> bool:
        """Ctrl-C or SIGTERM came."""
        return self._stop.wanted

    def leave(self) -> None:
        """End the process as the signal asks, saying what was kept."""
        self._stop.leave(f"the state is saved ({self._position}); the same command goes on from there")

    def latest(self) -> Resumed | None:
        """The last state that can be read, or None where there is none yet.

        Raises:
            CheckpointError: there are states, and none can be read.
        """
        found: StoredCheckpoint | CheckpointError | None = None
        for path in reversed(self._usable(self.stored.folder) if self.stored else []):
            found = StoredCheckpoint.read(path)
            if isinstance(found, StoredCheckpoint):
                return self._resumed(found)
            self._say(f"warning: {found} The state before it is used.")
        if found is not None:
            raise CheckpointError(f"{found} There is no other state; --overwrite True begins the run anew.")
        return None

    def _usable(self, folder: Path) -> list[Path]:
        """The states in a resume folder up to the one that `resume` names."""
        states = checkpoints_in(folder)
        return (
            states
            if self._last is None
            else [path for path in states if checkpoint_number(path) <= checkpoint_number(Path(self._last))]
        )

    def _resumed(self, state: StoredCheckpoint) -> Resumed:
        """With the schedule and the place in the epoch that settings ask for which changed since the state was saved."""
        position, self._left_out_before = state.checkpoint.position, state.unreadable
        same_schedule = not any(is_among(key, OF_THE_SCHEDULE) for key in state.about.differences(self._about))
        then, now = state.about.images_per_step, self._about.images_per_step
        # images are common to all processes: those of the first batches are the first ones of the epoch's order
        batch = None if then == now else position.batch * then // now
        self._say(
            f"resume: goes on {position}" + (f" (batch {batch} with the new batch size)" if batch is not None else "")
        )
        return Resumed(state.checkpoint, same_schedule, batch)

    def finish(self) -> None:
        """The run has ended: there is nothing to go on with."""
        if self._engine.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- the search's groups and the clusterings ---

    @property
    def clusterings(self) -> FinishedClusterings:
        """Where finished layers are kept."""
        return FinishedClusterings(self.folder / "layers")

    def searches(self, numbers: Sequence[int]) -> FinishedSearches:
        """Where finished groups are kept, told which of all groups the search works on."""
        return FinishedSearches(self.folder / "groups", numbers)


def open_run(settings: Settings, engine: Engine, stop: Stop, say: Say) -> tuple[OutputFolder, ResumableRun]:
    """The folder of a run, and what is kept there of one to go on with, its settings compared.

    Raises:
        SettingsError: as `open_output`; there is nothing to go on from where `resume` says; or settings differ.
        CheckpointError: what is there cannot be read.
    """
    wanted, own = settings.resume, Path(require(settings, "output_path")).expanduser().resolve()
    folder, last = (None, None) if wanted in ("auto", "none") else _source(wanted)
    if (
        folder is not None and folder != own and _came_from(own, folder)
    ):  # this command was stopped before: it goes on with its own
        folder, last = own, None
    elsewhere = folder is not None and folder != own
    output = open_output(settings, engine, may_go_on=wanted != "none" and not elsewhere)
    try:
        # auto leaves the run that --overwrite True is to replace; `resume` may name that very run
        if folder is None and wanted == "auto" and not settings.overwrite and output.is_unfinished:
            folder = own
        stored = None if folder is None else StoredRun.read(folder / "resume")
        if folder is not None and elsewhere and engine.is_main:
            with _alone(folder):
                pass
        kept = ResumableRun(output, engine, settings.checkpoint_every_n_steps, stop, say, stored, last)
        kept.check_settings(settings)
    except BaseException:
        output.close()
        raise
    return output, kept


def _came_from(own: Path, folder: Path) -> bool:
    """Whether the unfinished run in `own` went on from that in `folder`."""
    if not (own / STARTED).exists() or (own / FINISHED).exists():
        return False
    return StoredRun.read(own / "resume").origin == str(folder)


def _source(given: str) -> tuple[Path, str | None]:
    """The run's folder that `resume` leads to, and the name of the state if it names one.

    Raises:
        SettingsError: it is not there, or holds no unfinished run.
    """
    found = find(
        given, "resume", "Expected auto, none, the output folder of an unfinished run, or a state in its resume folder"
    )
    folder, state = (found.parent.parent.resolve(), found.name) if found.is_file() else (found.resolve(), None)
    if not (folder / STARTED).exists():
        finished = (folder / FINISHED).exists()
        why = "holds a run that has ended" if finished else "holds no unfinished run"
        raise SettingsError(
            f"resume: {folder} {why}; expected the output folder of an unfinished run, or a state in its resume folder"
        )
    return folder, state


@contextmanager
def _alone(source: Path) -> Iterator[None]:
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
    """Copy the run in `source` to the folder of this one.

    Raises:
        SettingsError: that run is still going on.
        RunError: it cannot be copied.
    """
    with _alone(source):
        output.begin()
        try:
            for name in LEAVINGS:
                place, target = source / name, output.path / name
                if place.is_dir():
                    shutil.copytree(place, target, dirs_exist_ok=True)
                elif place.exists():
                    shutil.copy2(place, target)
        except OSError as error:
            raise RunError(
                f"cannot copy {source} to {output.path}: {error.strerror or error}; {source} is unchanged"
            ) from error


__all__ = ["IMAGES", "PROCESSES", "WEIGHTS", "ResumableRun", "open_run", "weights_fingerprint"]

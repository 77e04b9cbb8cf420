"""What a run keeps in <output_path>/resume to go on after a crash, and the decision whether it may go on from it.

run.json                   settings, what the run works on, when it began
groups/<n>.json            finished groups of the permutation search
layers/<n>.safetensors     finished clusterings
state-<n>.safetensors      the last two states of the training (see compression.finetune.snapshot)

Each file is written to a temporary one and renamed; the containers have checksums. When the run ends the folder is removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..compression.container import read_container, write_container
from ..compression.finetune.loop import Resumed
from ..compression.finetune.snapshot import Snapshot
from ..compression.finetune.task import Engine
from ..errors import CheckpointError, RunError, SettingsError
from ..output_folder import FINISHED, LEAVINGS, STARTED, OutputFolder, take
from ..paths import find, write_text
from ..recorder import AnyRecorder
from ..settings import Settings, require
from ..stopping import Stop
from .pieces import KeptClusterings, KeptSearches, tensor_mark
from .running import Say, flat, open_output

FORMAT = 1
KEPT_STATES = 2

WITHOUT_INFLUENCE = (
    "checkpoint_every_n_steps", "dataloader.coco_path", "dataloader.imagenet_path", "dataloader.num_workers", "dataloader.source",
    "dataloader.verify_images", "device", "engine", "evaluation.detections", "evaluation.per_category", "evaluation.visualized_images",
    "expected.", "log_every_n_steps", "model.weights", "output_path", "overwrite", "resume", "resume_with_changes", "visualize",
)  # fmt: skip
"""Keys (with a dot at the end: sections) that may differ: they do not change what is trained. For paths it is what they hold that counts."""
OF_THE_NETWORK = ("model.", "seed", "optimizer")
"""Keys that cannot change in a run: its network, or the kind of its state, was made with them."""
OF_THE_SCHEDULE = ("epochs", "learning_rate", "lr_scheduler.", "scale_learning_rate", "dataloader.batch_size", PROCESSES := "(processes)")
WEIGHTS, IMAGES = "(starting weights)", "(training and validation images)"


def is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` is one of `keys`, or in one of the sections among them."""
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in keys)


def weights_mark(model: nn.Module) -> str:
    """A digest of all values of a network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor_mark(tensor)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredRun:
    """What an unfinished run says about itself in run.json.

    Attributes:
        folder: the run's resume folder.
        settings: by dotted key.
        facts: what it works on.
        started: when it began.
        versions: of this program and of torch.
    """

    folder: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    started: datetime
    versions: Sequence[str]

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
                raise CheckpointError(f"resume: {path} was written by a later version of pqf ({found['versions'][0]}); use that one")
            started = datetime.fromisoformat(found["started"])
            int(found["settings"]["dataloader.batch_size"]) * int(found["facts"][PROCESSES])
            return cls(folder, dict(found["settings"]), dict(found["facts"]), started, [str(version) for version in found["versions"]])
        except OSError as error:
            raise CheckpointError(f"resume: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"resume: {path} is damaged. --overwrite True begins the run anew") from error

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Dotted keys that count and have another value in `settings`."""
        keys = sorted({*self.settings, *settings})
        return [key for key in keys if not is_among(key, WITHOUT_INFLUENCE) and self.settings.get(key) != settings.get(key)]


def versions() -> list[str]:
    """Of this program and of torch."""
    return [__version__, torch.__version__]


class Kept:
    """The resume folder of a run, and the keeper of its training's states."""

    def __init__(
        self, output: OutputFolder, engine: Engine, every: int, stop: Stop, say: Say, stored: StoredRun | None, last: str | None = None
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
        self._engine, self._stop, self._say = engine, stop, say
        self._recorder: AnyRecorder | None = None
        self._changed: set[str] = set()
        self._position = ""

    # --- may it go on? ---

    def check_settings(self, settings: Settings) -> None:
        """Compare the settings with those of the run to go on with.

        Raises:
            SettingsError: some differ that cannot, or that may only where `resume_with_changes` says so. The message names them.
        """
        if self.stored is None:
            return
        now = dict(flat(settings.model_dump(mode="json")))
        self._refuse(self.stored.differences(now), self.stored.settings, now, settings.resume_with_changes)

    def check_facts(self, facts: Mapping[str, Any], settings: Settings) -> None:
        """The same for what the run works on: starting weights, images, number of processes.

        Raises:
            SettingsError: as `check_settings`.
        """
        if self.stored is None:
            return
        then = self.stored.facts
        self._refuse([key for key in facts if facts[key] != then.get(key)], then, facts, settings.resume_with_changes)
        if list(self.stored.versions) != versions():
            self._say(
                f"note: the run began with pqf {' and torch '.join(self.stored.versions)}; this is pqf {' and torch '.join(versions())}"
            )

    def _refuse(self, keys: Sequence[str], then: Mapping[str, Any], now: Mapping[str, Any], told: bool) -> None:
        if not keys:
            return
        assert self.stored is not None
        fixed = [key for key in keys if is_among(key, (*OF_THE_NETWORK, WEIGHTS))]
        if told and not fixed:
            self._changed |= set(keys)
            return
        shown = fixed or keys
        listing = [f"  {key}: {_shown(then.get(key))} then, {_shown(now.get(key))} now" for key in shown[:10]]
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
        elif self.stored.folder != self.folder:
            _adopt(self.stored.folder.parent, self._output)
        self._output.go_on()
        for path in self._states(self.folder):
            if self._last is not None and _number(path) > _number(Path(self._last)):
                path.unlink(missing_ok=True)

    def begin(self, settings: Settings, facts: Mapping[str, Any], recorder: AnyRecorder) -> None:
        """Write run.json; states are written after what `recorder` logged until then. The others wait until all is there."""
        self._recorder = recorder
        if self._engine.is_main:
            self._write_run(settings, facts)
        self._engine.barrier()

    def _write_run(self, settings: Settings, facts: Mapping[str, Any]) -> None:
        started = self.stored.started if self.stored else datetime.now().astimezone()
        run = {
            "format": FORMAT,
            "versions": versions(),
            "started": started.isoformat(timespec="seconds"),
            "settings": dict(flat(settings.model_dump(mode="json"))),
            "facts": facts,
        }
        write_text(self.folder / "run.json", json.dumps(run, indent=1) + "\n")

    def keep(self, snapshot: Snapshot) -> None:
        """Write a state, and remove all but the last two."""
        self._position = str(snapshot.position)
        if not self._engine.is_main:
            return
        if self._recorder is not None:
            self._recorder.flush()
        states = self._states(self.folder)
        number = _number(states[-1]) + 1 if states else 1
        values = json.dumps(snapshot.values, separators=(",", ":"))
        path = self.folder / f"state-{number:06d}.safetensors"
        write_container(path, snapshot.tensors, {"format": str(FORMAT), "values": values})
        for old in [*states, path][:-KEPT_STATES]:
            old.unlink(missing_ok=True)

    def deferred(self) -> AbstractContextManager[None]:
        """Signals wait in here."""
        return self._stop.deferred()

    @property
    def stop_wanted(self) -> bool:
        """Ctrl-C or SIGTERM came."""
        return self._stop.wanted

    def leave(self) -> None:
        """End the process as the signal asks, saying what was kept."""
        self._stop.leave(f"the state is saved ({self._position}); the same command goes on from there")

    def latest(self, batch_size: int) -> Resumed | None:
        """The last state that can be read, or None where there is none yet.

        Raises:
            CheckpointError: there are states, and none can be read.
        """
        if self.stored is None:
            return None
        found: Snapshot | CheckpointError | None = None
        upto = None if self._last is None else _number(Path(self._last))
        for path in reversed(self._states(self.stored.folder)):
            if upto is not None and _number(path) > upto:
                continue
            found = read_state(path)
            if isinstance(found, Snapshot):
                return self._resumed(found, batch_size)
            self._say(f"warning: {found} The state before it is used.")
        if found is not None:
            raise CheckpointError(f"{found} There is no other state; --overwrite True begins the run anew.")
        return None

    def _resumed(self, snapshot: Snapshot, batch_size: int) -> Resumed:
        """With the schedule and the place in the epoch that changed settings ask for."""
        position = snapshot.position
        same_schedule = not any(is_among(key, OF_THE_SCHEDULE) for key in self._changed)
        assert self.stored is not None
        then = int(self.stored.settings["dataloader.batch_size"]) * int(self.stored.facts[PROCESSES])
        now = batch_size * self._engine.world_size
        # images are common to all processes: those of the first batches are the first ones of the epoch's order
        batch = None if then == now else position.batch * then // now
        self._say(f"resume: goes on {position}" + (f" (batch {batch} with the new batch size)" if batch is not None else ""))
        return Resumed(snapshot, same_schedule, batch)

    def finish(self) -> None:
        """The run has ended: there is nothing to go on with."""
        if self._engine.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _states(folder: Path) -> list[Path]:
        return sorted(folder.glob("state-*.safetensors"), key=_number)

    # --- the search's groups and the clusterings ---

    @property
    def clusterings(self) -> KeptClusterings:
        """Where finished layers are kept."""
        return KeptClusterings(self.folder / "layers")

    def searches(self, numbers: Sequence[int]) -> KeptSearches:
        """Where finished groups are kept, told which of all groups the search works on."""
        return KeptSearches(self.folder / "groups", numbers)


def open_run(settings: Settings, engine: Engine, stop: Stop, say: Say) -> tuple[OutputFolder, Kept]:
    """The folder of a run, and what is kept there of one to go on with, its settings compared.

    Raises:
        SettingsError: as `open_output`; there is nothing to go on from where `resume` says; or settings differ.
        CheckpointError: what is there cannot be read.
    """
    wanted = settings.resume
    source = None if wanted in ("auto", "none") else _source(wanted)
    output_path = Path(require(settings, "output_path")).expanduser().absolute()
    here = source is None or source[0] == output_path
    may_go_on = wanted == "auto" or (source is not None and here)
    output = open_output(settings, engine, may_go_on=may_go_on)
    # a run of its own begins with --overwrite True, unless `resume` names the very run
    goes_on = output.is_unfinished and ((source is not None and here) or (wanted == "auto" and not settings.overwrite))
    try:
        stored = StoredRun.read(source[0] / "resume" if source else output.resume) if goes_on or source else None
        if source and not here and engine.is_main:
            with _alone(source[0]):
                pass
        kept = Kept(output, engine, settings.checkpoint_every_n_steps, stop, say, stored, source[1] if source else None)
        kept.check_settings(settings)
    except BaseException:
        output.close()
        raise
    return output, kept


def _source(given: str) -> tuple[Path, str | None]:
    """The run's folder that `resume` leads to, and the name of the state if it names one.

    Raises:
        SettingsError: it is not there, or holds no unfinished run.
    """
    found = find(given, "resume", "Expected auto, none, the output folder of an unfinished run, or a state in its resume folder")
    folder, state = (found.parent.parent, found.name) if found.is_file() else (found, None)
    if not (folder / STARTED).exists():
        finished = (folder / FINISHED).exists()
        why = "holds a run that has ended" if finished else "holds no unfinished run"
        raise SettingsError(f"resume: {folder} {why}; expected the output folder of an unfinished run, or a state in its resume folder")
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
            raise RunError(f"cannot copy {source} to {output.path}: {error.strerror or error}; {source} is unchanged") from error


def read_state(path: Path) -> Snapshot | CheckpointError:
    """The state, or why there is none."""
    try:
        tensors, metadata = read_container(path)
        snapshot = Snapshot(tensors, json.loads(metadata["values"]))
        position = snapshot.position
        if min(position.epoch, position.batch, position.step) < 0:
            raise ValueError
    except CheckpointError as error:
        return error
    except (ValueError, KeyError, TypeError, RecursionError):
        return CheckpointError(f"{path} is damaged: it holds no state of a training.")
    return snapshot


def _number(path: Path) -> int:
    digits = path.name.partition("-")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else -1


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["Kept", "StoredRun", "is_among", "open_run", "weights_mark", "IMAGES", "PROCESSES", "WEIGHTS"]

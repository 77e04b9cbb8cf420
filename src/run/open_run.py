"""A run: its processes, output folder, log, recorder and checkpoints, opened together and closed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.log import log, note
from ..compression.finetune.hooks import Resumed
from ..compression.finetune.outcome import Outcome
from ..engines import launch
from ..engines.engine import Engine
from ..settings import Settings, is_placeholder, require, to_yaml
from .agreement import once
from .checkpoints import CheckpointFolder
from .fingerprint import PROCESSES, RunFingerprint
from .launched import Launched, began_by
from .output_folder import FINISHED, OutputFolder, is_half_copied
from .processes import processes
from .recorder import AnyRecorder, NoRecorder, RunRecorder, Save, Sink
from .resume import Resume, UnfinishedRun, alone, came_from, source_of
from .shared_folder import open_output
from .signals import Stop, stopping
from .wandb_sink import WandbSink


@dataclass
class Job:
    """What a command does, by however many processes.

    Attributes:
        settings: as they were given.
        engine: the processes that share it.
    """

    settings: Settings
    engine: Engine


@dataclass
class Run(Job):
    """A training run.

    Attributes:
        signals: Ctrl-C and SIGTERM.
        output: its folder.
        resume: whether it resumes, and from what.
        recorder: of figures and models; keeps nothing before `begin`, nor on processes other than the first.
        checkpoints: what it can be resumed from; there from `begin` on.
        is_over: a process was lost when the run had ended, and its launcher started them again: nothing is left to do.
    """

    signals: Stop
    output: OutputFolder
    resume: Resume
    recorder: AnyRecorder = field(default_factory=NoRecorder)
    is_over: bool = False
    _fingerprint: RunFingerprint | None = None
    _checkpoints: CheckpointFolder | None = None

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Where checkpoints and finished parts go."""
        assert self._checkpoints is not None, "begin comes first"
        return self._checkpoints

    def check_inputs(self, digests: Mapping[str, str]) -> None:
        """Complete the run's fingerprint, and compare it with that of the run to resume.

        Args:
            digests: of what the run works on, by name.

        Raises:
            SettingsError: the run to resume worked on something else.
        """
        self._fingerprint = RunFingerprint.of(self.settings, {PROCESSES: self.engine.world_size, **digests})
        self.resume.check(self._fingerprint)

    def begin(self, unreadable: MutableMapping[str, str], save: Save, metric_name: str) -> Resumed | None:
        """Write the first files; until here nothing was written, and everything that can be wrong with the input was
        found.

        Args:
            unreadable: reason by path of the images that this process leaves out; those that the run left out before
                are put in.
            save: writes a model to a path.
            metric_name: the metric that counts.

        Returns:
            The checkpoint to resume from, None where there is none.

        Raises:
            CheckpointError: none of the checkpoints can be read.
        """
        assert self._fingerprint is not None, "check_inputs comes first"
        found = self.resume.latest(self._fingerprint)
        resumed, stored = (None, None) if found is None else found
        self._checkpoints = CheckpointFolder(self.output.resume, self.engine, self._fingerprint)
        self._checkpoints.unreadable = unreadable
        if stored is not None:
            unreadable.update(stored.unreadable)
        if self.engine.is_main:
            self.resume.prepare_folder()
            self.resume.start(self._fingerprint)
            self.recorder = self._recorder(resumed, save, metric_name)
            self._checkpoints.before_keeping = self.recorder.flush
        self.engine.barrier()
        return resumed

    def _recorder(self, resumed: Resumed | None, save: Save, metric_name: str) -> RunRecorder:
        earlier = self.resume.earlier
        after_step = None if earlier is None else 0 if resumed is None else resumed.checkpoint.position.step
        started = earlier.started if earlier else None
        recorder = RunRecorder(self.output, save, metric_name, started, after_step, self._sinks())
        recorder.file("config.yaml", to_yaml(self.settings))
        recorder.text("config", to_yaml(self.settings))
        return recorder

    def _sinks(self) -> list[Sink]:
        """Who receives the figures besides TensorBoard."""
        project = self.settings.wandb_project
        return [] if project is None else [WandbSink(self.output.path, project, self.settings.model_dump(mode="json"))]

    def finish(self, outcome: Outcome | None, results: Mapping[str, Any], models: Path | None = None) -> None:
        """Write the results; the run cannot be resumed any more.

        Args:
            outcome: of the training; None: there was none.
            results: further entries.
            models: where the models are; None: in the folder of trained models.
        """
        skipped = set(self.engine.gather(sorted(self.checkpoints.unreadable)))
        more = {"skipped images": len(skipped)} if skipped else {}
        self.recorder.finish(outcome, {**results, **more})
        self.checkpoints.remove()
        log.info("results in %s; models in %s", self.output.path / "results.txt", models or self.output.models)


@contextmanager
def open_run(settings: Settings) -> Iterator[Run]:
    """A training run with these settings: its processes agree, its folder is free, and what it resumes has the same
    settings.

    Raises:
        SettingsError: the processes, the output folder, or the run to resume do not fit the settings.
        CheckpointError: what is there to resume from cannot be read.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(processes(settings))
        signals = stack.enter_context(stopping())
        launched = _launched(settings, engine)
        output, resume = _output_and_resume(settings, engine, launched)
        stack.callback(output.close)
        run = Run(settings=settings, engine=engine, signals=signals, output=output, resume=resume)
        run.is_over = launched.again and once(engine, lambda: output.is_finished)
        if run.is_over:
            log.info("the run in %s has ended; nothing is left to do", output.path)
            if engine.is_main:
                output.forget()
        stack.callback(lambda: run.recorder.close())
        yield run


def _launched(settings: Settings, engine: Engine) -> Launched:
    restarts = launch.restarts()
    agents = sorted({agent for agent in engine.gather([restarts.agent]) if agent})
    launched = Launched(agents, agents != [] and once(engine, lambda: began_by(agents, _own_folder(settings))))
    if launched.again:
        count = f" (restart {restarts.done} of {restarts.most})" if restarts.done else ""
        note(f"torchrun has started the processes again{count}: they go on with the run in {_own_folder(settings)}")
    return launched


def _own_folder(settings: Settings) -> Path:
    return Path(require(settings, "output_path")).expanduser().resolve()


def _output_and_resume(settings: Settings, engine: Engine, launched: Launched) -> tuple[OutputFolder, Resume]:
    wanted, own = settings.resume, _own_folder(settings)
    folder, last = _named_source(wanted, own, launched.again)
    elsewhere = folder is not None and folder != own
    output = open_output(settings, engine, may_resume=wanted != "none" and not elsewhere, launched=launched)
    try:
        # auto leaves the run that --overwrite True is to replace; `resume` may name that very run
        takes_up = launched.again or (wanted == "auto" and not settings.overwrite)
        if folder is None and takes_up and output.is_unfinished:
            folder = own
        if folder is None and is_half_copied(own):
            note(f"{own} holds part of a run that was being copied when that was interrupted: it is removed")
        earlier = None if folder is None else UnfinishedRun.read(folder / "resume")
        if folder is not None and elsewhere and engine.is_main:
            with alone(folder):
                pass
        resume = Resume(output, earlier, last, settings.resume_with_changes, launched.again)
        resume.check(RunFingerprint.of(settings))
    except BaseException:
        output.close()
        raise
    return output, resume


def _named_source(wanted: str, own: Path, again: bool) -> tuple[Path | None, str | None]:
    """The output folder that `resume` names, and the checkpoint in it, if it names one; None: it names no folder, or
    processes that were started `again` have the run of those before them instead.

    Raises:
        SettingsError: what it names is not there, or holds no unfinished run.
    """
    named = Path(wanted).expanduser().resolve()
    if wanted in ("auto", "none") or (again and (own in (named, *named.parents) or (own / FINISHED).exists())):
        return None, None
    folder, last = source_of(wanted)
    if folder != own and came_from(own, folder):  # this command was stopped before: it has its own
        return own, None
    return folder, last


@dataclass
class Evaluation(Job):
    """An evaluation.

    Attributes:
        output: its folder; None: what it finds is only logged.
    """

    output: OutputFolder | None = None


@contextmanager
def open_evaluation(settings: Settings, files: Sequence[str] = ()) -> Iterator[Evaluation]:
    """An evaluation with these settings; it may write `files` into its output folder, if it has one.

    Raises:
        SettingsError: the processes or the output folder do not fit the settings.
    """
    with processes(settings) as engine:
        writes = bool(files) and not is_placeholder(settings.output_path)
        output = open_output(settings, engine, files) if writes else None
        try:
            yield Evaluation(settings=settings, engine=engine, output=output)
        finally:
            if output is not None:
                output.close()

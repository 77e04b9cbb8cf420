"""What a run leaves in its output folder (spec section 8).

<output_path>/config.yaml        the resolved settings
<output_path>/tensorboard/       figures over time
<output_path>/trained_models/    0.pth, 1.pth, ... and best.pth
<output_path>/results.txt, .json start, end, last, best, best epoch
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ..common.errors import RunError
from ..common.log import log
from ..common.paths import write_text
from ..compression.finetune.outcome import Outcome
from .output_folder import OutputFolder

Save = Callable[[nn.Module, Path, Mapping[str, float] | None], None]
"""Model, path, what the last validation measured on this model (None: nothing)."""

VALIDATION_TAGS = ("loss", "accuracy", "accuracy_top5", "BoxAP", "MaskAP")
"""Metrics that go to TensorBoard and to the screen; all of them are kept in results.json."""

EVENTS = "events.out.tfevents."
"""How the names of TensorBoard's files begin."""


class Sink(Protocol):
    """Another place that receives a run's figures, besides TensorBoard. Nothing that goes wrong there is raised."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step, by tag."""

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table."""

    def finish(self, results: Mapping[str, Any]) -> None:
        """The results of a run that ended."""

    def close(self) -> None:
        """Let go, whether or not the run ended."""


class RunRecorder:
    """Keeps figures in TensorBoard and models on disk."""

    def __init__(
        self,
        folder: OutputFolder,
        save: Save,
        metric_name: str,
        started: datetime | None = None,
        after_step: int | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Open the log.

        Args:
            folder: of the run.
            save: writes a model to a path, with what was measured on it if anything was.
            metric_name: the metric that counts.
            started: when the run began, if that was in an earlier process.
            after_step: TensorBoard is to hide what an earlier process logged for later steps than this one.
            sinks: who else receives the figures.

        Raises:
            RunError: the log cannot be written.
        """
        self.folder = folder
        self._save, self._sinks = save, sinks
        self._metric = metric_name
        self._measured: Mapping[str, float] | None = None
        self._started = started or datetime.now().astimezone()
        purge = None if after_step is None else after_step + 1
        self._log = folder.path / "tensorboard"
        with self._disk():
            sort_before_now(self._log)
            self._writer = SummaryWriter(str(self._log), purge_step=purge, flush_secs=10)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What the writer of the log meets, as an error for people."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write {self._log}: {error.strerror or error}; the models and checkpoints that were saved are "
                "kept. "
                "Free some space or choose another output_path."
            ) from error

    def text(self, name: str, text: str) -> None:
        """Keep a text, shown as it is."""
        with self._disk():
            self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()))

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Keep a table, as a text of TensorBoard."""
        lines = [header, ["---"] * len(header), *rows]
        with self._disk():
            self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines))
        for sink in self._sinks:
            sink.table(name, header, rows)

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        """Keep one figure."""
        self._figures(step, {tag: value})

    def _figures(self, step: int, figures: Mapping[str, float]) -> None:
        with self._disk():
            for tag, value in figures.items():
                self._writer.add_scalar(tag, value, step)
        for sink in self._sinks:
            sink.figures(step, figures)

    def flush(self) -> None:
        """See to it that what was logged is on the disk."""
        with self._disk():
            self._writer.flush()

    def file(self, name: str, text: str) -> None:
        """Write a text file into the folder of the run."""
        write_text(self.folder.path / name, text)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a training step, under `Train/`."""
        self._figures(step, {f"Train/{name}": value for name, value in figures.items()})

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a validation, under `Validation/`, at the step count of the epoch's end."""
        self._measured = metrics
        self._figures(step, {f"Validation/{name}": metrics[name] for name in VALIDATION_TAGS if name in metrics})
        self.flush()
        when = "before training" if epoch == 0 else f"epoch {epoch}"
        shown = ", ".join(
            f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.2f} %"
            for name, value in metrics.items()
            if name in VALIDATION_TAGS
        )
        log.info("%s: %s", when, shown)

    def model(self, epoch: int, model: nn.Module) -> None:
        """Write `trained_models/<epoch>.pth`."""
        self._save(model, self.folder.models / f"{epoch}.pth", None)

    def best(self, epoch: int, model: nn.Module) -> None:  # noqa: ARG002 (of Recorder)
        """Write `trained_models/best.pth`."""
        self._save(model, self.folder.models / "best.pth", self._measured)

    def finish(self, outcome: Outcome | None, more: Mapping[str, Any]) -> None:
        """Write results.txt and results.json and close the log; without an `outcome` where nothing was trained."""
        results: dict[str, Any] = {
            "start": self._started.isoformat(timespec="seconds"),
            "end": datetime.now().astimezone().isoformat(timespec="seconds"),
            **({} if outcome is None else self._trained(outcome)),
            **more,
        }
        self.flush()
        if outcome is not None:
            log.info("%s", outcome_text(self._metric, outcome))
        lines = [f"{name}: {'-' if value is None else value}" for name, value in results.items()]
        write_text(self.folder.path / "results.txt", "\n".join(lines) + "\n")
        history = {} if outcome is None else {"history": outcome.history}
        write_text(self.folder.path / "results.json", json.dumps({**results, **history}, indent=1) + "\n")
        for sink in self._sinks:
            sink.finish(results)
        self.close()

    def _trained(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "metric": self._metric,
            "before training": outcome.initial,
            "last": outcome.last,
            "best": outcome.best,
            "best epoch": outcome.best_epoch,
            "seconds per step": None if math.isnan(outcome.seconds_per_step) else round(outcome.seconds_per_step, 4),
        }

    def close(self) -> None:
        """Close the log."""
        with suppress(OSError):  # `flush` has said what there is to say
            self._writer.close()
        for sink in self._sinks:
            sink.close()


def sort_before_now(log_folder: Path) -> None:
    """See to it that every event file sorts before one that is opened now.

    TensorBoard reads the files of a folder by their names, `events.out.tfevents.<second>.<host>.<process>.<count>`.
    Files of one second are not in the order in which they were opened (count 10 sorts before 9), and a clock may have
    been set back since: what a resumed run logged would be hidden, as if it had come before.

    Raises:
        OSError: a file cannot be renamed.
    """
    before = int(time.time()) - 1
    late = [path for path in sorted(log_folder.glob(f"{EVENTS}*")) if event_second(path) >= before]
    for index, path in enumerate(late):
        rest = path.name.removeprefix(EVENTS).partition(".")[2]
        path.rename(path.with_name(f"{EVENTS}{before:010d}.{index:04d}.{rest}"))


def event_second(path: Path) -> int:
    """When an event file was opened, in seconds, by its name; -1 where the name does not say."""
    second = path.name.removeprefix(EVENTS).partition(".")[0]
    return int(second) if second.isdecimal() else -1


def outcome_text(metric: str, outcome: Outcome) -> str:
    """What was measured before training and in the end, and the best of all epochs, in a line."""

    def shown(value: float | None) -> str:
        return "not validated" if value is None else f"{value:.2f} %"

    text = f"{metric} before training: {shown(outcome.initial)}"
    if outcome.best is None or not outcome.history.keys() - {0}:
        return text
    return f"{text}; best: {shown(outcome.best)} (epoch {outcome.best_epoch}); last: {shown(outcome.last)}"


class NoRecorder:
    """What processes other than the first record: nothing."""

    def text(self, name: str, text: str) -> None:
        """Nothing."""

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Nothing."""

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def file(self, name: str, text: str) -> None:
        """Nothing."""

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Nothing."""

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""

    def model(self, epoch: int, model: nn.Module) -> None:
        """Nothing."""

    def best(self, epoch: int, model: nn.Module) -> None:
        """Nothing."""

    def finish(self, outcome: Outcome | None, more: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


AnyRecorder = RunRecorder | NoRecorder

"""What a run leaves in its output folder (spec section 8).

<output_path>/config.yaml        the resolved settings
<output_path>/tensorboard/       figures over time
<output_path>/trained_models/    0.pth, 1.pth, ... and best.pth
<output_path>/results.txt, .json start, end, last, best, best epoch
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from .compression.finetune.loop import Outcome
from .errors import SettingsError
from .paths import write_text

Save = Callable[[nn.Module, Path, Mapping[str, float] | None], None]
"""Model, path, what the last validation measured on this model (None: nothing)."""

VALIDATION_TAGS = ("loss", "accuracy", "accuracy_top5", "BoxAP", "MaskAP")
"""Metrics that go to TensorBoard and to the screen; all of them are kept in results.json."""
LEAVINGS = ("tensorboard", "trained_models", "results.txt", "results.json", "config.yaml", "compression.json")
EVALUATION_LEAVINGS = ("results.json", "detections.json")


class OutputFolder:
    """The folder of a run: checked before any work, cleared only when the work begins."""

    def __init__(self, path: Path, overwrite: bool, leavings: Sequence[str] = LEAVINGS, is_main: bool = True) -> None:
        """Check that the run can be written to `path`, where it will leave `leavings`.

        Args:
            path: of the folder, made if it is not there.
            overwrite: accept a folder that holds a run.
            leavings: names in the folder that a run writes, and replaces.
            is_main: False where another process writes; nothing is checked then.

        Raises:
            SettingsError: it cannot be written, or already holds a run and `overwrite` is False.
        """
        self.path = path.expanduser().absolute()
        self.leavings = leavings
        if not is_main:
            return
        held = [name for name in leavings if (self.path / name).exists()]
        if held and not overwrite:
            raise SettingsError(
                f"output_path: {self.path} already holds a run ({', '.join(held)}). Choose another output_path, or replace that run with --overwrite True"
            )
        probe = self.path / ".write_test"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"pqf")
            probe.unlink()
        except OSError as error:
            raise SettingsError(
                f"output_path: {self.path} cannot be written ({error.strerror}). Choose a folder where you may write"
            ) from error

    def begin(self) -> None:
        """Remove what an earlier run left (only the files and folders of a run), and make the folder of this one."""
        for name in self.leavings:
            place = self.path / name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            elif place.exists():
                place.unlink()
        if "trained_models" in self.leavings:
            self.models.mkdir(parents=True)

    @property
    def models(self) -> Path:
        """Where models go."""
        return self.path / "trained_models"


class RunRecorder:
    """Keeps figures in TensorBoard and models on disk."""

    def __init__(self, folder: OutputFolder, save: Save, metric_name: str, say: Callable[[str], None]) -> None:
        """Open the log.

        Args:
            folder: of the run.
            save: writes a model to a path, with what was measured on it if anything was.
            metric_name: the metric that counts.
            say: prints a line.
        """
        self.folder = folder
        self._save = save
        self._metric = metric_name
        self._say = say
        self._measured: Mapping[str, float] | None = None
        self._started = datetime.now().astimezone()
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), flush_secs=10)

    def text(self, name: str, text: str) -> None:
        """Keep a text, shown as it is."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()))

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        """Keep one figure."""
        self._writer.add_scalar(tag, value, step)

    def file(self, name: str, text: str) -> None:
        """Write a text file into the folder of the run."""
        write_text(self.folder.path / name, text)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a training step, under `Train/`."""
        for name, value in figures.items():
            self._writer.add_scalar(f"Train/{name}", value, step)

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a validation, under `Validation/`, at the step count of the epoch's end."""
        self._measured = metrics
        for name in VALIDATION_TAGS:
            if name in metrics:
                self._writer.add_scalar(f"Validation/{name}", metrics[name], step)
        self._writer.flush()
        when = "before training" if epoch == 0 else f"epoch {epoch}"
        shown = ", ".join(
            f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.2f} %"
            for name, value in metrics.items()
            if name in VALIDATION_TAGS
        )
        self._say(f"{when}: {shown}")

    def model(self, epoch: int, model: nn.Module) -> None:
        """Write `trained_models/<epoch>.pth`."""
        self._save(model, self.folder.models / f"{epoch}.pth", None)

    def best(self, epoch: int, model: nn.Module) -> None:
        """Write `trained_models/best.pth`."""
        self._save(model, self.folder.models / "best.pth", self._measured)

    def finish(self, outcome: Outcome, more: Mapping[str, Any]) -> None:
        """Write results.txt and results.json and close the log."""
        results: dict[str, Any] = {
            "start": self._started.isoformat(timespec="seconds"),
            "end": datetime.now().astimezone().isoformat(timespec="seconds"),
            "metric": self._metric,
            "before training": outcome.initial,
            "last": outcome.last,
            "best": outcome.best,
            "best epoch": outcome.best_epoch,
            "seconds per step": None if math.isnan(outcome.seconds_per_step) else round(outcome.seconds_per_step, 4),
            **more,
        }
        lines = [f"{name}: {'-' if value is None else value}" for name, value in results.items()]
        write_text(self.folder.path / "results.txt", "\n".join(lines) + "\n")
        write_text(self.folder.path / "results.json", json.dumps({**results, "history": outcome.history}, indent=1) + "\n")
        self.close()

    def close(self) -> None:
        """Close the log."""
        self._writer.close()


class NoRecorder:
    """What processes other than the first record: nothing."""

    def text(self, name: str, text: str) -> None:
        """Nothing."""

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
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

    def finish(self, outcome: Outcome, more: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


AnyRecorder = RunRecorder | NoRecorder

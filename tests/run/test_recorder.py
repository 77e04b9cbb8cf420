"""The log of a run that went on in a later process shows every figure once, the later one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from src.run.output_folder import OutputFolder
from src.run.recorder import RunRecorder
from tests.support.killing import scalars


def logged(output: Path, values: dict[int, float], after_step: int | None = None) -> Path:
    """The event file of one process that logged `values` by step and ended."""
    log = output / "tensorboard"
    before = set(log.glob("events*"))
    folder = OutputFolder(output, overwrite=True)
    recorder = RunRecorder(folder, lambda *_: None, "accuracy", after_step=after_step)
    for step, value in values.items():
        recorder.scalar("Train/loss", value, step)
    recorder.close()
    folder.close()
    return max(set(log.glob("events*")) - before, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("ahead", [0, 86_400])
def test_what_a_later_process_logged_is_shown_whatever_the_files_are_called(ahead: int, tmp_path: Path) -> None:
    """Within one second the names do not say what came first; where a clock was set back they say the wrong thing."""
    logged(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    logged(tmp_path, {2: 2.5, 3: 3.5}, after_step=1)
    for path in sorted((tmp_path / "tensorboard").glob("events*")):
        rest = path.name.split(".", 4)[-1]
        path.rename(path.with_name(f"events.out.tfevents.{int(time.time()) + ahead:010d}.{rest}"))
    logged(tmp_path, {3: 3.75, 4: 4.75}, after_step=2)
    assert scalars(tmp_path)["Train/loss"] == {1: 1.0, 2: 2.5, 3: 3.75, 4: 4.75}


def test_ten_processes_in_one_second(tmp_path: Path) -> None:
    """Each goes on from the step before the last one of its predecessor."""
    for process in range(12):
        logged(tmp_path, {process: float(process), process + 1: -1.0}, after_step=process - 1)
    expected = {**{step: float(step) for step in range(12)}, 12: -1.0}
    assert scalars(tmp_path)["Train/loss"] == expected

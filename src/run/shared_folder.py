"""The output folder of a run of several processes: one folder for all of them."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import SettingsError
from ..engines.engine import Engine
from ..settings import Settings, require
from .agreement import once
from .launched import Launched
from .output_folder import TRAINING_FILES, OutputFolder

SHARED_FOLDER_SECONDS = 5.0
"""How long a file of one machine may take to show up on another."""


def open_output(
    settings: Settings,
    engine: Engine,
    files: Sequence[str] = TRAINING_FILES,
    may_resume: bool = False,
    launched: Launched | None = None,
) -> OutputFolder:
    """The run's folder, checked by the first process, and by the others to be the same folder; the run will write
    `files` into it.

    With `may_resume` an unfinished run in it is accepted, and the one that these processes go on with as `launched`
    says.

    Raises:
        SettingsError: it is not set, cannot be written, already holds a run, or is another folder on another machine.
    """
    require(settings, "output_path")
    output = OutputFolder(Path(settings.output_path), settings.overwrite, files, engine.is_main, may_resume, launched)
    try:
        _check_shared(output, engine)
    except BaseException:
        output.close()
        raise
    return output


def _check_shared(output: OutputFolder, engine: Engine) -> None:
    """Raises SettingsError: a file of the first process does not show up in the folder of another one."""
    probe = output.path / f".shared-{secrets.token_hex(8)}"
    if engine.is_main:
        probe.write_bytes(b"pqf")
    try:
        name = once(engine, lambda: probe.name)
        seen = _appears(output.path / name)
        missing = engine.gather([] if seen else [[engine.rank, socket.gethostname(), str(output.path)]])
    finally:
        if engine.is_main:
            probe.unlink(missing_ok=True)
    if missing:
        rank, host, path = missing[0]
        raise SettingsError(
            f"output_path: {path}, as process {rank} on {host} sees it, is not the folder that process 0 on "
            f"{_main_host(engine)} writes to. "
            "All processes need one folder: give an absolute path on a disk that all machines share"
        )


def _main_host(engine: Engine) -> str:
    return str(engine.gather([socket.gethostname()])[0])


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

"""What every recipe asks of its processes: start and agree, share checks and the output folder, speak once, end together."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..common.errors import LostContactError, SettingsError
from ..engines import choosing
from ..engines.engine import Engine
from ..settings import Settings, require
from ..tasks.loading import loader_death
from .output_folder import LEAVINGS, OutputFolder

Say = Callable[[str], None]

SHARED_FOLDER_SECONDS = 5.0
"""How long a file of one machine may take to show up on another."""


@contextmanager
def processes(settings: Settings) -> Iterator[Engine]:
    """The engine of the run, once all processes are known to have the same settings; closed at the end.

    After an error it is not closed, as the others may be waiting for something else: this process ends, and its launcher ends them.

    Raises:
        SettingsError: the engine does not fit or cannot start, or the settings differ.
        LostContactError: another process went away.
        RunError: a process that loads images died.
    """
    engine = choosing.make(settings.engine, choosing.pick_device(settings.device))
    try:
        check_same_settings(settings, engine)
        yield engine
    except Exception as error:
        if engine.lost_contact(error):
            raise LostContactError(
                f"another process of this run has ended, and its message says why ({_first_line(error)})"
            ) from error
        if isinstance(error, RuntimeError) and (death := loader_death(error)):
            raise death from error
        raise
    engine.close()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def printer(engine: Engine) -> Say:
    """Prints on the first process."""
    return lambda line: print(line, flush=True) if engine.is_main else None


@contextmanager
def first_here(engine: Engine) -> Iterator[None]:
    """One process of each machine goes first, the others follow when it is done: for downloads and files that are made once."""
    if not engine.is_first_here:
        engine.barrier()
    yield
    if engine.is_first_here:
        engine.barrier()


def check_same_settings(settings: Settings, engine: Engine) -> None:
    """Compare a hash of the settings over all processes, and on a difference the keys.

    Raises:
        SettingsError: they differ; the message names the keys.
    """
    own = dict(flat(settings.model_dump(mode="json"))) | {"(version of this program)": __version__}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(engine.gather([digest]))) == 1:
        return
    all_flat: list[dict[str, Any]] = engine.gather([own])
    keys = sorted(
        {
            key
            for one in all_flat
            for key in one
            if any(key not in other or other[key] != one[key] for other in all_flat)
        }
    )
    listing = [f"  {key}: " + "; ".join(_values(key, all_flat)) for key in keys[:10]]
    more = [f"  and {len(keys) - 10} more"] if len(keys) > 10 else []
    raise SettingsError(
        "\n".join(["the processes were started with different settings:", *listing, *more, "Start all with the same."])
    )


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _values(key: str, all_flat: list[dict[str, Any]]) -> list[str]:
    """`0.1 (process 0, 2)` for every value that a key has."""
    who: dict[str, list[str]] = {}
    for rank, flat in enumerate(all_flat):
        who.setdefault(json.dumps(flat[key]) if key in flat else "not set", []).append(str(rank))
    return [
        f"{value} (process {', '.join(ranks[:4])}{', ...' if len(ranks) > 4 else ''})" for value, ranks in who.items()
    ]


def digest_of(parts: Iterable[str]) -> str:
    """A digest of texts and their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def check_same(engine: Engine, what: str, parts: Iterable[str], advice: str) -> None:
    """Compare a hash of `parts` over all processes.

    Raises:
        SettingsError: `what` is not the same everywhere.
    """
    if engine.world_size == 1:
        return
    rows = engine.gather([[digest_of(parts), socket.gethostname()]])
    other = next((rank for rank, (found, _) in enumerate(rows) if found != rows[0][0]), None)
    if other is not None:
        raise SettingsError(
            f"{what} is not the same on all processes: process 0 on {rows[0][1]} and process {other} on {rows[other][1]} differ. {advice}"
        )


def open_output(
    settings: Settings, engine: Engine, leavings: Sequence[str] = LEAVINGS, may_go_on: bool = False
) -> OutputFolder:
    """The run's folder, checked by the first process, and by the others to be the same folder; the run will leave `leavings` in it.

    With `may_go_on` an unfinished run in it is accepted.

    Raises:
        SettingsError: it is not set, cannot be written, already holds a run, or is another folder on another machine.
    """
    require(settings, "output_path")
    output = OutputFolder(Path(settings.output_path), settings.overwrite, leavings, engine.is_main, may_go_on)
    try:
        _check_shared(output, engine)
    except BaseException:
        output.close()
        raise
    return output


def _check_shared(output: OutputFolder, engine: Engine) -> None:
    """Raises SettingsError: a file of the first process does not show up in the folder of another one."""
    mark = output.path / f".shared-{secrets.token_hex(8)}"
    if engine.is_main:
        mark.write_bytes(b"pqf")
    try:
        name = once(engine, lambda: mark.name)
        seen = _appears(output.path / name)
        missing = engine.gather([] if seen else [[engine.rank, socket.gethostname(), str(output.path)]])
    finally:
        if engine.is_main:
            mark.unlink(missing_ok=True)
    if missing:
        rank, host, path = missing[0]
        raise SettingsError(
            f"output_path: {path}, as process {rank} on {host} sees it, is not the folder that process 0 on {_main_host(engine)} writes to. "
            "All processes need one folder: give an absolute path on a disk that all machines share"
        )


def once(engine: Engine, make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on all of them: something that JSON can hold."""
    (made,) = engine.gather([make()] if engine.is_main else [])
    return made


def _main_host(engine: Engine) -> str:
    return str(engine.gather([socket.gethostname()])[0])


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

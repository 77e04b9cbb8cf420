"""The processes of a run: started, known to have the same settings, and ended together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..common.errors import LostContactError
from ..engines import choosing
from ..engines.engine import Engine
from ..settings import Settings
from ..tasks.workers import loader_death
from .agreement import check_same_settings


@contextmanager
def processes(settings: Settings) -> Iterator[Engine]:
    """The engine of the run, once all processes are known to have the same settings; closed at the end.

    After an error it is not closed, as the others may be waiting for something else: this process ends, and its
    launcher ends them.

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
        if death := loader_death(error):
            raise death from error
        raise
    engine.close()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

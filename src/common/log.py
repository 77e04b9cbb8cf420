"""The one stream on which a command says what it does: Python's logging, a line per record.

A line without a prefix tells what was done, `note: ` what is worth knowing, `warning: ` what may be wrong. Whoever uses
the package from a program of their own sees warnings only, unless they set up logging themselves:
`logging.getLogger("pqf")`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import output

log = logging.getLogger("pqf")


def note(text: str) -> None:
    """Log something worth knowing that asks for nothing."""
    log.info("note: %s", text)


class LineHandler(logging.Handler):
    """Writes every record as a line to the standard output of the moment; what cannot be written is `output.loss`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, above a progress bar if there is one."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with _above_bars():
            output.out(f"{prefix}{record.getMessage()}\n")


@contextmanager
def _above_bars() -> Iterator[None]:
    """Progress bars make room meanwhile, where there are any."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        yield
        return
    with tqdm.tqdm.external_write_mode(file=sys.stdout):
        yield


@contextmanager
def lines_of(is_first_process: Callable[[], bool]) -> Iterator[None]:
    """Show the package's records, and Python's warnings among them, as lines for a while.

    Args:
        is_first_process: of several processes only the one for which it is true shows anything.
    """
    handler, before, passed_on = LineHandler(), log.level, log.propagate
    handler.addFilter(lambda _record: is_first_process())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = passed_on


__all__ = ["LineHandler", "lines_of", "log", "note"]

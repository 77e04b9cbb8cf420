"""Libraries that talk: what they say is kept from the screen for a while."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the lines of one record that are not empty."""
        self.lines.extend(line.strip() for line in record.getMessage().splitlines() if line.strip())


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[list[str]]:
    """Keep warnings, standard error and the records of some loggers from the screen; gives the lines of those.

    Args:
        names: of loggers.
    """
    handler, loggers = _Kept(), [logging.getLogger(name) for name in names]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield handler.lines
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate

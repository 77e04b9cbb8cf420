"""What the package logged meanwhile."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def logged(pattern: str, level: int = logging.WARNING) -> Iterator[list[str]]:
    """A line that fits `pattern` must be logged in here, also where an error ends it; gives all lines."""
    log, handler = logging.getLogger("pqf"), _Lines()
    handler.setLevel(level)
    before = log.level
    log.addHandler(handler)
    log.setLevel(min(level, before or level))
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        assert any(re.search(pattern, line) for line in handler.lines), f"{pattern!r} is not in {handler.lines}"

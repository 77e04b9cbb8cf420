"""Writing to standard output and standard error: never an error, whatever their encoding and whoever reads them."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

_lost: list[OSError] = []
"""The first error that a write to standard output met since the last `loss`."""


def out(text: str) -> None:
    """Write `text` to the standard output of the moment; `loss` tells whether it could be."""
    error = _write(sys.stdout, text)
    if error is not None:
        failed(error)


def failed(error: OSError) -> None:
    """Somebody else met `error` when writing to standard output."""
    if not _lost:
        _lost.append(error)


def err(text: str) -> None:
    """Write `text` to the standard error of the moment, if it can be."""
    _write(sys.stderr, text)


def loss() -> OSError | None:
    """The first error that `out` met since the last call; standard output then leads nowhere, as Python's own flush at
    the end would fail once more."""
    if not _lost:
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    error = _lost[0]
    _lost.clear()
    return error


def keep_standard_files_open() -> None:
    """Let a standard input, output or error that is closed lead nowhere: the next file to be opened, a model perhaps,
    would take its number, and receive what libraries print."""
    for number in (0, 1, 2):
        if not _is_open(number):
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _write(stream: TextIO | None, text: str) -> OSError | None:
    if stream is None:  # closed since the start
        return None
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        return error
    except ValueError:  # closed meanwhile
        return None
    return None

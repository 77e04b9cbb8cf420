"""An error that torchrun's restarts do not cure is said once, and then only that it has come again."""

from __future__ import annotations

from contextlib import suppress

from ..engines import launch

FILE_NAME = "pqf-error.txt"


def or_that_it_was_said(message: str) -> str:
    """`message`, or where the processes before the last restart of torchrun ended with the same, one short line.

    The messages are kept among the logs of torchrun's agent, which are new whenever somebody starts torchrun.
    """
    with suppress(OSError, ValueError):
        restarts = launch.restarts()
        path = None if restarts.folder is None else restarts.folder / FILE_NAME
        if path is None:
            return message
        if restarts.done and path.exists() and path.read_text(encoding="utf-8") == message:
            return f"the same again after restart {restarts.done} of {restarts.most}"
        path.write_text(message, encoding="utf-8")
    return message

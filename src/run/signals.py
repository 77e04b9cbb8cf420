"""Ctrl-C and SIGTERM: at once where nothing would be lost, and after the step under way where something would."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPATIENCE_SECONDS = 1.0
"""A second Ctrl-C that comes so long after the first does not wait for anything."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: from `kill`, a batch system, or a launcher that ends its processes."""


class Stop:
    """Whether this process was asked to stop; made by `stopping`."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._waiting = False
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0

    @property
    def wanted(self) -> bool:
        """A signal came while signals had to wait."""
        return self._asked is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait in here; whoever opened it asks `wanted` and calls `leave`. A second Ctrl-C does not wait."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @staticmethod
    @contextmanager
    def undisturbed() -> Iterator[None]:
        """No error of a child process that ends: torch raises an error for it wherever the main process happens to be,
        in the middle of a step too. Its loader notices a dead process itself when it waits for a batch."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            yield
            return
        before = signal.getsignal(signal.SIGCHLD)
        _ignore_children()
        try:
            yield
        except KeyboardInterrupt:  # the process ends, and it stays so
            raise
        except BaseException:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)

    def leave(self, why: str = "") -> None:
        """Do what the signal asked for.

        Raises:
            KeyboardInterrupt: after Ctrl-C, with `why` as its message.
            Terminated: after SIGTERM.
        """
        # the signal may have ended loader processes too, and torch would raise for them on the way out
        _ignore_children()
        raise (Terminated if self._asked == signal.SIGTERM else KeyboardInterrupt)(why)

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (of signal handlers)
        """A signal came."""
        if (
            os.getpid() != self._owner
        ):  # a loader's process that inherited this: the main process ends it when it is time
            return
        impatient = number == signal.SIGINT and self.wanted and time.monotonic() - self._asked_at > IMPATIENCE_SECONDS
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number), time.monotonic()
        if not self._waiting or impatient:
            self.leave()


def _ignore_children() -> None:
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handle Ctrl-C and SIGTERM for a while; the old handlers come back at the end. Outside the main thread nothing is
    handled."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

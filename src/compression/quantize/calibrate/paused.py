"""Work that stands still in between: a forward pass that waits where a weight is used, until the weight is quantized.

Each piece of work has a thread of its own, but only ever one thread of all runs: whoever lets a piece of work go on
waits until it stands still again, or ends. So nothing has to be safe for threads, and no result depends on when they
run. What takes memory and processors is done for the work by whoever waits, so that no thread has memory, helpers or
handles of libraries of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils import _python_dispatch

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 10.0
"""Seconds that work gets to notice that it has to end; after them its thread is left alone, and ends with the
program."""


class _Ended(BaseException):
    """Ends work that nobody waits for any more; no `except Exception` of a network's own stops it."""


class PausedWork(Generic[T]):
    """Work that shows something from time to time, and stands still until it may go on.

    Args:
        work: is given the way to stand still: a function to call with what is shown.
        name: of its thread.
    """

    def __init__(self, work: Callable[[Callable[[T], None]], None], name: str | None = None) -> None:
        self._work = work
        self._may_go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._shown: T | None = None
        self._task: Callable[[], Any] | None = None
        self._done: Any = None
        self._failed: Exception | None = None
        self._error: BaseException | None = None
        self._ending = False
        self.has_ended = False
        self._thread = threading.Thread(target=copy_context().run, args=(self._body,), name=name, daemon=True)

    def begin(self) -> bool:
        """Make ready; False: the machine allows no further thread."""
        try:
            self._thread.start()
        except RuntimeError:
            return False
        return True

    def go_on(self) -> T | None:
        """Let it run until it stands still; returns what it shows, None at its end. It must have begun.

        Raises:
            BaseException: what the work raised.
        """
        if self.has_ended:
            return None
        self._switch()
        while self._task is not None:
            task, self._task = self._task, None
            try:
                self._done = task()
            except Exception as failure:
                self._failed = failure
            del task
            self._switch()
        shown, self._shown = self._shown, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return shown

    def let_do(self, task: Callable[[], R]) -> R:
        """Called by the work: have something done in the thread of whoever waits.

        Raises:
            Exception: what the task raised.
        """
        self._task = task
        self._wait()
        done, self._done = self._done, None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        return cast(R, done)

    def close(self) -> None:
        """End it, wherever it stands or runs."""
        self._ending = True
        if self._thread.ident is not None:
            self._may_go.release()
            self._thread.join(PATIENCE)

    def _switch(self) -> None:
        """Let the work run, and wait for it."""
        self._may_go.release()
        self._stands.acquire()

    def _wait(self) -> None:
        """Let the one who waits run, and wait."""
        self._check()
        self._stands.release()
        self._may_go.acquire()
        self._check()

    def _check(self) -> None:
        if self._ending:
            raise _Ended

    def _stand(self, shown: T) -> None:
        self._shown = shown
        self._wait()

    def _body(self) -> None:
        self._may_go.acquire()
        try:
            self._check()
            self._work(self._stand)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error  # whoever waits raises it
        finally:
            self.has_ended = True
            self._stands.release()


def torch_state(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """What torch keeps for each thread, as it is in this one: enters it in another.

    Args:
        device: where the work computes.
    """
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = [kind for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
    default = torch.get_default_device()
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(gradients))
            for kind, dtype in dtypes.items():
                stack.enter_context(torch.autocast(kind, dtype))
            if default.type != "cpu":  # with a default set, even the processor, every call is looked at
                stack.enter_context(default)
            if current is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(current))
            yield

    return entered


@contextmanager
def interleaved_modes() -> Iterator[None]:
    """Threads may enter and leave dispatch modes in any order in here: torch notes for all threads together whether
    there is a mode, and expects that the last one entered is left first."""
    noted = {name: value for name, value in vars(_python_dispatch).items() if isinstance(value, bool)}
    try:
        yield
    finally:
        vars(_python_dispatch).update(noted)
        with _python_dispatch.TorchDispatchMode():  # on leaving it, torch's compiled part is told too
            pass

"""Running out of memory, of the machine or of a GPU, as an error for people that says on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import RunError

WORDS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed",
    "bad_alloc", "bad allocation",
)  # fmt: skip
"""Of the messages of torch's allocators, of CUDA and of its libraries, in lower case."""
TOO_MUCH = "out of memory while it was loaded"
"""The reason of a file that this machine could not load, whatever the file is like."""
LONGEST = 160
"""Letters of such a message that are repeated."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def out_of_memory(where: str, error: BaseException) -> RunError:
    """The error for people.

    Args:
        where: on what, and what to reduce; follows on "out of memory".
        error: what was raised.
    """
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
    return RunError(f"out of memory {where} What was saved is kept. ({said})")


@contextmanager
def named_when_out_of_memory(where: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory in here into an error that says on what.

    Args:
        where: as in `out_of_memory`; asked only then.

    Raises:
        RunError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(where(), error) from error

"""Inner loops compiled by numba, wherever numba works; where it does not, their callers do the same in NumPy.

Numba is not there for every platform and Python version. Where it is there it may still not work: its libraries do not
fit each other, it finds no folder for its cache (no home, or one that cannot be written), or what the cache holds is
broken. None of this ends a run: loops are compiled without a cache then, or not at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .log import note

Function = TypeVar("Function", bound=Callable[..., Any])

_loops: list[Any] = []
"""Every function that `loop` has prepared."""

_said: set[str] = set()
"""Notes that were made: once is enough."""


def loop(**options: Any) -> Callable[[Function], Function]:
    """Decorates a function that numba is to compile with `options`, cached on the disk where that is possible.

    Raises:
        ImportError: there is no numba; or whatever a numba that does not work raises.
    """
    from numba import njit

    def decorate(function: Function) -> Function:
        try:
            compiled = njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no folder for the cache
            _once("numba has no folder for its cache (NUMBA_CACHE_DIR can name one): loops are compiled in every run")
            compiled = njit(nogil=True, **options)(function)
        _loops.append(compiled)
        return compiled

    return decorate


class CompiledLoop:
    """A compiled function that is imported, and compiled, where it is first used.

    Args:
        load: imports the function.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._function: Any = None
        self._loaded = False
        self._lock = threading.Lock()

    def function(self) -> Any:
        """The function; None where numba cannot be imported or does not compile."""
        with self._lock:
            if not self._loaded:
                self._loaded = True
                self._function = self._imported()
        return self._function

    def ready(self, *arguments: Any) -> Any:
        """The function, compiled for such arguments; None where that is impossible."""
        function = self.function()
        if function is None:
            return None
        from numba import typeof

        kinds = tuple(typeof(argument) for argument in arguments)
        if kinds in function.signatures:
            return function
        with self._lock:
            if self._function is not None and not _compiles(function, kinds):
                self._function = None
        return self._function

    def _imported(self) -> Any:
        try:
            function = self._load()
        except ImportError as error:
            if error.name != "numba":  # not installed: that is known; otherwise it is there and does not work
                _say("cannot be used", error)
            return None
        except Exception as error:  # libraries that do not fit each other raise anything
            _say("cannot be used", error)
            return None
        return function if hasattr(function, "signatures") else None  # NUMBA_DISABLE_JIT=1


def _compiles(function: Any, kinds: tuple[Any, ...]) -> bool:
    """Compile `function`, without the cache on the disk where that is what fails; False: it does not work."""
    try:
        function.compile(kinds)
    except Exception:  # a cache that is broken or cannot be written raises anything
        try:
            _without_cache()
            function.compile(kinds)
        except Exception as error:
            _say("does not compile", error)
            return False
    return True


def _without_cache() -> None:
    from numba.core.caching import NullCache

    for compiled in _loops:
        compiled._cache = NullCache()


def _say(what: str, error: Exception) -> None:
    said = str(error).strip().splitlines()
    _once(f"numba {what} here ({said[0] if said else type(error).__name__}): the same is done in NumPy, slower")


def _once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        note(text)

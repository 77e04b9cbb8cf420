"""Commands that share their name with a function of the Python interface: `pqf.compress` and `pqf.inspect` are both.

Importing the command's module puts it in the place of the function in the package; it can be called like it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from .registry import ROOT


class _CallableModule(ModuleType):
    """A module that calls the function of its name."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(".api", ROOT), name)(*arguments, **keywords)


def make_callable(module_name: str) -> None:
    """Let calls of a module go to the function of its name in the Python interface."""
    sys.modules[module_name].__class__ = _CallableModule

"""Names that settings know and files that answer to them: a registry says what there is before anything heavy is
imported.

To add a quantizer, a search, an architecture, a dataset or an engine one writes a file and adds an entry to its
registry.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
ROOT = __package__.rpartition(".")[0]
"""The package itself, under whatever name it is installed."""


@dataclass(frozen=True)
class Entry:
    """Where the thing of a name is, and what must be known of it before it is imported.

    Attributes:
        place: `module:attribute`; a module that begins with a dot is one of this package.
        about: what it is, in a few words.
        facts: further properties, by name.
    """

    place: str
    about: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import it."""
        module, _, attribute = self.place.partition(":")
        return getattr(importlib.import_module(module, ROOT), attribute)


class Registry(Mapping[str, T], Generic[T]):
    """Things by name, each imported when it is asked for."""

    def __init__(self, what: str, entries: Mapping[str, Entry]) -> None:
        """`what` names the kind of thing, for messages."""
        self.what = what
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        found: T = self.entries[name].load()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def fact(self, name: str, key: str) -> Any:
        """A property of an entry; None where there is no such entry, or it does not have it."""
        return self.entries[name].facts.get(key) if name in self.entries else None

    def names(self, **facts: Any) -> list[str]:
        """The names of all entries that have these properties."""
        return [name for name in self.entries if all(self.fact(name, key) == value for key, value in facts.items())]

    def nearest(self, name: str) -> str | None:
        """The name most like a wrong one, if any is like it."""
        return next(iter(difflib.get_close_matches(name, self.entries, 1)), None)

    @contextmanager
    def added(self, name: str, entry: Entry) -> Iterator[None]:
        """A further entry for a while."""
        before = self.entries.get(name)
        self.entries[name] = entry
        try:
            yield
        finally:
            del self.entries[name]
            if before is not None:
                self.entries[name] = before

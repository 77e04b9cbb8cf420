"""Names that settings know and files that answer to them: a registry says what there is before anything heavy is
imported.

To add a quantizer, a search, an architecture, a dataset or an engine one writes a file and adds an entry to its
registry.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import SettingsError

T = TypeVar("T")
ROOT = __package__.rpartition(".")[0]
"""The package itself, under whatever name it is installed."""


@dataclass(frozen=True)
class Entry:
    """Where the thing of a name is, and what must be known of it before it is imported.

    Attributes:
        place: `module:attribute`; a module that begins with a dot is one of this package.
        about: what it is, in a few words; the help shows them.
        facts: further properties, by name. `reads` lists the settings, of those that only some entries of its registry
            read, that this one does; without it an entry is taken to read all of them.
    """

    place: str
    about: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import it."""
        module, _, attribute = self.place.partition(":")
        return getattr(importlib.import_module(module, ROOT), attribute)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of a message about a wrong name: the one of `names` that is most like it; empty where none is."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


class UnknownNameError(SettingsError, KeyError):
    """A name that is in no entry; the message lists those that are."""

    def __str__(self) -> str:
        """The message; a KeyError would put quotes around it."""
        return str(self.args[0])


class Registry(Mapping[str, T], Generic[T]):
    """Things by name, each imported when it is asked for."""

    def __init__(self, what: str, entries: Mapping[str, Entry]) -> None:
        """`what` names the kind of thing, for messages."""
        self.what = what
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        found: T = self.entry(name).load()
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

    def entry(self, name: str) -> Entry:
        """The entry of a name, nothing imported.

        Raises:
            UnknownNameError: there is none; a KeyError, and a SettingsError with a message for people.
        """
        if name not in self.entries:
            raise self.unknown(name)
        return self.entries[name]

    def unknown(self, name: str, subject: str = "", more: Sequence[str] = ()) -> UnknownNameError:
        """The error for a name that is not there: what there is, and which of that is nearest.

        Args:
            name: the wrong name.
            subject: what the message says before it; empty: the kind of thing.
            more: further names that would have been right.
        """
        names = [*more, *self.entries]
        listing = ", ".join(names) + did_you_mean(name, names)
        return UnknownNameError(f"{subject or f'the {self.what}'} {name!r} is not known; there are {listing}")

    def fact(self, name: str, key: str) -> Any:
        """A property of an entry; None where there is no such entry, or it does not have it."""
        return self.entries[name].facts.get(key) if name in self.entries else None

    def names(self, **facts: Any) -> list[str]:
        """The names of all entries that have these properties."""
        return [name for name in self.entries if all(self.fact(name, key) == value for key, value in facts.items())]

    def readers(self, setting: str) -> list[str]:
        """The entries that read a setting which only some of them read."""
        return [name for name, entry in self.entries.items() if setting in entry.facts.get("reads", (setting,))]

    def unread(self, name: str) -> list[str]:
        """The settings that other entries read and this one does not; none where it does not say what it reads."""
        own = self.fact(name, "reads")
        mentioned = dict.fromkeys(key for entry in self.entries.values() for key in entry.facts.get("reads", ()))
        return [] if own is None else [key for key in mentioned if key not in own]

    @contextmanager
    def added(self, name: str, entry: Entry) -> Iterator[None]:
        """A further entry for a while."""
        before = self.entries
        self.entries = {**before, name: entry}
        try:
            yield
        finally:
            self.entries = before

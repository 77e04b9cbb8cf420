"""What several processes of a run settle among themselves: who goes first, and that all have the same settings and
data."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import __version__
from ..common.errors import SettingsError
from ..engines.engine import Engine
from ..settings import Settings


@contextmanager
def first_here(engine: Engine) -> Iterator[None]:
    """One process of each machine goes first, the others follow when it is done: for downloads and files that are made
    once."""
    if not engine.is_first_here:
        engine.barrier()
    yield
    if engine.is_first_here:
        engine.barrier()


def check_same_settings(settings: Settings, engine: Engine) -> None:
    """Compare a hash of the settings over all processes, and on a difference the keys.

    Raises:
        SettingsError: they differ; the message names the keys.
    """
    own = dict(flat(settings.model_dump(mode="json"))) | {"(version of this program)": __version__}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(engine.gather([digest]))) == 1:
        return
    all_flat: list[dict[str, Any]] = engine.gather([own])
    keys = sorted(
        {
            key
            for one in all_flat
            for key in one
            if any(key not in other or other[key] != one[key] for other in all_flat)
        }
    )
    listing = [f"  {key}: " + "; ".join(_values(key, all_flat)) for key in keys[:10]]
    more = [f"  and {len(keys) - 10} more"] if len(keys) > 10 else []
    raise SettingsError(
        "\n".join(["the processes were started with different settings:", *listing, *more, "Start all with the same."])
    )


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _values(key: str, all_flat: list[dict[str, Any]]) -> list[str]:
    """`0.1 (process 0, 2)` for every value that a key has."""
    who: dict[str, list[str]] = {}
    for rank, flat in enumerate(all_flat):
        who.setdefault(json.dumps(flat[key]) if key in flat else "not set", []).append(str(rank))
    return [
        f"{value} (process {', '.join(ranks[:4])}{', ...' if len(ranks) > 4 else ''})" for value, ranks in who.items()
    ]


def digest_of(parts: Iterable[str]) -> str:
    """A digest of texts and their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def check_same(engine: Engine, what: str, parts: Iterable[str], advice: str) -> None:
    """Compare a hash of `parts` over all processes.

    Raises:
        SettingsError: `what` is not the same everywhere.
    """
    if engine.world_size == 1:
        return
    rows = engine.gather([[digest_of(parts), socket.gethostname()]])
    other = next((rank for rank, (found, _) in enumerate(rows) if found != rows[0][0]), None)
    if other is not None:
        raise SettingsError(
            f"{what} is not the same on all processes: process 0 on {rows[0][1]} and process {other} on "
            f"{rows[other][1]} differ. {advice}"
        )


def once(engine: Engine, make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on all of them: something that JSON can hold."""
    (made,) = engine.gather([make()] if engine.is_main else [])
    return made

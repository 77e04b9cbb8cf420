"""How this process was started, as the environment of its launcher tells. Nothing here loads torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import SettingsError
from .registry import ENGINES


@dataclass(frozen=True)
class Launch:
    """Where this process stands among those started with it; one process on its own has the defaults.

    Attributes:
        engine: the engine that fits how it was started.
        rank, world_size: number of this process, and of all processes.
        local_rank, local_size: the same among the processes of this machine.
    """

    engine: str = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the one process that writes and prints."""
        return self.rank == 0


def here(environment: Mapping[str, str] | None = None) -> Launch:
    """What the environment (None: this process's) says.

    Raises:
        SettingsError: two launchers at once, or a variable that is not a number.
    """
    variables = os.environ if environment is None else environment
    found = {
        launcher.name: launcher
        for engine in ENGINES
        for launcher in ENGINES.fact(engine, "launchers") or ()
        if all(name in variables for name in launcher.variables)
    }
    engines = {name.split()[0] for name in found}
    if len(engines) > 1:
        listing = "; ".join(f"{name}: {', '.join(launcher.variables)}" for name, launcher in found.items())
        raise SettingsError(
            f"engine: this process was started by {' and '.join(sorted(engines))} at once, as its environment says "
            f"({listing}). "
            "Start it with one of them, or unset the variables of the other."
        )
    if not found:
        return Launch()
    launcher = next(iter(found.values()))
    rank, size = _number(variables, launcher.rank, None), _number(variables, launcher.world_size, None)
    local_rank, local_size = (
        _number(variables, launcher.local_rank, rank),
        _number(variables, launcher.local_size, size),
    )
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        raise SettingsError(
            f"engine: the environment says process {rank} of {size}, and {local_rank} of {local_size} on this machine, "
            "which cannot be "
            f"({launcher.rank}, {launcher.world_size}, {launcher.local_rank}, {launcher.local_size})"
        )
    return Launch(engines.pop(), rank, size, local_rank, local_size)


@dataclass(frozen=True)
class Restarts:
    """What torchrun's agent says to the processes that it starts, and starts again when one is lost.

    Attributes:
        agent: tells this start of torchrun on this machine from every other one, also through a script in between;
            empty: torchrun did not start this process, or does not say.
        folder: of the agent's logs, new at each start of torchrun and the same at each restart of the processes.
        done, most: restarts after a failure, so far and in all. One that a machine's coming causes is not counted.
    """

    agent: str = ""
    folder: Path | None = None
    done: int = 0
    most: int = 0


def restarts(environment: Mapping[str, str] | None = None) -> Restarts:
    """What the environment (None: this process's) says of restarts.

    Raises:
        SettingsError: a variable that is not a number.
    """
    variables = os.environ if environment is None else environment
    if "TORCHELASTIC_RESTART_COUNT" not in variables:
        return Restarts()
    done, most = (_number(variables, f"TORCHELASTIC_{name}", 0) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    # <logs>/<run>_<random>/attempt_<restarts>/<local rank>/error.json
    places = Path(variables.get("TORCHELASTIC_ERROR_FILE") or "/").parents
    if len(places) < 3 or not places[1].name.startswith("attempt_"):
        return Restarts("", None, done, most)
    return Restarts(f"{socket.gethostname()} {places[2]}", places[2], done, most)


def _number(variables: Mapping[str, str], name: str, default: int | None) -> int:
    if name not in variables and default is not None:
        return default
    text = variables.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise SettingsError(
            f"engine: the environment variable {name} is {text!r}, and a number was expected: unset it, or use a "
            "launcher"
        )
    return int(text)

"""By which start of torchrun a run began.

torchrun starts all processes again when one is lost, or when a machine leaves or comes. They go on with the run of
those before them, whatever the command line says of runs that were there already. <output_path>/.launch tells which
start it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..common.paths import write_text

FILE_NAME = ".launch"


@dataclass(frozen=True)
class Launched:
    """How the processes of a run came to be.

    Attributes:
        agents: what tells this start of torchrun from all others, for each machine; none: torchrun did not start them.
        again: the run in the output folder was begun by this very start, so it is the one to go on with.
    """

    agents: Sequence[str] = ()
    again: bool = False

    def mark(self, folder: Path) -> None:
        """Let processes that are started after these know the run. Raises RunError: the disk is full."""
        if self.agents:
            write_text(folder / FILE_NAME, json.dumps(list(self.agents)) + "\n")
        else:
            (folder / FILE_NAME).unlink(missing_ok=True)


def began_by(agents: Sequence[str], folder: Path) -> bool:
    """Whether one of these agents took part in the run in the output folder `folder`: one that is left of those, as
    others may be lost and new ones may have come."""
    with suppress(OSError, ValueError, TypeError):
        return not set(agents).isdisjoint(json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))
    return False

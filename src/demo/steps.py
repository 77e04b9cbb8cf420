"""What the demonstrations share: their flags, commands run one after the other as a user would, results, tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common import output
from ..common.errors import RunError

Row = tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A command of a demonstration.

    Attributes:
        title: what it does.
        entry: the module with its `main`.
        config: the settings file, below config/, without its ending.
        flags: what is added on the command line.
    """

    title: str
    entry: ModuleType
    config: str
    flags: Sequence[str]

    @property
    def arguments(self) -> list[str]:
        """The whole command line."""
        return ["--config", f"../config/{self.config}.yaml", *self.flags]


def folder_and_flags(argv: Sequence[str], folder: str) -> tuple[Path, list[str]]:
    """The value of --output_path (or `folder`), and the other flags."""
    flags = list(argv)
    if "--output_path" not in flags[:-1]:
        return Path(folder), flags
    at = flags.index("--output_path")
    return Path(flags[at + 1]), flags[:at] + flags[at + 2 :]


def data_flags(flags: Sequence[str]) -> list[str]:
    """Those of the flags that say where the data is and how it is read, with their values."""
    found: list[str] = []
    for flag, value in zip_longest(flags, flags[1:], fillvalue=""):
        if flag.startswith("--dataloader."):
            found += [flag] if "=" in flag else [flag, value]
    return found


def announce(title: str) -> None:
    """The line over a step's output."""
    output.out(f"\n== {title}\n")


def run_steps(steps: Sequence[Step], first: int = 1, of: int | None = None) -> int:
    """Run the commands, each printed before; returns the status of the first that fails, or 0.

    Args:
        steps: run in this order.
        first: number of the first one.
        of: how many there are; None: these.
    """
    for number, step in enumerate(steps, start=first):
        announce(f"{number}/{of or len(steps)} {step.title}")
        output.out(f"   python -m {step.entry.__name__} {' '.join(step.arguments)}\n\n")
        status: int = step.entry.main(step.arguments)
        if status:
            return status
    return 0


def demonstrate(steps: Sequence[Step], folder: Path, rows: Callable[[], Sequence[Row]], best: Path | str) -> int:
    """Run the steps and print what they reached; returns the status of the first that fails, or 0.

    Args:
        steps: run in this order.
        folder: what they leave is in it.
        rows: reads that for the table.
        best: the compressed network.
    """
    started = time.perf_counter()
    status = run_steps(steps)
    if status:
        return status
    output.out(
        f"\n{table(folder, rows)}\n\n{time.perf_counter() - started:.0f} seconds in all; the compressed network is "
        f"{best}\n"
    )
    return 0


def table(folder: Path, rows: Callable[[], Sequence[Row]]) -> str:
    """The rows as text: the first column to the left, the others to the right, a line under the header.

    Raises:
        RunError: a result that `rows` reads in `folder` is missing.
    """
    try:
        cells = rows()
    except (OSError, KeyError, ValueError) as error:
        raise RunError(f"the demo's results in {folder} are incomplete: {error}") from error
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def results(run: Path) -> dict[str, Any]:
    """What a training run left in its folder."""
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def file_size(path: Path) -> str:
    """Of a model, in megabytes."""
    return f"{path.stat().st_size / 2**20:.2f} MB"


def percent(value: float | None) -> str:
    """A metric."""
    return "-" if value is None else f"{value:.2f} %"


def seconds(value: float | None) -> str:
    """The time of a step."""
    return "-" if value is None else f"{value:.3f}"

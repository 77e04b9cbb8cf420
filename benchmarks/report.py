"""What the measurements share: paired timing, a description of the machine, tables and JSON files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Pair:
    """Two things timed in turn, A B A B ...

    Attributes:
        a: median seconds of A.
        b: median seconds of B.
        ratio: median of b/a over the pairs: what slows the machine for a while slows both halves of a pair.
        low: smallest ratio of a pair.
        high: largest ratio of a pair.
    """

    a: float
    b: float
    ratio: float
    low: float
    high: float


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA if there is any, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def synchronize(device: torch.device | str) -> None:
    """Wait for what was started on a CUDA device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def time_pairs(
    a: Callable[[], Any], b: Callable[[], Any], pairs: int, device: torch.device | str = "cpu", warm_up: int = 2
) -> Pair:
    """Time `a` and `b` in turn `pairs` times, after `warm_up` untimed calls of each."""
    for _ in range(warm_up):
        a()
        b()
    times = [(seconds(a, device), seconds(b, device)) for _ in range(pairs)]
    ratios = [second / first for first, second in times]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return Pair(first, second, statistics.median(ratios), min(ratios), max(ratios))


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the figures depend on besides the code."""
    device = torch.device(device)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def largest_resident_set() -> int:
    """Bytes. The kernel's own count of this process: `ru_maxrss` of a spawned process begins at the size of its
    parent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_machine(found: dict[str, Any]) -> None:
    """One line."""
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(end="", flush=True)


def verdict(value: float, limit: float) -> str:
    """How a measured value stands to what is claimed."""
    return f"<= {limit:g}: {'yes' if value <= limit else 'NO'}"


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write the results, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}", flush=True)


def write_comparison(
    options: argparse.Namespace, machine: Mapping[str, Any], limits: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write what a quantized network costs beside the dense one, timed in turn."""
    settings = {"batch": options.batch, "size": options.size, "pairs": options.repeats}
    about = {"machine": machine, "settings": settings, "limits": limits, "a_is": "dense", "b_is": "quantized"}
    write_json(options.json, {**about, "results": results})

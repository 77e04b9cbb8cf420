"""What this machine offers."""

from __future__ import annotations

import os

from . import launch


def available_processors() -> int:
    """Processors that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_processors() -> int:
    """This process's share of them, at least one, where a launcher started several processes on this machine."""
    return max(1, available_processors() // launch.here().local_size)

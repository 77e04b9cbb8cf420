"""What this machine offers."""

from __future__ import annotations

import os


def available_processors() -> int:
    """Processors that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""How long tests wait for processes: so long that only a process that hangs takes it, on however slow and busy a
machine."""

PATIENCE = 1500.0
"""Seconds."""

"""Numbers of bytes as people write them: `1.2MB`."""

from __future__ import annotations

import re

from .numbers import WHOLE_LIMIT, read_number

_UNITS = {"": 1, "B": 1, "BYTES": 1, "KB": 2**10, "KIB": 2**10, "MB": 2**20, "MIB": 2**20, "GB": 2**30, "GIB": 2**30}
SIZE_WORDS = "a size such as 1.2MB, 900KB or 1_200_000 (bytes); MB are 2^20 bytes"


def read_size(value: object) -> int:
    """Bytes from a whole number of them, or from a number with a unit, such as `1.2MB` and `900 KB`.

    Raises:
        ValueError: it is no size; says what is one.
    """
    text = value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
    unit = _UNITS.get(found[2].upper()) if found else 1
    try:
        number = read_number(found[1] if found else value)
    except ValueError:
        raise ValueError(SIZE_WORDS) from None
    size = 0 if unit is None else number * unit
    if not 1 <= size < WHOLE_LIMIT or (unit == 1 and size != int(size)):
        raise ValueError(SIZE_WORDS)
    return int(size)


def size_text(size: int) -> str:
    """A number of bytes as `read_size` reads it, with the largest unit of which it is a whole number."""
    for unit in ("GB", "MB", "KB"):
        if size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)

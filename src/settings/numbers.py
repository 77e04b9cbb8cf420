"""How a number is read from what YAML or a command line gives."""

from __future__ import annotations

import math
from contextlib import suppress

WHOLE_LIMIT = 2**63


def read_number(value: object) -> int | float:
    """A finite number from YAML's number or from text such as `1e-6` and `1_000`, which YAML 1.1 reads as text.

    Raises:
        ValueError: without a message, so that the caller words it from the key's kind.
    """
    if isinstance(value, str) and value.isascii():
        value = _spelled(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    if isinstance(value, float) and not math.isfinite(value):  # a whole number of 400 digits fits no float
        raise ValueError
    return value


def _spelled(text: str) -> int | float | None:
    for kind in (int, float):  # int first: a float would round large whole numbers
        with suppress(ValueError):
            return kind(text)
    return None

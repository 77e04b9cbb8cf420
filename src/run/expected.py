"""What evaluations have in common: the comparison with what was expected."""

from __future__ import annotations

from collections.abc import Mapping

from ..common.log import log


def verdict(found: Mapping[str, float], expected: Mapping[str, float | None], tolerance: float) -> int:
    """The exit status: 0 if every found value (percent) is within `tolerance` of what is expected of it, or nothing is;
    else 1."""
    status = 0
    for name, wanted in expected.items():
        if wanted is None:
            continue
        off = found[name] - wanted
        inside = abs(off) <= tolerance + 1e-9
        start = "as expected" if inside else "NOT AS EXPECTED"
        label = "" if len(expected) == 1 else f"{name}: "
        log.info("%s: %s%.2f %% +- %g was expected, %+.2f off", start, label, wanted, tolerance, off)
        status = status if inside else 1
    return status

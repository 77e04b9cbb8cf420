"""Progress bars with an estimate of the time left; silent when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(
    items: Iterable[T], label: str, total: int | None = None, show: bool = True, unit: str = "it", done: int = 0
) -> Generator[T, None, None]:
    """Iterate over `items` with a progress bar on standard error; closing the iteration clears the bar.

    Args:
        items: what to iterate over.
        label: what is going on, in a few words.
        total: number of items where `items` has no length.
        show: False on processes other than the first.
        unit: what an item is called.
        done: how many of `total` were done before.
    """
    # disable=None asks tqdm to stay silent when the stream is not a terminal; there may be no stream at all
    hidden = None if show and sys.stderr is not None else True
    yield from tqdm(
        items, desc=label, total=total, unit=unit, disable=hidden, leave=False, dynamic_ncols=True, initial=done
    )

"""Images whose shape does not survive resizing: so narrow that one side becomes enormous, or nothing at all.

Both are told from the size alone, before anything is decoded.
"""

from __future__ import annotations

MOST_PIXELS = 1 << 26
"""Of an image brought to the size of a classification network: 200 MB in 8-bit RGB. With a short side of 256 pixels
these are images up to 1,024 times as long as they are wide."""


def too_long(size: tuple[int, int], resize: int) -> str | None:
    """Why an image of `size` (width, height) cannot have its short side brought to `resize` pixels; None: it can.

    The long side grows alike: a line of 60,000 pixels would become an image of 15 million by 256.
    """
    short, long = min(size), max(size)
    if short < 1:
        return f"the image has {_words(size)} pixels"
    grown = resize * long // short
    if resize * grown <= MOST_PIXELS:
        return None
    return (
        f"the image has {_words(size)} pixels, which with a short side of {resize} pixels (dataloader.resize) would be "
        f"{grown:,} pixels long; at most {MOST_PIXELS // resize:,} are made"
    )


def too_narrow(size: tuple[int, int], min_size: int, max_size: int) -> str | None:
    """Why an image of `size` (width, height) cannot be brought to the size of a detection network; None: it can.

    Its short side becomes `min_size` pixels, or its long side `max_size` where that is smaller (rounded down, as
    torchvision does): of a narrow image nothing may be left.
    """
    short, long = min(size), max(size)
    if short < 1:
        return f"the image has {_words(size)} pixels"
    scale = min(min_size / short, max_size / long)
    if int(short * scale) >= 1:
        return None
    return (
        f"the image has {_words(size)} pixels, of which nothing is left when its long side becomes {max_size} pixels "
        "(dataloader.max_size)"
    )


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

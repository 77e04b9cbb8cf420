"""Image files: decoded to 8-bit RGB, and checked whether they can be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

from ..common import progress
from ..common.errors import DataError
from . import places
from .remembered import Look, Remembered

END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL_BYTES = 4096
FILES_PER_JOB = 64
SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose greys have up to 16 bits, though Pillow may hold them in 32."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Of TIFF."""
ORIENTATION = 274
"""Of EXIF."""
UPRIGHT, ORIENTATIONS = 1, 8
"""Values of that tag: the first and how many there are."""

T = TypeVar("T")


def open_file(path: str | Path) -> BinaryIO:
    """The file of an image, or its bytes inside a larger file, to read from. Raises as `places.open_file`."""
    return places.open_file(path)


def open_image(path: str | Path) -> Image.Image:
    """An image of which only the header is read yet; to be closed. Raises whatever the decoder raises."""
    return Image.open(open_file(path) if places.is_inside(os.fspath(path)) else path)


def load_rgb(path: str | Path) -> Image.Image:
    """The decoded image as 8-bit RGB, whatever it was stored as. Raises whatever the decoder raises, and ValueError for
    values of which nobody knows what white is: see `reason`."""
    with open_image(path) as image:
        return _rgb(image)


def decoded(image: Image.Image, reduction: int = 1) -> Image.Image:
    """An opened image, or one that is decoded already, as 8-bit RGB.

    Args:
        image: it; it is not to be decoded anew afterwards.
        reduction: 2, 4 or 8 decodes one pixel where there are as many by as many: the discrete cosine transform of a
            JPEG is then undone for its low frequencies alone. Only where `can_be_reduced`.

    Raises:
        DataError: it cannot be decoded; the message is the reason.
    """
    try:
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for bad files
        raise DataError(reason(error)) from error


def pixels_of(image: Image.Image) -> Tensor:
    """An opened or decoded image as 8-bit RGB, uint8 (3, height, width), the colours of a pixel together in memory.

    JPEGs are decoded by torchvision, which gives Pillow's pixels in a tenth less time.

    Raises:
        DataError: it cannot be decoded; the message is the reason.
    """
    if can_be_reduced(image) and image.mode == "RGB" and (file := getattr(image, "fp", None)) is not None:
        file.seek(0)
        with suppress(RuntimeError):  # Pillow says why, or has an answer of its own
            return decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
    return torch.from_numpy(np.array(decoded(image))).permute(2, 0, 1)


def can_be_reduced(image: Image.Image) -> bool:
    """Whether an image is an opened JPEG of the usual kind (colours or greys) of which no pixel is decoded yet: its
    size is known, and it can be decoded smaller."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and len(getattr(image, "tile", ())) == 1


def _rgb(image: Image.Image) -> Image.Image:
    if problem := range_problem(image):
        raise ValueError(problem)
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;"):  # Pillow would clip such greys to white
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # the same colours, without Pillow's warning
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def range_problem(image: Image.Image) -> str | None:
    """Why the values of an opened image cannot be brought to 8 bits; None: they can."""
    if image.mode == "F":
        kind = "floating-point numbers"
    elif image.mode == "I" and image.format not in SIXTEEN_BITS:
        kind = "integers of 32 bits, or with a sign,"
    else:
        return None
    return f"its values are {kind} of which nothing says what is black and white: store it with 8 or 16 bits"


def _grey(image: Image.Image) -> np.ndarray:
    """The values (H, W) of a grey image of up to 16 bits, as 8 bits."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def reason(error: Exception) -> str:
    """Why a file could not be decoded, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """The tag of an opened image, without decoding it; `UPRIGHT` where there is none that can be read."""
    if image.format == "TIFF":  # Pillow turns these itself
        return UPRIGHT
    try:
        if image.format == "PNG":  # getexif would decode it
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        value = exif.get(ORIENTATION, UPRIGHT)
    except Exception:  # a tag that cannot be read, of a file that may be good otherwise
        return UPRIGHT
    return value if value in range(UPRIGHT, ORIENTATIONS + 1) else UPRIGHT


def full_check(path: str) -> str | None:
    """Decode the whole image; the reason why that failed, or None."""
    try:
        load_rgb(path)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for bad files
        return reason(error)
    return None


def quick_check(path: str) -> str | None:
    """Check the file's header and end only. A file without its end marker is decoded, so nothing that decodes is
    refused."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size == 0:
                return "the file is empty"
            with Image.open(file) as image:
                if problem := range_problem(image):
                    return problem
                marker = END_MARKERS.get(image.format or "")
            if marker is None:
                return None
            file.seek(max(0, size - TAIL_BYTES))
            if marker in file.read():
                return None
    except Exception as error:  # as in full_check
        return reason(error)
    return full_check(path)


CHECKS: dict[str, Callable[[str], str | None] | None] = {"none": None, "quick": quick_check, "full": full_check}


def looks(paths: list[str], how: str, show: bool, place: Path, part: str = "all") -> Iterator[tuple[str, Look]]:
    """(path, what looking at it told) for all `paths`, in their order; nothing for the check `none`.

    A file that was found to be readable before, and has the same size and time since, is not looked at again.

    Args:
        paths: the files.
        how: name of the check.
        show: show a progress bar.
        place: the data set's folder.
        part: name of this process's part of the data set.

    Raises:
        DataError: there is no such check.
    """
    if how not in CHECKS:
        raise DataError(f"checking images: {how!r} is not known; there are {', '.join(CHECKS)}")
    check = CHECKS[how]
    if check is None:
        return
    memory = Remembered(place, how, part)

    def look(path: str) -> Look:
        return memory.look(path, lambda path: _look(path, check))

    yield from in_threads(look, paths, f"checking images ({how})", show)
    memory.keep()


def _look(path: str, check: Callable[[str], str | None]) -> Look:
    if problem := check(path):
        return Look(problem)
    with open_image(path) as image:
        return Look(None, image.size, orientation_of(image))


def in_threads(check: Callable[[str], T], paths: list[str], label: str, show: bool) -> Iterator[tuple[str, T]]:
    """(path, what `check` finds) for all paths, in their order."""

    def check_some(start: int) -> list[tuple[str, T]]:
        return [(path, check(path)) for path in paths[start : start + FILES_PER_JOB]]

    pool = ThreadPoolExecutor()
    try:
        results = chain.from_iterable(pool.map(check_some, range(0, len(paths), FILES_PER_JOB)))
        yield from progress.bar(results, label, total=len(paths), show=show, unit="image")
    finally:  # an interrupted check does not first finish its queue
        pool.shutdown(cancel_futures=True)

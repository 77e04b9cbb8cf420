"""The digits of the digit scenes, cut out of them, as an image folder: a backbone learns from these before it learns to
detect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from . import digit_scenes
from .digits import write_folder_at_once

SIDE = 48
MARGIN = 1.2
"""Side of the square that is cut out, as a multiple of the digit's longer side."""


def write_digit_crops(root: Path) -> None:
    """Write every digit of the scenes as `<root>/{train,val}/<digit>/<scene>_<number>.png`, 48x48 pixels.

    The folder appears all at once or not at all; if it is already complete nothing happens.

    Raises:
        DataError: `root` holds something else, or cannot be written.
        SettingsError: scikit-learn is not installed.
    """
    write_folder_at_once(root, "digit_crops", "the digit crops folder (train/0..9 and val/0..9)", _is_complete, _write)


def _write(folder: Path) -> None:
    for split in digit_scenes.N_SCENES:
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
        for number, scene in enumerate(digit_scenes.scenes(split), start=1):
            picture = Image.fromarray(scene.image)
            for place, (digit, mask) in enumerate(zip(scene.digits, scene.masks, strict=True)):
                crop(picture, mask).save(folder / split / str(digit) / f"{number:06d}_{place}.png")


def crop(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """A square around the pixels of `mask` (h, w), black beyond the picture's rim."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    half = MARGIN * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) / 2
    x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    corners = tuple(round(float(value)) for value in (x - half, y - half, x + half, y + half))
    return picture.crop(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)  # type: ignore[arg-type]


def _is_complete(root: Path) -> bool:
    classes = {str(digit) for digit in range(10)}
    for split, count in digit_scenes.N_SCENES.items():
        if not (root / split).is_dir() or {entry.name for entry in (root / split).iterdir()} != classes:
            return False
        if sum(1 for _ in (root / split).glob("*/*.png")) < count:  # every scene has several
            return False
    return True

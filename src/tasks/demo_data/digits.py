"""The handwritten digits that come with scikit-learn, as a small image folder for trying things out without a
download."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ...common.errors import DataError, SettingsError
from ...common.paths import check_name, temporary_name

SIDE = 64
VALIDATION_EVERY = 5
N_IMAGES = 1797


def write_digits(root: Path) -> None:
    """Write 1,797 digits as 64x64 RGB files `<root>/{train,val}/<digit>/<number>.png`; every fifth of a class goes to
    `val`.

    The folder appears all at once or not at all; if it is already complete nothing happens.

    Raises:
        DataError: `root` holds something else, or cannot be written.
        SettingsError: scikit-learn is not installed.
    """
    description = f"the digits folder ({N_IMAGES:,} PNG files in train/0..9 and val/0..9)"
    write_folder_at_once(root, "digits", description, _is_complete, _write)


def write_folder_at_once(
    root: Path, name: str, description: str, is_complete: Callable[[Path], bool], write: Callable[[Path], None]
) -> None:
    """Have `write` fill a temporary folder beside `root`, then rename it to `root`; nothing happens if `root` is
    already complete.

    Args:
        root: the folder wanted; missing, empty or complete.
        name: what error messages begin with.
        description: what a complete folder is, for error messages.
        is_complete: whether a folder is one.
        write: fills an empty folder.

    Raises:
        DataError: `root` holds something else, or cannot be written.
    """
    root = Path(os.path.abspath(root.expanduser()))
    check_name(root)
    if is_complete(root):
        return
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise DataError(
            f"{name}: {root} exists but is not {description}. Remove it to have it written again, or choose another "
            "folder."
        )
    temporary: Path | None = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=temporary_name(root.name), dir=root.parent))
        write(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, root)
    except OSError as error:
        if not is_complete(root):  # another process may have been faster, which is as good
            raise DataError(
                f"{name}: cannot write {root}: {error.strerror or error}. Choose another folder or free some space."
            ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 8, 8) with values 0 to 16, and labels (n,).

    Raises:
        SettingsError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SettingsError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    return digits.images, digits.target


def _write(folder: Path) -> None:
    images, labels = load_digit_images()
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "val" if seen[label] % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
        seen[label] += 1
        place = folder / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(place / f"{number:04d}.png")


def _is_complete(root: Path) -> bool:
    classes = {str(digit) for digit in range(10)}
    for split in ("train", "val"):
        if not (root / split).is_dir() or {entry.name for entry in (root / split).iterdir()} != classes:
            return False
    return sum(1 for _ in root.glob("*/*/*.png")) == N_IMAGES

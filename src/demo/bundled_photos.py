"""Photos that come with scikit-learn and scikit-image, and crops of them: a few photos instead of a thousand.

A crop shows another part at another scale, in half of all cases mirrored. Of few photos these say less than as many
photos would, and far more than none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..common.errors import SettingsError
from ..common.paths import write_atomically
from ..common.randomness import stream

SMALLEST = 0.08
"""Of a crop's area, in that of the largest square, as torchvision's RandomResizedCrop has it by default."""
QUALITY = 95
"""Of the JPEG files."""


@dataclass(frozen=True)
class Photo:
    """A photo in an installed package.

    Attributes:
        title: what it shows.
        module: the package's.
        file: its path in there.
    """

    title: str
    module: str
    file: str

    def path(self) -> Path:
        """Where it lies.

        Raises:
            SettingsError: the package is installed without it.
        """
        spec = importlib.util.find_spec(self.module)
        folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
        for folder in folders:
            if (folder / self.file).is_file():
                return folder / self.file
        raise SettingsError(
            f"there is no {self.file} in the installed {PACKAGES[self.module]}; the demonstration needs it. Install "
            f"another version of it: pip install --upgrade {PACKAGES[self.module]}"
        )

    def open(self) -> Image.Image:
        """The photo, RGB."""
        with Image.open(self.path()) as image:
            return image.convert("RGB")


PACKAGES = {"sklearn": "scikit-learn", "skimage": "scikit-image"}
"""By module, the packages that hold the photos."""


def _of_skimage(**files: str) -> tuple[Photo, ...]:
    return tuple(Photo(title, "skimage", f"data/{file}") for title, file in files.items())


TO_LOOK_AT = _of_skimage(cat="chelsea.png", coffee="coffee.png", photographer="camera.png", rocket="rocket.jpg")
"""Photos that the network is never calibrated with."""
TO_CALIBRATE = (
    Photo("palace", "sklearn", "datasets/images/china.jpg"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg"),
    *_of_skimage(
        astronaut="astronaut.png",
        motorcycle="motorcycle_left.png",
        galaxies="hubble_deep_field.jpg",
        tissue="ihc.png",
        retina="retina.jpg",
        coins="coins.png",
        bricks="brick.png",
        grass="grass.png",
        gravel="gravel.png",
        moon="moon.png",
        clock="clock_motion.png",
        page="page.png",
    ),
)
"""Photos to cut crops out of."""


def check_photos(photos: Sequence[Photo]) -> None:
    """See that all are there.

    Raises:
        SettingsError: a package is not installed, or has no such photo.
    """
    for photo in photos:
        photo.path()


def crop_of(photo: Image.Image, side: int, draw: torch.Generator) -> Image.Image:
    """A square part of a photo, (side, side) pixels: a random share of the area of the largest square, anywhere in the
    photo, mirrored in half of all cases.

    Args:
        photo: RGB.
        side: in pixels.
        draw: source of randomness.
    """
    largest = min(photo.size)
    share, across, down, mirrored = torch.rand(4, generator=draw).tolist()
    length = max(1, round(largest * (SMALLEST + (1 - SMALLEST) * share) ** 0.5))
    left, top = (int(where * (space - length + 1)) for where, space in zip((across, down), photo.size, strict=True))
    part = photo.resize(
        (side, side), Image.Resampling.BICUBIC, box=(left, top, left + length, top + length), reducing_gap=3.0
    )
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored < 0.5 else part


def write_crops(photos: Sequence[Photo], folder: Path, count: int, side: int, seed: int = 0) -> list[Path]:
    """Cut crops out of photos, one of each in turn, and write them as JPEG files.

    The names sort in that order: the first few files are of as many photos as possible, too.

    Args:
        photos: to cut them out of.
        folder: receives them; crops of an earlier call are removed.
        count: of crops.
        side: of each, in pixels.
        seed: of what is cut.

    Raises:
        RunError: a file cannot be written.
    """
    for old in folder.glob("crop_*.jpg"):
        old.unlink()
    opened = [photo.open() for photo in photos]
    paths = []
    for number in range(count):
        of = number % len(photos)
        crop = crop_of(opened[of], side, stream(seed, "crop", number))
        path = folder / f"crop_{number:04d}_{photos[of].title}.jpg"
        write_atomically(path, lambda temporary, crop=crop: crop.save(temporary, format="JPEG", quality=QUALITY))  # type: ignore[misc]
        paths.append(path)
    return paths

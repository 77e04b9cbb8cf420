"""From a decoded image to what a classification network sees, in training and in validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from ..common.errors import DataError
from .augmentations import drawing_from, made, random_resized_crop
from .shapes import too_long

Transform = Callable[[Image.Image, torch.Generator], Tensor]
"""An RGB image and a source of randomness -> normalised float32 tensor (3, H, W). Raises DataError for an image so
narrow that it would become huge."""


def training_transform(
    resize: int, image_size: int, crop_padding: int, horizontal_flip: bool, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """Short side to `resize`, `crop_padding` black pixels on each side, a random crop of `image_size`, a flip in half
    of all cases."""
    return partial(_augment, resize, image_size, crop_padding, horizontal_flip, list(mean), list(std))


@dataclass
class Augmented:
    """A training transform with a crop or changes of torchvision's own; a `Transform`.

    Attributes:
        resize, image_size, crop_padding, horizontal_flip, mean, std: as for `training_transform`.
        resized_crop: a crop of a random part of the image instead, which `resize` and `crop_padding` do not change.
        names: of augmentations, in this order: those of the image, then those of the tensor.
    """

    resize: int
    image_size: int
    crop_padding: int
    horizontal_flip: bool
    mean: list[float]
    std: list[float]
    resized_crop: bool = False
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._of_image, self._of_tensor = made(self.names, "image"), made(self.names, "tensor")
        self._crop = random_resized_crop(self.image_size)

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """What the network sees of an RGB image."""
        with drawing_from(generator):
            if self.resized_crop:
                image = self._crop(image)
                if self.horizontal_flip and bool(torch.rand(()) < 0.5):
                    image = functional.hflip(image)
            else:
                image = _crop(self.resize, self.image_size, self.crop_padding, self.horizontal_flip, image, generator)
            for change in self._of_image:
                image = change(image)
            seen = functional.normalize(functional.to_tensor(image), self.mean, self.std)
            for change in self._of_tensor:
                seen = change(seen)
        return seen


def validation_transform(resize: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Short side to `resize`, centre crop of `image_size` (torchvision's Resize, CenterCrop, ToTensor, Normalize)."""
    return partial(_centre, resize, image_size, list(mean), list(std))


def crop_of_bytes(resize: int, image_size: int) -> Transform:
    """As `validation_transform`, but for the normalising: uint8 (3, H, W), which `normalized` makes the same of."""
    return partial(_centre_bytes, resize, image_size)


def whole_bytes(image: Image.Image, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG001 (of Transform)
    """The image as it is: uint8 (3, H, W)."""
    return functional.pil_to_tensor(image).contiguous()


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (..., 3, H, W) uint8 as float32, normalised; to the last bit what the transforms make of each."""
    return functional.normalize(in_zero_to_one(pixels), list(mean), list(std))


def in_zero_to_one(pixels: Tensor) -> Tensor:
    """Images uint8 as float32 in 0..1."""
    return pixels.to(torch.float32).div(255)


def _resized(image: Image.Image, resize: int) -> Image.Image:
    if problem := too_long(image.size, resize):
        raise DataError(problem)
    return functional.resize(image, [resize])


def _augment(
    resize: int,
    size: int,
    padding: int,
    flip: bool,
    mean: list[float],
    std: list[float],
    image: Image.Image,
    generator: torch.Generator,
) -> Tensor:
    image = _crop(resize, size, padding, flip, image, generator)
    return functional.normalize(functional.to_tensor(image), mean, std)


def _crop(
    resize: int, size: int, padding: int, flip: bool, image: Image.Image, generator: torch.Generator
) -> Image.Image:
    image = _resized(image, resize)
    if padding:
        image = functional.pad(image, [padding])
    # all three are always drawn, so that a crop does not depend on whether flips are on
    top = int(torch.randint(image.height - size + 1, (), generator=generator))
    left = int(torch.randint(image.width - size + 1, (), generator=generator))
    flipped = bool(torch.rand((), generator=generator) < 0.5)
    image = functional.crop(image, top, left, size, size)
    if flip and flipped:
        image = functional.hflip(image)
    return image


def _centre(
    resize: int,
    size: int,
    mean: list[float],
    std: list[float],
    image: Image.Image,
    generator: torch.Generator | None = None,  # noqa: ARG001 (of Transform)
) -> Tensor:
    return normalized(_centre_bytes(resize, size, image), mean, std)


def _centre_bytes(
    resize: int,
    size: int,
    image: Image.Image,
    generator: torch.Generator | None = None,  # noqa: ARG001 (of Transform)
) -> Tensor:
    return functional.pil_to_tensor(functional.center_crop(_resized(image, resize), [size])).contiguous()

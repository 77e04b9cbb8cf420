"""From an image to what a classification network is given of it, in training and in validation: bytes, which
`Normalise` makes the network's input of on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from ..common.errors import DataError
from .augmentations import drawing_from, made, random_part
from .decoding import decoded
from .shapes import too_long
from .views import View, exact, fast, image_of, pixels_of

Transform = Callable[[Image.Image, torch.Generator], Tensor]
"""An image, opened or decoded, and a source of randomness -> what the network is given of it: uint8 (3, H, W), or
float32 where it is normalised already. Raises DataError for an image that cannot be decoded, or so narrow that it would
become huge."""


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes what the network sees; the names are those of the settings.

    Attributes:
        resize: the images' short side is brought to this many pixels.
        image_size: side of the square crop that the network sees; at most `resize`.
        crop_padding: black pixels added on each side before a training crop.
        horizontal_flip: mirror half of the training images.
        mean, std: of the three channels, on the scale 0 to 1.
        channels_last: hand the images to the network in this memory format.
        crop: `random`, or `random_resized`, in training.
        augmentation: names of what else is done to training images.
        decoding: `fast`, or `exact`, in training; in validation images are always exact.
    """

    resize: int = 256
    image_size: int = 224
    crop_padding: int = 0
    horizontal_flip: bool = True
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    channels_last: bool = False
    crop: str = "random"
    augmentation: tuple[str, ...] = ()
    decoding: str = "fast"

    def for_training(self) -> Transform:
        """How training images are shown."""
        return TrainingTransform(self)

    def for_validation(self) -> Transform:
        """How validation images are shown."""
        return crop_of_bytes(self.resize, self.image_size)


class TrainingTransform:
    """A random crop, a flip in half of all cases, and the augmentations of a spec; a `Transform`.

    The crop is of the image whose short side was brought to `resize` and which got `crop_padding` black pixels on each
    side, or a random part brought to `image_size`. What is drawn does not depend on how images are decoded.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec
        self._of_image, self._of_tensor = made(spec.augmentation, "image"), made(spec.augmentation, "tensor")
        self._normalise = Normalise(spec.mean, spec.std)

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """What the network is given of an image: float32 where there are augmentations of normalised tensors."""
        spec = self.spec
        if spec.decoding != "fast" or image.format != "JPEG":  # others may turn when they are decoded
            image = decoded(image)
        if spec.crop == "random" and not spec.augmentation:
            return self._pixels(image, self._random_view(image, generator))
        with drawing_from(generator):
            view = self._resized_view(image) if spec.crop == "random_resized" else self._random_view(image, generator)
            if self._of_image:
                changed = image_of(fast(image, view)) if spec.decoding == "fast" else exact(image, view)
                for change in self._of_image:
                    changed = change(changed)
                pixels = pixels_of(changed)
            else:
                pixels = self._pixels(image, view)
            if self._of_tensor:
                pixels = self._normalise(pixels, torch.contiguous_format)
            for change in self._of_tensor:
                pixels = change(pixels)
        return pixels

    def _pixels(self, image: Image.Image, view: View) -> Tensor:
        return fast(image, view) if self.spec.decoding == "fast" else pixels_of(exact(image, view))

    def _random_view(self, image: Image.Image, generator: torch.Generator) -> View:
        """A crop of the resized image, which need not be decoded."""
        spec, size = self.spec, self.spec.image_size
        width, height = resized(image.size, spec.resize)
        padding = spec.crop_padding
        # all three are always drawn, so that a crop does not depend on whether flips are on
        top = int(torch.randint(height + 2 * padding - size + 1, (), generator=generator)) - padding
        left = int(torch.randint(width + 2 * padding - size + 1, (), generator=generator)) - padding
        mirrored = bool(torch.rand((), generator=generator) < 0.5) and spec.horizontal_flip
        return View(None, (width, height), (left, top, left + size, top + size), mirrored)

    def _resized_view(self, image: Image.Image) -> View:
        """A random part, whatever its size; drawn from torch's global generator."""
        size = self.spec.image_size
        part = random_part(image)
        mirrored = self.spec.horizontal_flip and bool(torch.rand(()) < 0.5)
        return View(part, (size, size), (0, 0, size, size), mirrored)


def crop_of_bytes(resize: int, image_size: int) -> Transform:
    """Short side to `resize`, centre crop of `image_size`: to the last bit torchvision's Resize and CenterCrop on
    Pillow's images, and ToTensor and Normalize where `Normalise` follows."""
    return partial(_centre, resize, image_size)


def _centre(resize: int, size: int, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG001 (of Transform)
    image = decoded(image)  # some kinds of images turn when they are
    width, height = resized(image.size, resize)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pixels_of(exact(image, View(None, (width, height), (left, top, left + size, top + size))))


def whole_bytes(image: Image.Image, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG001 (of Transform)
    """The image as it is: uint8 (3, H, W)."""
    return functional.pil_to_tensor(decoded(image)).contiguous()


def resized(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Width and height of an image of `size` (width, height) whose short side is brought to `resize` pixels: the long
    side is rounded down, as in torchvision.

    Raises:
        DataError: the image is so narrow that it would become huge.
    """
    if problem := too_long(size, resize):
        raise DataError(problem)
    width, height = size
    return (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)


class Normalise:
    """From bytes to what a network sees: float32 in 0..1, less the mean of each channel, by its standard deviation.

    Gives the same to the last bit on every device as torchvision's ToTensor and Normalize, and never waits for the
    device.

    Args:
        mean, std: of the three channels, on the scale 0 to 1.
        device: of the images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self._mean, self._std = (
            torch.tensor(list(one), dtype=torch.float32).view(3, 1, 1).to(device) for one in (mean, std)
        )
        # as a tensor: CUDA multiplies by 1/255 where it is to divide by a number, which may differ in the last bit
        self._white = torch.full((3, 1, 1), 255.0, device=device)

    def __call__(self, pixels: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        """Images (..., 3, H, W) uint8 as float32, in a memory format; float32 is only brought to that format."""
        if pixels.is_floating_point():
            return pixels.to(memory_format=memory_format)
        values = pixels.to(torch.float32, memory_format=memory_format)
        return values.div_(self._white).sub_(self._mean).div_(self._std)


def in_zero_to_one(pixels: Tensor) -> Tensor:
    """Images uint8 as float32 in 0..1."""
    return pixels.to(torch.float32).div(255)

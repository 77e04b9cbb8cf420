"""What a network is to see of an image: which part, how large, mirrored or not; and two ways to make it.

`exact` decodes the whole image and resizes it as Pillow does, which is what torchvision's transforms make of images.
`fast` resizes with torch, whose pixels differ from Pillow's by at most 1 of 255, and decodes JPEGs that are much larger
than needed at half, a quarter or an eighth of their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .decoding import can_be_reduced, decoded, pixels_of

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two are beyond what is meant."""

REDUCTIONS = (8, 4, 2)
SPARE = 2
"""A JPEG is decoded smaller where so many of its pixels remain for each one that is wanted, along each side."""


@dataclass(frozen=True)
class View:
    """What a network is to see of an image.

    Attributes:
        part: of the image, in its own pixels; None: all of it.
        scaled: width and height that this is brought to.
        window: of the scaled part; where it reaches beyond, pixels are black.
        mirrored: left and right changed.
    """

    part: Box | None
    scaled: tuple[int, int]
    window: Box
    mirrored: bool = False


def exact(image: Image.Image, view: View) -> Image.Image:
    """The view of an image, opened or decoded, as torchvision's transforms on Pillow's images make it.

    Raises:
        DataError: it cannot be decoded.
    """
    image = decoded(image)
    if view.part is not None:
        image = image.crop(view.part)
    if image.size != view.scaled:
        image = image.resize(view.scaled, Image.Resampling.BILINEAR)
    if view.window != (0, 0, *image.size):
        image = image.crop(view.window)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored else image


def fast(image: Image.Image, view: View) -> Tensor:
    """The same with torch: uint8 (3, height, width), the colours of a pixel together in memory.

    Raises:
        DataError: it cannot be decoded.
    """
    reduction = reduction_for(image, view)
    if reduction > 1:
        image = decoded(image, reduction)
    if reduction > 1 and view.part is not None:  # between pixels, which torch's resizing cannot
        left, top, right, bottom = (side / reduction for side in view.part)
        image = image.resize(view.scaled, Image.Resampling.BILINEAR, (left, top, right, bottom))
    pixels = pixels_of(image)
    if reduction == 1 and view.part is not None:
        left, top, right, bottom = view.part
        pixels = pixels[:, top:bottom, left:right]
    width, height = view.scaled
    if pixels.shape[1:] != (height, width):
        whole = pixels[None].contiguous(memory_format=torch.channels_last)
        pixels = functional.interpolate(whole, (height, width), mode="bilinear", antialias=True)[0]
    pixels = _cut(pixels, view)
    if view.mirrored:
        return pixels.permute(1, 2, 0).flip(1).permute(2, 0, 1)
    return pixels


def image_of(pixels: Tensor) -> Image.Image:
    """The RGB image of uint8 (3, height, width)."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def reduction_for(image: Image.Image, view: View) -> int:
    """How much smaller an image may be decoded for a view of it; 1: not at all."""
    if not can_be_reduced(image):
        return 1
    left, top, right, bottom = view.part or (0, 0, *image.size)
    spare = min((right - left) / view.scaled[0], (bottom - top) / view.scaled[1]) / SPARE
    return next((reduction for reduction in REDUCTIONS if reduction <= spare), 1)


def _cut(pixels: Tensor, view: View) -> Tensor:
    """The view's window of the scaled pixels."""
    left, top, right, bottom = view.window
    width, height = view.scaled
    beyond = (max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height))
    inside = pixels[:, max(0, top) : min(height, bottom), max(0, left) : min(width, right)]
    return functional.pad(inside, beyond) if any(beyond) else inside

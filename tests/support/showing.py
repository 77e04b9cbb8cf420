"""Images as a network sees them: a transform and the normalising that follows it on the network's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from src.tasks.classification import ImageSpec
from src.tasks.transforms import Normalise, Transform


def seen(transform: Transform, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """A transform that gives normalised float32, in rows of pixels of one colour."""
    normalise = Normalise(mean, std)

    def show(image: Image.Image, generator: torch.Generator) -> Tensor:
        return normalise(transform(image, generator), torch.contiguous_format)

    return show


def validation_transform(resize: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """What a validation shows."""
    return seen(ImageSpec(resize, size).for_validation(), mean, std)


def training_transform(
    resize: int, size: int, padding: int, flip: bool, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """What a training shows whose decoding is exact."""
    return seen(ImageSpec(resize, size, padding, flip, decoding="exact").for_training(), mean, std)

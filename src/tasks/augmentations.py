"""torchvision's v2 transforms as augmentations by name.

They draw from torch's global generator; here each image has one of its own, so that what it looks like depends on
nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from .augmentation_names import AUGMENTATIONS

Make = Callable[[], Callable[[Any], Any]]
"""A function that changes an RGB image of PIL's, or a normalised tensor (3, H, W), as the fact `of` of its entry
says."""

COLOUR = 0.4
"""Largest relative change of brightness, contrast and saturation."""
AREAS, SHAPES = [0.08, 1.0], [3 / 4, 4 / 3]
"""Of a crop of a random part: its share of the image's area, and its width by its height (Szegedy et al. 2015)."""


def trivialaugment() -> Callable[[Any], Any]:
    """TrivialAugment (Mueller and Hutter 2021): one change drawn from all, of a strength drawn from all."""
    return v2.TrivialAugmentWide()


def randaugment() -> Callable[[Any], Any]:
    """RandAugment (Cubuk et al. 2020): two changes of the strength 9 of 30."""
    return v2.RandAugment()


def autoaugment() -> Callable[[Any], Any]:
    """AutoAugment (Cubuk et al. 2019), the policy for ImageNet."""
    return v2.AutoAugment()


def augmix() -> Callable[[Any], Any]:
    """AugMix (Hendrycks et al. 2020): mixes the image with three chains of changes."""
    return v2.AugMix()


def color_jitter() -> Callable[[Any], Any]:
    """Brightness, contrast and saturation, each by a random factor."""
    return v2.ColorJitter(COLOUR, COLOUR, COLOUR)


def random_erasing() -> Callable[[Any], Any]:
    """Random erasing (Zhong et al. 2020) in a quarter of the images; the mean of normalised images is 0."""
    return v2.RandomErasing(p=0.25, value=0)


def random_part(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image, which need not be decoded; from torch's global
    generator."""
    top, left, height, width = RandomResizedCrop.get_params(image, AREAS, SHAPES)
    return left, top, left + width, top + height


def made(names: Sequence[str], of: str) -> list[Callable[[Any], Any]]:
    """Those of the augmentations `names` that change the `image`, or the `tensor`."""
    return [AUGMENTATIONS[name]() for name in names if AUGMENTATIONS.fact(name, "of") == of]


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """torch's global generator of the CPU draws meanwhile what follows from the state of `generator`."""
    own = torch.default_generator
    before = own.get_state()
    own.manual_seed(int(torch.randint(2**62, (), generator=generator)))
    try:
        yield
    finally:
        own.set_state(before)

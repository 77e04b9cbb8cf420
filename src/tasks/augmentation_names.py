"""What can be done to training images, by name. To add one: a function of the type `augmentations.Make` in a file, and
its entry here. The fact `of` says what it changes: the `image`, or the normalised `tensor`."""

from __future__ import annotations

from typing import Any

from ..common.registry import Entry, Registry

IMAGE, TENSOR = {"of": "image"}, {"of": "tensor"}

AUGMENTATIONS: Registry[Any] = Registry(
    "augmentation",
    {
        "trivialaugment": Entry(".tasks.augmentations:trivialaugment", "one random change of random strength", IMAGE),
        "randaugment": Entry(".tasks.augmentations:randaugment", "two random changes of fixed strength", IMAGE),
        "autoaugment": Entry(".tasks.augmentations:autoaugment", "the changes that were found for ImageNet", IMAGE),
        "augmix": Entry(".tasks.augmentations:augmix", "a mixture of the image and three changed ones", IMAGE),
        "color_jitter": Entry(
            ".tasks.augmentations:color_jitter", "brightness, contrast and saturation up to 40 % up or down", IMAGE
        ),
        "random_erasing": Entry(
            ".tasks.augmentations:random_erasing", "in a quarter of the images a rectangle becomes grey", TENSOR
        ),
    },
)

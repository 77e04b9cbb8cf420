"""From COCO's images and annotations to batches in the form that torchvision's detection networks take.

A target holds boxes (N, 4) float32 (left, top, right, bottom in pixels), labels (N,) int64 (outputs of the
head), image_id (1,) int64 and, for networks that find masks, masks (N, H, W) uint8. What an item looks like depends on
(seed, epoch, number of the image) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import functional

from ...common.memory import TOO_MUCH, is_out_of_memory
from ...common.randomness import stream
from ..images import reason
from ..loading import EpochOrder, Unreadable
from .data import CocoSplit, box_in_image
from .orientation import load_as_annotated

Target = dict[str, Tensor]

RATIOS_PER_OCTAVE = 3
"""Images are grouped by width / height in steps of this many to a factor of two, from 1:2 to 2:1."""


def target_of(split: CocoSplit, number: int) -> Target:
    """The objects to train on in the image at `number`; several, one or none."""
    image_id = split.image_ids[number]
    width, height = split.size(image_id)
    objects = split.annotations[number]
    boxes = [box_in_image(annotation, width, height) for annotation in objects]
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([split.label(annotation["category_id"]) for annotation in objects], dtype=torch.int64),
        "image_id": torch.tensor([image_id]),
    }
    if split.masks:
        masks = np.zeros((len(objects), height, width), dtype=np.uint8)
        for mask, annotation in zip(masks, objects, strict=True):  # one by one: there may be thousands
            mask[:] = split.api.annToMask(annotation)
        target["masks"] = torch.from_numpy(masks)
    return target


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Image (3, H, W), boxes and masks, where there are any, mirrored left to right."""
    width = image.shape[-1]
    boxes = target["boxes"]
    mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    masks = {"masks": target["masks"].flip(-1)} if "masks" in target else {}
    return image.flip(-1), {**target, "boxes": mirrored, **masks}


@dataclass(frozen=True)
class DetectionItem:
    """An image (3, H, W) float32 in 0..1, its id and, for training, its target."""

    image_id: int
    image: Tensor
    target: Target


class CocoDataset(Dataset):
    """Items by (epoch, number), or `Unreadable`.

    Args:
        split: the images.
        seed: the run's seed.
        flip: mirror half of the images at random, anew in each epoch.
    """

    def __init__(self, split: CocoSplit, seed: int, flip: bool) -> None:
        self.split, self.seed, self.flip = split, seed, flip

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> DetectionItem | Unreadable:
        epoch, number = key
        image_id = self.split.image_ids[number]
        path = self.split.path(image_id)
        try:
            image = functional.to_tensor(load_as_annotated(path, self.split.size(image_id)))
        except (
            Exception
        ) as error:  # any decoder's complaint about a bad file; ours to report, not to die of in a worker
            return Unreadable(path, TOO_MUCH if is_out_of_memory(error) else reason(error))
        try:
            target = target_of(self.split, number)
            if self.flip and torch.rand((), generator=stream(self.seed, "augmentation", epoch, number)) < 0.5:
                image, target = flipped(image, target)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            width, height = self.split.size(image_id)
            objects = len(self.split.annotations[number])
            return Unreadable(path, f"{TOO_MUCH}, {width}x{height} pixels with {objects:,} objects")
        return DetectionItem(image_id, image, target)


@dataclass(frozen=True)
class DetectionBatch:
    """Images of different sizes with their ids and targets, and the files of this batch that could not be read."""

    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    image_ids: tuple[int, ...]
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> DetectionBatch:
        """The same batch in page-locked memory (the loader calls this for CUDA)."""
        targets = tuple({name: value.pin_memory() for name, value in target.items()} for target in self.targets)
        return DetectionBatch(
            tuple(image.pin_memory() for image in self.images), targets, self.image_ids, self.unreadable
        )


def collate_detection(items: list[DetectionItem | Unreadable]) -> DetectionBatch:
    """A batch of the readable items; the others are kept beside it."""
    good = [item for item in items if isinstance(item, DetectionItem)]
    bad = tuple(item for item in items if isinstance(item, Unreadable))
    return DetectionBatch(
        tuple(item.image for item in good),
        tuple(item.target for item in good),
        tuple(item.image_id for item in good),
        bad,
    )


def ratio_groups(split: CocoSplit) -> list[int]:
    """For each image the number of its group: images of one group have a like ratio of width to height."""
    sizes = torch.tensor([split.size(image_id) for image_id in split.image_ids], dtype=torch.float64)
    octaves = (sizes[:, 0] / sizes[:, 1]).log2().clamp(-1, 1)
    return (octaves * RATIOS_PER_OCTAVE).floor().to(torch.int64).tolist()


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch as lists of (epoch, number), each of images of one group as far as the numbers allow.

    The images come in the order of `order`. A group's images fill its batches in that order; what is left of all groups
    is put together, neighbouring groups first. There are as many batches as without groups, every image is in one of
    them, and they come in the order of their first images, so that groups do not follow each other.

    Args:
        order: the images that this process reads.
        groups: the group of each image; None: one group.
        batch_size: images per batch.

    Attributes:
        start: how many of the first batches the next iteration leaves out.
    """

    def __init__(self, order: EpochOrder, groups: list[int] | None, batch_size: int) -> None:
        self.order, self.groups, self.batch_size = order, groups, batch_size
        self.start = 0

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = list(self.order)
        members: dict[int, list[int]] = {}
        for place, (_, number) in enumerate(keys):
            members.setdefault(self.groups[number] if self.groups else 0, []).append(place)
        chunks: list[list[int]] = []
        rest: list[int] = []
        for _, places in sorted(members.items()):
            full = len(places) - len(places) % self.batch_size
            chunks += [places[start : start + self.batch_size] for start in range(0, full, self.batch_size)]
            rest += places[full:]
        chunks += [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        for chunk in sorted(chunks, key=min)[self.start :]:
            yield [keys[place] for place in chunk]

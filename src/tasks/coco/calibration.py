"""Training images in COCO's layout that show a detector what it sees, without what is in them."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

import torch

from ..calibration import CalibrationSpec, ImagesToShow, Several, collate_several, drawn, unreadable_files
from ..loading import Unreadable
from .data import KEY, CocoSplit
from .loading import CocoDataset, DetectionItem


def training_images(
    split: CocoSplit, spec: CalibrationSpec, skip_unreadable: bool, reasons: MutableMapping[str, str]
) -> ImagesToShow:
    """`spec.count` of the training images, as a validation shows them; arguments as for folders of images."""
    chosen = [split.image_ids[number] for number in drawn(len(split), spec)]
    part = replace(split, image_ids=tuple(chosen), annotations=((),) * len(chosen), masks=False)
    files = unreadable_files(skip_unreadable, KEY, reasons)
    return ImagesToShow(part.paths, CocoDataset(part, spec.seed, flip=False), _collate, spec, files)


def _collate(items: list[DetectionItem | Unreadable]) -> Several:
    """The images alone, as bytes again."""
    plain = [
        item if isinstance(item, Unreadable) else ((item.image * 255).round().to(torch.uint8), 0) for item in items
    ]
    return collate_several(plain)

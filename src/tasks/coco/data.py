"""Objects in images in COCO's layout: what the annotations say, checked before any work.

`<root>/annotations/instances_{train,val}2017.json` and the images in `<root>/{train,val}2017`. The file is read once;
it becomes a `pycocotools` COCO, whose rules for masks and crowds hold everywhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_codec
from pycocotools.coco import COCO

from ...common.errors import DataError
from ...common.log import log
from ..images import some
from .checks import LIMIT, check_annotations, check_images_and_categories, check_lists, is_whole
from .exports import bring_to_cocos_form, fill_in_boxes, find_files, leave_out_broken_masks

KEY = "dataloader.coco_path"
SPLITS = {"train": "train2017", "val": "val2017"}
LAYOUT = "Expected annotations/instances_{train,val}2017.json, train2017/ and val2017/ in it."
MISSING = "the file is missing"
THINNEST = 0.01
"""Pixels. A box that is thinner has no area to learn from (and none at all after rounding to 32 bits)."""


@dataclass(frozen=True)
class Dropped:
    """What training leaves out, with the number of each."""

    crowds: int = 0
    degenerate_boxes: int = 0
    without_mask: int = 0
    images_without_annotations: int = 0
    broken_masks: int = 0

    def __str__(self) -> str:
        return (
            f"{self.crowds:,} crowds, {self.degenerate_boxes:,} degenerate boxes, {self.without_mask:,} objects "
            f"without a mask, {self.broken_masks:,} with a broken mask, "
            f"{self.images_without_annotations:,} images without usable annotations"
        )


@dataclass(frozen=True)
class CocoSplit:
    """The images of one split and what is in them.

    Attributes:
        folder: of the images.
        source: the annotation file.
        api: everything the file says.
        image_ids: the images that are used, in the order of the file.
        annotations: per image (as `image_ids`) the objects to train on; the evaluation asks `api` instead.
        dropped: what a training split leaves out; of any split the broken masks.
        outputs: category id -> output of the network's head, see `classes`; None: not known yet.
        masks: whether objects are to be found with their masks; False: boxes are all that is learnt and scored.
    """

    folder: Path
    source: Path
    api: COCO
    image_ids: tuple[int, ...]
    annotations: tuple[tuple[Mapping[str, Any], ...], ...]
    dropped: Dropped = Dropped()
    outputs: Mapping[int, int] | None = None
    masks: bool = True

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def paths(self) -> list[str]:
        """The image files, as `image_ids`."""
        return [self.path(image_id) for image_id in self.image_ids]

    @property
    def names(self) -> dict[int, str]:
        """Category id -> name."""
        return {category["id"]: str(category["name"]) for category in self.api.dataset["categories"]}

    def label(self, category_id: int) -> int:
        """The output of the network's head that stands for a category."""
        return category_id if self.outputs is None else self.outputs[category_id]

    def label_names(self) -> dict[int, str]:
        """Output of the network's head -> name of its category."""
        return {self.label(number): name for number, name in self.names.items()}

    def path(self, image_id: int) -> str:
        """The file of an image."""
        return str(self.folder / self.api.imgs[image_id]["file_name"])

    def size(self, image_id: int) -> tuple[int, int]:
        """(width, height) of an image as the annotations say."""
        image = self.api.imgs[image_id]
        return int(image["width"]), int(image["height"])

    def keeping(self, image_ids: Sequence[int]) -> CocoSplit:
        """The same split with these of its images only."""
        wanted = set(image_ids)
        kept = [number for number, image_id in enumerate(self.image_ids) if image_id in wanted]
        return replace(
            self,
            image_ids=tuple(self.image_ids[number] for number in kept),
            annotations=tuple(self.annotations[number] for number in kept),
        )


def read_coco(root: str | Path, split: str, masks: bool = True) -> CocoSplit:
    """The `train` or `val` split of the COCO folder `root`.

    For training, crowds, degenerate boxes and, where `masks` are to be found, objects without a mask are left out, and
    images of which nothing remains; for validation every image stays. Objects whose mask encloses nothing are left out
    of both, with a warning.

    Raises:
        DataError: the folder or the file is missing, the file is not JSON, not COCO's, or contradicts itself; nothing
            is left to train on, or nothing is there to find.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    folder, source = root / SPLITS[split], root / "annotations" / f"instances_{SPLITS[split]}.json"
    for place, exists in ((root, root.is_dir()), (source, source.is_file()), (folder, folder.is_dir())):
        if not exists:
            raise DataError(f"{KEY}: {place} does not exist. {LAYOUT}")
    contents, broken = read_annotation_file(source)
    find_files(contents["images"], folder)
    api = make_api(contents)
    if split == "train":
        return _to_train(folder, source, api, broken, masks)
    if not any(not annotation["iscrowd"] for annotation in api.anns.values()):
        raise DataError(f"{KEY}: {source} holds no object, so there is nothing to measure detections against")
    image_ids = tuple(api.imgs)
    return CocoSplit(folder, source, api, image_ids, ((),) * len(image_ids), Dropped(broken_masks=broken), masks=masks)


def read_annotation_file(source: Path) -> tuple[dict[str, Any], int]:
    """The contents of an annotation file in COCO's form, checked, and how many objects with broken masks it had.

    Raises:
        DataError: not JSON, not COCO's, or it contradicts itself; names the first entries that do.
    """
    try:
        contents = json.loads(source.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} is not a JSON file ({error}). Expected COCO's instances_*.json") from error
    check_lists(contents, source)
    bring_to_cocos_form(contents)
    check_images_and_categories(contents, source)
    broken = leave_out_broken_masks(contents)
    if broken:
        log.warning("%s: left out %s objects whose masks are broken: %s", source, f"{len(broken):,}", some(broken))
    fill_in_boxes(contents)
    check_annotations(contents, source)
    return contents, len(broken)


def make_api(contents: dict[str, Any]) -> COCO:
    """A COCO of checked contents; what COCO's rules need and files leave out is filled in."""
    _number(contents["annotations"])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        api = COCO()
        api.dataset = contents
        api.createIndex()
    for annotation in contents["annotations"]:
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = _area(api, annotation)
    return api


def _number(annotations: list[dict[str, Any]]) -> None:
    """Give annotations numbers from 1 where theirs cannot serve: COCO's evaluation reads 0 as "no match"."""
    ids = [annotation.get("id") for annotation in annotations]
    if all(is_whole(number) and 0 < number < LIMIT for number in ids) and len(set(ids)) == len(ids):
        return
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number


def _area(api: COCO, annotation: Mapping[str, Any]) -> float:
    if has_mask(annotation):
        return float(mask_codec.area(api.annToRLE(annotation)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation comes with a mask."""
    return bool(annotation.get("segmentation"))


def require_masks(split: CocoSplit) -> None:
    """Raises DataError where objects have no mask to measure masks against: COCO's figures need one of each."""
    without = [annotation for annotation in split.api.dataset["annotations"] if not has_mask(annotation)]
    if without:
        listing = some(f"id {annotation['id']}" for annotation in without)
        raise DataError(
            f"{KEY}: {len(without):,} objects in {split.source} have no mask (segmentation): {listing}. Masks that are "
            "found cannot be measured without. Add them, leave these objects out, or use a network that finds boxes "
            "alone"
        )


def box_in_image(annotation: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """The annotation's box (left, top, right, bottom) in pixels, cut to the image."""
    x, y, w, h = (float(value) for value in annotation["bbox"])
    return max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))


def _to_train(folder: Path, source: Path, api: COCO, broken: int, masks: bool) -> CocoSplit:
    counts = {"crowds": 0, "degenerate_boxes": 0, "without_mask": 0, "images_without_annotations": 0}
    image_ids, kept = [], []
    for image_id, image in api.imgs.items():
        usable = []
        for annotation in api.imgToAnns.get(image_id, []):
            reason = _unusable(annotation, image["width"], image["height"], masks)
            if reason:
                counts[reason] += 1
            else:
                usable.append(annotation)
        if usable:
            image_ids.append(image_id)
            kept.append(tuple(usable))
        else:
            counts["images_without_annotations"] += 1
    dropped = Dropped(**counts, broken_masks=broken)
    if not image_ids:
        raise DataError(f"{KEY}: {source} leaves nothing to train on; left out were {dropped}")
    return CocoSplit(folder, source, api, tuple(image_ids), tuple(kept), dropped, masks=masks)


def _unusable(annotation: Mapping[str, Any], width: int, height: int, masks: bool) -> str | None:
    """Why training leaves an object out; None: it does not."""
    if annotation["iscrowd"]:
        return "crowds"
    left, top, right, bottom = box_in_image(annotation, width, height)
    if right - left < THINNEST or bottom - top < THINNEST:
        return "degenerate_boxes"
    return None if has_mask(annotation) or not masks else "without_mask"


def check_same_categories(train: CocoSplit, validation: CocoSplit) -> None:
    """Raises DataError where a category id has another name in the other split."""
    ours, theirs = train.names, validation.names
    other = [
        f"{number}: {ours[number]!r} and {theirs[number]!r}"
        for number in ours
        if number in theirs and ours[number] != theirs[number]
    ]
    if other:
        raise DataError(f"{KEY}: the two splits give the same category ids to different things: {some(other)}")

"""Detections in COCO's result form: collected image by image with compact masks, written to and read from JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from torch import Tensor

from ...common.errors import DataError
from ...common.paths import write_atomically
from ..images import some
from .masks import check_rle, encode_masks

Row = dict[str, Any]
"""One detection: image_id, category_id, bbox [x, y, width, height], score and, with a mask, segmentation {size,
counts}."""

MASK_THRESHOLD = 0.5
"""A pixel more probable than this belongs to the object (the threshold of torchvision and of COCO's baselines)."""
FORM = (
    "Expected COCO's result form: a list of {image_id, category_id, score, bbox [x, y, width, height], segmentation "
    "{size, counts}}"
)


class Detections:
    """What a network found. Only run lengths of the masks are kept: some hundred bytes each.

    The rows are kept as text in one growing buffer. As objects of their own they would lie between the large tensors
    that come and go with every image, and the allocator could not use the place of those again: gigabytes more,
    measured by benchmarks/coco_memory.py.
    """

    def __init__(self, outputs: Mapping[int, int] | None = None) -> None:
        """None yet.

        Args:
            outputs: category id -> output of the network's head; None: the ids are the outputs.
        """
        self._categories = None if outputs is None else {output: number for number, output in outputs.items()}
        self._text = bytearray()
        self._places: dict[int, list[tuple[int, int]]] = {}  # of an image's rows in it, each place a JSON list

    def add(self, image_id: int, output: Mapping[str, Tensor]) -> None:
        """Keep the detections in one image, less those of outputs that stand for no category.

        Such outputs are those of a head with room to spare, and output 0 of SSD's relatives without a background.

        Args:
            image_id: COCO's id of the image.
            output: as torchvision's networks give it: `boxes` (N, 4) left, top, right, bottom in pixels, `scores` (N,),
                `labels` (N,) outputs of the head and, from those that find masks, `masks` (N, 1, H, W) probabilities.
        """
        output = self._known(output)
        boxes = output["boxes"].detach().cpu().double()
        sizes = boxes[:, 2:] - boxes[:, :2]
        rows: list[Row] = [
            {
                "image_id": image_id,
                "category_id": label if self._categories is None else self._categories[label],
                "bbox": [*corner, *size],
                "score": score,
            }
            for label, corner, size, score in zip(
                output["labels"].tolist(), boxes[:, :2].tolist(), sizes.tolist(), output["scores"].tolist(), strict=True
            )
        ]
        if "masks" in output:
            masks = output["masks"].detach()[:, 0] > MASK_THRESHOLD
            size = list(masks.shape[-2:])
            for row, counts in zip(rows, encode_masks(masks), strict=True):
                row["segmentation"] = {"size": size, "counts": counts}
        self.merge(rows)

    def _known(self, output: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The detections of which the category is known."""
        if self._categories is None:
            return output
        known = [place for place, label in enumerate(output["labels"].tolist()) if label in self._categories]
        if len(known) == len(output["labels"]):
            return output
        return {name: output[name][known] for name in ("boxes", "labels", "scores", "masks") if name in output}

    def rows(self) -> list[Row]:
        """All detections, image by image in the order of the ids."""
        places = (place for image_id in sorted(self._places) for place in self._places[image_id])
        return [row for start, end in places for row in json.loads(self._text[start:end])]

    def merge(self, rows: Iterable[Row]) -> None:
        """Keep the rows that other processes found, too."""
        for image_id, together in groupby(rows, key=itemgetter("image_id")):
            start = len(self._text)
            self._text += json.dumps(list(together)).encode()
            self._places.setdefault(image_id, []).append((start, len(self._text)))


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` as JSON that pycocotools and other evaluators read; the file appears whole or not at all.

    Raises:
        RunError: it cannot be written.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            separator = "["
            for row in rows:
                file.write(separator + json.dumps(row, allow_nan=False))
                separator = ",\n"
            file.write("]\n" if separator != "[" else "[]\n")

    write_atomically(Path(path), write)


def read_results(path: str | Path, api: COCO) -> list[Row]:
    """The detections of a result file, as `Detections.rows` gives them: all with boxes, all or none with masks.

    Args:
        path: of the JSON file.
        api: the annotations of the images that the detections are in.

    Raises:
        DataError: not JSON, or a row is not in COCO's result form, or is for an image, a category or a size that `api`
            does not have.
    """
    try:
        contents = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. {FORM}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file ({error}). {FORM}") from error
    if not isinstance(contents, list):
        raise DataError(f"{path} does not hold a list of detections. {FORM}")
    strangers = list(_strangers(contents, api))
    if strangers:
        raise DataError(
            f"{path}: {len(strangers):,} of its {len(contents):,} detections are in images that the annotations do not "
            "have: "
            f"{some(f'image_id {stranger!r}' for stranger in strangers)}. These are results for other images."
        )
    problems = [
        f"detection {number:,}: {problem}"
        for number, row in enumerate(contents)
        if (problem := _take(row, api)) is not None
    ]
    if problems:
        raise DataError(
            f"{path}: {len(problems):,} of its {len(contents):,} detections cannot be used:\n  "
            f"{some(problems, chr(10) + '  ')}\n{FORM}"
        )
    _require_alike(path, contents)
    return contents


def _strangers(contents: Sequence[object], api: COCO) -> Iterator[object]:
    for row in contents:
        if (
            isinstance(row, dict)
            and "image_id" in row
            and not (_is_id(row["image_id"]) and row["image_id"] in api.imgs)
        ):
            yield row["image_id"]


def _take(row: object, api: COCO) -> str | None:
    """What is wrong with a row whose image is known; a good one's mask is brought to the compressed form, and gives the
    box if there is none."""
    if not isinstance(row, dict):
        return "not a map"
    missing = [key for key in ("image_id", "category_id", "score") if key not in row]
    if not {"bbox", "segmentation"} & row.keys():
        missing.append("bbox or segmentation")
    if missing:
        return f"{', '.join(missing)} missing"
    if not _is_id(row["category_id"]) or row["category_id"] not in api.cats:
        return f"category_id {row['category_id']!r} is not among the annotations' categories"
    if not _is_number(row["score"]):
        return f"score {row['score']!r} is not a number"
    box = row.get("bbox", [0, 0, 0, 0])
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        return f"bbox {box!r} is not [x, y, width, height] in pixels"
    if "segmentation" in row:
        image = api.imgs[row["image_id"]]
        try:
            counts = check_rle(row["segmentation"], image["height"], image["width"])
        except ValueError as error:
            return str(error)
        row["segmentation"] = {"size": [image["height"], image["width"]], "counts": counts}
        row.setdefault("bbox", mask_codec.toBbox(row["segmentation"]).tolist())
    return None


def _require_alike(path: str | Path, rows: Sequence[Row]) -> None:
    """Average precision of masks that some detections have and others do not would mean nothing."""
    having = sum("segmentation" in row for row in rows)
    if 0 < having < len(rows):
        raise DataError(
            f"{path}: {having:,} of its {len(rows):,} detections have a segmentation and the others have none. {FORM}"
        )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

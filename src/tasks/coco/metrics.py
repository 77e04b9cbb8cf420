"""COCO's average precision and recall of boxes and masks, as pycocotools counts them.

https://cocodataset.org/#detection-eval: over ten IoU thresholds from 0.50 to 0.95, by size of the object, and with at
most 1, 10 and 100 detections per image. Detections in a crowd region are not counted as false.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .backends import BACKENDS
from .results import Detections, Row, read_results, write_results

__all__ = ["CocoFigures", "Detections", "Row", "coco_figures", "read_results", "write_results"]

Kind = Literal["bbox", "segm"]

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve figures in COCO's order; s, m, l: objects below 32 x 32 pixels, below 96 x 96, and larger."""
WORDS = {"bbox": "box", "segm": "mask"}


def pycocotools_evaluator() -> type[Any]:
    """pycocotools' own evaluator class."""
    found: type[Any] = COCOeval
    return found


@dataclass(frozen=True)
class CocoFigures:
    """How well detections fit.

    Attributes:
        kind: `bbox` or `segm`.
        stats: COCO's twelve figures by name, in percent; nan where there is no such object, or for masks of detections
            that have none.
        per_category: AP in percent by the category's name; empty if not asked for.
    """

    kind: Kind
    stats: Mapping[str, float]
    per_category: Mapping[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The figures in words, for people."""
        word = WORDS[self.kind]
        value = {name: _percent(figure) for name, figure in self.stats.items()}
        lines = [
            f"{word} AP {value['AP']} (AP50 {value['AP50']}, AP75 {value['AP75']}; "
            f"small {value['APs']}, medium {value['APm']}, large {value['APl']})",
            f"{word} AR {value['AR100']} (with 1 detection per image {value['AR1']}, with 10 {value['AR10']}; "
            f"small {value['ARs']}, medium {value['ARm']}, large {value['ARl']})",
        ]
        width = max(map(len, self.per_category), default=0)
        return lines + [
            f"  {word} AP {name.ljust(width)} {_percent(figure)}" for name, figure in self.per_category.items()
        ]


def coco_figures(
    api: COCO,
    rows: Sequence[Row],
    kind: Kind,
    image_ids: Sequence[int],
    *,
    backend: str = "pycocotools",
    per_category: bool = False,
) -> CocoFigures:
    """Compare detections with the annotations of `image_ids`.

    The size of a detection, which decides where a false one counts by size, is that of its box for boxes and of its
    mask for masks.

    Args:
        api: the annotations; not changed.
        rows: detections, possibly none; those in other images do not count.
        kind: `bbox` compares boxes, `segm` masks.
        image_ids: the images that were searched.
        backend: `pycocotools`, or `faster` (faster-coco-eval, the same figures).
        per_category: give the AP of each category too.

    Raises:
        SettingsError: the backend is unknown or not installed.
    """
    BACKENDS.entry(backend)
    if kind == "segm" and not all("segmentation" in row for row in rows):
        return CocoFigures(kind, dict.fromkeys(STATS, math.nan))
    evaluator = BACKENDS[backend]()
    searched = set(image_ids)
    objects = _by_category(
        annotation for image_id in sorted(searched) for annotation in api.imgToAnns.get(image_id, [])
    )
    found = _by_category(row for row in rows if row["image_id"] in searched)
    categories = sorted(api.cats)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
        parts = [
            _one_category(evaluator, api, number, objects.get(number, []), found.get(number, []), kind)
            for number in categories
        ]
        evaluation = evaluator(iouType=kind)
        evaluation.eval = {
            "precision": np.concatenate(
                [precision for precision, _ in parts], axis=2
            ),  # (thresholds, recalls, categories, sizes, detections)
            "recall": np.concatenate(
                [recall for _, recall in parts], axis=1
            ),  # (thresholds, categories, sizes, detections)
        }
        evaluation.summarize()
    stats = {name: _value(figure) for name, figure in zip(STATS, evaluation.stats[: len(STATS)], strict=True)}
    return CocoFigures(
        kind, stats, _per_category(api, categories, evaluation.eval["precision"]) if per_category else {}
    )


def _by_category(entries: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for entry in entries:
        found.setdefault(entry["category_id"], []).append(entry)
    return found


def _one_category(
    evaluator: Any, api: COCO, category_id: int, objects: Sequence[Row], rows: Sequence[Row], kind: Kind
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (thresholds, recalls, 1, sizes, detections) and recall (thresholds, 1, sizes, detections) of a
    category.

    pycocotools keeps several arrays for every image, category and size at once: gigabytes for COCO's 5,000 images.
    Categories do not depend on each other, so one at a time gives the same figures; an image without the category adds
    nothing to them.
    """
    image_ids = sorted({entry["image_id"] for entry in (*objects, *rows)}) or sorted(api.imgs)[:1]
    truth = [dict(annotation) for annotation in objects]  # copies, which an evaluator may write into
    evaluation = evaluator(
        _make_api(api, category_id, image_ids, truth),
        _make_api(api, category_id, image_ids, _detected(rows, kind)),
        kind,
    )
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _detected(rows: Sequence[Row], kind: Kind) -> list[Row]:
    """What pycocotools' loadRes makes of `rows`, also where there are none, and without copying the masks.

    loadRes takes the area of the box for that of a mask wherever there is a box; COCO's definition, and other
    evaluators, take the mask's.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        annotation = {"id": number, "iscrowd": 0, **{key: row[key] for key in ("image_id", "category_id", "score")}}
        if kind == "bbox":
            annotation |= {"bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3]}
        else:
            annotation |= {"segmentation": row["segmentation"], "area": int(mask_codec.area(row["segmentation"]))}
        found.append(annotation)
    return found


def _make_api(api: COCO, category_id: int, image_ids: Sequence[int], annotations: list[Row]) -> COCO:
    made = COCO()
    images = [api.imgs[image_id] for image_id in image_ids]
    made.dataset = {"images": images, "categories": [api.cats[category_id]], "annotations": annotations}
    made.createIndex()
    return made


def _per_category(api: COCO, categories: Sequence[int], precision: np.ndarray) -> dict[str, float]:
    names = {number: str(api.cats[number]["name"]) for number in categories}
    times = Counter(names.values())
    found = {}
    for place, number in enumerate(categories):
        values = precision[:, :, place, 0, -1]  # all sizes, up to 100 detections
        values = values[values > -1]
        name = names[number] if times[names[number]] == 1 else f"{names[number]} ({number})"
        found[name] = 100 * float(np.mean(values)) if len(values) else math.nan
    return found


def _value(figure: float) -> float:
    """Percent; COCO says -1 where there is nothing to find."""
    return math.nan if figure < 0 else 100 * float(figure)


def _percent(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{figure:.1f}"

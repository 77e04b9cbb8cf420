"""COCO's average precision and recall of boxes and masks, as pycocotools counts them.

https://cocodataset.org/#detection-eval: over ten IoU thresholds from 0.50 to 0.95, by size of the object, and with at most 1, 10
and 100 detections per image. Detections in a crowd region are not counted as false.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import SettingsError
from . import faster_coco
from .coco_results import Detections, Row, read_results, write_results

__all__ = ["BACKENDS", "CocoFigures", "Detections", "Row", "coco_figures", "read_results", "write_results"]

Kind = Literal["bbox", "segm"]

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve figures in COCO's order; s, m, l: objects below 32 x 32 pixels, below 96 x 96, and larger."""
WORDS = {"bbox": "box", "segm": "mask"}

BACKENDS: dict[str, Callable[[], Any]] = {"pycocotools": lambda: COCOeval, "faster": faster_coco.evaluator}
"""Name -> class with pycocotools' interface."""


@dataclass(frozen=True)
class CocoFigures:
    """How well detections fit.

    Attributes:
        kind: `bbox` or `segm`.
        stats: COCO's twelve figures by name, in percent; nan where there is no such object.
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
        return lines + [f"  {word} AP {name.ljust(width)} {_percent(figure)}" for name, figure in self.per_category.items()]


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

    The size of a detection, which decides where a false one counts by size, is that of its box for boxes and of its mask for masks.

    Args:
        api: the annotations; not changed.
        rows: detections, possibly none; those in other images do not count.
        kind: `bbox` compares boxes, `segm` masks.
        image_ids: the images that were looked at.
        backend: `pycocotools`, or `faster` (faster-coco-eval, the same figures).
        per_category: give the AP of each category too.

    Raises:
        SettingsError: the backend is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise SettingsError(f"the evaluator {backend!r} is not known; there are {', '.join(BACKENDS)}")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
        evaluation = BACKENDS[backend]()(_truth(api, image_ids), _detected(api, rows, kind, image_ids), kind)
        evaluation.params.imgIds = sorted(set(image_ids))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {name: _value(figure) for name, figure in zip(STATS, evaluation.stats[: len(STATS)], strict=True)}
    return CocoFigures(kind, stats, _per_category(api, evaluation) if per_category else {})


def _truth(api: COCO, image_ids: Sequence[int]) -> COCO:
    """The annotations of these images in copies, which an evaluator may write into."""
    return _make_api(api, image_ids, [dict(annotation) for image_id in image_ids for annotation in api.imgToAnns.get(image_id, [])])


def _detected(api: COCO, rows: Sequence[Row], kind: Kind, image_ids: Sequence[int]) -> COCO:
    """What pycocotools' loadRes makes of `rows`, also where there are none, and without copying the masks.

    loadRes takes the area of the box for that of a mask wherever there is a box; COCO's definition, and other evaluators, take the mask's.
    """
    wanted = set(image_ids)
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate((row for row in rows if row["image_id"] in wanted), start=1):
        annotation = {"id": number, "iscrowd": 0, **{key: row[key] for key in ("image_id", "category_id", "score")}}
        if kind == "bbox":
            annotation |= {"bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3]}
        else:
            annotation |= {"segmentation": row["segmentation"], "area": int(mask_codec.area(row["segmentation"]))}
        annotations.append(annotation)
    return _make_api(api, image_ids, annotations)


def _make_api(api: COCO, image_ids: Sequence[int], annotations: list[dict[str, Any]]) -> COCO:
    made = COCO()
    images = [api.imgs[image_id] for image_id in image_ids]
    made.dataset = {"images": images, "categories": api.dataset["categories"], "annotations": annotations}
    made.createIndex()
    return made


def _per_category(api: COCO, evaluation: Any) -> dict[str, float]:
    precision = evaluation.eval["precision"]  # (thresholds, recalls, categories, sizes, numbers of detections)
    names = Counter(str(api.cats[number]["name"]) for number in evaluation.params.catIds)
    found = {}
    for place, number in enumerate(evaluation.params.catIds):
        name = str(api.cats[number]["name"])
        values = precision[:, :, place, 0, -1]
        values = values[values > -1]
        found[name if names[name] == 1 else f"{name} ({number})"] = 100 * float(np.mean(values)) if len(values) else math.nan
    return found


def _value(figure: float) -> float:
    """Percent; COCO says -1 where there is nothing to find."""
    return math.nan if figure < 0 else 100 * float(figure)


def _percent(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{figure:.1f}"

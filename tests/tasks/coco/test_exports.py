"""What labelling tools export in other forms than COCO's: the same data as in COCO's form, or one object less."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.tasks.coco.data import Dropped, read_coco
from src.tasks.coco.image_checks import require_images
from src.tasks.coco.loading import CocoDataset
from src.tasks.loading import Unreadable
from tests.support.coco import contents, entry, rectangle, write

Lists = dict[str, list[dict[str, Any]]]


def plain() -> Lists:
    """Two images of three objects."""
    return contents(
        [entry(1, 40, 30), entry(2, 30, 50)],
        [
            rectangle(1, 1, 1, [2, 3, 10, 12]),
            rectangle(2, 1, 4, [20, 4, 8, 20]),
            rectangle(3, 2, 2, [5, 6, 20, 30]),
        ],
    )


def runs(annotation: dict[str, Any], height: int, width: int) -> None:
    """Give an object's rectangle as run lengths instead of a polygon."""
    x, y, w, h = annotation["bbox"]
    between = [x * height + y, *[h, height - h] * (w - 1), h]
    annotation["segmentation"] = {"size": [height, width], "counts": [*between, height * width - sum(between)]}


def floats(lists: Lists, *keys: str) -> None:
    for entries in lists.values():
        for one in entries:
            one.update({key: float(one[key]) for key in keys if key in one})


def every(annotations: list[dict[str, Any]], **values: Any) -> None:
    for annotation in annotations:
        annotation.update(copy.deepcopy(values))


def without(annotations: list[dict[str, Any]], *keys: str) -> None:
    for annotation in annotations:
        for key in keys:
            del annotation[key]


def float_runs(lists: Lists) -> None:
    runs(lists["annotations"][0], 30, 40)
    mask = lists["annotations"][0]["segmentation"]
    mask["size"], mask["counts"] = [30.0, 40.0], [float(count) for count in mask["counts"]]


def flat(lists: Lists) -> None:
    for annotation in lists["annotations"]:
        (annotation["segmentation"],) = annotation["segmentation"]


ALIKE: dict[str, Callable[[Lists], Any]] = {
    "ids and sizes are floats": lambda lists: floats(lists, "id", "image_id", "category_id", "width", "height"),
    "flags are floats": lambda lists: floats(lists, "iscrowd"),
    "flags are False": lambda lists: every(lists["annotations"], iscrowd=False),
    "flags and areas are null": lambda lists: every(lists["annotations"], iscrowd=None, area=None),
    "flags, areas and numbers are missing": lambda lists: without(lists["annotations"], "iscrowd", "area", "id"),
    "numbers stand there twice": lambda lists: every(lists["annotations"], id=7),
    "numbers have more than 64 bits": lambda lists: lists["annotations"][0].update(id=10**400),
    "run lengths are floats": float_runs,
    "polygons have no list around them": flat,
    "boxes are missing": lambda lists: without(lists["annotations"], "bbox"),
    "boxes are null": lambda lists: every(lists["annotations"], bbox=None),
    "a mask has a second polygon of two points": lambda lists: lists["annotations"][0]["segmentation"].append(
        [3, 4, 9, 9]
    ),
    "a mask has an empty polygon": lambda lists: lists["annotations"][0]["segmentation"].append([]),
}


def items(root: Path) -> list[Any]:
    """The training images and all that is known of them."""
    split, bad = require_images(read_coco(root, "train"), "full", show=False)
    assert bad == []
    found = [CocoDataset(split, 0, flip=False)[1, number] for number in range(len(split))]
    assert not any(isinstance(item, Unreadable) for item in found)
    return [
        (item.image_id, item.image.tolist(), {name: value.tolist() for name, value in item.target.items()})
        for item in found
    ]


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE.keys())
def test_other_forms_mean_the_same(tmp_path: Path, change: Callable[[Lists], Any]) -> None:
    write(tmp_path, "train", plain())
    expected, areas = items(tmp_path), [a["area"] for a in read_coco(tmp_path, "train").api.anns.values()]
    changed = plain()
    change(changed)
    write(tmp_path, "train", changed, pictures=False)
    assert items(tmp_path) == expected
    split = read_coco(tmp_path, "train")
    assert split.dropped == Dropped()
    assert [annotation["area"] for annotation in split.api.anns.values()] == areas
    assert all(annotation["iscrowd"] == 0 for annotation in split.api.anns.values())


@pytest.mark.parametrize("mask", [[[]], [[5, 5, 9, 9]], [[5, 5, 9, 9], []], [[5, 5, 9, 5, 9, 9, 5]], [[1]]])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_object_whose_mask_is_broken_is_left_out_and_counted(
    tmp_path: Path, split: str, mask: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    lists = plain()
    lists["annotations"].append(rectangle(90, 2, 1, [5, 5, 4, 4], segmentation=mask))
    source = write(tmp_path, split, lists)
    found = read_coco(tmp_path, split)
    assert sorted(found.api.anns) == [1, 2, 3]
    assert found.dropped == Dropped(broken_masks=1)
    assert "1 with a broken mask" in str(found.dropped)
    assert f"{source}: left out 1 objects whose masks are broken: annotations[3] (id 90)" in caplog.text


def test_files_are_found_under_other_spellings_of_their_names(tmp_path: Path) -> None:
    lists = plain()
    write(tmp_path, "train", lists)
    folder = tmp_path / "train2017"
    names = [image["file_name"] for image in lists["images"]]
    (folder / "a b").mkdir()
    moved = [(folder / name).rename(folder / "a b" / name) for name in names]
    spellings = [
        "a b/{}", "a b\\{}", "a%20b/{}", "train2017/a b/{}", "train2017\\a b\\{}", ".\\a b\\{}", "a%20b%5C{}",
    ]  # fmt: skip
    for spelling in spellings:
        for image, name in zip(lists["images"], names, strict=True):
            image["file_name"] = spelling.format(name)
        write(tmp_path, "train", lists, pictures=False)
        assert [Path(path) for path in read_coco(tmp_path, "train").paths] == moved, spelling


def test_a_name_that_is_there_is_not_read_in_another_way(tmp_path: Path) -> None:
    lists = plain()
    write(tmp_path, "train", lists)
    folder = tmp_path / "train2017"
    (folder / "000002.png").rename(folder / "%61.png")
    (folder / "a.png").write_bytes((folder / "000001.png").read_bytes())
    lists["images"][1]["file_name"] = "%61.png"
    write(tmp_path, "train", lists, pictures=False)
    assert Path(read_coco(tmp_path, "train").path(2)).name == "%61.png"


def test_what_is_in_an_annotation_file_of_floats_is_written_as_whole_numbers(tmp_path: Path) -> None:
    lists = plain()
    write(tmp_path, "train", lists)
    floats(lists, "id", "image_id", "category_id")
    write(tmp_path, "train", lists, pictures=False)
    split = read_coco(tmp_path, "train")
    assert json.dumps(split.image_ids) == "[1, 2]"
    assert json.dumps(sorted(split.names)) == "[1, 2, 4]"

"""COCO's data: what training leaves out and evaluation keeps, the form of targets, batches, and what bad files get."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO

from src.common.errors import DataError
from src.tasks.coco.checks import decoded_counts
from src.tasks.coco.classes import outputs_of, with_outputs
from src.tasks.coco.data import (
    Dropped,
    check_same_categories,
    make_api,
    read_annotation_file,
    read_coco,
)
from src.tasks.coco.image_checks import require_images
from src.tasks.coco.loading import (
    CocoDataset,
    DetectionItem,
    EpochBatches,
    collate_detection,
    flipped,
    ratio_groups,
    target_of,
)
from src.tasks.loading import EpochOrder, Unreadable
from tests.support.coco import contents, crowd, entry, rectangle, small_coco, write


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


# --- reading ---


def test_training_leaves_out_crowds_and_degenerate_boxes_and_evaluation_nothing(coco: Path) -> None:
    train, validation = read_coco(coco, "train"), read_coco(coco, "val")
    assert train.image_ids == (1, 2, 3, 4)
    assert [len(objects) for objects in train.annotations] == [2, 2, 2, 2]
    assert train.dropped == Dropped(crowds=1, degenerate_boxes=1)
    assert "1 crowds, 1 degenerate boxes" in str(train.dropped)
    assert validation.image_ids == (1, 2, 3)  # 3 has no object
    assert len(validation.api.anns) == 6
    assert sum(annotation["iscrowd"] for annotation in validation.api.anns.values()) == 1
    assert train.names == {1: "square", 2: "disc", 4: "bar"}


def test_every_reason_to_leave_something_out_is_counted(tmp_path: Path) -> None:
    objects = [
        rectangle(1, 1, 1, [2, 2, 10, 10]),
        rectangle(2, 1, 1, [2, 2, 10, 0]),
        rectangle(3, 1, 1, [2, 2, -4, 9], segmentation=[[0, 0, 5, 0, 5, 5]]),
        rectangle(4, 1, 1, [90, 2, 10, 10], segmentation=[[0, 0, 5, 0, 5, 5]]),  # wholly beyond the image
        rectangle(5, 2, 1, [2, 2, 10, 10], segmentation=[]),
        rectangle(6, 3, 1, [2, 2, 0, 0]),
    ]
    write(tmp_path, "train", contents([entry(number, 40, 30) for number in (1, 2, 3, 4)], objects))
    split = read_coco(tmp_path, "train")
    assert split.image_ids == (1,)
    assert split.dropped == Dropped(0, degenerate_boxes=4, without_mask=1, images_without_annotations=3)


def test_a_folder_reads_as_pycocotools_does(many_coco: Path) -> None:
    for name in ("train", "val"):
        split = read_coco(many_coco, name)
        theirs = COCO(str(split.source))
        assert set(split.api.imgs) == set(theirs.imgs)
        assert split.api.anns == theirs.anns
        kept, bad = require_images(split, "full", show=False)
        assert (len(kept), bad) == (len(split), [])
        assert with_outputs(split, outputs_of(split.names, 91), 91).label_names() == split.names
        if name == "train":
            plain = [annotation for annotation in theirs.anns.values() if not annotation["iscrowd"]]
            assert sum(map(len, split.annotations)) == len(plain)
            empty = [number for number in theirs.imgs if all(a["iscrowd"] for a in theirs.imgToAnns[number])]
            crowds = sum(annotation["iscrowd"] for annotation in theirs.anns.values())
            assert split.dropped == Dropped(crowds=crowds, images_without_annotations=len(empty))
            assert crowds > 0
            assert empty
            for number in (0, 7):
                target = target_of(split, number)
                for box, mask in zip(target["boxes"], target["masks"], strict=True):
                    rows, columns = mask.nonzero(as_tuple=True)
                    left, top, right, bottom = box.tolist()
                    # COCO's boxes are those of the polygons; a pixel counts if its middle is inside
                    assert abs(left - float(columns.min())) <= 1.5
                    assert abs(right - float(columns.max() + 1)) <= 1.5
                    assert abs(top - float(rows.min())) <= 1.5
                    assert abs(bottom - float(rows.max() + 1)) <= 1.5
        else:
            assert len(split) == len(theirs.imgs)
    check_same_categories(read_coco(many_coco, "train"), read_coco(many_coco, "val"))


def test_numbers_that_cocos_evaluation_cannot_use_are_replaced_and_areas_filled_in(tmp_path: Path) -> None:
    objects = [rectangle(0, 1, 1, [2, 2, 10, 10]), rectangle(0, 1, 2, [2, 2, 6, 5])]
    for annotation in objects:
        del annotation["area"], annotation["iscrowd"]
    del objects[1]["segmentation"]
    source = write(tmp_path, "val", contents([entry(1, 40, 30)], objects))
    api = make_api(read_annotation_file(source)[0])
    assert sorted(api.anns) == [1, 2]
    assert [(annotation["area"], annotation["iscrowd"]) for annotation in api.anns.values()] == [(100.0, 0), (30.0, 0)]


# --- targets ---


def test_targets_have_torchvisions_form(coco: Path) -> None:
    split = read_coco(coco, "train")
    target = target_of(split, 0)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[8, 8, 32, 28], [30, 30, 60, 54]]
    assert (target["labels"].dtype, target["labels"].tolist()) == (torch.int64, [1, 4])
    assert (target["masks"].dtype, tuple(target["masks"].shape)) == (torch.uint8, (2, 64, 96))
    assert target["masks"].flatten(1).sum(1).tolist() == [24 * 20, 30 * 24]
    assert target["masks"][0, 8:28, 8:32].all()
    assert target["image_id"].tolist() == [1]
    empty = target_of(read_coco(coco, "val"), 2)
    assert (empty["boxes"].shape, empty["masks"].shape, empty["labels"].shape) == ((0, 4), (0, 64, 96), (0,))


def test_a_box_that_overshoots_is_cut_to_the_image(tmp_path: Path) -> None:
    write(tmp_path, "train", contents([entry(1, 40, 30)], [rectangle(1, 1, 1, [-1, 20, 42, 11])]))
    assert target_of(read_coco(tmp_path, "train"), 0)["boxes"].tolist() == [[0, 20, 40, 30]]


def test_a_flip_mirrors_image_boxes_and_masks_together(coco: Path) -> None:
    split = read_coco(coco, "train")
    item = CocoDataset(split, 0, flip=False)[1, 0]
    assert isinstance(item, DetectionItem)
    image, target = flipped(item.image, item.target)
    assert torch.equal(image, item.image.flip(2))
    assert target["boxes"].tolist() == [[96 - 32, 8, 96 - 8, 28], [36, 30, 66, 54]]
    for box, mask in zip(target["boxes"].to(torch.int64), target["masks"], strict=True):
        left, top, right, bottom = box.tolist()
        assert mask[top:bottom, left:right].all()
        assert int(mask.sum()) == (right - left) * (bottom - top)
    twice = flipped(image, target)
    assert torch.equal(twice[0], item.image)
    assert all(torch.equal(twice[1][name], item.target[name]) for name in item.target)


def same(one: DetectionItem, other: DetectionItem) -> bool:
    pairs = [(one.image, other.image), *((one.target[name], other.target[name]) for name in one.target)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_half_of_the_items_are_flipped_anew_in_each_epoch_and_always_alike(coco: Path) -> None:
    split = read_coco(coco, "train")
    plain, dataset, again, other = (
        CocoDataset(split, seed, flip) for seed, flip in ((0, False), (0, True), (0, True), (1, True))
    )
    flips = []
    for epoch in range(40):
        assert same(plain[epoch, 0], plain[0, 0])
        assert same(dataset[epoch, 0], again[epoch, 0])
        flips.append(not same(dataset[epoch, 0], plain[0, 0]))
    assert 10 <= sum(flips) <= 30
    assert flips != [not same(other[epoch, 0], plain[0, 0]) for epoch in range(40)]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16"])
def test_images_of_every_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    what = contents([{**entry(1, 40, 30), "file_name": "1.tif"}], [rectangle(1, 1, 1, [2, 2, 10, 10])])
    write(tmp_path, "train", what, pictures=False)
    if mode == "I;16":
        picture = Image.fromarray(np.full((30, 40), 25700, dtype=np.uint16))
    else:
        picture = Image.new("RGB", (40, 30), (100, 100, 100)).convert(mode)
    picture.save(tmp_path / "train2017" / "1.tif")
    split, bad = require_images(read_coco(tmp_path, "train"), "full", show=False)
    assert bad == []
    item = CocoDataset(split, 0, flip=False)[1, 0]
    assert isinstance(item, DetectionItem)
    assert item.image.shape == (3, 30, 40)
    assert item.image.mean() == pytest.approx(100 / 255, abs=0.02)


def test_an_image_that_breaks_later_is_reported_beside_the_others(tmp_path: Path) -> None:
    split = read_coco(small_coco(tmp_path), "train")
    Path(split.path(2)).write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(split.path(3))
    batch = collate_detection([CocoDataset(split, 0, flip=False)[1, number] for number in range(4)])
    assert batch.image_ids == (1, 4)
    assert [Path(item.path).name for item in batch.unreadable] == ["000002.png", "000003.png"]
    assert "5x5 pixels, but the annotations say 96x64" in batch.unreadable[1].reason
    nothing = collate_detection([Unreadable("a", "b")])
    assert len(nothing) == 0


# --- batches ---

SIZES = st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), min_size=1, max_size=40)


def orders(n: int, epoch: int, rank: int = 0, world: int = 1, shuffle: bool = True) -> EpochOrder:
    order = EpochOrder(n, shuffle, 3, rank, world, n // world if world > 1 else None)
    order.set_epoch(epoch)
    return order


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.integers(1, 7), st.integers(1, 5))
def test_every_image_is_in_one_batch_and_there_are_as_many_as_without_groups(
    sizes: list[tuple[int, int]], batch_size: int, epoch: int
) -> None:
    groups = [round(3 * float(np.log2(width / height))) for width, height in sizes]
    batches = EpochBatches(orders(len(sizes), epoch), groups, batch_size)
    found = list(batches)
    assert len(found) == len(batches) == -(-len(sizes) // batch_size)
    assert sorted(number for batch in found for _, number in batch) == list(range(len(sizes)))
    assert {e for batch in found for e, _ in batch} == {epoch}
    assert sum(len(batch) < batch_size for batch in found) <= 1
    assert found == list(EpochBatches(orders(len(sizes), epoch), groups, batch_size))
    # all but the batches of left-over images hold one group
    mixed = sum(len({groups[number] for _, number in batch}) > 1 for batch in found)
    left_over = sum(count % batch_size for count in Counter(groups).values())
    assert mixed <= -(-left_over // batch_size)


def test_without_groups_batches_are_those_of_the_order() -> None:
    order = orders(7, 2)
    assert list(EpochBatches(order, None, 3)) == [list(order)[:3], list(order)[3:6], list(order)[6:]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_processes_share_the_images_and_make_as_many_steps(
    groups: list[int], batch_size: int, world: int, epoch: int, shuffle: bool
) -> None:
    shares = [
        list(EpochBatches(orders(len(groups), epoch, rank, world, shuffle), groups, batch_size))
        for rank in range(world)
    ]
    per_process = len(groups) // world
    assert {len(share) for share in shares} == {-(-per_process // batch_size)}
    seen = [number for share in shares for batch in share for _, number in batch]
    assert len(seen) == len(set(seen)) == world * per_process


def test_shapes_that_are_alike_are_one_group(coco: Path) -> None:
    groups = ratio_groups(read_coco(coco, "train"))
    assert groups[0] == groups[2] != groups[1] == groups[3]
    batches = list(EpochBatches(orders(4, 1), groups, 2))
    assert sorted(sorted(number for _, number in batch) for batch in batches) == [[0, 2], [1, 3]]


# --- bad input ---


def good() -> dict[str, Any]:
    region = np.zeros((30, 40), dtype=bool)
    region[3:9, 4:20] = True
    return contents([entry(1, 40, 30), entry(2, 40, 30)], [rectangle(1, 1, 1, [2, 2, 10, 10]), crowd(2, 2, 4, region)])


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    what = copy.deepcopy(good())
    change(what)
    return what


def at(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(what: Any) -> None:
        for part in path[:-1]:
            what = what[part]
        if value is None:
            del what[path[-1]]
        else:
            what[path[-1]] = value

    return change


WRONG_FILES = [
    (at(["images"], None), "images is missing"),
    (at(["annotations"], {}), "annotations is a map"),
    (at(["categories"], []), "categories is empty"),
    (at(["images"], []), "images is empty"),
    (at(["annotations", 1], 7), "annotations[1] is a number"),
    (at(["images", 0, "id"], "1"), "images[0]: id is '1'"),
    (at(["images", 1, "id"], 1), "id 1 stands there twice"),
    (at(["images", 0, "width"], 0), "width is 0"),
    (at(["images", 0, "height"], None), "height is None"),
    (at(["images", 0, "file_name"], None), "file_name is None"),
    (at(["categories", 0, "name"], None), "name is None"),
    (at(["categories", 1, "id"], 1), "id 1 stands there twice"),
    (at(["annotations", 0, "image_id"], 77), "annotations[0] (id 1): image_id 77 is not among the images"),
    (at(["annotations", 1, "category_id"], 3), "annotations[1] (id 2): category_id 3 is not among the categories"),
    (at(["annotations", 0, "bbox"], [1, 2, 3]), "bbox is [1, 2, 3]"),
    (at(["annotations", 0, "bbox", 0], float("nan")), "bbox is [nan"),
    (at(["annotations", 0, "bbox", 0], 10**400), "bbox is [1000"),
    (at(["annotations", 1, "bbox"], None), "bbox is None"),
    (at(["images", 0, "id"], 1 << 63), "images[0]: id is 9223372036854775808, expected a whole number of at most 64"),
    (at(["images", 0, "id"], -(1 << 63) - 1), "images[0]: id is -9223372036854775809"),
    (at(["categories", 0, "id"], 1e300), "categories[0]: id is 1000"),
    (at(["images", 0, "width"], 40.5), "width is 40.5"),
    (at(["images", 0, "width"], 1 << 31), "2147483648x30 pixels are more than can be read"),
    (at(["annotations", 0, "iscrowd"], 2), "iscrowd is 2"),
    (at(["annotations", 0, "area"], "big"), "area is 'big'"),
    (at(["annotations", 0, "segmentation", 0], ["a"] * 6), "at least three points"),
    (at(["annotations", 0, "segmentation", 0, 0], 10**400), "at least three points"),
    (at(["annotations", 0, "segmentation"], "mask"), "neither polygons nor a run-length"),
    (at(["annotations", 0, "segmentation", 0, 0], 55), "does not fit the image: a polygon reaches from 2 to 55 where the image has 40"),
    (at(["annotations", 1, "segmentation", "size"], [40, 30]), "the mask is for an image of size [40, 30]"),
    (at(["annotations", 1, "segmentation", "counts"], [3, 4]), "do not add up to the 1,200 pixels"),
    (at(["annotations", 1, "segmentation", "counts"], "04"), "but its image has 1,200"),
    (at(["annotations", 1, "segmentation", "counts"], "\x7f"), "not a compressed run-length encoding"),
    (at(["annotations", 1, "segmentation", "counts"], 5), "neither numbers nor text"),
]  # fmt: skip


def refused(call: Callable[[], Any], *words: str) -> str:
    with pytest.raises(DataError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("change", "words"), WRONG_FILES, ids=[words for _, words in WRONG_FILES])
def test_a_file_that_is_not_cocos_says_where(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    write(tmp_path, "val", good())
    read_coco(tmp_path, "val")
    source = write(tmp_path, "val", changed(change), pictures=False)
    refused(lambda: read_coco(tmp_path, "val"), str(source), words)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7", '"images"', "null", "\x00\xff", "[" * 100_000])
def test_a_file_that_is_not_json_or_not_a_map_is_refused(tmp_path: Path, text: str) -> None:
    source = write(tmp_path, "val", good())
    source.write_text(text)
    refused(
        lambda: read_coco(tmp_path, "val"),
        str(source),
        "JSON" if text in ("", "{", "\x00\xff") or len(text) > 99 else "is not a COCO annotation file",
    )


def test_missing_folders_and_files_are_named_with_the_layout(tmp_path: Path) -> None:
    refused(
        lambda: read_coco(tmp_path / "nowhere", "train"),
        str(tmp_path / "nowhere"),
        "does not exist",
        "dataloader.coco_path",
        "train2017/",
    )
    refused(lambda: read_coco(tmp_path, "train"), "annotations/instances_train2017.json", "does not exist")
    source = write(tmp_path, "train", good())
    for path in (tmp_path / "train2017").iterdir():
        path.unlink()
    (tmp_path / "train2017").rmdir()
    refused(lambda: read_coco(tmp_path, "train"), str(tmp_path / "train2017"), "does not exist")
    assert source.exists()


def test_missing_unreadable_and_ill_fitting_images_are_named_before_training(tmp_path: Path) -> None:
    split = read_coco(small_coco(tmp_path), "train")
    Path(split.path(2)).unlink()
    for how in ("none", "quick", "full"):
        refused(
            lambda how=how: require_images(split, how, show=False),
            "1 of the 4 images",
            "000002.png",
            "skip_unreadable True",
        )
    Path(split.path(4)).write_bytes(Path(split.path(4)).read_bytes()[:200])
    Image.new("RGB", (64, 64)).save(split.path(1))
    kept, bad = require_images(split, "quick", skip_unreadable=True, show=False)
    assert kept.image_ids == (3,)
    assert len(kept.annotations) == 1
    assert sorted(Path(path).name for path, _ in bad) == ["000001.png", "000002.png", "000004.png"]
    assert any("64x64 pixels, but the annotations say 96x64" in why for _, why in bad)
    Path(split.path(3)).unlink()
    refused(lambda: require_images(split, "quick", True, False), "not one image")


def test_splits_that_name_a_category_otherwise_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", good())
    write(tmp_path, "val", changed(at(["categories", 1, "name"], "ring")))
    refused(
        lambda: check_same_categories(read_coco(tmp_path, "train"), read_coco(tmp_path, "val")), "2: 'disc' and 'ring'"
    )


def test_nothing_to_train_on_and_nothing_to_find_are_refused(tmp_path: Path) -> None:
    nothing = contents([entry(1, 40, 30)], [])
    write(tmp_path, "train", nothing)
    write(tmp_path, "val", nothing)
    refused(lambda: read_coco(tmp_path, "train"), "nothing to train on", "1 images without usable annotations")
    refused(lambda: read_coco(tmp_path, "val"), "holds no object")


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_run_lengths_are_read_as_pycocotools_writes_them(height: int, width: int, random: Any) -> None:
    mask = np.array([[random.random() < 0.4 for _ in range(width)] for _ in range(height)], dtype=np.uint8)
    encoded = mask_codec.encode(np.asfortranarray(mask))
    counts = decoded_counts(encoded["counts"].decode("ascii"))
    assert sum(counts) == height * width
    pixels = np.concatenate([np.full(count, number % 2) for number, count in enumerate(counts)] or [[]])
    assert np.array_equal(pixels.reshape(width, height).T, mask)


def test_a_reader_of_anything_gives_an_error_of_ours(tmp_path: Path) -> None:
    tree = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 50) | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["id", "images", "bbox", "image_id", "segmentation", "counts", "size", "iscrowd"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
    places = [["annotations"], ["annotations", 0], ["annotations", 0, "segmentation"], ["annotations", 1, "segmentation"],
              ["annotations", 1, "segmentation", "counts"], ["images", 0], ["categories", 0], ["annotations", 0, "bbox"]]  # fmt: skip
    write(tmp_path, "val", good())
    source = tmp_path / "annotations" / "instances_val2017.json"

    @settings(deadline=None, max_examples=150)
    @given(st.sampled_from(places), tree)
    def check(place: list[Any], value: Any) -> None:
        what = copy.deepcopy(good())
        here: Any = what
        for part in place[:-1]:
            here = here[part]
        here[place[-1]] = value
        source.write_text(json.dumps(what))
        try:
            split = read_coco(tmp_path, "val")
        except DataError:
            return
        for annotation in split.api.anns.values():
            if annotation.get("segmentation"):
                image = split.api.imgs[annotation["image_id"]]
                assert split.api.annToMask(annotation).shape == (image["height"], image["width"])

    check()

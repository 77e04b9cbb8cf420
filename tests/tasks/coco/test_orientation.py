"""Photos that are stored turned: turned where the annotations are for what viewers show, refused where that cannot be
told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from src.common.errors import DataError
from src.tasks.coco.data import CocoSplit, read_coco
from src.tasks.coco.image_checks import require_images, too_narrow_images
from src.tasks.coco.loading import CocoDataset
from src.tasks.coco.orientation import load_as_annotated
from src.tasks.decoding import ORIENTATION
from src.tasks.loading import Unreadable
from tests.support.coco import contents, entry, rectangle, write

STORED = (36, 24)


def photo(
    root: Path, orientation: int, width: int, height: int, ending: str = "png", size: tuple[int, int] = STORED
) -> CocoSplit:
    """A training split of one tagged image with bright and dark corners, whose annotations say width and height."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = [255, 128, 0]
    pixels[: size[1] // 2, size[0] // 2 :] = 80
    image = {**entry(1, width, height), "file_name": f"1.{ending}"}
    write(root, "train", contents([image], [rectangle(1, 1, 1, [2, 2, 10, 10])]), pictures=False)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(root / "train2017" / f"1.{ending}", exif=exif)
    return read_coco(root, "train")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_images_are_turned_to_the_size_of_their_annotations(tmp_path: Path, orientation: int, ending: str) -> None:
    for size in (STORED, STORED[::-1]):
        split = photo(tmp_path, orientation, *size, ending)
        kept, bad = require_images(split, "quick", show=False)
        assert (len(kept), bad) == (1, [])
        item = CocoDataset(split, 0, flip=False)[1, 0]
        assert not isinstance(item, Unreadable)
        assert item.image.shape[1:] == item.target["masks"].shape[1:] == size[::-1]
        with Image.open(split.path(1)) as image:
            expected = image.convert("RGB") if size == STORED else ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(np.asarray(load_as_annotated(split.path(1), size)), np.asarray(expected))
        assert np.array_equal((item.image * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize(("orientation", "size"), [(2, STORED), (3, STORED), (4, STORED), (6, (24, 24)), (8, (24, 24))])
def test_where_the_size_does_not_tell_the_image_is_named(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    split = photo(tmp_path, orientation, *size, "jpg", size)
    with pytest.raises(DataError, match=rf"1\.jpg .the image is stored turned .EXIF orientation {orientation}."):
        require_images(split, "quick", show=False)
    item = CocoDataset(split, 0, flip=False)[1, 0]
    assert isinstance(item, Unreadable)
    assert "EXIF orientation" in item.reason


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_upright_images_and_tags_without_a_meaning_change_nothing(tmp_path: Path, orientation: int) -> None:
    split = photo(tmp_path, orientation, *STORED, "jpg")
    assert require_images(split, "quick", show=False)[1] == []
    with pytest.raises(DataError, match="36x24 pixels, but the annotations say 24x36"):
        require_images(photo(tmp_path, orientation, 24, 36, "jpg"), "quick", show=False)


def test_a_damaged_tag_is_none(tmp_path: Path) -> None:
    split = photo(tmp_path, 1, *STORED, "jpg")
    Image.new("RGB", STORED).save(split.path(1), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert require_images(split, "full", show=False)[1] == []
    assert load_as_annotated(split.path(1), STORED).size == STORED


def test_images_too_narrow_for_the_network_are_named(tmp_path: Path) -> None:
    images = [entry(1, 40, 30), entry(2, 4000, 3)]
    objects = [rectangle(1, 1, 1, [2, 2, 10, 10]), rectangle(2, 2, 1, [100, 0, 300, 3])]
    write(tmp_path, "train", contents(images, objects))
    split = read_coco(tmp_path, "train")
    ((path, why),) = too_narrow_images(split, 800, 1333)
    assert path == split.path(2)
    assert "4000x3" in why
    assert too_narrow_images(split, 800, 4000) == []

"""The digit scenes: COCO's layout, exact masks of what is visible, disjoint digits, the same every time, all or
nothing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from src.common.errors import DataError
from src.tasks.coco.data import read_coco
from src.tasks.coco.image_checks import require_images
from src.tasks.demo_data import digit_crops, digit_scenes
from src.tasks.demo_data.digits import load_digit_images
from src.tasks.images import read_folder, require_readable
from src.tasks.sources import SCENES, prepare

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
FEW = {"train": 30, "val": 20}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "deep" / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "N_SCENES", FEW)
        prepare("digits", root, "dataloader.source", SCENES)
    return root


def api_of(root: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}2017.json"))


def fingerprint(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_is_a_coco_folder(written):
    for split, count in FEW.items():
        data = read_coco(written, split)
        assert len(data) == count
        kept, bad = require_images(data, "full", show=False)
        assert len(kept) == count
        assert bad == []
        assert data.names == {digit + 1: str(digit) for digit in range(10)}
        assert (data.dropped.crowds, data.dropped.degenerate_boxes, data.dropped.without_mask) == (0, 0, 0)


@pytest.mark.parametrize("split", FEW)
def test_boxes_and_areas_are_those_of_the_masks_and_masks_do_not_overlap(written, split):
    api = api_of(written, split)
    for image_id in api.imgs:
        covered = np.zeros((digit_scenes.SIDE, digit_scenes.SIDE), dtype=int)
        for annotation in api.imgToAnns[image_id]:
            mask = api.annToMask(annotation)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert annotation["area"] == mask.sum() > 0
            assert annotation["bbox"] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            covered += mask
        assert covered.max() == 1


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return load_digit_images()


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_laws_of_a_scene(digits, seed):
    images, labels = digits
    scene = digit_scenes.compose(images, labels, seed)
    again = digit_scenes.compose(images, labels, seed)
    assert (scene.image == again.image).all()
    assert scene.digits == again.digits
    assert scene.image.shape == (digit_scenes.SIDE, digit_scenes.SIDE, 3)
    assert 1 <= len(scene.digits) == len(scene.masks) <= digit_scenes.DIGITS_PER_SCENE[1]
    assert scene.masks.sum(0).max() <= 1
    # a mask ends where the colour does: inside it differs from the canvas around all digits
    canvas = scene.image[~scene.masks.any(0)].mean(0)
    for mask in scene.masks:
        # not at the edge, which is blended: where little of a digit is left to be seen, that is most of it
        inner = mask & np.all([np.roll(mask, step, axis) for step in (-1, 1) for axis in (0, 1)], axis=0)
        if inner.any():
            # a colour's level is 0.35 from the canvas, each channel up to 0.25 from that, and the canvas is tinted by
            # up to 0.05
            assert np.abs(scene.image[inner].mean(0) - canvas).max() > 0.05 * 255


def test_digits_overlap_somewhere_and_vary_in_size(written):
    """Overlap is what makes a visible part differ from a whole digit; without it the masks would be no harder than the
    boxes."""
    api = api_of(written, "train")
    heights = [annotation["bbox"][3] for annotation in api.anns.values()]
    assert max(heights) > 1.6 * min(heights)
    boxes = {image_id: [annotation["bbox"] for annotation in api.imgToAnns[image_id]] for image_id in api.imgs}
    crossing = sum(
        a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
        for found in boxes.values()
        for n, a in enumerate(found)
        for b in found[:n]
    )
    assert crossing > 5


def test_training_and_validation_digits_are_disjoint_and_complete(digits):
    _, labels = digits
    train, val = digit_scenes._digits_of("train", labels), digit_scenes._digits_of("val", labels)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
    shares = {digit: Counter(labels[val])[digit] / Counter(labels)[digit] for digit in range(10)}
    assert all(0.18 < share <= 0.2 for share in shares.values())


def test_is_deterministic(written, tmp_path, monkeypatch):
    monkeypatch.setattr(digit_scenes, "N_SCENES", FEW)
    digit_scenes.write_digit_scenes(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(written)
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]


def test_a_complete_folder_is_left_alone(written, monkeypatch):
    monkeypatch.setattr(digit_scenes, "N_SCENES", FEW)
    monkeypatch.setattr(digit_scenes, "scenes", lambda _: pytest.fail("written again"))
    digit_scenes.write_digit_scenes(written)


def test_another_folder_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_scenes, "N_SCENES", FEW)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(DataError, match="is not the digit scenes folder"):
        digit_scenes.write_digit_scenes(tmp_path)
    assert (tmp_path / "annotations" / "instances_train2017.json").read_text() == "{}"


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DataError, match="No space left"):
        digit_scenes.write_digit_scenes(tmp_path / "scenes")
    assert list(tmp_path.iterdir()) == []


def test_crops_are_an_image_folder_of_every_digit(written, tmp_path, monkeypatch):
    monkeypatch.setattr(digit_scenes, "N_SCENES", FEW)
    prepare("digit_crops", tmp_path / "crops")
    for split in FEW:
        index = read_folder(tmp_path / "crops", split, False)
        assert index.classes == tuple("0123456789")[: len(index.classes)]
        kept, _ = require_readable(index, "full", show=False)
        wanted = Counter(annotation["category_id"] - 1 for annotation in api_of(written, split).anns.values())
        assert Counter(kept.labels) == wanted
        assert Image.open(index.paths[0]).size == (digit_crops.SIDE, digit_crops.SIDE)


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=10, deadline=None)
def test_a_crop_holds_its_digit(digits, seed):
    scene = digit_scenes.compose(*digits, seed)
    for mask in scene.masks:
        white = Image.fromarray(np.where(mask[:, :, None], 255, 0).astype(np.uint8).repeat(3, axis=2))
        found = np.asarray(digit_crops.crop(white, mask))[:, :, 0]
        longer = max(np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1))
        share = mask.sum() / (digit_crops.MARGIN * longer) ** 2  # of the square that is digit
        assert (found / 255).mean() == pytest.approx(share, rel=0.1)
        assert found[0].max() == found[-1].max() == found[:, 0].max() == found[:, -1].max() == 0


def test_annotations_are_plain_json(written):
    contents = json.loads((written / "annotations" / "instances_val2017.json").read_text())
    assert {"images", "annotations", "categories"} <= contents.keys()
    assert all(isinstance(annotation["segmentation"]["counts"], str) for annotation in contents["annotations"])

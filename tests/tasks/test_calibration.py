"""Images that show a network what it sees: chosen by the seed, kept as bytes, and shown as a validation shows them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from src.common.errors import DataError
from src.tasks.calibration import CalibrationImages, CalibrationSpec, training_images
from src.tasks.coco.calibration import training_images as coco_images
from src.tasks.coco.data import read_coco
from src.tasks.coco.loading import CocoDataset
from src.tasks.images import load_rgb, read_folder
from tests.support.coco import small_coco
from tests.support.showing import validation_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SPEC = CalibrationSpec(count=10, batch_size=4, image_size=16, resize=20, mean=MEAN, std=STD, seed=3)


def test_training_images_are_those_of_a_validation_to_the_last_bit(small_images: Path) -> None:
    index = read_folder(small_images, "train", False)
    chosen = training_images(index, SPEC, False, {})
    assert len(chosen) == len(set(chosen.paths)) == 10
    assert set(chosen.paths) < set(index.paths)
    assert training_images(index, SPEC, False, {}).paths == chosen.paths
    batches = chosen.read(False)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    show = validation_transform(20, 16, MEAN, STD)
    wanted = torch.stack([show(load_rgb(path), torch.Generator()) for path in chosen.paths])
    assert torch.equal(torch.cat(list(batches)), wanted)
    assert batches[0].is_contiguous()
    assert torch.equal(batches[1], batches[1:][0])
    assert torch.equal(batches[1], wanted[4:8])
    with pytest.raises(IndexError):
        batches[3]


def test_another_seed_draws_others_and_workers_change_nothing(small_images: Path) -> None:
    index = read_folder(small_images, "train", False)
    first = training_images(index, SPEC, False, {})
    other = training_images(index, CalibrationSpec(count=10, image_size=16, resize=20, seed=4), False, {})
    assert first.paths != other.paths
    spec = CalibrationSpec(10, 4, num_workers=1, image_size=16, resize=20, mean=MEAN, std=STD, seed=3)
    for one, two in zip(first.read(False), training_images(index, spec, False, {}).read(False), strict=True):
        assert torch.equal(one, two)


def test_a_detectors_images_are_shown_as_they_are(tmp_path: Path) -> None:
    split = read_coco(small_coco(tmp_path / "coco"), "train")
    spec = CalibrationSpec(count=100, batch_size=2, image_size=None)
    chosen = coco_images(split, spec, False, {})
    assert chosen.paths == split.paths
    dataset = CocoDataset(split, 0, flip=False)
    shown = [image for batch in chosen.read(False) for image in batch]
    for number, image in enumerate(shown):
        assert torch.equal(image, dataset[0, number].image)  # type: ignore[union-attr]
    folder = CalibrationImages(Path(chosen.paths[0]).parent, spec, False)
    assert sum(map(len, folder.read(False))) == len(folder)


def test_unreadable_images_end_the_reading_or_are_known_to_the_run(small_images: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(small_images, tmp_path / "images"))
    index = read_folder(images, "train", False)
    spec = CalibrationSpec(batch_size=4, image_size=16, resize=20)
    broken = index.paths[5]
    Path(broken).write_bytes(b"not an image")
    with pytest.raises(DataError, match="1 unreadable image"):
        training_images(index, spec, False, {}).read(False)
    known: dict[str, str] = {}
    assert sum(map(len, training_images(index, spec, True, known).read(False))) == len(index) - 1
    assert set(known) == {broken}
    for path in index.paths:
        Path(path).write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"dataloader.imagenet_path: none of the 24 images for calibration"):
        training_images(index, spec, True, {}).read(False)

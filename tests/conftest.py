"""Fixtures that several test files use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.coco import varied_coco

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PQF_TEST_DATA", ROOT.parent / "shared" / "data"))


def write_images(folder: Path, classes: int, each: int, seed: int, side: int = 40) -> None:
    """`classes` folders of `each` images of smooth noise around a colour of the class."""
    draw = np.random.default_rng(seed)
    for label in range(classes):
        place = folder / f"class{label:04d}"
        place.mkdir(parents=True)
        colour = np.array([37 * label % 256, 91 * label % 256, 151 * label % 256])
        for number in range(each):
            pixels = np.clip(colour + draw.normal(0, 20, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.fixture(scope="session")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-layout folder: 3 classes, 8 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("small_images")
    write_images(root / "train", 3, 8, seed=0)
    write_images(root / "val", 3, 4, seed=1)
    return root


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of images of 12 pixels, four each to train and two each to validate with."""
    root = tmp_path_factory.mktemp("tiny images")
    write_images(root / "train", 3, 4, seed=0, side=12)
    write_images(root / "val", 3, 2, seed=1, side=12)
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """In this process as in those that are started: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def thousand_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-layout folder with 1,000 classes, one 8x8 image each, in both splits."""
    root = tmp_path_factory.mktemp("thousand_classes")
    write_images(root / "train", 1000, 1, seed=0, side=8)
    (root / "val").symlink_to(root / "train")
    return root


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder with the authors' ResNet-18 and the photos to try it on."""
    if not (DATA / "published" / "resnet18.pth").exists():
        pytest.skip(f"the authors' files are not at {DATA} (set PQF_TEST_DATA)")
    return DATA


@pytest.fixture(scope="session", params=["varied", "tiny_coco"])
def many_coco(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder with dozens of images in each split: a made one, and, where it is there, a small part of COCO
    itself."""
    if request.param == "varied":
        return varied_coco(tmp_path_factory.mktemp("varied_coco"))
    if not (DATA / "tiny_coco").is_dir():
        pytest.skip(f"the small part of COCO is not at {DATA} (set PQF_TEST_DATA)")
    return DATA / "tiny_coco"

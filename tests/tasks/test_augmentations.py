"""Augmentations by name: each changes images, depends on its seed alone, and leaves the global generator alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from src.common.errors import SettingsError
from src.common.randomness import stream
from src.settings import Settings, load
from src.tasks.augmentation_names import AUGMENTATIONS
from src.tasks.classification import ImageSpec
from src.tasks.transforms import Transform
from tests.support.showing import seen

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    draw = np.random.default_rng(0)
    rough = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((64, 48), Image.Resampling.BICUBIC)


def shown(transform: Transform, image: Image.Image, seed: int) -> Tensor:
    return seen(transform, MEAN, STD)(image, stream(seed, "augmentation"))


def images_of(**changes) -> Transform:
    return ImageSpec(resize=36, image_size=32, mean=MEAN, std=STD, **changes).for_training()


@pytest.mark.parametrize(
    "changes", [*({"augmentation": (name,)} for name in AUGMENTATIONS), {"crop": "random_resized"}]
)
def test_each_depends_on_the_images_own_generator_alone(image: Image.Image, changes: dict) -> None:
    transform, plain = images_of(**changes), images_of()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = [shown(transform, image, seed) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    travelled = pickle.loads(pickle.dumps(transform))  # as to the processes of a loader
    assert all(torch.equal(found, shown(travelled, image, seed)) for seed, found in enumerate(first))
    assert all(found.shape == (3, 32, 32) and found.dtype == torch.float32 for found in first)
    assert any(not torch.equal(found, shown(plain, image, seed)) for seed, found in enumerate(first))
    assert len({found.numpy().tobytes() for found in first}) > 6


def test_without_any_of_them_images_are_those_of_before(image: Image.Image) -> None:
    """The random crop and flip of the paper's recipe, written out."""
    for seed in range(5):
        draw = stream(seed, "augmentation")
        small = image.resize((48, 36), Image.Resampling.BILINEAR)
        top, left = (int(torch.randint(size - 32 + 1, (), generator=draw)) for size in (36, 48))
        part = small.crop((left, top, left + 32, top + 32))
        if float(torch.rand((), generator=draw)) < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 255
        wanted = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        assert torch.allclose(shown(images_of(decoding="exact"), image, seed), wanted, atol=1e-6)


def test_a_resized_crop_shows_parts_of_every_size_and_no_padding() -> None:
    """Of an image whose red rises from left to right, the range that is seen tells how much was cut out."""
    ramp = Image.fromarray(np.stack([np.tile(np.arange(256, dtype=np.uint8), (256, 1))] * 3, axis=2))
    transform = ImageSpec(36, 32, mean=(0, 0, 0), std=(1, 1, 1), crop="random_resized").for_training()
    widths = []
    for seed in range(60):
        red = seen(transform, (0, 0, 0), (1, 1, 1))(ramp, stream(seed, "augmentation"))[0]
        assert float(red.max() - red.min()) <= 1
        widths.append(float(red.max() - red.min()))
    assert min(widths) < 0.5 < 0.8 < max(widths)


def test_erasing_comes_last_and_leaves_a_rectangle_of_the_mean(image: Image.Image) -> None:
    transform, plain = images_of(augmentation=("random_erasing",)), images_of(augmentation=("random_erasing",))
    erased = 0
    for seed in range(40):
        found = shown(transform, image, seed)
        zero = (found == 0).all(0)
        if zero.any():
            erased += 1
            rows, columns = torch.where(zero)
            box = zero[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]
            assert box.all()
        assert torch.equal(found, shown(plain, image, seed))
    assert 2 < erased < 25


def test_their_names_are_checked_with_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("dataloader: {augmentation: [trivialaugment, random_erasing], crop: random_resized}")
    assert load(str(file)).dataloader.augmentation == ("trivialaugment", "random_erasing")
    assert Settings().dataloader.augmentation == ()
    with pytest.raises(
        SettingsError, match=r"dataloader.augmentation\[0\] = 'cutmax': expected one of trivialaugment, randaugment"
    ):
        load(str(file), ["--dataloader.augmentation", "[cutmax]"])
    with pytest.raises(SettingsError, match=r"dataloader.crop.*one of random, random_resized"):
        load(str(file), ["--dataloader.crop", "middle"])

"""What is made of images in training: `exact` is torchvision's to the last bit, `fast` is near it, and both depend on
seed, epoch and number alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional, v2

from src.common.errors import DataError
from src.common.randomness import stream
from src.run.fingerprint import RunFingerprint
from src.settings import load
from src.tasks.augmentations import drawing_from
from src.tasks.classification import Classification, ImageSpec
from src.tasks.decoding import can_be_reduced, open_image, pixels_of
from src.tasks.images import ImageFolderIndex, load_rgb, read_folder
from src.tasks.loading import ImageDataset, LoaderSpec, Unreadable
from src.tasks.transforms import Normalise
from src.tasks.views import View, exact, fast, reduction_for
from src.tasks.workers import pack
from tests.tasks.test_classification import FakeEngine
from tests.tasks.test_images import MEAN, STD, photos

NEAR = 1
"""Of 255: the largest difference of a pixel of an image that was not decoded smaller."""
NEAR_REDUCED, NEAR_REDUCED_MEAN = 64, 4.0
"""The same, and the mean difference, where it was."""


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image with edges and with slopes, as photos have them."""
    draw = np.random.default_rng(seed)
    rough = Image.fromarray(draw.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
    image = np.asarray(rough.resize(size, Image.Resampling.BICUBIC)).copy()
    image[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] = (250, 30, 10)
    return Image.fromarray(image)


def differences(one: Tensor, other: Tensor) -> Tensor:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == torch.uint8
    return (one.int() - other.int()).abs()


def shown(path: Path, spec: ImageSpec, seed: int) -> Tensor:
    with open_image(path) as image:
        return spec.for_training()(image, stream(seed, "augmentation"))


def both(path: Path, seed: int = 0, **spec) -> tuple[Tensor, Tensor]:
    """The same view of an image, fast and exact."""
    found, wanted = (shown(path, ImageSpec(**spec, decoding=how), seed) for how in ("fast", "exact"))
    return found, wanted


@pytest.mark.parametrize("flip", [True, False])
def test_an_exact_random_resized_crop_is_torchvisions_to_the_last_bit(flip: bool) -> None:
    image, crop = smooth((333, 250)), v2.RandomResizedCrop(64, antialias=True)
    show = ImageSpec(80, 64, 0, flip, crop="random_resized", decoding="exact").for_training()
    for seed in range(12):
        with drawing_from(stream(seed, "a")):
            wanted = crop(image)
            if flip and bool(torch.rand(()) < 0.5):
                wanted = functional.hflip(wanted)
        assert torch.equal(show(image, stream(seed, "a")), functional.pil_to_tensor(wanted))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bytes_normalised_later_are_what_the_transforms_made_to_the_last_bit(
    memory_format: torch.memory_format,
) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 4, 1)
    image = Image.fromarray(every[0].permute(1, 2, 0).numpy())
    wanted = functional.normalize(functional.to_tensor(image), MEAN, STD)
    normalise = Normalise(MEAN, STD)
    for given in (every, every.contiguous(memory_format=torch.channels_last)):
        found = normalise(given, memory_format)
        assert found.is_contiguous(memory_format=memory_format)
        assert torch.equal(found[1], wanted)
        assert torch.equal(normalise(found, memory_format), found)  # what is normalised already stays


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_they_are_the_same_to_the_last_bit() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 4, 1)
    found = Normalise(MEAN, STD, "cuda")(every.cuda(), torch.channels_last)
    assert torch.equal(found.cpu(), Normalise(MEAN, STD)(every))


@pytest.mark.parametrize("crop", ["random", "random_resized"])
@pytest.mark.parametrize("padding", [0, 9])
def test_fast_is_exact_to_one_of_255(crop: str, padding: int, tmp_path: Path) -> None:
    for number, size in enumerate([(320, 240), (200, 320), (64, 64), (80, 64), (48, 40)]):
        path = tmp_path / f"{number}.jpg"
        smooth(size).save(path, quality=95)
        for seed in range(6):
            found, wanted = both(path, seed, resize=64, image_size=56, crop_padding=padding, crop=crop)
            reduced = min(size) >= 4 * 56
            assert reduced or int(differences(found, wanted).max()) <= NEAR


def test_fast_is_exact_to_one_of_255_on_photos(tmp_path: Path) -> None:
    for number, path in enumerate(photos(10)):
        large = tmp_path / f"{number}.jpg"
        with Image.open(path) as image:
            image.resize((667, 500), Image.Resampling.BICUBIC).save(large, quality=90)
        for crop in ("random", "random_resized"):
            for place in (path, large):
                found = differences(*both(place, number, crop=crop))
                assert int(found.max()) <= NEAR
                assert float(found.float().mean()) < 0.2
        found = differences(*both(large, number, resize=120, image_size=112))  # decoded at half its size
        assert int(found.max()) <= NEAR_REDUCED
        assert float(found.float().mean()) < NEAR_REDUCED_MEAN


def test_jpegs_are_decoded_smaller_only_where_two_pixels_remain_for_each_along_each_side(tmp_path: Path) -> None:
    smooth((1000, 800)).save(tmp_path / "a.jpg")
    sides = {401: 1, 400: 1, 201: 1, 200: 2, 101: 2, 100: 4, 51: 4, 50: 8, 5: 8}
    for side, wanted in sides.items():
        view = View(None, (side * 5 // 4, side), (0, 0, side, side))
        with Image.open(tmp_path / "a.jpg") as image:
            assert reduction_for(image, view) == wanted
            found = fast(image, view)
        with Image.open(tmp_path / "a.jpg") as image:
            assert tuple(found.shape) == (3, side, side)
            assert (
                float(differences(found, functional.pil_to_tensor(exact(image, view))).float().mean())
                < NEAR_REDUCED_MEAN
            )
        with Image.open(tmp_path / "a.jpg") as image:
            image.load()
            assert reduction_for(image, view) == 1  # it is decoded already
    part = View((100, 0, 300, 800), (50, 50), (0, 0, 50, 50))  # its width decides
    with Image.open(tmp_path / "a.jpg") as image:
        assert reduction_for(image, part) == 2
        assert float(fast(image, part).float().std()) > 0


def odd_files(folder: Path, size: tuple[int, int]) -> None:
    """Files of kinds that are not plain JPEGs, and JPEGs of unusual kinds."""
    image = smooth(size)
    palette, turned = image.quantize(16), Image.Exif()
    turned[274] = 6
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "turned.jpg", exif=turned)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "rgb.png")
    image.save(folder / "named_jpeg.jpg", format="PNG")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("LA").save(folder / "la.png")
    image.convert("1").save(folder / "one.png")
    palette.save(folder / "palette.png", transparency=bytes(range(16)))
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(folder / "grey16.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[smooth(size, 1), smooth(size, 2)])
    image.save(folder / "plain.webp", lossless=True)
    image.save(folder / "turned.tif", tiffinfo={274: 6})
    image.save(folder / "several.mpo", save_all=True, append_images=[smooth(size, 1)])
    image.save(folder / "plain.bmp")


@pytest.mark.parametrize("size", [(96, 72), (200, 152)], ids=str)
@pytest.mark.parametrize("crop", ["random", "random_resized"])
def test_odd_files_are_shown_as_pillow_decodes_them(size: tuple[int, int], crop: str, tmp_path: Path) -> None:
    odd_files(tmp_path, size)
    for path in sorted(tmp_path.iterdir()):
        spec = ImageSpec(36, 32, crop=crop, decoding="exact")
        with open_image(path) as image:
            reduced = can_be_reduced(image) and min(size) > 96
        assert not reduced or path.name in ("progressive.jpg", "turned.jpg", "grey.jpg")
        for seed in range(3):
            found, wanted = both(path, seed, resize=36, image_size=32, crop=crop)
            show = spec.for_training()
            assert torch.equal(wanted, show(load_rgb(path), stream(seed, "augmentation"))), path.name
            off = differences(found, wanted)
            assert float(off.float().mean()) <= NEAR_REDUCED_MEAN if reduced else int(off.max()) <= NEAR, path.name


@pytest.mark.parametrize("decoding", ["fast", "exact"])
def test_a_broken_file_is_unreadable_in_every_way(decoding: str, tmp_path: Path) -> None:
    smooth((640, 480)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    cases = {"cut.jpg": content[: len(content) // 2], "empty.jpg": b"", "text.jpg": b"no image"}
    for name, broken in cases.items():
        (tmp_path / name).write_bytes(broken)
    paths = [str(tmp_path / name) for name in (*cases, "gone.jpg")]
    index = ImageFolderIndex(tmp_path, ("a",), paths, [0] * 4)
    for spec in (ImageSpec(36, 32, decoding=decoding), ImageSpec(400, 320, crop="random_resized", decoding=decoding)):
        found = [ImageDataset(index, spec.for_training(), 0)[1, number] for number in range(4)]
        reasons = [one.reason for one in found if isinstance(one, Unreadable)]
        assert len(reasons) == 4
        assert "truncated" in reasons[0]
        assert reasons[1:] == [*["not an image that Pillow can read"] * 2, "No such file or directory"]


def task(folder: Path, num_workers: int = 0, **spec) -> Classification:
    splits = [read_folder(folder, split, False) for split in ("train", "val")]
    loading = LoaderSpec(batch_size=5, num_workers=num_workers, show_progress=False)
    return Classification(FakeEngine(), *splits, ImageSpec(36, 32, mean=MEAN, std=STD, **spec), loading)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; training images are JPEGs of many sizes, small ones and ones that are decoded smaller."""
    root = tmp_path_factory.mktemp("jpegs")
    for split in ("train", "val"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(6):
                smooth((60 + 97 * number, 40 + 83 * number), number).save(root / split / label / f"{number}.jpg")
    return root


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"decoding": "exact"},
        {"crop": "random_resized", "channels_last": True},
        {"augmentation": ("trivialaugment",)},
        {"augmentation": ("random_erasing",)},
    ],
    ids=str,
)
def test_two_runs_and_any_number_of_workers_give_the_same(folder: Path, spec: dict) -> None:
    one, two = task(folder, **spec), task(folder, 2, **spec)
    for first, second in zip(one.training_batches(1), two.training_batches(1), strict=True):
        assert torch.equal(first.images, second.images)
        assert first.images.stride() == second.images.stride()
        assert first.images.dtype == (torch.float32 if "random_erasing" in str(spec) else torch.uint8)
        assert torch.equal(one.inputs(first), two.inputs(second))
    again = [batch.images for batch in one.training_batches(1)]
    assert all(torch.equal(a, b.images) for a, b in zip(again, task(folder, **spec).training_batches(1), strict=True))


def test_what_augmentations_change_is_drawn_alike_in_both_ways(folder: Path) -> None:
    """Rectangles that are erased lie where they lay, in the normalised image."""
    path = folder / "train" / "a" / "0.jpg"
    erased = 0
    for seed in range(30):
        spec = {"resize": 36, "image_size": 32, "mean": MEAN, "std": STD, "augmentation": ("random_erasing",)}
        found, wanted = both(path, seed, **spec)
        assert found.dtype == wanted.dtype == torch.float32
        assert torch.equal((found == 0).all(0), (wanted == 0).all(0))
        assert float((found - wanted).abs().max()) <= 1.01 / 255 / min(STD)
        erased += bool((found == 0).all(0).any())
    assert erased


def test_validation_is_exact_whatever_training_is(folder: Path) -> None:
    path = folder / "val" / "b" / "5.jpg"
    with open_image(path) as image:
        found = ImageSpec(36, 32, decoding="fast").for_validation()(image, torch.Generator())
    small = functional.center_crop(functional.resize(load_rgb(path), [36]), [32])
    assert torch.equal(found, functional.pil_to_tensor(small))


def test_batches_keep_their_layout_on_their_way() -> None:
    images = torch.randint(0, 256, (3, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    sent = {"images": images, "rows": images.contiguous(), "labels": torch.arange(3), "none": torch.empty(0)}
    found = pack(sent).unpacked()
    assert all(
        torch.equal(found[name], tensor) and found[name].stride() == tensor.stride() for name, tensor in sent.items()
    )


def test_a_run_that_resumes_must_decode_as_it_did() -> None:
    ways = [load("../config/train_resnet18.yaml", ["--dataloader.decoding", way]) for way in ("fast", "exact")]
    first, second = map(RunFingerprint.of, ways)
    assert first.differences(second) == ["dataloader.decoding"]
    assert first.differences(RunFingerprint.of(load("../config/train_resnet18.yaml", []))) == []


@pytest.mark.parametrize("how", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_jpegs_have_pillow_s_pixels(how: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    smooth((133, 87)).save(path, **how)
    with Image.open(path) as opened, Image.open(path) as other:
        assert torch.equal(pixels_of(opened), functional.pil_to_tensor(other))
        assert opened.tile  # Pillow decoded nothing
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with Image.open(path) as opened, pytest.raises(DataError, match="truncated"):
        pixels_of(opened)

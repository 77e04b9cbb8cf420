"""Image folders: what is refused and how it is said, what counts as readable, and what a network gets to see."""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from src.common.errors import DataError
from src.common.randomness import stream
from src.tasks.classification import ImageSpec
from src.tasks.images import (
    check_images,
    check_same_classes,
    full_check,
    load_rgb,
    quick_check,
    read_folder,
    require_readable,
)
from src.tasks.loading import Batch, EpochOrder, ImageDataset, Unreadable, collate
from tests.conftest import DATA
from tests.support.showing import training_transform, validation_transform

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def noise(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_folder(root: Path, split: str = "val", classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for c, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for i in range(each):
            noise(seed=100 * c + i).save(root / split / name / f"{i}.jpg")
    return root


def photos(n: int) -> list[Path]:
    folder = DATA / "imagenet_samples" / "val"
    if not folder.is_dir():
        pytest.skip(f"no photos at {folder} (set PQF_TEST_DATA)")
    return sorted(folder.glob("*/*.JPEG"))[:: 1000 // n][:n]


# --- folders


def test_same_images_and_labels_as_image_folder(tmp_path):
    make_folder(tmp_path, classes=("b", "a", "c"))
    noise().save(tmp_path / "val" / "a" / "X.PNG")
    index = read_folder(tmp_path, "val", False)
    theirs = ImageFolder(str(tmp_path / "val"))
    assert index.classes == ("a", "b", "c") == tuple(theirs.classes)
    assert list(zip(index.paths, index.labels, strict=True)) == theirs.samples
    assert index.root == tmp_path / "val"
    assert len(index) == 10


def test_hidden_names_and_other_files_are_not_looked_at(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "val" / "cat" / "._0.jpg").write_bytes(b"x")
    (tmp_path / "val" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "val" / "list.txt").write_text("x")
    assert len(read_folder(tmp_path, "val", False)) == 6


def refused(function, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        function()
    for part in parts:
        assert part in str(caught.value)


def test_missing_folder(tmp_path):
    key = "dataloader.imagenet_path"
    refused(
        lambda: read_folder(tmp_path / "nowhere", "val", False),
        key,
        f"{tmp_path}/nowhere does not exist",
        "train/ and val/",
    )
    (tmp_path / "root").mkdir()
    refused(lambda: read_folder(tmp_path / "root", "val", False), key, f"{tmp_path}/root/val does not exist")


def test_relative_path_is_named_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: read_folder("nowhere", "val", False), f"{tmp_path}/nowhere does not exist")


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "root").write_text("x")
    refused(lambda: read_folder(tmp_path / "root", "val", False), f"{tmp_path}/root is a file")
    (tmp_path / "val").write_text("x")
    refused(lambda: read_folder(tmp_path, "val", False), f"{tmp_path}/val is a file")


def test_no_class_folders(tmp_path):
    (tmp_path / "val").mkdir()
    refused(lambda: read_folder(tmp_path, "val", False), "has no class folders", f"{tmp_path}/val/<class>/")
    noise().save(tmp_path / "val" / "loose.jpg")
    refused(lambda: read_folder(tmp_path, "val", False), "holds 1 images directly")


def test_empty_class_folders_are_named_up_to_five(tmp_path):
    make_folder(tmp_path)
    for i in range(7):
        (tmp_path / "val" / f"empty{i}").mkdir()
    refused(
        lambda: read_folder(tmp_path, "val", False), "7 of the 9", "empty0, empty1, empty2, empty3, empty4, and 2 more"
    )


def test_splits_with_different_classes(tmp_path):
    make_folder(tmp_path, "train", ("cat", "dog", "emu"))
    make_folder(tmp_path, "val", ("cat", "cow", "dog"))
    train, validation = read_folder(tmp_path, "train", False), read_folder(tmp_path, "val", False)
    check_same_classes(train, train)
    refused(
        lambda: check_same_classes(train, validation), f"only in {tmp_path}/train: emu", f"only in {tmp_path}/val: cow"
    )


# --- files


def spoil(folder: Path) -> dict[str, bytes]:
    """Name and content of files that cannot be decoded."""
    noise((300, 300)).save(folder / "whole.jpg")
    noise((300, 300)).save(folder / "whole.png")
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    return {
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
    }


@pytest.mark.parametrize("how", ["quick", "full"])
def test_unreadable_files_are_found_and_named(tmp_path, how):
    make_folder(tmp_path, each=2)
    bad = spoil(tmp_path)
    for name, content in bad.items():
        (tmp_path / "val" / "cat" / name).write_bytes(content)
    os.symlink(tmp_path / "gone", tmp_path / "val" / "dog" / "link.jpg")
    index = read_folder(tmp_path, "val", False)
    found = {os.path.basename(path): reason for path, reason in check_images(index, how, False)}
    assert set(found) == {*bad, "link.jpg"}
    assert "truncated" in found["half.jpg"]
    assert "Pillow" in found["text.jpg"]
    assert found["link.jpg"] == "No such file or directory"
    assert not any(str(tmp_path) in reason for reason in found.values())
    refused(
        lambda: require_readable(index, how, show=False),
        "5 unreadable images",
        "half.jpg (",
        "--dataloader.skip_unreadable True",
    )
    kept, skipped = require_readable(index, how, True, False)
    assert {os.path.basename(path) for path, _ in skipped} == set(found)
    assert (len(kept), kept.labels, kept.classes) == (4, [0, 0, 1, 1], index.classes)
    assert require_readable(kept, how, show=False) == (kept, [])


def test_many_unreadable_files_are_counted(tmp_path):
    make_folder(tmp_path)
    for i in range(8):
        (tmp_path / "val" / "cat" / f"bad{i}.jpg").write_bytes(b"")
    refused(
        lambda: require_readable(read_folder(tmp_path, "val", False), show=False),
        "8 unreadable",
        "bad4.jpg",
        "and 3 more",
    )


def test_a_class_emptied_by_skipping_is_an_error(tmp_path):
    make_folder(tmp_path, each=1)
    (tmp_path / "val" / "dog" / "0.jpg").write_bytes(b"")
    refused(lambda: require_readable(read_folder(tmp_path, "val", False), "quick", True, False), "1 class(es)", "dog")


def test_none_checks_nothing_and_unknown_checks_are_listed(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val" / "dog" / "bad.jpg").write_bytes(b"")
    index = read_folder(tmp_path, "val", False)
    assert check_images(index, "none", False) == []
    refused(lambda: check_images(index, "thorough", False), "none, quick, full")


def test_quick_accepts_whatever_decodes(tmp_path):
    """A JPEG whose end marker was cut off, or that is followed by other bytes, still decodes."""
    noise().save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "trailing.jpg").write_bytes(content + bytes(10_000))
    assert full_check(str(tmp_path / "trailing.jpg")) is None
    for cut in range(1, 400, 7):
        place = tmp_path / "cut.jpg"
        place.write_bytes(content[:-cut])
        assert (quick_check(str(place)) is None) >= (full_check(str(place)) is None)
    assert quick_check(str(tmp_path / "trailing.jpg")) is None


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "bomb" in (quick_check(str(tmp_path / "a.png")) or "")
    assert "bomb" in (full_check(str(tmp_path / "a.png")) or "")


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "ppm", "tif"])
def test_formats(tmp_path, ending):
    (tmp_path / "val" / "a").mkdir(parents=True)
    noise().save(tmp_path / "val" / "a" / f"x.{ending.upper()}")
    index, _ = require_readable(read_folder(tmp_path, "val", False), "full", show=False)
    assert load_rgb(index.paths[0]).size == (40, 30)


def test_every_colour_mode_becomes_rgb_without_a_warning(tmp_path):
    image = noise()
    palette = image.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    palette.save(tmp_path / "palette.png", transparency=bytes(range(16)))
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("LA").save(tmp_path / "la.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("1").save(tmp_path / "one.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(tmp_path / "grey16.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = {path.name: load_rgb(path) for path in tmp_path.iterdir()}
        assert len(loaded) == 7
        assert all(
            (x.mode, x.size) == ("RGB", (40, 30)) and quick_check(str(tmp_path / name)) is None
            for name, x in loaded.items()
        )
    assert np.array_equal(np.asarray(loaded["grey16.png"]), np.asarray(image.convert("L").convert("RGB")))
    assert np.array_equal(np.asarray(loaded["palette.png"]), np.asarray(image.quantize(16).convert("RGB")))


RAMP = np.tile(np.arange(64) * 1024, (8, 1))
"""Grey values (8, 64) from 0 to 64,512."""


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("16.png", RAMP.astype(np.uint16), {}),
        ("16.pgm", RAMP.astype(np.uint16), {}),
        ("16.tif", RAMP.astype(np.uint16), {}),
        ("16b.tif", RAMP.astype(">u2"), {}),
        ("inverse.tif", (65535 - RAMP).astype(np.uint16), {"tiffinfo": {262: 0}}),
    ],
)
def test_16_bits_are_scaled_to_8(name: str, values: np.ndarray, options: dict, tmp_path: Path) -> None:
    if values.dtype.byteorder == ">":
        Image.frombuffer("I;16B", (64, 8), values.tobytes(), "raw", "I;16B", 0, 1).save(tmp_path / name)
    elif name.endswith(".pgm"):  # Pillow before 10.4 reads them, but cannot write them
        (tmp_path / name).write_bytes(b"P5 64 8 65535 " + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name, **options)
    loaded = np.asarray(load_rgb(tmp_path / name))
    assert np.array_equal(loaded, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2))
    assert quick_check(str(tmp_path / name)) is None


@pytest.mark.parametrize(
    ("kind", "mode"), [(np.int32, "I"), (np.float32, "F"), (np.uint32, "I"), (np.int16, "I")], ids=str
)
def test_values_without_a_known_range_are_unreadable(kind: type, mode: str, tmp_path: Path) -> None:
    make_folder(tmp_path)
    place = tmp_path / "val" / "cat" / "depth.tif"
    values = (RAMP // 2).astype(kind)
    if kind in (np.uint32, np.int16):  # Pillow reads such files, but does not write them
        sign, bits = (1, 32) if kind is np.uint32 else (2, 16)
        write_tiff(place, values, sign, bits)
    else:
        Image.fromarray(values).save(place)
    with Image.open(place) as image:
        assert image.mode == mode
    index = read_folder(tmp_path, "val", False)
    for how in ("quick", "full"):
        ((path, why),) = check_images(index, how, False)
        assert path == str(place)
        assert "store it with 8 or 16 bits" in why
    item = ImageDataset(index, validation_transform(32, 32, MEAN, STD), 0)[0, index.paths.index(str(place))]
    assert isinstance(item, Unreadable)


def write_tiff(path: Path, values: np.ndarray, sample_format: int, bits: int) -> None:
    """A grey TIFF of one strip."""
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, values.nbytes), (339, sample_format)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    path.write_bytes(header + values.tobytes() + struct.pack("<H", len(tags)) + directory + bytes(4))


@pytest.mark.parametrize("size", [(9000, 1), (1, 9000)])
def test_a_strip_is_unreadable_not_huge(size: tuple[int, int], tmp_path: Path) -> None:
    make_folder(tmp_path)
    place = tmp_path / "val" / "cat" / "strip.png"
    noise(size).save(place)
    index = read_folder(tmp_path, "val", False)
    ((path, why),) = check_images(index, "quick", False, resize=256)
    assert path == str(place)
    assert "dataloader.resize" in why
    for transform in (validation_transform(256, 224, MEAN, STD), training_transform(256, 224, 0, True, MEAN, STD)):
        item = ImageDataset(index, transform, 0)[0, index.paths.index(str(place))]
        assert item == Unreadable(path, why)


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    noise((1, 1)).save(tmp_path / "a.png")
    seen = validation_transform(256, 224, MEAN, STD)(load_rgb(tmp_path / "a.png"), torch.Generator())
    assert seen.shape == (3, 224, 224)


# --- what the network sees


def assert_as_torchvision(image: Image.Image, resize: int, size: int) -> None:
    theirs = transforms.Compose(
        [transforms.Resize(resize), transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    assert torch.equal(validation_transform(resize, size, MEAN, STD)(image, torch.Generator()), theirs(image))


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (33, 1000)])
def test_validation_transform_is_torchvisions_bit_for_bit(size):
    assert_as_torchvision(noise(size), 256, 224)
    assert_as_torchvision(noise(size), 64, 64)


def test_validation_transform_on_photos_is_torchvisions_bit_for_bit():
    for path in photos(8):
        assert quick_check(str(path)) is None
        assert_as_torchvision(Image.open(path).convert("RGB"), 256, 224)


def test_training_transform_is_a_crop_of_the_resized_image():
    image = noise((60, 48))
    transform = training_transform(32, 24, 0, True, [0, 0, 0], [1, 1, 1])
    whole = transforms.ToTensor()(transforms.Resize(32)(image))
    crops = [whole[:, y : y + 24, x : x + 24] for y in range(9) for x in range(17)]
    crops += [crop.flip(2) for crop in crops]
    hits = []
    for i in range(40):
        seen = transform(image, stream(0, i))
        assert torch.equal(seen, transform(image, stream(0, i)))
        hits.append(next(n for n, crop in enumerate(crops) if torch.equal(crop, seen)))
    assert len(set(hits)) > 25
    assert 8 < sum(n >= len(crops) // 2 for n in hits) < 32


def test_flips_do_not_move_crops_and_padding_is_black():
    image = Image.new("RGB", (32, 32), "white")
    plain = training_transform(32, 32, 4, False, [0, 0, 0], [1, 1, 1])
    flipping = training_transform(32, 32, 4, True, [0, 0, 0], [1, 1, 1])
    flipped = 0
    for i in range(20):
        one, other = plain(image, stream(1, i)), flipping(image, stream(1, i))
        assert torch.equal(one, other) or torch.equal(one.flip(2), other)
        flipped += not torch.equal(one, other)
        assert set(one.unique().tolist()) <= {0.0, 1.0}
        assert one.sum() >= 3 * 28 * 28
    assert flipped


def test_dataset_depends_on_seed_epoch_and_number_alone(tmp_path):
    index = read_folder(make_folder(tmp_path), "val", False)
    transform = ImageSpec(28, 16).for_training()
    dataset = ImageDataset(index, transform, seed=3)
    image, label = dataset[(1, 4)]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, 1)
    torch.rand(7)
    assert torch.equal(image, dataset[(1, 4)][0])
    assert not torch.equal(image, dataset[(2, 4)][0])
    assert not torch.equal(image, ImageDataset(index, transform, seed=4)[(1, 4)][0])


def test_an_unreadable_file_is_kept_apart(tmp_path):
    index = read_folder(make_folder(tmp_path), "val", False)
    Path(index.paths[1]).write_bytes(b"")
    dataset = ImageDataset(index, validation_transform(16, 16, MEAN, STD), 0)
    batch = collate([dataset[(0, i)] for i in range(3)])
    assert isinstance(batch, Batch)
    assert (len(batch), batch.images.shape) == (2, (2, 3, 16, 16))
    assert batch.unreadable == (Unreadable(index.paths[1], "not an image that Pillow can read"),)
    alone = collate([dataset[(0, 1)]])
    assert (len(alone), len(alone.unreadable)) == (0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_an_epoch_without_overlap(world_size, shuffle):
    every = [EpochOrder(11, shuffle, 0, rank, world_size) for rank in range(world_size)]
    seen = sorted(i for order in every for _, i in order)
    assert seen == list(range(11))
    assert sum(map(len, every)) == 11
    equal = [EpochOrder(11, shuffle, 0, rank, world_size, 11 // world_size) for rank in range(world_size)]
    lists = [[i for _, i in order] for order in equal]
    assert {len(one) for one in lists} == {11 // world_size}
    assert len({i for one in lists for i in one}) == 11 // world_size * world_size

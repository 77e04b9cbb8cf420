"""Shards: the same images as in folders, at their places; and every way in which one can be wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.common.errors import DataError
from src.tasks import remembered, shards
from src.tasks.classification import Classification, ImageSpec
from src.tasks.decoding import load_rgb
from src.tasks.images import ImageFolderIndex, check_images, check_same_classes, leave_out, read_folder
from src.tasks.loading import LoaderSpec
from src.tasks.places import below, describe, holder, inside, is_inside, open_file
from src.tasks.splits import list_splits, unlabelled
from tests.support.logs import logged
from tests.support.stored import as_shards, file_bytes, write_tar
from tests.tasks.test_classification import FakeEngine

KEY = "dataloader.imagenet_path"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def stored(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_shards(tiny_images, tmp_path_factory.mktemp("shards"), each=5)


@pytest.fixture(scope="module")
def png(tiny_images: Path) -> bytes:
    return (tiny_images / "val" / "class0000" / "0.png").read_bytes()


def read(root: Path, *splits: str, **given) -> list[ImageFolderIndex]:
    return list_splits(root, splits or ("train", "val"), show_progress=False, **given)


def refused(root: Path, *words: str, splits: tuple[str, ...] = ("val",), **given) -> str:
    with pytest.raises(DataError) as caught:
        read(root, *splits, **given)
    for word in (KEY, *words):
        assert word in str(caught.value)
    return str(caught.value)


# --- places


def test_a_place_says_what_it_is_and_other_names_are_files(tmp_path: Path) -> None:
    place = inside(tmp_path / "a.tar", "x/1.jpg", 512, 100)
    assert is_inside(place)
    assert (holder(place), describe(place)) == (f"{tmp_path}/a.tar", f"{tmp_path}/a.tar#x/1.jpg")
    assert describe(inside("/d/b.arrow", "image", 17, 9)) == "/d/b.arrow#row 17"
    assert list(below([place], tmp_path)) == ["a.tar#x/1.jpg@512+100"]
    odd = inside("/d#1/a.TAR", "new\nline#2@1+1.jpg", 0, 3)
    assert (holder(odd), describe(odd)) == ("/d#1/a.TAR", "/d#1/a.TAR#new\nline#2@1+1.jpg")
    for name in ("/d/a#1@2+3.jpg", "/d/a.tar", "/d/a.tar.d/1.jpg", "/d/a.tar#1.jpg", "a.zip#1.jpg@2+3"):
        assert not is_inside(name)
        assert describe(name) == holder(name) == name
    plain = tmp_path / "a.tar#1@2"
    plain.write_bytes(b"content")
    assert open_file(plain).read() == b"content"


def test_a_place_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    assert file_bytes(inside(tmp_path / "a.tar", "x", 2, 5)) == b"23456"
    with pytest.raises(OSError, match="is shorter than when it was listed"):
        file_bytes(inside(tmp_path / "a.tar", "x", 6, 5))
    with pytest.raises(FileNotFoundError):
        file_bytes(inside(tmp_path / "b.tar", "x", 6, 5))


# --- what is found


def test_shards_hold_what_folders_hold(tiny_images: Path, stored: Path) -> None:
    """In files of one form and of another, with labels in .cls and in .json; in any order of reading."""
    for split, found in zip(("train", "val"), read(stored), strict=True):
        wanted = read_folder(tiny_images, split, False)
        assert (found.labels, found.classes, found.root) == (wanted.labels, ("0", "1", "2"), stored / split)
        for i in random.Random(0).sample(range(len(wanted)), len(wanted)):
            assert file_bytes(found.paths[i]) == Path(wanted.paths[i]).read_bytes()
            assert load_rgb(found.paths[i]).tobytes() == load_rgb(wanted.paths[i]).tobytes()
        assert check_images(found, "quick", False) == check_images(found, "full", False) == []
        assert pickle.loads(pickle.dumps(found)) == found
        assert len(set(found.listed())) == len(found)


@pytest.mark.parametrize("crop", ["random", "random_resized"])
def test_batches_of_photos_are_those_of_folders(crop: str, tmp_path: Path) -> None:
    """JPEG files much larger than what is shown of them, which may be decoded in another way than others."""
    for number in range(8):
        for split in ("train", "val"):
            place = tmp_path / "folders" / split / f"class{number % 2}" / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((300, 200 + number), 90).convert("RGB").save(place, quality=80)
    as_shards(tmp_path / "folders", tmp_path / "shards", each=3)
    found = []
    for root, workers in ((tmp_path / "folders", 0), (tmp_path / "shards", 0), (tmp_path / "shards", 2)):
        loading = LoaderSpec(batch_size=3, num_workers=workers, show_progress=False)
        task = Classification(FakeEngine(), *read(root), ImageSpec(32, 24, crop=crop), loading)
        batches = [*task.training_batches(1), *task.training_batches(2, 1)]
        assert [len(batch) for batch in batches] == [3, 3, 2, 3, 2]
        found.append(torch.cat([batch.images for batch in batches]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_archive_is_read_and_leavings_are_passed_over(form: int, tmp_path: Path, png: bytes) -> None:
    long = "./deep/" + "n" * 90 + "/été" if form != tarfile.USTAR_FORMAT else "./deep/n"
    files = [(f"{long}/1.PNG", png), (f"{long}/1.cls", b" 1\n"), ("0.png", png), ("0.cls", b"0")]
    leavings = [("._0.png", b"x"), ("__MACOSX/0.png", b"x"), ("0.txt", b"a cat"), ("1.seg.png", png)]
    archive = write_tar(tmp_path / "val" / "a.tar", [*files, *leavings], form)
    with tarfile.open(archive, "a", format=form) as more:
        more.add(tmp_path / "val", "folder", recursive=False)
    with logged("2 files .1 .seg.png, 1 .txt. of .* are not used", level=20):
        (found,) = read(tmp_path, "val")
    assert found.labels == [1, 0]
    assert [describe(path).partition("#")[2] for path in found.paths] == [f"{long}/1.PNG", "0.png"]
    assert [file_bytes(path) for path in found.paths] == [png, png]


def test_names_of_columns_have_no_effect_on_shards_and_folders(stored: Path, tiny_images: Path) -> None:
    for root in (stored, tiny_images):
        with logged(f"dataloader.label_column has no effect: {root} is no saved data set"):
            read(root, "val", label_column="kind")


def test_shards_of_all_splits_may_lie_beside_each_other(stored: Path, tmp_path: Path) -> None:
    for split, name in (("train", "train"), ("val", "validation")):
        for number, archive in enumerate(sorted((stored / split).iterdir())):
            os.link(archive, tmp_path / f"imagenet1k-{name}-{number:04d}.tar")
    for found, wanted in zip(read(tmp_path), read(stored), strict=True):
        assert found.labels == wanted.labels
        assert list(map(file_bytes, found.paths)) == list(map(file_bytes, wanted.paths))


def test_classes_have_the_names_of_a_file(stored: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(stored / name)
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\nowl\n")
    train, validation = read(tmp_path)
    assert train.classes == validation.classes == ("cat", "dog", "emu", "owl")
    check_same_classes(train, validation)
    # a class that had no images is not one that lost them
    kept, _ = leave_out(train, [(train.paths[0], "bad")], skip_unreadable=True)
    assert len(kept) == len(train) - 1
    assert read(stored, n_classes=5)[0].classes == ("0", "1", "2", "3", "4")
    for wrong in ("cat\ncat\n", "cat\n\ndog\n", ""):
        (tmp_path / "classes.txt").write_text(wrong)
        refused(tmp_path, "classes.txt: expected the name of a class in every line, each once")


def test_images_without_labels_are_found_below_a_folder(tmp_path: Path, png: bytes) -> None:
    write_tar(tmp_path / "in" / "some" / "a.tar", [("1.png", png), ("2.png", png), ("2.json", b'{"text": "no label"}')])
    write_tar(tmp_path / "in" / "b.tar", [("3.png", png), ("3.cls", b"no number")])
    root, places = unlabelled(tmp_path / "in", "calibration.images")
    assert root == tmp_path / "in"
    assert [file_bytes(place) for place in places] == [png] * 3
    (tmp_path / "in" / "loose.png").write_bytes(png)  # then these are the images, and archives are other files
    assert unlabelled(tmp_path / "in", "calibration.images")[1] == [f"{tmp_path}/in/loose.png"]
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"calibration.images: there are no images below .* compressed files"):
        unlabelled(tmp_path / "packed", "calibration.images")


# --- what is remembered


def test_a_shard_is_listed_once_as_long_as_it_stays_the_same(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "WORTH", 5)
    places: list[str] = []
    real = shards.read_shard

    def counted(path: Path, key: str) -> shards.Samples:
        places.append(path.name)
        return real(path, key)

    monkeypatch.setattr(shards, "read_shard", counted)
    folder = tmp_path / "val"
    folder.mkdir()
    for archive in (stored / "train").iterdir():
        (folder / archive.name).write_bytes(archive.read_bytes())
    wanted = read(tmp_path, "val")
    names = [path.name for path in sorted(folder.iterdir())]
    assert places == names
    assert read(tmp_path, "val") == wanted
    assert places == names
    os.utime(folder / names[1], (1, 1))
    assert read(tmp_path, "val") == wanted
    assert places == [*names, names[1]]
    (memory,) = (tmp_path / "cache").rglob("*.npz")
    for damage in (b"", b"no archive", memory.read_bytes()[:-30]):
        memory.write_bytes(damage)
        places.clear()
        assert read(tmp_path, "val") == wanted
        assert places == names


# --- what is refused


def cut(archive: Path, size: int) -> None:
    archive.write_bytes(archive.read_bytes()[:size])


def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path: Path, png: bytes) -> None:
    archive = write_tar(tmp_path / "val" / "a.tar", [("0.png", png), ("0.cls", b"0"), ("1.png", png), ("1.cls", b"1")])
    content = archive.read_bytes()
    with tarfile.open(archive) as opened:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in opened.getmembers()]
    cuts = {100, 512, 700, ends[-1] + 511, *(place for end in ends for place in (end - 100, end, end + 100))}
    for size in sorted(cuts):
        archive.write_bytes(content[:size])
        refused(tmp_path, "a.tar", "copy or write it again")
    archive.write_bytes(content[: ends[-1] + 512])  # nothing but padding is missing
    assert read(tmp_path, "val")[0].labels == [0, 1]
    spoilt = bytearray(content)
    spoilt[ends[1] : ends[1] + 512] = bytes([7] * 512)
    archive.write_bytes(spoilt)
    refused(tmp_path, "goes on behind its end")
    archive.write_bytes(content + content)
    refused(tmp_path, "goes on behind its end", "several archives")
    archive.write_bytes(b"")
    refused(tmp_path, "a.tar")


def test_a_compressed_shard_is_refused_by_its_name_and_by_its_content(tmp_path: Path, png: bytes) -> None:
    plain = write_tar(tmp_path / "a.tar", [("0.png", png), ("0.cls", b"0")]).read_bytes()
    for packed, program in (
        (gzip.compress(plain), "gunzip"),
        (bz2.compress(plain), "bunzip2"),
        (lzma.compress(plain), "unxz"),
    ):
        (tmp_path / "val").mkdir(exist_ok=True)
        for name in ("a.tar.gz", "a.tgz", "a.tar.zst", "a.tar"):
            (tmp_path / "val" / name).write_bytes(packed)
            refused(tmp_path, name, "compressed", program if name == "a.tar" else "gunzip", "unpack it to .tar")
            (tmp_path / "val" / name).unlink()


def test_samples_without_labels_are_named(tmp_path: Path, png: bytes) -> None:
    archive = tmp_path / "val" / "a.tar"
    write_tar(archive, [("0.png", png), ("0.cls", b"0"), ("x/1.png", png), ("2.png", png), ("2.json", b'{"a": 1}')])
    refused(tmp_path, f"2 of 3 images in {tmp_path}/val have no label", f"{archive}#x/1.png", "0001.cls")
    for name, content in (
        ("0.cls", b"cat"),
        ("0.cls", b"-1"),
        ("0.json", b'{"label": "cat"}'),
        ("0.json", b"{"),
        ("0.json", b'{"label": true}'),
    ):
        write_tar(archive, [("0.png", png), (name, content)])
        refused(tmp_path, "have no label that is a whole number from 0", f"{archive}#0.png")


def test_labels_beyond_the_classes_are_named(tmp_path: Path, png: bytes) -> None:
    archive = write_tar(tmp_path / "val" / "a.tar", [("0.png", png), ("0.cls", b"0"), ("1.png", png), ("1.cls", b"7")])
    refused(tmp_path, "go up to 7", "no image has the label 1, 2, 3, 4, 5, and 1 more", "--dataloader.num_classes 8")
    assert len(read(tmp_path, "val", n_classes=8)[0].classes) == 8
    refused(
        tmp_path, "1 labels", "beyond the 5 classes that dataloader.num_classes", f"{archive}#1.png (7)", n_classes=5
    )
    (tmp_path / "val" / "classes.txt").write_text("cat\ndog\n")
    refused(tmp_path, "beyond the 2 classes that classes.txt", "0 to 1")


def test_shards_without_images_or_with_doubtful_ones(tmp_path: Path, png: bytes) -> None:
    archive = tmp_path / "val" / "a.tar"
    write_tar(archive, [("0.cls", b"0"), ("a.0.png", png), ("b.gif", b"x")])
    refused(tmp_path, "holds no images, but .0.png, .gif", "ends at its first dot")
    write_tar(archive, [])
    refused(tmp_path, "holds no images, but nothing")
    write_tar(archive, [("0.png", png), ("0.jpg", png), ("0.cls", b"0")])
    refused(tmp_path, "sample 0 of", "several images (png, jpg)")
    write_tar(archive, [("0.png", png), ("0.png", png)])
    refused(tmp_path, "holds 0.png twice")


def test_folders_beside_shards_are_refused(tmp_path: Path, png: bytes) -> None:
    write_tar(tmp_path / "val" / "a.tar", [("0.png", png), ("0.cls", b"0")])
    (tmp_path / "val" / "cat").mkdir()
    refused(tmp_path, "holds shards (a.tar) and folders (cat)", "expected either")
    (tmp_path / "val" / "a.tar").rename(tmp_path / "val" / "a.tar.gz")  # an archive that was unpacked there
    (tmp_path / "val" / "cat" / "0.png").write_bytes(png)
    assert read(tmp_path, "val")[0].classes == ("cat",)


def test_an_unreadable_image_is_named_and_can_be_left_out(tmp_path: Path, png: bytes) -> None:
    archive = tmp_path / "val" / "a.tar"
    contents = {"0": png, "1": png[:60], "2": b"", "3": png}
    write_tar(archive, [one for n, data in contents.items() for one in ((f"{n}.png", data), (f"{n}.cls", b"0"))])
    (found,) = read(tmp_path, "val")
    bad = check_images(found, "quick", False)
    assert [describe(path) for path, _ in bad] == [f"{archive}#1.png", f"{archive}#2.png"]
    assert bad[1][1] == "the file is empty"
    with pytest.raises(DataError, match=f"2 unreadable images:\n  {archive}#1.png \\("):
        leave_out(found, bad, False)
    kept, _ = leave_out(found, bad, True)
    assert kept.paths == [found.paths[0], found.paths[3]]
    # and where it shows only when it is read
    for skip in (True, False):
        loading = LoaderSpec(batch_size=4, num_workers=1, skip_unreadable=skip, show_progress=False)
        task = Classification(FakeEngine(), found, found, ImageSpec(11, 9), loading)
        if skip:
            with logged(f"skipped unreadable image {archive}#1.png: "):
                assert [len(batch) for batch in task.training_batches(1)] == [2]
        else:
            with pytest.raises(DataError, match=f"2 unreadable images:\n  {archive}#"):
                list(task.training_batches(1))


def test_images_in_shards_are_remembered_as_readable_until_the_shard_changes(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "WORTH", 5)
    for archive in (stored / "train").iterdir():
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / archive.name).write_bytes(archive.read_bytes())
    (found,) = read(tmp_path, "val")

    def n_checked() -> int:
        memory = remembered.Remembered(found.root, "quick", "all")
        for path in found.paths:
            memory.look(path, lambda _: remembered.Look(None))
        return memory.n_checked

    assert n_checked() == 12
    assert check_images(found, "quick", False) == []
    assert n_checked() == 0
    os.utime(holder(found.paths[0]), (1, 1))
    assert n_checked() == 5

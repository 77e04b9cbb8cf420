"""Images that were checked are not read again, unless they changed since; whatever is wrong with the memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from src.common.errors import DataError
from src.tasks import decoding, remembered
from src.tasks.coco.data import read_coco
from src.tasks.coco.image_checks import require_images
from src.tasks.images import ImageFolderIndex, check_images, read_folder
from tests.support.coco import contents, entry, rectangle, write

Counted = list[str]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolderIndex:
    """Twelve images in a data set that is worth remembering, and a cache folder of their own."""
    monkeypatch.setattr(remembered, "WORTH", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "val" / "a").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (20 + number, 10), (number, 0, 0)).save(tmp_path / "val" / "a" / f"{number:02}.png")
    return read_folder(tmp_path, "val", False)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The names of the files that are really read."""
    names: Counted = []

    def check(path: str) -> str | None:
        names.append(os.path.basename(path))
        return decoding.quick_check(path)

    monkeypatch.setitem(decoding.CHECKS, "quick", check)
    return names


def read(index: ImageFolderIndex, names: Counted, part: str = "all") -> Counted:
    """Which files a check reads; it finds no problem."""
    names.clear()
    assert check_images(index, "quick", False, part=part) == []
    return sorted(names)


def test_a_second_check_reads_nothing(index: ImageFolderIndex, checked: Counted, tmp_path: Path) -> None:
    assert len(read(index, checked)) == 12
    assert read(index, checked) == []
    looks = dict(decoding.looks(index.paths, "quick", False, index.root))
    assert [looks[path].size for path in index.paths] == [(20 + number, 10) for number in range(12)]
    assert [path.parent for path in (tmp_path / "cache").rglob("*.npy")] == [tmp_path / "cache/pqf/checked_images"]
    assert not list((tmp_path / "cache").rglob(".*"))


def test_whatever_changed_is_read_again(index: ImageFolderIndex, checked: Counted) -> None:
    read(index, checked)
    first, second, third, fourth = (Path(path) for path in index.paths[:4])
    os.utime(first, (1, 1))
    with open(second, "ab") as file:
        file.write(b"x")
    os.replace(fourth, third)
    Image.new("RGB", (5, 5)).save(fourth)
    assert read(index, checked) == ["00.png", "01.png", "02.png", "03.png"]
    assert read(index, checked) == []


def test_a_spoilt_file_is_found_and_never_remembered(index: ImageFolderIndex, checked: Counted) -> None:
    read(index, checked)
    Path(index.paths[5]).write_bytes(b"no image")
    for _ in range(2):
        checked.clear()
        ((path, _),) = check_images(index, "quick", False)
        assert path == index.paths[5]
        assert checked == ["05.png"]
    os.unlink(index.paths[6])
    assert [path for path, _ in check_images(index, "quick", False)] == index.paths[5:7]


def test_sizes_are_judged_anew(index: ImageFolderIndex, checked: Counted) -> None:
    read(index, checked)
    checked.clear()
    narrow = Path(index.paths[3])
    Image.new("RGB", (9000, 1)).save(narrow)
    for resize, bad in ((1, []), (256, [str(narrow)])):
        assert [path for path, _ in check_images(index, "quick", False, resize=resize)] == bad
    assert checked == ["03.png"]


def test_kinds_of_checks_and_data_sets_are_kept_apart(
    index: ImageFolderIndex, checked: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(index, checked)
    checked.clear()
    monkeypatch.setitem(decoding.CHECKS, "full", lambda path: checked.append(path))  # type: ignore[func-returns-value]
    assert check_images(index, "full", False) == []
    assert len(checked) == 12
    monkeypatch.setattr(remembered.PIL, "__version__", "0.1")
    assert len(read(index, checked)) == 12


def test_several_processes_know_what_all_have_found(
    index: ImageFolderIndex, checked: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "WORTH", 5)
    for rank in (0, 1):
        part = ImageFolderIndex(index.root, index.classes, index.paths[rank::2], index.labels[rank::2])
        assert len(read(part, checked, f"{rank}of2")) == 6
    assert read(index, checked) == []


@pytest.mark.parametrize("damage", ["empty", "text", "other", "folder"])
def test_a_damaged_memory_is_none(damage: str, index: ImageFolderIndex, checked: Counted, tmp_path: Path) -> None:
    read(index, checked)
    (file,) = (tmp_path / "cache").rglob("*.npy")
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        content = {"empty": b"", "text": b"no numbers" * 50, "other": file.read_bytes()[:-7]}[damage]
        file.write_bytes(content)
    assert len(read(index, checked)) == 12
    assert read(index, checked) == ([] if damage != "folder" else [f"{number:02}.png" for number in range(12)])


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null", "relative"])
def test_where_nothing_can_be_written_nothing_is_remembered(
    place: str, index: ImageFolderIndex, checked: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setenv("HOME", str(tmp_path / "val" / "a" / "00.png"))  # a file: no folder can be in it
    for _ in range(2):
        assert len(read(index, checked)) == 12


def test_small_data_sets_are_not_worth_it(
    index: ImageFolderIndex, checked: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remembered, "WORTH", 1000)
    read(index, checked)
    assert not (tmp_path / "cache").exists()


def test_records_that_nobody_uses_are_removed(index: ImageFolderIndex, checked: Counted, tmp_path: Path) -> None:
    read(index, checked)
    (file,) = (tmp_path / "cache").rglob("*.npy")
    stale = file.with_name("stale.0of1.npy")
    stale.write_bytes(b"")
    os.utime(stale, (1, 1))
    os.utime(index.paths[0], (1, 1))
    read(index, checked)
    assert not stale.exists()
    assert file.exists()


def test_unknown_checks_are_listed(index: ImageFolderIndex) -> None:
    with pytest.raises(DataError, match="none, quick, full"):
        check_images(index, "thorough", False)


def test_images_of_a_detection_set_are_remembered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: Counted
) -> None:
    monkeypatch.setattr(remembered, "WORTH", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "coco"
    objects = [rectangle(number, number, 1, [2, 2, 10, 10]) for number in (1, 2)]
    write(root, "val", contents([entry(1, 40, 30), entry(2, 40, 30)], objects))
    for wanted in (2, 0):
        checked.clear()
        kept, bad = require_images(read_coco(root, "val"), "quick", show=False)
        assert (len(kept), bad, len(checked)) == (2, [], wanted)
    # what is remembered of a file says its size: other annotations are still compared with it
    write(root, "val", contents([entry(1, 40, 30), entry(2, 30, 40)], objects), pictures=False)
    _, bad = require_images(read_coco(root, "val"), "quick", skip_unreadable=True, show=False)
    assert ["40x30 pixels, but the annotations say 30x40" in why for _, why in bad] == [True]


def test_a_quick_look_at_a_png_does_not_decode_it(tmp_path: Path) -> None:
    """Its size and orientation are in front of its pixels: a file damaged behind them is for the loader to find."""
    path = tmp_path / "damaged.png"
    Image.effect_noise((64, 64), 100).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)
    assert decoding.full_check(str(path)) is not None
    (found,) = decoding.looks([str(path)], "quick", False, tmp_path)
    assert found == (str(path), remembered.Look(None, (64, 64), 1))

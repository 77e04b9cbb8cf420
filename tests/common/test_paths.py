"""Any name that a file can have is written; one that no file can have is told in one message."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from src.common.errors import RunError, SettingsError
from src.common.paths import (
    check_name,
    holds_something,
    remove_half_written,
    temporary_name,
    write_atomically,
    write_folder_atomically,
    write_text,
)
from src.model_files.safetensors_file import read_container, write_container

LETTERS = ["x", "é", "模"]


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("length", [200, 240, 243, 250, 255])
def test_the_longest_names_are_written(length: int, letter: str, tmp_path: Path) -> None:
    n = (length - len(".safetensors")) // len(letter.encode())
    path = tmp_path / "new folder" / f"{letter * n}.safetensors"
    for text in ("first", "second"):
        write_text(path, text)
        assert path.read_text() == text
    write_container(path, {}, {"format": "x"})
    assert read_container(path)[1] == {"format": "x"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["short", "x" * 255, "模" * 85, "\udcff" * 200])
def test_temporary_names_are_legal_and_found_again(name: str, tmp_path: Path) -> None:
    stray = tmp_path / temporary_name(name)
    assert len(os.fsencode(stray.name)) <= 143
    stray.touch()
    remove_half_written(tmp_path)
    assert not stray.exists()


def test_what_killed_writers_left_is_not_something(tmp_path: Path) -> None:
    folder = tmp_path / "resume"
    assert not holds_something(folder)
    folder.mkdir()
    assert not holds_something(folder)
    (folder / temporary_name("run.json")).touch()
    assert not holds_something(folder)
    (folder / "run.json").touch()
    assert holds_something(folder)
    assert holds_something(folder / "run.json")


IMPOSSIBLE = {
    "a file": "x" * 256,
    "letters of several bytes": "模" * 86,
    "a folder": f"{'y' * 300}/model.pth",
    "below a folder that is not there": f"new/{'y' * 300}/model.pth",
    "zero": "a\0b",
    "a path": "/".join(["folder"] * 1000),
}


@pytest.mark.parametrize("name", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_name_that_no_file_can_have_is_told_before_anything_is_made(name: str, tmp_path: Path) -> None:
    for act in (check_name, lambda path: write_atomically(path, lambda temporary: None)):  # noqa: ARG005
        with pytest.raises(SettingsError, match=r"no file can be called .*Choose another name") as error:
            act(tmp_path / name)
        assert error.value.status == 2
        assert len(str(error.value)) < 300
        assert list(tmp_path.iterdir()) == []


def test_names_that_can_be_are_not_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "new", "new/below", "file/below", "x" * 255, "ä b\n"):
        check_name(tmp_path / name)


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "here" / "folder"

    def good(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("new")

    def bad(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="no space left on the disk; nothing was left behind"):
        write_folder_atomically(place, bad)
    assert not list(place.parent.iterdir())
    for _ in range(2):
        write_folder_atomically(place, good)
        (place / "more").write_text("of the one that is replaced")
    with pytest.raises(RunError, match="the previous folder is unchanged"):
        write_folder_atomically(place, bad)
    assert (place / "more").exists()
    write_folder_atomically(place, good)
    assert [str(path.relative_to(place)) for path in sorted(place.rglob("*"))] == ["below", "below/file"]
    assert [path.name for path in place.parent.iterdir()] == ["folder"]

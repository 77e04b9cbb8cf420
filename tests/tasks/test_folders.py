"""Which files of a class folder are images: by their endings, without what systems and programs leave behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from src.common.errors import DataError
from src.tasks.images import read_folder
from tests.support.logs import logged


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images each, one of them deeper."""
    for name in ("fir", "oak"):
        put(tmp_path / "val" / name / "1.png", tmp_path / "val" / name / "more like this" / "2.PNG")
    return tmp_path


LEFT_BEHIND = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".Trash-1000"]


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_leavings_are_neither_classes_nor_images(name: str, root: Path) -> None:
    expected = read_folder(root, "val", False)
    put(root / "val" / name / "1.png", root / "val" / name / "fir" / "1.png", root / "val" / "oak" / name / "1.png")
    put(root / "val" / "oak" / "more like this" / name / "deep" / "1.png", root / "val" / "oak" / "._1.png")
    assert read_folder(root, "val", False) == expected
    assert [os.path.relpath(path, root / "val") for path in expected.paths] == [
        f"{kind}/{image}" for kind in ("fir", "oak") for image in ("1.png", "more like this/2.PNG")
    ]


def test_images_that_are_not_read_are_counted_and_said(root: Path) -> None:
    put(root / "val" / "fir" / "3.gif", root / "val" / "fir" / "4.jfif", root / "val" / "oak" / "a" / "5.GIF")
    (root / "val" / "oak" / "Thumbs.db").write_bytes(b"x")
    with logged(r"^3 files \(2 \.gif, 1 \.jfif\) of .*val are not used.*\.jpeg") as lines:
        assert len(read_folder(root, "val", False)) == 4
    assert len(lines) == 1


def test_other_files_are_counted_too(root: Path) -> None:
    for name in ("1.xml", "2.xml", "LICENSE"):
        (root / "val" / "oak" / name).write_text("x")
    with logged(r"3 files \(1 without an ending, 2 \.xml\) of .*val are not used", level=20) as lines:
        read_folder(root, "val", False)
    assert len(lines) == 1


def test_a_link_that_leads_back_is_not_followed(root: Path) -> None:
    expected = read_folder(root, "val", False)
    (root / "val" / "fir" / "again").symlink_to(root / "val" / "fir")
    (root / "val" / "fir" / "all").symlink_to(root)
    assert read_folder(root, "val", False) == expected
    (root / "val" / "fir" / "oak").symlink_to(root / "val" / "oak")
    assert len(read_folder(root, "val", False)) == 6  # other links are


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(root: Path) -> None:
    closed = root / "val" / "fir" / "more like this"
    closed.chmod(0)
    try:
        with pytest.raises(DataError, match="more like this cannot be read: Permission denied"):
            read_folder(root, "val", False)
    finally:
        closed.chmod(0o755)

"""Fetching the authors' models: what is not the published file is never written."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.model_files.published import BLOB_IDS, blob_id
from src.paper_models import main


def test_the_blob_id_is_git_s() -> None:
    # `printf 'hello\n' | git hash-object --stdin`
    assert blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_another_file_is_refused_and_an_old_one_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (source / "resnet18.pth").write_bytes(b"not the model")
    (folder / "resnet18.pth").write_bytes(b"what was there")
    assert main(["resnet18.pth", "--folder", str(folder), "--base_url", source.as_uri()]) == 1
    assert "is not the published file" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["resnet18.pth"]
    assert (folder / "resnet18.pth").read_bytes() == b"what was there"


def test_no_network_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet18.pth", "--folder", str(tmp_path), "--base_url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert "cannot download" in error
    assert str(tmp_path / "resnet18.pth") in error


def test_an_unknown_name_lists_the_published_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["resnet19.pth", "--folder", str(tmp_path)])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in BLOB_IDS)


@pytest.mark.published
def test_the_published_resnet18_is_verified(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (published / "published").as_uri()
    assert main(["resnet18.pth", "--folder", str(tmp_path), "--base_url", source]) == 0
    assert "downloaded, verified" in capsys.readouterr().out
    assert main(["resnet18.pth", "--folder", str(tmp_path), "--base_url", "http://127.0.0.1:9"]) == 0
    assert "already there, verified" in capsys.readouterr().out

"""Every data set of the registries is written as a folder that can be read; a further one is one entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from src import train_resnet
from src.common.registry import Entry
from src.tasks.coco.backends import BACKENDS
from src.tasks.coco.data import read_coco
from src.tasks.demo_data import digit_scenes
from src.tasks.images import read_folder
from src.tasks.sources import SCENES, SOURCES, prepare
from tests.conftest import write_images


@pytest.mark.parametrize("name", SOURCES.names(written=True))
def test_a_data_set_of_folders_is_written_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "val": 20})
    prepare(name, tmp_path / "data")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    for split in ("train", "val"):
        assert len(read_folder(tmp_path / "data", split, False).paths) > 0
    prepare(name, tmp_path / "data")
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SCENES.names(written=True))
def test_a_data_set_of_scenes_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 4, "val": 2})
    prepare(name, tmp_path / "data", sources=SCENES)
    for split in ("train", "val"):
        assert len(read_coco(tmp_path / "data", split)) > 0


@pytest.mark.parametrize("name", BACKENDS)
def test_an_evaluator_has_the_interface_of_pycocotools(name: str) -> None:
    if name == "faster":
        pytest.importorskip("faster_coco_eval")
    kind = BACKENDS[name]()
    assert all(callable(getattr(kind, method)) for method in ("evaluate", "accumulate", "summarize"))


def write_noise(root: Path) -> None:
    """A data set of its own."""
    if not root.exists():
        write_images(root / "train", 2, 4, seed=0)
        write_images(root / "val", 2, 2, seed=1)


def test_one_entry_makes_a_data_set_known_to_the_command(tmp_path: Path) -> None:
    flags = [
        "--config", "../config/train_resnet18.yaml", "--model.weights", "none", "--model.use_compression", "False",
        "--epochs", "1",
        "--dataloader.imagenet_path", str(tmp_path / "noise"), "--dataloader.source", "noise",
        "--dataloader.num_workers", "0",
        "--dataloader.batch_size", "4", "--dataloader.resize", "32", "--dataloader.image_size", "32", "--output_path",
        str(tmp_path / "run"),
    ]  # fmt: skip
    assert train_resnet.main(flags) == 2  # not known
    with SOURCES.added("noise", Entry("tests.tasks.test_registry:write_noise", "noise", {"written": True})):
        assert train_resnet.main(flags) == 0
    assert (tmp_path / "run" / "results.json").exists()

"""Whole runs on shards and on saved data sets: bit for bit those on the folders that they were made of."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import src.compress as command
from src import evaluate_classifier, train_classifier
from src.model_files.pth import read_tensors
from src.tasks.splits import list_splits
from tests.conftest import write_images
from tests.recipes.test_distillation import saved
from tests.run.test_resume import at_step, stopped
from tests.support import small_runs
from tests.support.launching import launch
from tests.support.stored import as_saved, as_shards, file_bytes
from tests.test_entries import paths, refused

FLAGS = [
    *small_runs.training(batch=6, workers=2, sls=20, k_means=4),
    *("--model.arch", "tests.support.own_network:Net", "--epochs", "2", "--dataloader.crop_padding", "4"),
    *("--calibration.use", "True", "--distillation.weight", "1", "--distillation.images_per_batch", "3"),
]
pytestmark = pytest.mark.usefixtures("one_thread")
HOW: dict[str, Callable[[Path, Path], Path]] = {"shards": as_shards, "saved": as_saved}


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Further images, of which the labels are not used: in folders of one kind."""
    root = tmp_path_factory.mktemp("more")
    write_images(root / "train", 1, 7, seed=5)
    shutil.copytree(root / "train", root / "val")
    return root


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dense") / "dense.pth", 3)


def train(images: Path, more: Path, dense: Path, output: Path) -> list[str]:
    return [*FLAGS, *paths(images, output), "--distillation.images", str(more), "--model.weights", str(dense)]


@pytest.fixture(scope="module")
def whole(small_images: Path, more: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train_classifier.main(train(small_images, more / "train", dense, output)) == 0
    return output


def same(one: Path, other: Path) -> None:
    for name in ("0.pth", "1.pth", "2.pth"):
        found, wanted = (read_tensors(run / "trained_models" / name) for run in (one, other))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    found, wanted = (json.loads((run / "results.json").read_text()) for run in (one, other))
    assert found["history"] == wanted["history"]


@pytest.mark.parametrize("how", HOW)
def test_training_evaluation_and_resuming_are_those_on_folders(
    how: str,
    small_images: Path,
    more: Path,
    dense: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, further = HOW[how](small_images, tmp_path / "images"), HOW[how](more, tmp_path / "more")
    further = further if how == "saved" else further / "train"
    arguments = [*train(images, further, dense, tmp_path / "run"), "--checkpoint_every_n_steps", "1"]
    assert stopped(arguments, signal.SIGINT, at_step(tmp_path / "run", 2), train_classifier.main) == 130
    assert train_classifier.main(arguments) == 0
    assert "resume: resumes" in capsys.readouterr().out
    same(tmp_path / "run", whole)
    flags = ["--config", "../config/evaluate_resnet.yaml", "--model.arch", "tests.support.own_network:Net"]
    flags += ["--dataloader.imagenet_path", str(images), *small_runs.evaluation(workers=2)]
    flags += ["--model.state_dict_compressed", str(tmp_path / "run" / "trained_models" / "2.pth")]
    wanted = json.loads((whole / "results.json").read_text())["history"]["2"]["accuracy"]
    assert evaluate_classifier.main([*flags, "--expected.accuracy", str(wanted), "--expected.tolerance", "0"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_two_processes_find_in_shards_what_they_find_in_folders(
    how: str, small_images: Path, more: Path, dense: Path, tmp_path: Path
) -> None:
    stored, further = HOW[how](small_images, tmp_path / "images"), HOW[how](more, tmp_path / "more")
    for images, others, name in ((small_images, more / "train", "folders"), (stored, further, "stored")):
        others = others if how == "saved" or name == "folders" else others / "train"
        ended = launch("torchrun", ["-m", "src.train_classifier", *train(images, others, dense, tmp_path / name)])
        assert ended.status == 0, ended.text
    same(tmp_path / "stored", tmp_path / "folders")


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_process_that_is_started_anew_reads_the_same(how: str, small_images: Path, tmp_path: Path) -> None:
    (index,) = list_splits(HOW[how](small_images, tmp_path / "images"), ("train",))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(file_bytes, index.paths) == list(map(file_bytes, index.paths))


def test_a_run_does_not_go_on_with_other_labels(
    small_images: Path, more: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = as_shards(small_images, tmp_path / "images", each=24)
    arguments = [*train(images, more, dense, tmp_path / "run"), "--checkpoint_every_n_steps", "1"]
    assert stopped(arguments, signal.SIGINT, at_step(tmp_path / "run", 1), train_classifier.main) == 130
    capsys.readouterr()
    archive = images / "train" / "train-000000.tar"
    archive.write_bytes(archive.read_bytes().replace(b"1" + bytes(511), b"0" + bytes(511), 1))  # of one image
    refused(capsys, train_classifier.main, arguments, "training and validation images")


def test_a_network_is_calibrated_with_shards_without_labels(
    more: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which one image is unreadable: as with a folder in which it is not."""
    archive = as_shards(more, tmp_path / "shards") / "train" / "train-000000.tar"
    content = bytearray(archive.read_bytes())
    content[512:600] = bytes(88)  # the first bytes of the first image
    archive.write_bytes(content)
    shutil.copytree(more / "train", tmp_path / "folder")
    (tmp_path / "folder" / "class0000" / "0.png").unlink()
    found = []
    for name, images in (("a", tmp_path / "folder"), ("b", archive.parent)):
        flags = ["--model.arch", "tests.support.own_network:Net", "--model.weights", str(dense), "--device", "cpu"]
        flags += ["--output_path", str(tmp_path / name), "--calibration.images", str(images)]
        assert command.main([*flags, "--calibration.image_size", "32", "--save_format", "pth"]) == 0
        found.append(read_tensors(tmp_path / name / "model.pth"))
    assert f"left out 1 unreadable images: {archive}#00000.png (" in capsys.readouterr().out
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])

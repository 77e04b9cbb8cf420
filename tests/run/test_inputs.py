"""What a user most often forgets is told at once: before torch, which takes seconds, is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from src import recipes
from src.architectures import ARCHITECTURES
from src.run.inputs import DATA, check_inputs, data_folder
from src.settings import load
from src.settings.reach import JOBS, TASKS
from src.tasks.sources import BY_TASK
from tests.conftest import ROOT

EVALUATE = "../config/evaluate_resnet.yaml"

CODE = """
import importlib, sys
status = importlib.import_module("src." + sys.argv[1]).main(sys.argv[2:])
print("torch was loaded" if "torch" in sys.modules else "without torch")
sys.exit(status)
"""
PLACE = "PLACE"
"""Stands for a folder that exists."""
OUT = ["--output_path", f"{PLACE}/out"]
IMAGES = ["--dataloader.imagenet_path", PLACE]
WEIGHTS = ["--model.weights", "none"]
DENSE = ["--model.use_compression", "False", *WEIGHTS]
CASES = [
    ("train_resnet", OUT, "dataloader.imagenet_path is still the placeholder <your_imagenet_path_here>"),
    ("train_resnet", IMAGES, "output_path is still the placeholder"),
    (
        "train_resnet",
        [*OUT, "--dataloader.imagenet_path", "nowhere"],
        "dataloader.imagenet_path: nowhere does not exist",
    ),
    ("train_resnet", ["--model.arch", "resnet19"], "model.arch: 'resnet19' is not known for classification; known: "),
    ("train_resnet", ["--model.arch", "resnet19"], "; did you mean resnet"),
    ("train_resnet", ["--model.arch", "maskrcnn"], "model.arch: 'maskrcnn' is not known for classification; known: "),
    ("train_resnet", ["--model.weights", "missing.pth"], "model.weights: missing.pth does not exist"),
    ("train_resnet", [*OUT, *IMAGES, "--dataloader.source", "circles"], "dataloader.source: 'circles' is not known"),
    ("train_maskrcnn", OUT, "dataloader.coco_path is still the placeholder"),
    ("train_maskrcnn", ["--dataloader.coco_path", PLACE], "output_path is still the placeholder"),
    ("train_maskrcnn", ["--model.arch", "resnet50"], "'resnet50' is not known for detection; known: maskrcnn"),
    (
        "train_maskrcnn",
        [*OUT, "--dataloader.coco_path", PLACE, "--dataloader.source", "digit_crops"],
        "dataloader.source: 'digit_crops' is not known; there are folder, digits",
    ),
    ("train_resnet", [*OUT, "--dataloader.imagenet_path", "hf:a/b/c/d"], "hf:a/b/c/d is no name of a data set"),
    ("evaluate_resnet", ["--model.state_dict_compressed", "missing.pth"], "missing.pth does not exist"),
    ("evaluate_resnet", ["--model.state_dict_compressed", "missing.pth"], "make paper-models"),
    ("evaluate_resnet", ["--model.state_dict_compressed", "null"], "the file to evaluate is not set"),
    ("evaluate_resnet", ["--model.use_compression", "False", "--model.weights", "m.pth"], "m.pth does not exist"),
    ("evaluate_resnet", DENSE, "dataloader.imagenet_path is still the placeholder"),
    ("evaluate_resnet", [*DENSE, "--model.arch", "maskrcnn"], "'maskrcnn' is not known for classification"),
    ("evaluate_maskrcnn", DENSE, "dataloader.coco_path is still the placeholder"),
    ("evaluate_maskrcnn", ["--evaluation.detections", "found.json"], "found.json does not exist"),
]


@pytest.mark.parametrize(("entry", "flags", "words"), CASES, ids=[f"{e}-{w[:40]}" for e, _, w in CASES])
def test_bad_input_is_told_before_torch_is_loaded(entry: str, flags: list[str], words: str, tmp_path: Path) -> None:
    given = [flag.replace(PLACE, str(tmp_path)) for flag in flags]
    done = subprocess.run(
        [sys.executable, "-c", CODE, entry, *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert words in done.stderr
    assert "without torch" in done.stdout
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize("task", DATA)
def test_a_dataset_that_is_written_needs_no_folder(task: str, tmp_path: Path) -> None:
    key, _ = DATA[task]
    settings = load(
        "../config/train_resnet18.yaml", ["--dataloader.source", "digits", f"--{key}", str(tmp_path / "new")]
    )
    assert data_folder(settings, task)[0] == tmp_path / "new"


def test_a_packed_file_says_itself_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    flags = ["--model.arch", "resnet19", "--model.state_dict_compressed", str(tmp_path / "model.safetensors")]
    check_inputs(load(EVALUATE, [*flags, "--dataloader.imagenet_path", str(tmp_path)]), "evaluate", "classification")


def test_every_task_has_data_and_recipes() -> None:
    assert set(DATA) == set(TASKS) == set(BY_TASK)
    assert {ARCHITECTURES.fact(name, "task") for name in ARCHITECTURES} == set(TASKS)
    for job in JOBS:
        for task in TASKS:
            name = "compress_only" if job == "compress" else f"{job}_{task}"  # for any task
            assert callable(getattr(recipes, name))

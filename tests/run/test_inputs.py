"""What a user most often forgets is told at once: before torch, which takes seconds, is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CODE = """
import importlib, sys
status = importlib.import_module("src." + sys.argv[1]).main(sys.argv[2:])
print("torch was loaded" if "torch" in sys.modules else "without torch")
sys.exit(status)
"""
IMAGES = ["--dataloader.imagenet_path", "/tmp"]
CASES = [
    ("train_resnet", [], "dataloader.imagenet_path is still the placeholder <your_imagenet_path_here>", ["--output_path", "out"]),
    ("train_resnet", IMAGES, "output_path is still the placeholder", []),
    ("train_resnet", ["--dataloader.imagenet_path", "nowhere", "--output_path", "o"], "nowhere does not exist", []),
    ("train_resnet", ["--model.arch", "resnet19"], "model.arch: 'resnet19' is not known for classification; known: ", []),
    ("train_resnet", ["--model.arch", "maskrcnn"], "model.arch: 'maskrcnn' is not known for classification", []),
    ("train_resnet", ["--model.weights", "missing.pth"], "model.weights: missing.pth does not exist", []),
    ("train_resnet", ["--dataloader.source", "circles", "--output_path", "o", *IMAGES], "'circles' is not known", []),
    ("train_maskrcnn", ["--output_path", "o"], "dataloader.coco_path is still the placeholder", []),
    ("train_maskrcnn", ["--model.arch", "resnet50"], "'resnet50' is not known for detection; known: maskrcnn", []),
    ("evaluate_resnet", ["--model.state_dict_compressed", "missing.pth"], "missing.pth does not exist", ["make paper-models"]),
    ("evaluate_resnet", ["--model.use_compression", "False", "--model.weights", "m.pth"], "m.pth does not exist", []),
    ("evaluate_maskrcnn", ["--evaluation.detections", "found.json"], "found.json does not exist", []),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "flags", "words", "more"), CASES, ids=[f"{e}-{w[:30]}" for e, _, w, _ in CASES])
def test_bad_input_is_told_before_torch_is_loaded(
    entry: str, flags: list[str], words: str, more: list[str], tmp_path: Path
) -> None:
    given = [*flags, *(more if more and more[0].startswith("--") else [])]
    done = subprocess.run(
        [sys.executable, "-c", CODE, entry, *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert all(word in done.stderr for word in more if not word.startswith("--") and word != "out")
    assert "without torch" in done.stdout
    assert not (ROOT / "out").exists()
    assert not list(tmp_path.iterdir())

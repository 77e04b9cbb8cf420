"""Every example runs as it is, with the package under the name that users know it by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"timm_model": "timm", "own_training_loop": "sklearn"}
SAYS = {
    "torchvision_model": ["the loaded network computes the same", "bytes on disk"],
    "timm_model": ["channels may be reordered together", "computes the same"],
    "own_training_loop": ["fine-tuned: "],
}


def run(example: Path, tmp_path: Path) -> str:
    (tmp_path / "pqf").symlink_to(ROOT / "src", target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_says_what_it_is_to_show(example: Path, tmp_path: Path) -> None:
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    printed = run(example, tmp_path)
    for words in SAYS[example.stem]:
        assert words in printed, printed
    if example.stem == "own_training_loop":
        found = {line.split(": ")[0]: float(line.split(": ")[1][:-2]) for line in printed.splitlines()[-3:]}
        assert found["dense"] > 95
        assert found["fine-tuned"] > found["dense"] - 5

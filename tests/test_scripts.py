"""The scripts beside the package run on the code as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import MEASUREMENTS
from tests.conftest import ROOT
from tests.support.patience import PATIENCE


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_figure_of_the_readme_is_drawn_from_the_real_search(tmp_path: Path) -> None:
    printed = run("imgs.permutation", "--output", str(tmp_path / "figure.png"))
    assert "det(Cov)" in printed
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path: Path) -> None:
    run("benchmarks", "--small", "--results", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.json" for name in MEASUREMENTS)

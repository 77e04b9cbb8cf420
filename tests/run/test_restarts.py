"""torchrun starts the processes of a run again when one is lost, or when machines leave or come, and they go on with the
run: nobody has to say so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_images
from tests.support.launching import environment, need
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.timeout(2 * PATIENCE)


@pytest.mark.parametrize(
    ("seed", "kills", "images"), [(0, 2, 8), pytest.param(1, 20, 40, marks=pytest.mark.slow)], ids=["2", "20"]
)
def test_a_run_that_loses_processes_ends_as_the_one_that_lost_none(
    seed: int, kills: int, images: int, tmp_path: Path
) -> None:
    """One of two processes is killed, drawn at random, at moments spread over search, clustering, training and end."""
    need("torchrun")
    write_images(tmp_path / "images" / "train", 3, images, seed=0)
    write_images(tmp_path / "images" / "val", 3, 4, seed=1)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.losing", *map(str, (tmp_path, tmp_path / "images", seed, kills))],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report["kills"]) >= kills
    if kills >= 20:
        assert {rank for rank, _ in report["kills"]} == {0, 1}
        assert {was for _, was in report["kills"]} >= {"clustering", "training or validating"}, report["kills"]
    for lost in report["lost"]:
        assert lost == report["whole"], [name for name in lost if lost[name] != report["whole"].get(name)]

"""A real network, 50 times smaller, without training and without labels."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import calibrate
from tests.conftest import DATA

WEIGHTS, PHOTOS = DATA / "cifar10_resnet18_dense.pth", DATA / "cifar10_12k.tar.gz"


@pytest.mark.slow
@pytest.mark.skipif(
    not (WEIGHTS.exists() and PHOTOS.exists()), reason=f"no CIFAR-10 network at {DATA} (set PQF_TEST_DATA)"
)
def test_calibrated_with_256_photos_it_keeps_nine_of_ten_answers(tmp_path: Path) -> None:
    with tarfile.open(PHOTOS) as archive:
        archive.extractall(tmp_path, filter="data")
    figures = tmp_path / "calibrate.json"
    calibrate.main(
        ["--weights", str(WEIGHTS), "--photos", str(tmp_path / "cifar10"), "--count", "256", "--json", str(figures)]
    )
    dense, plain, retaken, calibrated = json.loads(figures.read_text())["rows"]
    assert plain["same answer"] < 40
    assert calibrated["same answer"] > 90
    assert calibrated["same answer"] > retaken["same answer"] + 7
    assert calibrated["top-1"] > dense["top-1"] - 3
    assert calibrated["ratio"] > 50

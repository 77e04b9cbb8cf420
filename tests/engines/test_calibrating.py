"""Two real processes that calibrate a network together find what one finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import src.compress as command
from src.model_files.packed import load_packed
from tests.support.calibrating import as_values, found_by, networks
from tests.support.launching import launch

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("found")
    finished = launch("torchrun", ["-m", "tests.support.calibrating", str(folder)])
    assert finished.status == 0, finished.text
    assert finished.left == 0
    return torch.load(folder / "found.pth")


def test_all_processes_find_the_same(found: dict) -> None:
    for one, other in found.values():
        assert one == other
    assert found["resumed"] == found["odd"]


@pytest.mark.parametrize("name", sorted(networks()))
def test_and_it_is_what_one_process_finds(name: str, found: dict) -> None:
    alone, together = as_values(found_by(None, *networks()[name])), found[name][0]
    assert together["codes"] == alone["codes"]
    assert together["codebooks"] == alone["codebooks"]
    assert together["plain"] == alone["plain"]
    assert together["norms"].keys() == alone["norms"].keys()
    for norm, statistics in alone["norms"].items():
        assert torch.allclose(torch.tensor(together["norms"][norm]), torch.tensor(statistics), rtol=1e-5)


@pytest.mark.slow
def test_the_command_writes_the_same_network_in_two_processes_as_in_one(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(14):
        pixels = draw.integers(0, 256, (30, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    flags = ["--model.arch", "tests.support.own_network:Net", "--model.weights", "none", "--device", "cpu"]
    flags += ["--model.compression_parameters.k_means_n_iters", "2", "--model.compression_parameters.k", "16"]
    flags += ["--calibration.images", str(tmp_path / "photos"), "--calibration.num_workers", "0"]
    flags += ["--calibration.image_size", "16", "--calibration.batch_size", "4", "--output_path"]
    finished = launch("torchrun", ["-m", "src.compress", *flags, str(tmp_path / "two")])
    assert finished.status == 0, finished.text
    assert command.main([*flags, str(tmp_path / "one")]) == 0
    one, two = (load_packed(tmp_path / name / "model.safetensors").state() for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)

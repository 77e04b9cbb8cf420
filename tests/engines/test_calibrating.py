"""Two real processes that calibrate a network together find what one finds."""

from __future__ import annotations

import pytest
import torch

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

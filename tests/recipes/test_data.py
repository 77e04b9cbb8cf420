"""The number of loader processes is this process's share of the processors at most."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from src.engines.launch import Launch
from src.engines.machine import available_processors
from src.engines.single import SingleProcess
from src.recipes import data
from tests.conftest import ROOT
from tests.support.logs import logged

ENGINE = SingleProcess(Launch(), torch.device("cpu"))


@pytest.mark.parametrize(("processors", "wanted", "used"), [(4, 2, 2), (4, 4, 4), (4, 9, 4), (1, 4, 1), (2, 0, 0)])
def test_workers_are_clamped_and_said_once(
    processors: int, wanted: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "own_processors", lambda: processors)
    monkeypatch.setattr(data, "available_processors", lambda: processors)
    if used == wanted:
        assert data.workers(wanted, ENGINE) == used
        return
    with logged(
        f"dataloader.num_workers: {used} instead of {wanted}, as this machine has {processors}", logging.INFO
    ) as lines:
        assert data.workers(wanted, ENGINE) == used
    assert len(lines) == 1


def test_processes_of_one_machine_share_its_processors() -> None:
    """In processes of their own: the launcher's variables say how many there are."""
    code = "from src.engines.machine import own_processors; print(own_processors())"
    for local in (1, 2, 64):
        variables = {
            "RANK": "0", "WORLD_SIZE": str(local), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "a", "MASTER_PORT": "1",
            "PATH": "/usr/bin:/bin",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == max(1, available_processors() // local)

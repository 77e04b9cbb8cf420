"""Every engine of the registry keeps the contract; a further one is one entry."""

from __future__ import annotations

import inspect

import pytest
import torch

from src.common.registry import Entry
from src.engines import choosing
from src.engines.engine import Engine
from src.engines.launch import Launch, here
from src.engines.registry import ENGINES, Launcher
from src.engines.single import SingleProcess
from src.settings import load

METHODS = [name for name, member in vars(Engine).items() if inspect.isfunction(member) and not name.startswith("_")]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_what_the_loop_asks_for_and_says_how_it_is_started(name: str) -> None:
    kind = ENGINES[name]
    assert inspect.isclass(kind)
    assert METHODS
    for method in METHODS:
        assert callable(getattr(kind, method)), method
    for attribute in ("is_main", "is_first_here"):
        assert hasattr(kind, attribute)
    assert "-m" in ENGINES.fact(name, "start")
    assert list(inspect.signature(kind.__init__).parameters)[1:] == ["launch", "device"]


class Ours(SingleProcess):
    """An engine of its own."""


OURS = Launcher("ours", "OUR_RANK", "OUR_SIZE", "OUR_LOCAL_RANK", "OUR_LOCAL_SIZE", ("OUR_RANK", "OUR_SIZE"))


def test_one_entry_makes_an_engine_known(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("tests.engines.test_registry:Ours", "ours", {"start": "ours -m ...", "launchers": (OURS,)})
    with ENGINES.added("ours", entry):
        monkeypatch.setenv("OUR_RANK", "0")
        monkeypatch.setenv("OUR_SIZE", "1")
        assert here() == Launch("ours", 0, 1, 0, 1)
        assert load("../config/train_resnet18.yaml", ["--engine", "ours"]).engine == "ours"
        assert type(choosing.make("ours", torch.device("cpu"))).__name__ == "Ours"
        assert type(choosing.make("auto", torch.device("cpu"))).__name__ == "Ours"
    assert here() == Launch()

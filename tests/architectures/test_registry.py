"""Every architecture of the registry keeps the contract; a further one is one entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src import architectures
from src.architectures import ARCHITECTURES
from src.architectures.architecture import Architecture, n_outputs
from src.common.errors import SettingsError
from src.common.registry import Entry
from src.compression.permute.groups import resolve


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_what_its_entry_says(name: str) -> None:
    found, entry = ARCHITECTURES[name], ARCHITECTURES.entries[name]
    assert found.name == name
    assert found.task == entry.facts["task"]
    assert entry.about
    assert found.task in ("classification", "detection")
    with torch.device("meta"):
        model = found.build(7)
    assert n_outputs(found, model) == 7
    groups = resolve(model, found.groups(model), found.reshapes)
    assert groups
    assert all(group.width > 1 for group in groups)
    assert found.weights_url.startswith("https://")


def test_a_name_for_another_task_or_no_name_is_refused() -> None:
    for name, task in (("maskrcnn", "classification"), ("resnet18", "detection"), ("resnet1", "classification")):
        with pytest.raises(SettingsError, match=f"model.arch: '{name}' is not known for {task}; known: "):
            architectures.get(name, task)


PLAIN = Architecture(
    name="plain",
    task="classification",
    build=lambda n: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n)),
    weights_url="",
    n_classes=3,
    head="3",
    groups=lambda _: [],
)


def test_one_entry_makes_an_architecture_known_to_all() -> None:
    entry = Entry("tests.architectures.test_registry:PLAIN", "a small network", {"task": "classification"})
    with ARCHITECTURES.added("plain", entry):
        assert architectures.get("plain", "classification") is ARCHITECTURES["plain"]
        assert architectures.get("plain", "classification").name == "plain"
        assert "plain" in ARCHITECTURES.names(task="classification")
    with pytest.raises(SettingsError, match="is not known"):
        architectures.get("plain", "classification")

"""Laws of every registry: entries lie in their own wing, say what they are, and name settings that exist."""

from __future__ import annotations

from typing import Any

import pytest

from src.architectures import ARCHITECTURES
from src.common.errors import SettingsError
from src.common.registry import Entry, Registry, UnknownNameError
from src.compression.finetune.registry import OPTIMIZERS, SCHEDULES
from src.compression.permute.registry import SEARCHES, STEPS
from src.compression.quantize.registry import QUANTIZERS
from src.engines.registry import ENGINES
from src.settings import ModelSettings, SchedulerSettings, Settings
from src.settings.keys import leaves
from src.tasks.coco.backends import BACKENDS
from src.tasks.sources import SCENES, SOURCES

WINGS: dict[str, tuple[Registry[Any], ...]] = {
    ".architectures.": (ARCHITECTURES,),
    ".compression.finetune.": (OPTIMIZERS, SCHEDULES),
    ".compression.permute.": (SEARCHES, STEPS),
    ".compression.quantize.": (QUANTIZERS,),
    ".engines.": (ENGINES,),
    ".tasks.": (BACKENDS, SCENES, SOURCES),
}
ENTRIES = [
    pytest.param(wing, registry, name, id=f"{registry.what}-{name}")
    for wing, registries in WINGS.items()
    for registry in registries
    for name in registry
]


@pytest.mark.parametrize(("wing", "registry", "name"), ENTRIES)
def test_an_entry_leads_into_its_own_wing_and_says_what_it_is(wing: str, registry: Registry[Any], name: str) -> None:
    entry = registry.entry(name)
    assert entry.place.startswith(wing)
    assert entry.about
    assert registry[name] is registry[name]  # and it can be imported


READS = [
    (OPTIMIZERS, Settings, ""),
    (SCHEDULES, SchedulerSettings, "lr_scheduler."),
    (SEARCHES, ModelSettings, "model."),
    (ENGINES, Settings, ""),
]


@pytest.mark.parametrize(("registry", "section", "prefix"), READS, ids=lambda value: getattr(value, "what", ""))
def test_settings_that_an_entry_says_it_reads_exist(registry: Registry[Any], section: type, prefix: str) -> None:
    mentioned = {key for name in registry for key in registry.fact(name, "reads")}
    assert mentioned
    assert all(prefix + key in leaves() and key in section.model_fields for key in mentioned)  # type: ignore[attr-defined]
    for name in registry:
        assert set(registry.unread(name)) == mentioned - set(registry.fact(name, "reads"))


def test_a_wrong_name_is_one_error_that_lists_what_there_is_and_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        OPTIMIZERS["adma"]
    assert isinstance(caught.value, SettingsError)
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == "the optimizer 'adma' is not known; there are sgd, adam; did you mean adam?"
    assert OPTIMIZERS.get("adma") is None
    assert str(ENGINES.unknown("zzz", "engine:", ["auto"])) == (
        "engine: 'zzz' is not known; there are auto, single, torchrun, horovod"
    )


def test_an_entry_is_there_for_a_while_and_one_that_it_hid_comes_back() -> None:
    with QUANTIZERS.added("kmeans", Entry("math:pi", "a number")):
        assert QUANTIZERS["kmeans"] > 3
    assert callable(QUANTIZERS["kmeans"])
    with QUANTIZERS.added("number", Entry("math:pi", "a number")):
        assert list(QUANTIZERS) == ["kmeans", "src", "number"]
    assert "number" not in QUANTIZERS


def test_an_entry_without_what_it_reads_is_taken_to_read_everything() -> None:
    with SCHEDULES.added("mine", Entry("math:pi", "a number")):
        assert SCHEDULES.unread("mine") == []
        assert "mine" in SCHEDULES.readers("patience")
    assert SCHEDULES.readers("patience") == ["plateau"]

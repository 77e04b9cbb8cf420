"""One file and one entry: what is added to the registries here is trained with and evaluated by the commands themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from src import evaluate_resnet, train_resnet
from src.architectures import ARCHITECTURES
from src.architectures.architecture import Architecture
from src.common.registry import Entry
from src.compression.finetune.optimizers import ScheduleParts
from src.compression.finetune.registry import OPTIMIZERS, SCHEDULES
from src.compression.permute.groups import Group
from src.compression.permute.registry import SEARCHES, STEPS
from src.compression.permute.search import search
from src.compression.quantize.kmeans import kmeans
from src.compression.quantize.registry import QUANTIZERS
from src.engines.registry import ENGINES, Launcher
from src.engines.single import SingleProcess
from src.tasks.sources import SOURCES
from tests.conftest import write_images

used: list[str] = []
"""Which of the additions were called."""


def build(n_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, n_classes),
    )


PLAIN = Architecture(
    name="plain",
    task="classification",
    build=build,
    weights_url="",
    n_classes=3,
    head="5",
    groups=lambda _: [Group(("0",), ("2",))],
)


def first_vectors(vectors, k, _iterations, generator, _tolerance=0.0, _stopped=None):
    used.append("quantizer")
    return kmeans(vectors, k, 0, generator)


def in_steps(objective, n_blocks, n_tries, generator, _deadline, _measure):
    used.append("search")
    return search(objective, n_blocks, n_tries, generator, ["BACKWARDS"])


def backwards(objective, _n_blocks, _n_tries, _generator):
    used.append("step")
    objective.reset(np.arange(objective.n_channels)[::-1].copy())


def signs(parameters, spec):
    used.append("optimizer")
    return torch.optim.Rprop(parameters, lr=spec.learning_rate)


def halved(optimizer, _spec, _n_steps):
    used.append("schedule")
    return ScheduleParts(epoch=lr_scheduler.StepLR(optimizer, 1, gamma=0.5))


def noise(root: Path) -> None:
    used.append("dataset")
    if not root.exists():
        write_images(root / "train", 3, 4, seed=0)
        write_images(root / "val", 3, 2, seed=1)


class Ours(SingleProcess):
    """An engine of its own."""

    def barrier(self) -> None:
        used.append("engine")


OURS = Launcher("ours", "OUR_RANK", "OUR_SIZE", "OUR_LOCAL_RANK", "OUR_LOCAL_SIZE", ("OUR_RANK", "OUR_SIZE"))


def entry(attribute: str, **facts: Any) -> Entry:
    return Entry(f"{__name__}:{attribute}", "an addition", facts)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    used.clear()
    monkeypatch.setenv("OUR_RANK", "0")
    monkeypatch.setenv("OUR_SIZE", "1")
    with ExitStack() as stack:
        for registry, name, one in (
            (ARCHITECTURES, "plain", entry("PLAIN", task="classification")),
            (QUANTIZERS, "first", entry("first_vectors")),
            (SEARCHES, "steps", entry("in_steps", children=1)),
            (STEPS, "BACKWARDS", entry("backwards")),
            (OPTIMIZERS, "signs", entry("signs")),
            (SCHEDULES, "halved", entry("halved")),
            (SOURCES, "noise", entry("noise", written=True)),
            (ENGINES, "ours", entry("Ours", start="ours -m ...", launchers=(OURS,))),
        ):
            stack.enter_context(registry.added(name, one))
        yield


def flags(folder: Path) -> list[str]:
    return [
        "--recipe", "published", "--model.arch", "plain", "--model.compression_parameters.k_means_type", "first", "--model.search", "steps",
        "--model.compression_parameters.layer_specs", "{}", "--model.compression_parameters.k", "4",
        "--model.compression_parameters.large_subvectors", "True", "--model.permutations", "null",
        "--optimizer", "signs", "--lr_scheduler.type", "halved", "--lr_scheduler.patience", "5", "--momentum", "0.5",
        "--engine", "ours", "--dataloader.source", "noise", "--dataloader.imagenet_path", str(folder / "noise"),
        "--dataloader.num_workers", "0", "--dataloader.batch_size", "4", "--dataloader.resize", "32",
        "--dataloader.image_size", "32", "--model.weights", "none", "--epochs", "1", "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.usefixtures("added")
def test_a_run_with_an_addition_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("model: {compression_parameters: {ignored_modules: []}}\n")
    config = ["--config", str(file)]
    assert train_resnet.main([*config, *flags(tmp_path), "--output_path", str(tmp_path / "run")]) == 0
    assert set(used) == {"quantizer", "search", "step", "optimizer", "schedule", "dataset", "engine"}
    out = capsys.readouterr().out
    assert "patience has no effect" not in out  # nor is the momentum: an entry that says nothing may read everything
    assert "momentum has no effect" not in out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["history"].keys() == {"0", "1"}

    best = str(tmp_path / "run" / "trained_models" / "best.pth")
    assert evaluate_resnet.main([*config, *flags(tmp_path), "--model.state_dict_compressed", best]) == 0
    assert "model: plain, " in capsys.readouterr().out


@pytest.mark.usefixtures("added")
def test_the_help_lists_additions(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_resnet.main(["--help"]) == 0
    text = capsys.readouterr().out
    for names in ("sgd|adam|signs", "kmeans|src|first", "best|published|steps", "GREEDY|STOCHASTIC|RANDOM|BACKWARDS"):
        assert names in text
    for names in ("none|halved", "folder|digits|digit_crops|noise", "horovod|ours", "resnet50ssl|plain [resnet50]"):
        assert names in text
    assert "plain: an addition" in " ".join(text.split())


def test_without_their_entries_they_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(tmp_path)
    for key, value in zip(given[::2], given[1::2], strict=True):
        if value in ("plain", "first", "steps", "signs", "halved", "noise", "ours"):
            known = ["--dataloader.imagenet_path", str(tmp_path), "--output_path", str(tmp_path / "run")]
            assert train_resnet.main([*known, key, value]) == 2
            error = capsys.readouterr().err
            assert key.removeprefix("--") in error
            assert repr(value) in error

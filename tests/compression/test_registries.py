"""Every quantizer, search, step, optimizer and schedule keeps the contract of its kind; a further one is one entry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from src.common.randomness import stream
from src.common.registry import Entry
from src.compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from src.compression.finetune.registry import OPTIMIZERS, SCHEDULES
from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.groups import Group
from src.compression.permute.objective import child_objective
from src.compression.permute.permute import SearchSpec, permute
from src.compression.permute.registry import SEARCHES, STEPS
from src.compression.permute.search import search_published
from src.compression.quantize.clustering import Clustering
from src.compression.quantize.kmeans import cluster, kmeans
from src.compression.quantize.registry import QUANTIZERS
from src.settings import load
from tests.support.helpers import quantized, spec

CONFIG = "../config/train_resnet18.yaml"


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("d", [1, 4, 9])
def test_a_quantizer_gives_codes_of_at_most_k_blocks_the_same_for_a_seed(name: str, d: int) -> None:
    vectors = torch.randn(400, d, generator=stream(0, "vectors"))
    once, again = (cluster(name, vectors, 16, 5, stream(1, "draw")) for _ in range(2))
    assert once.codebook.shape == (16, d)
    assert once.codes.shape == (400,)
    assert 0 <= int(once.codes.min()) <= int(once.codes.max()) < 16
    assert torch.equal(once.codebook, once.codebook.half().float())
    assert torch.unique(once.codebook[once.codes], dim=0).shape[0] <= 16
    assert torch.equal(once.codebook, again.codebook)
    assert torch.equal(once.codes, again.codes)
    lost = (vectors - once.codebook[once.codes]).square().sum(1).mean()
    assert once.distortion == pytest.approx(float(lost), rel=1e-4)
    assert once.distortion < float((vectors - vectors.mean(0)).square().sum(1).mean())


def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 8, 3)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(16)[None, :, None, None] + 0.1)
    return conv


@pytest.mark.parametrize("name", STEPS)
def test_a_step_leaves_a_permutation(name: str) -> None:
    objective = GroupObjective([child_objective(layer(), 18)], [1.0])
    STEPS[name](objective, 1, 200, stream(0, "step"))
    assert sorted(objective.permutation.tolist()) == list(range(16))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_never_worse_than_the_identity_and_the_same_for_a_seed(name: str) -> None:
    results = [
        SEARCHES[name](GroupObjective([child_objective(layer(), 18)], [1.0]), 1, 500, stream(0, "search"), None, None)
        for _ in range(2)
    ]
    for found in results:
        assert found.after <= found.before
        assert found.permutation is None or sorted(found.permutation.tolist()) == list(range(16))
    assert (results[0].permutation is None) == (results[1].permutation is None)
    assert results[0].permutation is None or torch.equal(results[0].permutation, results[1].permutation)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_and_a_schedule_follows(name: str, schedule: str) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, OptimizerSpec(name, 0.1))
    plan = Schedule(optimizer, ScheduleSpec(schedule, milestones=(1,)), 2, 3)
    rates = []
    for epoch in range(2):
        for _ in range(3):
            rates.append(plan.learning_rate)
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            plan.after_step()
        plan.after_epoch(float(epoch))
    assert not torch.equal(before, model.weight)
    assert all(0 < rate <= 0.1 for rate in rates)
    again = Schedule(make_optimizer(model, OptimizerSpec(name, 0.1)), ScheduleSpec(schedule, milestones=(1,)), 2, 3)
    again.load(plan.state())


# --- a further one: a function and an entry ---


def first_vectors(vectors, k, iterations, generator, tolerance=0.0, stopped=None) -> Clustering:  # noqa: ARG001 (of a protocol)
    """A quantizer of its own: the first k vectors are the codebook."""
    return kmeans(vectors, k, 0, generator)


def backwards(objective, n_blocks, n_tries, generator, deadline, measure):  # noqa: ARG001 (of a protocol)
    """A search of its own, which tries one permutation."""
    before = objective.value
    objective.reset(np.arange(objective.n_channels)[::-1].copy())
    return (
        search_published(objective, n_blocks, 0, generator)
        if objective.value > before
        else search_published(objective, n_blocks, 1, generator)
    )


@pytest.fixture
def added() -> Iterator[None]:
    here = "tests.compression.test_registries"
    with (
        QUANTIZERS.added("first", Entry(f"{here}:first_vectors", "the first vectors")),
        SEARCHES.added("backwards", Entry(f"{here}:backwards", "one permutation", {"children": 1})),
    ):
        yield


@pytest.mark.usefixtures("added")
def test_one_entry_makes_a_quantizer_or_a_search_known_to_settings_and_all_that_follows() -> None:
    flags = ["--model.compression_parameters.k_means_type", "first", "--model.search", "backwards"]
    settings = load(CONFIG, flags)
    assert settings.model.compression_parameters.k_means_type == "first"
    assert settings.model.search == "backwards"
    model = nn.Sequential(layer(), nn.ReLU(), nn.Conv2d(8, 4, 3))
    permute(model, [Group(("0",), ("2",))], {"2": 18}, SearchSpec("backwards"), show_progress=False)
    assert quantized(model, spec(4, settings.model.compression_parameters.k_means_type))[2].k == 4


def test_without_its_entry_a_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="one of kmeans, src"):
        load(CONFIG, ["--model.compression_parameters.k_means_type", "first"])
    with pytest.raises(ValueError, match="one of best, published"):
        load(CONFIG, ["--model.search", "backwards"])

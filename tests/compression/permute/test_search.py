"""Laws of the score of a permutation and of its search."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from src.architectures import ARCHITECTURES
from src.common.randomness import stream
from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.groups import Group
from src.compression.permute.objective import ChildObjective, child_objective, is_optimisable
from src.compression.permute.permute import GroupResult, PermutationSpec, SearchSpec, permute
from src.compression.permute.registry import STEPS
from src.compression.permute.search import greedy, search, stochastic
from src.compression.quantize.kmeans import cluster
from src.compression.quantize.plan import make_plan
from tests.support.helpers import lively, outputs, relative, spec


def single(*arguments) -> GroupObjective:
    return GroupObjective([ChildObjective(*arguments)], [1.0])


def published(n_tries: int) -> SearchSpec:
    return SearchSpec(search="published", sls_iterations=n_tries)


def plain_score(weight: Tensor, p: np.ndarray, d: int, groups: int = 1) -> float:
    """log det of torch.cov of the subvectors of the permuted weight (R, C/groups, a), from scratch, with the documented
    ridge."""
    rows, per_group, _ = weight.shape
    permutation = torch.as_tensor(p)
    parts = []
    for g in range(groups):
        local = permutation[g * per_group : (g + 1) * per_group] - g * per_group
        parts.append(weight[g * (rows // groups) : (g + 1) * (rows // groups)][:, local])
    subvectors = torch.cat(parts).reshape(-1, d)
    covariance = torch.atleast_2d(torch.cov(subvectors.T, correction=0))
    ridge = 1e-10 * weight.square().mean() * torch.eye(d, dtype=weight.dtype)
    return float(torch.linalg.slogdet(covariance + ridge).logabsdet)


SHAPES = [
    # (channels per group, values per channel, d): whole channels per subvector, and (last ones) channels that straddle
    # two subvectors
    (8, 1, 4), (12, 1, 1), (6, 4, 8), (4, 9, 18), (9, 2, 6), (4, 9, 6), (6, 9, 6), (8, 49, 8), (4, 3, 2), (16, 9, 16),
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 10**6),
    forced=st.booleans(),
    data=st.data(),
)
def test_the_score_updated_swap_by_swap_is_the_log_det_of_the_covariance_computed_anew(
    shape, groups, seed, forced, data
) -> None:
    channels, area, d = shape
    draw = np.random.default_rng(seed)
    rows = groups * max(4, -(-4 * d * d // (channels * area)))  # several times more subvectors than d
    scales = draw.uniform(0.2, 3, (1, channels, 1))
    weight = torch.from_numpy(draw.normal(0.1, 1, (rows, channels, area)) * scales)
    objective = ChildObjective(weight.reshape(rows, -1).numpy(), channels * groups, d, groups)
    # rounding: a swap adds about 1e-15 relative to the moment, whose condition number here stays below 1e4
    assert objective.value == pytest.approx(plain_score(weight, np.arange(channels * groups), d, groups), abs=1e-9)
    for _ in range(data.draw(st.integers(1, 12))):
        block = data.draw(st.integers(0, groups - 1)) * channels
        i, j = (block + data.draw(st.integers(0, channels - 1)) for _ in range(2))
        before, p = objective.value, objective.permutation.copy()
        swapped = objective.try_swap(i, j, -float("inf")) if forced else objective.try_swap(i, j)
        assert swapped == (objective.value < before) or forced
        if swapped:
            p[[i, j]] = p[[j, i]]
        assert np.array_equal(objective.permutation, p)
        assert objective.value == pytest.approx(plain_score(weight, p, d, groups), abs=1e-9)
        assert objective.evaluate(p) == pytest.approx(objective.value, abs=1e-9)


def test_a_convolution_is_scored_on_the_subvectors_that_are_quantized() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, groups=2).double()
    linear = nn.Linear(8 * 6, 32).double()
    assert child_objective(conv, 18).value == pytest.approx(
        plain_score(conv.weight.detach().flatten(2), np.arange(8), 18, 2), abs=1e-9
    )
    found = child_objective(linear, 4, (32, 8, 2, 3))
    assert (found.n_channels, found.area) == (8, 6)
    assert found.value == pytest.approx(
        plain_score(linear.weight.detach().reshape(32, 8, 6), np.arange(8), 4), abs=1e-9
    )


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("d", [4, 18])
def test_the_greedy_start_does_not_depend_on_the_scale_of_the_weights(scale: float, d: int) -> None:
    area = 9 if d == 18 else 1
    draw = np.random.default_rng(0)
    columns = draw.normal(0, 1, (64, 32, area)) * draw.uniform(0.1, 2, (1, 32, 1))
    found = []
    for weight in (columns, columns * scale):
        objective = single(weight.reshape(64, -1), 32, d)
        greedy(objective, 1, 0, stream(0))
        found.append(objective.permutation)
    assert np.array_equal(*found)
    assert not np.array_equal(found[0], np.arange(32))


def test_the_greedy_start_interleaves_runs_of_falling_variance() -> None:
    # one value per channel, variances 1, 16, 4, 9, means of 7 that must not count
    columns = np.array([[1.0], [-1.0]]) * np.array([[1.0, 4.0, 2.0, 3.0]]) + np.array([[7.0, 0.0, 0.0, 0.0]])
    objective = single(columns, 4, 2)
    greedy(objective, 1, 0, stream(0))
    # falling: 1, 3, 2, 0; two runs (1, 3) and (2, 0); run j supplies position j of every subvector
    assert objective.permutation.tolist() == [1, 2, 3, 0]


def test_the_greedy_start_sorts_wider_channels_by_the_determinant_of_their_covariance() -> None:
    u, v = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    # channel 0 has by far the largest variance, but its two values are nearly the same: the smallest determinant
    channels = [(10 * u, 10 * u + 0.01 * v), (u, v), (3 * u, 3 * v), (2 * u, 2 * v)]
    columns = np.stack([value for pair in channels for value in pair], axis=1)
    objective = single(columns, 4, 4)
    greedy(objective, 1, 0, stream(0))
    # falling: 2, 3, 1, 0; runs (2, 3) and (1, 0)
    assert objective.permutation.tolist() == [2, 1, 3, 0]


def test_the_greedy_start_stays_within_the_blocks_of_a_grouped_convolution() -> None:
    columns = np.random.default_rng(0).normal(0, 1, (16, 8)) * 4.0 ** np.arange(8)
    objective = single(columns, 16, 4, 2)
    greedy(objective, 2, 0, stream(0))
    assert sorted(objective.permutation[:8]) == list(range(8))
    assert objective.permutation[:8].tolist() == [7, 5, 3, 1, 6, 4, 2, 0]


def columns_for(seed: int, channels: int = 16, area: int = 1, rows: int = 64) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(0, 1, (rows, channels, area)) * draw.uniform(0.2, 2, (1, channels, 1))).reshape(rows, -1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("area", "d"), [(1, 4), (9, 18), (9, 6)])
def test_local_search_never_raises_the_score_and_is_identical_for_the_same_seed(seed: int, area: int, d: int) -> None:
    found = []
    for _ in range(2):
        objective = single(columns_for(seed, area=area), 16, d)
        before = objective.value
        stochastic(objective, 1, 300, stream(seed))
        assert objective.value < before
        assert sorted(objective.permutation) == list(range(16))
        found.append(objective.permutation)
    assert np.array_equal(*found)
    other = single(columns_for(seed, area=area), 16, d)
    stochastic(other, 1, 300, stream(seed + 100))
    assert not np.array_equal(other.permutation, found[0])


def test_every_search_stays_within_its_blocks() -> None:
    for name in STEPS:
        result = search(single(columns_for(0, 8), 16, 4, 2), 2, 50, stream(0), [name])
        assert (result.permutation // 8).tolist() == [0] * 8 + [1] * 8, name


@pytest.mark.parametrize("steps", [["GREEDY"], ["STOCHASTIC"], ["RANDOM"], ["GREEDY", "STOCHASTIC"]])
def test_a_result_worse_than_the_identity_is_dropped(steps: list[str]) -> None:
    # channels that stand together are nearly equal, so that the identity is (close to) the best permutation
    draw = np.random.default_rng(0)
    base = np.repeat(draw.normal(0, 1, (256, 8)), 4, axis=1)
    columns = base + 0.01 * draw.normal(0, 1, base.shape)
    objective = single(columns, 32, 4)
    identity = objective.value
    result = search(objective, 1, 20, stream(0), steps)
    assert result.before == identity
    assert result.after <= identity
    if steps == ["GREEDY"]:
        greedy(objective, 1, 0, stream(0))
        assert objective.value > identity + 1  # what would have been taken
        assert result.permutation.tolist() == list(range(32))
        assert result.after == identity


def dead(weight: Tensor) -> None:
    weight[:, ::3] = 0


def equal(weight: Tensor) -> None:
    weight[:] = weight[:, :1]


def constant(weight: Tensor) -> None:
    weight[:] = 1


def zero(weight: Tensor) -> None:
    weight[:] = 0


def one_value(weight: Tensor) -> None:
    weight[:] = 0
    weight[0, 0] = 1


@pytest.mark.parametrize("spoil", [dead, equal, constant, zero, one_value])
@pytest.mark.parametrize("large", [False, True])
def test_degenerate_weights_do_not_stop_the_search_and_keep_the_function(spoil, large: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1)).double()
    with torch.no_grad():
        spoil(model[2].weight)
        spoil(model[4].weight)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    before = outputs(model, x)
    results = permute(
        model,
        [Group(("0",), ("2",)), Group(("2",), ("4",))],
        {"2": 18 if large else 9, "4": 4},
        SearchSpec(sls_iterations=50),
        show_progress=False,
    )
    assert all(np.isfinite([r.before, r.after]).all() and r.after <= r.before for r in results)
    assert torch.allclose(outputs(model, x), before, rtol=1e-9, atol=1e-12)


def test_large_blocks_of_a_resnet18_get_a_lower_score_and_the_same_function() -> None:
    torch.manual_seed(0)
    model = lively(ARCHITECTURES["resnet18"].build(10).double())
    groups = ARCHITECTURES["resnet18"].groups(model)
    sizes = make_plan(model, spec(256, large=True, ignored=["conv1"])).sizes
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = outputs(model, x)
    results = permute(model, groups, sizes, published(20), show_progress=False)
    assert relative(outputs(model, x), before) < 1e-9  # float64, only the order of additions changes
    assert [r.children for r in results] == [g.children[:1] for g in groups]
    for result in results:
        assert result.after < result.before
        # the score that is reported is that of the weights that are there now
        now = child_objective(model.get_submodule(result.children[0]), sizes[result.children[0]]).value
        assert now == pytest.approx(result.after, abs=1e-6)


def test_small_blocks_of_3x3_convolutions_are_left_alone() -> None:
    torch.manual_seed(0)
    model = lively(ARCHITECTURES["resnet18"].build(10))
    groups = ARCHITECTURES["resnet18"].groups(model)
    weights = copy.deepcopy(model.state_dict())
    sizes = make_plan(model, spec(256, ignored=["conv1"])).sizes
    results = permute(model, groups, sizes, SearchSpec(sls_iterations=5), show_progress=False)
    inner = [r for r, g in zip(results, groups, strict=True) if len(g.children) == 1]
    assert inner
    assert all(r.permutation is None and not r.children for r in inner)
    for group in (g for g in groups if len(g.children) == 1):
        assert torch.equal(model.get_submodule(group.parents[1]).weight, weights[f"{group.parents[1]}.weight"])
    # the streams end in 1x1 convolutions or the linear layer, which decide
    assert [r.children[0] for r in results if r.children] == [
        "layer2.0.downsample.0",
        "layer3.0.downsample.0",
        "layer4.0.downsample.0",
        "fc",
    ]


def test_the_first_optimisable_child_that_is_quantized_decides() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6))
    group = Group(("0",), ("1", "2", "3"))

    def decided(sizes: dict[str, int], search: str = "published") -> tuple[str, ...]:
        how = SearchSpec(search=search, sls_iterations=5)
        return permute(copy.deepcopy(model), [group], sizes, how, show_progress=False)[0].children

    assert decided({"1": 4, "2": 4, "3": 4}) == ("1",)
    assert decided({"2": 4, "3": 4}) == ("2",)  # 1 is not quantized
    assert decided({"1": 1, "2": 1, "3": 4}) == ("3",)  # a subvector of one value does not depend on the permutation
    assert decided({}) == ()
    assert decided({"1": 1, "2": 4, "3": 4}, "best") == ("2", "3")
    assert not is_optimisable(nn.ConvTranspose2d(8, 8, 3), 18)


def test_the_search_named_for_a_layer_is_the_one_that_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 64)).double()
    with torch.no_grad():
        model[1].weight.mul_(torch.linspace(0.2, 3, 16))
    found = {}
    for name in STEPS:
        twin = copy.deepcopy(model)
        how = SearchSpec(sls_iterations=30, permutation_specs={"1": PermutationSpec(optimization=(name,))})
        (found[name],) = permute(twin, [Group(("0",), ("1",))], {"1": 4}, how, show_progress=False)
        objective = GroupObjective([child_objective(model[1], 4)], [1.0])
        STEPS[name](objective, 1, 30, stream(0, "permutation", "1"))
        assert found[name].permutation.tolist() == objective.permutation.tolist()
    assert len({tuple(r.permutation.tolist()) for r in found.values()}) == 3


def test_the_result_depends_on_the_seed_alone_and_not_on_other_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    groups = [Group(("0",), ("1",)), Group(("1",), ("2",))]
    sizes = {"1": 4, "2": 4}

    def run(groups: list[Group], seed: int) -> list[GroupResult]:
        return permute(copy.deepcopy(model), groups, sizes, published(50), seed=seed, show_progress=False)

    both, again, alone, other = run(groups, 3), run(groups, 3), run(groups[1:], 3), run(groups, 4)
    assert [r.permutation.tolist() for r in both] == [r.permutation.tolist() for r in again]
    assert alone[0].permutation.tolist() == both[1].permutation.tolist()
    assert [r.permutation.tolist() for r in both] != [r.permutation.tolist() for r in other]


def test_permuting_lowers_the_distortion_of_the_quantized_weight() -> None:
    """The point of it all: channels of unequal variance, quantized with and without a search."""
    torch.manual_seed(0)
    ratios = []
    for seed in range(4):
        weight = torch.randn(64, 32) * torch.exp(torch.randn(32))
        linear = nn.Linear(32, 64)
        linear.weight.data.copy_(weight)
        p = search(GroupObjective([child_objective(linear, 4)], [1.0]), 1, 500, stream(seed)).permutation
        plain, permuted = (
            cluster("kmeans", w.reshape(-1, 4), 32, 30, stream(seed)).distortion for w in (weight, weight[:, p])
        )
        ratios.append(permuted / plain)
    assert float(np.mean(ratios)) < 0.9

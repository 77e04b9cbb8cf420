"""Laws of permuting channels that stand at any positions of a network's tensors."""

from __future__ import annotations

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from src.common.errors import GroupError
from src.compression.permute.binding import bind, chains
from src.compression.permute.channels import ChannelGroup, Places, permuted
from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.groups import Group
from src.compression.permute.layout import changes_subvectors, plain_groups, row_classes
from src.compression.permute.objective import RIDGE, ChildObjective
from src.compression.permute.permute import SearchSpec, permute
from src.compression.permute.placed_child import PlacedChild
from src.compression.permute.placed_objective import PlacedObjective
from src.compression.permute.search import greedy, search_best
from src.compression.quantize.compress import candidate_distortion, compress
from src.compression.quantize.plan import make_plan
from src.compression.quantize.subvectors import to_subvectors
from tests.support.channel_networks import NETWORKS, SCORED, DenseBlock, columns, correlated, of_blocks, rows
from tests.support.helpers import lively, outputs, relative, spec
from tests.support.logs import logged

EXACT = 1e-9
"""As for layers: only the order of additions changes."""
HOW = spec(8, large=True)


def brute_force(weight: torch.Tensor, d: int) -> float:
    """log det of the covariance of the subvectors that a weight is really cut into."""
    x = to_subvectors(weight.double(), d).numpy()
    covariance = np.cov(x.T, bias=True).reshape(d, d) + RIDGE * np.square(x).mean() * np.eye(d)
    return float(np.linalg.slogdet(covariance)[1])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, list[Places], int, int]:
    """A weight, the places of a group in it, the number of its blocks and d."""
    n_blocks, size, area = (
        draw(st.sampled_from([1, 1, 2])),
        draw(st.integers(2, 6)),
        draw(st.sampled_from([1, 1, 3, 4])),
    )
    n, generator = n_blocks * size, torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()) and n_blocks > 1:  # a convolution with groups, alone or with other inputs in its rows
        places = [of_blocks("w", 12, size, n_blocks)]
        shape = (12, size, area, 1)
    else:
        copies, others = draw(st.integers(1, 3)), draw(st.integers(0, 5))
        width = n * copies + others
        order = (
            torch.randperm(width, generator=generator)
            if draw(st.booleans())
            else torch.arange(others, width + others) % width
        )
        shape = (12, width, area, 1)
        places = [Places("w", (1, width, 1, 1), order[: n * copies].reshape(n, copies), True)]
    row = shape[1] * area
    d = draw(st.sampled_from([d for d in range(1, min(row, 9) + 1) if row % d == 0]))
    scale = torch.rand(1, *shape[1:], generator=generator, dtype=torch.float64) + 0.2
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale, places, n_blocks, d


def placed(weight: torch.Tensor, places: list[Places], n_blocks: int, d: int) -> PlacedChild:
    n = places[0].positions.shape[0]
    matrix = weight.reshape(len(weight), -1).numpy()
    return PlacedChild(matrix, d, row_classes(weight.shape, places, n_blocks), n, n_blocks)


def drawn(n: int, n_blocks: int, draw: np.random.Generator) -> np.ndarray:
    size = n // n_blocks
    return np.concatenate([draw.permutation(size) + block * size for block in range(n_blocks)])


def pairs(n: int, n_blocks: int, count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size, first = n // n_blocks, draw.integers(0, n, count)
    return first, first // size * size + (first % size + draw.integers(1, size, count)) % size


@settings(max_examples=50, deadline=None)
@given(case=layouts(), seed=st.integers(0, 100))
def test_the_score_is_that_of_the_subvectors_the_permuted_weight_is_cut_into(case, seed: int) -> None:
    weight, places, n_blocks, d = case
    child, draw = placed(*case), np.random.default_rng(seed)
    assert child.value == pytest.approx(brute_force(weight, d), abs=1e-7)
    for _ in range(3):
        p = drawn(child.n_channels, n_blocks, draw)
        moved = permuted(weight, places[0], torch.from_numpy(p))
        assert child.evaluate(p) == pytest.approx(brute_force(moved, d), abs=1e-7)
        child.reset(p)
        i, j = (int(x[0]) for x in pairs(child.n_channels, n_blocks, 1, draw))
        value, proposal = child.propose(i, j)
        child.commit(proposal)
        assert value == pytest.approx(child.evaluate(child.permutation), abs=1e-7)
    before, classes = brute_force(weight, d), row_classes(weight.shape, places, n_blocks)
    if not changes_subvectors(classes, d):
        assert brute_force(moved, d) == pytest.approx(before, abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(case=layouts(), seed=st.integers(0, 100), annealed=st.booleans())
def test_the_kernel_equals_numpy_and_both_equal_the_score_recomputed(case, seed: int, annealed: bool) -> None:
    draw = np.random.default_rng(seed)
    n, n_blocks = case[1][0].positions.shape[0], case[2]
    first, second = pairs(n, n_blocks, 200, draw)
    heat = (np.geomspace(20.0, 0.1, 200), draw.random(200)) if annealed else ()
    second_child = (case[0].flip(0) + case[0].roll(1, 1), *case[1:])
    found = []
    for compiled in (True, False):
        objective = PlacedObjective([placed(*case), placed(*second_child)], [1.0, 0.3], compiled)
        assert objective.compiled == compiled
        made = objective.run(first, second, *heat)
        assert objective.value == pytest.approx(objective.evaluate(objective.permutation), abs=1e-7)
        # permutations of equal score are told apart by rounding only; a descent never goes from one to the other
        found.append((made, None if annealed else objective.permutation.tolist(), objective.value))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-7)


@pytest.mark.parametrize(
    ("area", "d", "n_groups"), [(1, 4, 1), (9, 18, 1), (9, 6, 1), (9, 27, 1), (1, 2, 2), (4, 8, 2)]
)
def test_where_channels_fill_the_rows_it_is_the_score_of_layers(area: int, d: int, n_groups: int) -> None:
    draw = np.random.default_rng(0)
    weight = torch.from_numpy(
        draw.normal(size=(24, 24 // n_groups, area, 1)) * draw.uniform(0.2, 2, (1, 24 // n_groups, area, 1))
    )
    place = of_blocks("w", 24, 24 // n_groups, n_groups) if n_groups > 1 else columns("w", range(24), 24)
    classes = row_classes(weight.shape, [place], n_groups)
    assert plain_groups(classes, weight.shape) == n_groups
    plain = ChildObjective(weight.reshape(24, -1).numpy(), 24, d, n_groups)
    general = placed(weight, [place], n_groups, d)
    for seed in range(5):
        p = drawn(24, n_groups, np.random.default_rng(seed))
        assert general.evaluate(p) == pytest.approx(plain.evaluate(p), abs=1e-9)
    one, other = GroupObjective([plain], [1.0]), PlacedObjective([general], [1.0])
    first, second = pairs(24, n_groups, 500, draw)
    assert one.run(first, second) == other.run(first, second)
    assert one.permutation.tolist() == other.permutation.tolist()


def test_whole_subvectors_and_rows_that_move_change_nothing_to_be_scored() -> None:
    shape = (6, 8, 3, 3)
    kernels = [columns("w", range(2, 8), 8)]
    for d, changes in ((9, False), (3, False), (18, True), (2, True), (4, True), (6, True)):
        assert changes_subvectors(row_classes(shape, kernels, 1), d) == changes, d
    assert row_classes(shape, [rows("w", range(6), 6)], 1) == []
    reversed_kernels = Places("w", (1, 8, 3, 1), torch.arange(24).reshape(8, 3).flip(1), True)
    assert not changes_subvectors(row_classes(shape, [reversed_kernels], 1), 9)
    pairs_moved = Places("w", (1, 8), torch.arange(8).reshape(4, 2), True)
    assert not changes_subvectors(row_classes((6, 8), [pairs_moved], 1), 2)
    shifted = Places("w", (1, 8), torch.arange(1, 7).reshape(3, 2), True)
    assert changes_subvectors(row_classes((6, 8), [shifted], 1), 2)  # a channel begins within a subvector
    blocks_change_places = Places("w", (4, 2, 1, 1), torch.arange(8).reshape(2, 4), True)
    assert row_classes((4, 2, 1, 1), [blocks_change_places], 1) == []  # whole rows move


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_keeps_the_outputs_and_scores_what_a_permutation_influences(name: str) -> None:
    torch.manual_seed(0)
    model = correlated(lively(NETWORKS[name]().double()))
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    before, weights = outputs(model, x), copy.deepcopy(model.state_dict())
    plan = make_plan(model, HOW)
    results = permute(model, model.groups(), plan.sizes, show_progress=False)
    assert [list(result.children) for result in results] == SCORED[name]
    assert relative(outputs(model, x), before) < EXACT
    for group, result in zip(model.groups(), results, strict=True):
        assert (result.permutation is None) == (not result.children)
        assert result.label == group.label
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert any(result.after < result.before - 1e-3 for result in results)
    assert moved


@pytest.mark.parametrize("name", NETWORKS)
def test_random_permutations_of_the_groups_keep_the_outputs(name: str) -> None:
    """Of all groups, those too that nothing is searched for: what the networks' groups are worth as tests."""
    torch.manual_seed(0)
    model = lively(NETWORKS[name]().double())
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    before = outputs(model, x)
    for seed, group in enumerate(bind(model, model.groups())):
        group.apply(torch.from_numpy(drawn(group.width, group.n_blocks, np.random.default_rng(seed))))
    assert relative(outputs(model, x), before) < EXACT


def scores(model: nn.Module, sizes: dict[str, int]) -> dict[str, float]:
    return {name: brute_force(model.get_submodule(name).weight.detach(), d) for name, d in sizes.items()}


@pytest.mark.parametrize("growth", [8, 6])
def test_channels_side_by_side_are_searched_one_group_after_the_other_and_all_gain(growth: int) -> None:
    """With 6 channels per layer and d = 4, subvectors hold channels of two groups."""
    torch.manual_seed(0)
    model = correlated(DenseBlock(growth).eval())
    groups, plan = model.groups(), make_plan(model, HOW)
    assert chains(groups) == [[0, 1, 2, 3]]
    before = scores(model, plan.sizes)
    results = permute(model, groups, plan.sizes, show_progress=False)
    after = scores(model, plan.sizes)
    assert all(result.after <= result.before for result in results)
    # the last group saw what the others had done: its score is that of the permuted network
    last = results[-1]
    assert last.children == ("fc",)
    assert last.after == pytest.approx(after["fc"], abs=1e-5)
    assert last.before != pytest.approx(before["fc"], abs=1e-3)  # the groups before it moved columns of the same weight
    assert sum(after.values()) < sum(before.values()) - 0.3


def test_the_search_lowers_the_distortion_of_a_dense_block() -> None:
    torch.manual_seed(0)
    model = DenseBlock(16, 4, 40).eval()
    with torch.no_grad():
        for layer in (*model.layers, model.fc):  # inputs of very unequal size
            layer.weight.mul_(torch.randn(1, layer.weight.shape[1], *[1] * (layer.weight.dim() - 2)).exp())
    plan = make_plan(model, HOW)

    def distortion(network: nn.Module) -> float:
        lost = compress(copy.deepcopy(network), plan, show_progress=False)[1]
        return sum(layer.distortion for layer in lost) / sum(layer.power for layer in lost)

    before = distortion(model)
    permute(model, model.groups(), plan.sizes, measure=candidate_distortion(plan, 0), show_progress=False)
    assert distortion(model) < 0.8 * before


@pytest.mark.parametrize("search", ["best", "published"])
def test_the_same_seed_gives_the_same_result_and_published_scores_one_child(search: str) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = correlated(DenseBlock().eval())
        results = permute(
            model, model.groups(), make_plan(model, HOW).sizes, SearchSpec(search), seed=5, show_progress=False
        )
        found.append([(r.children, r.before, r.after, r.permutation.tolist()) for r in results])
    assert found[0] == found[1]
    assert max(len(children) for children, *_ in found[0]) == (1 if search == "published" else 4)


def test_groups_of_channels_and_of_layers_give_the_same_permutations() -> None:
    """Where the channels fill the rows the form of a group makes no difference, to the last bit."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 12, 1),
        nn.Conv2d(12, 5, 1),
    )
    groups = [Group(("0", "1"), ("2",)), Group(("2",), ("4",)), Group(("4",), ("5",))]
    as_channels = [of_layers(model, group) for group in groups]
    plan, results = make_plan(model, HOW), []
    for form in (groups, as_channels, [as_channels[0], *groups[1:]]):
        network = copy.deepcopy(model)
        found = permute(network, form, plan.sizes, seed=1, measure=candidate_distortion(plan, 1), show_progress=False)
        results.append([(r.children, r.before, r.after, r.permutation.tolist()) for r in found])
        results[-1].append({key: value.tolist() for key, value in network.state_dict().items()})
    assert results[0] == results[1] == results[2]


def of_layers(model: nn.Module, group: Group) -> ChannelGroup:
    places = []
    for name in group.parents:
        module = model.get_submodule(name)
        for leaf, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dim():
                places.append(rows(f"{name}.{leaf}", range(len(tensor)), len(tensor), tensor.dim()))
    for name in group.children:
        weight = model.get_submodule(name).weight
        places.append(columns(f"{name}.weight", range(weight.shape[1]), weight.shape[1], weight.dim()))
    return ChannelGroup(" -> ".join((*group.parents, *group.children)), tuple(places))


def test_chains_hold_the_groups_that_move_columns_of_one_weight() -> None:
    block, shuffled, attention = DenseBlock(), NETWORKS["Shuffled"](), NETWORKS["Attention"]()
    assert chains(block.groups()) == [[0, 1, 2, 3]]
    assert chains([*shuffled.groups(), Group(("a",), ("b",))]) == [[0, 1, 2, 3], [4]]
    assert chains(attention.groups()) == [[0], [1], [2], [3]]
    assert chains([]) == []


def test_a_greedy_start_sorts_channels_by_variance_over_the_places_of_a_subvector() -> None:
    draw = np.random.default_rng(0)
    scale = np.ones(20)
    scale[4:] = draw.permutation(np.arange(1, 17))
    weight = torch.from_numpy(draw.normal(size=(500, 20)) * scale)
    child = placed(weight, [columns("w", range(4, 20), 20, rank=2)], 1, 4)
    objective = PlacedObjective([child], [1.0])
    greedy(objective, 1, 0, torch.Generator())
    sizes = scale[4:][objective.permutation].reshape(4, 4)  # by subvector and place
    assert all(left.min() > right.max() for left, right in itertools.pairwise(sizes.T))
    assert objective.value < child.evaluate(np.arange(16))
    # kernels that begin at every place of a subvector have no such order
    kernels = placed(torch.randn(9, 8, 3, 1, dtype=torch.float64), [columns("w", range(1, 7), 8)], 1, 4)
    assert kernels.falling_variances() is None


@pytest.mark.parametrize("copies", [1, 2])
def test_the_search_finds_the_best_permutation_of_a_small_group(copies: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 5 * copies + 3, generator=draw, dtype=torch.float64)
    weight = torch.nn.functional.pad(
        weight * (torch.rand(1, weight.shape[1], generator=draw) * 3 + 0.1), (0, -weight.shape[1] % 4)
    )
    places = [
        Places("w", (1, weight.shape[1]), torch.arange(2, 2 + 5 * copies).reshape(copies, 5).T.contiguous(), True)
    ]
    child = placed(weight, places, 1, 4)
    best = min(child.evaluate(np.array(p)) for p in itertools.permutations(range(5)))
    found = search_best(PlacedObjective([child], [1.0]), 1, 1000, torch.Generator().manual_seed(0))
    assert found.after == pytest.approx(best, abs=1e-9)


def test_a_layer_too_wide_for_a_table_is_left_out_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(2, 9000), nn.Linear(9000, 8))
    places = (
        rows("0.weight", range(9000), 9000, 2),
        rows("0.bias", range(9000), 9000, 1),
        columns("1.weight", range(9000), 9000, 2),
    )
    with logged("1: too wide to be scored", logging.INFO):
        (result,) = permute(model, [ChannelGroup("wide", places)], {"1": 4}, show_progress=False)
    assert result.children == ()
    assert result.permutation is None


def test_zero_weights_are_left_out() -> None:
    model = DenseBlock().eval()
    nn.init.zeros_(model.fc.weight)
    results = permute(model, model.groups(), make_plan(model, HOW).sizes, show_progress=False)
    assert all("fc" not in result.children for result in results)
    assert results[-1].permutation is None


BROKEN = {
    "no such tensor": (rows("stem.weihgt", range(8), 8), "no tensor 'stem.weihgt'"),
    "another width": (columns("layers.1.weight", range(8), 17), "does not fit"),
    "another rank": (rows("stem.weight", range(8), 8, rank=2), "does not fit"),
    "too far": (columns("layers.1.weight", range(12, 20), 16), "0 ... 15"),
    "another number of channels": (columns("layers.1.weight", range(4), 16), "positions of 8 channels"),
    "twice": (columns("layers.1.weight", torch.zeros(8, dtype=torch.int64), 16), "same position"),
    "not whole numbers": (columns("layers.1.weight", torch.zeros(8), 16), "whole numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_group_that_does_not_fit_is_refused_by_name_and_changes_nothing(case: str) -> None:
    model = DenseBlock().eval()
    before = copy.deepcopy(model.state_dict())
    wrong, words = BROKEN[case]
    good = model.groups()
    bad = ChannelGroup("the bad one", (*good[0].places, wrong))
    with pytest.raises(GroupError, match="the bad one") as caught:
        permute(model, [*good[1:], bad], make_plan(model, HOW).sizes, show_progress=False)
    assert words in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

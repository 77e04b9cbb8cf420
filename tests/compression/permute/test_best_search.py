"""Scoring all children of a group together, the compiled kernel, and the search that ends when nothing is gained."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from src.architectures import ARCHITECTURES
from src.common.randomness import stream
from src.compression.permute import gram
from src.compression.permute.assignment import assign_channels, linearised, positions
from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.groups import Group
from src.compression.permute.objective import ChildObjective
from src.compression.permute.permute import SearchSpec, permute
from src.compression.permute.search import search, search_best
from src.compression.quantize.plan import make_plan
from tests.support.helpers import lively, outputs, relative, spec

CHANNELS = 24
# (values per channel, subvector length, convolution groups): 1x1, large 3x3, straddling, grouped, straddling within two
# channels and more
KINDS = [(1, 4, 1), (9, 18, 1), (9, 6, 1), (1, 2, 2), (9, 27, 1), (4, 8, 2), (10, 4, 1), (7, 6, 1), (10, 12, 1)]


def child(kind: tuple[int, int, int], seed: int, rows: int = 40) -> ChildObjective:
    """Channels of unequal size, correlated in pairs that do not stand together."""
    area, d, groups = kind
    draw = np.random.default_rng(seed)
    width = CHANNELS // groups
    weight = draw.normal(0, 1, (rows, width, area)) * draw.uniform(0.2, 2, (1, width, 1))
    weight += 0.8 * np.roll(weight, width // 2, axis=1)
    return ChildObjective(weight.reshape(rows, -1), CHANNELS, d, groups)


def together(kinds: list[tuple[int, int, int]], seed: int, compiled: bool = True) -> GroupObjective:
    children = [child(kind, seed + number) for number, kind in enumerate(kinds)]
    return GroupObjective(children, [float(c.n_subvectors) for c in children], compiled)


def pairs(n: int, n_blocks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    size = CHANNELS // n_blocks
    first = draw.integers(0, CHANNELS, n)
    return first, first // size * size + (first % size + draw.integers(1, size, n)) % size


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), seed=st.integers(0, 1000), annealed=st.booleans()
)
def test_the_kernel_equals_numpy_and_both_equal_the_score_recomputed(
    kinds: list[tuple[int, int, int]], seed: int, annealed: bool
) -> None:
    n_blocks = max(groups for _, _, groups in kinds)
    first, second = pairs(300, n_blocks, seed)
    heat = (np.geomspace(20.0, 0.1, 300), np.random.default_rng(seed).random(300)) if annealed else ()
    found = []
    for compiled in (True, False):
        objective = together(kinds, seed, compiled)
        assert objective.compiled == compiled
        before = objective.value
        made = objective.run(first, second, *heat)
        found.append((objective.permutation.tolist(), made))
        assert objective.value <= before
        assert objective.value == pytest.approx(
            together(kinds, seed).evaluate(objective.permutation), abs=1e-9 * abs(before) + 1e-9
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_swaps_are_made_for_every_kind_of_child(kind: tuple[int, int, int]) -> None:
    """So that the equality above is not one of searches that do nothing; a few drawn groups start at a local
    optimum."""
    made = [together([kind], seed).run(*pairs(300, kind[2], seed)) for seed in range(5)]
    assert sum(made) > 20


def test_annealing_ends_at_the_best_permutation_it_met() -> None:
    objective = together(KINDS[:2], 0)
    first, second = pairs(20_000, 1, 0)
    always = np.ones(20_000) * 1e9  # so hot that nearly every swap is made: the end is a random permutation
    objective.run(first, second, always, np.random.default_rng(0).random(20_000))
    best = objective.value
    drawn = [objective.evaluate(np.random.default_rng(seed).permutation(CHANNELS)) for seed in range(200)]
    assert best < min(drawn)


@pytest.mark.parametrize("kinds", [[(1, 4, 1)], [(9, 18, 1)], [(1, 4, 1), (9, 18, 1), (1, 4, 1)]])
def test_an_assignment_step_never_raises_the_score(kinds: list[tuple[int, int, int]]) -> None:
    gains = []
    for seed in range(5):
        objective = together(kinds, seed)
        stride = positions(objective)
        assert stride == max(d // area for area, d, _ in kinds)
        before = objective.value
        assign_channels(objective, np.arange(stride), rounds=1)
        assert objective.value <= before
        gains.append(before - objective.value)
        assert sorted(objective.permutation.tolist()) == list(range(CHANNELS))
    assert max(gains) > 0


def test_the_linearised_score_bounds_the_true_one_from_above() -> None:
    """log det is concave; this is what makes an assignment step a descent step."""
    for seed in range(3):
        objective = together([(1, 4, 1), (9, 18, 1), (1, 8, 1)], seed)
        stride = positions(objective)
        for position in range(stride):
            places = np.arange(CHANNELS // stride) * stride + position
            cost = sum(w * linearised(c, places) for w, c in zip(objective.weights, objective.children, strict=True))
            for chosen in itertools.permutations(range(places.size)):
                moved = objective.permutation.copy()
                moved[places] = moved[places][list(chosen)]
                bound = sum(cost[chosen[slot], slot] - cost[slot, slot] for slot in range(places.size))
                assert objective.evaluate(moved) - objective.value <= bound + 1e-9 * abs(objective.value)


def test_subvectors_that_split_channels_have_no_positions_to_assign() -> None:
    objective = together([(9, 6, 1)], 0)
    assert positions(objective) == 0


def test_the_best_search_finds_pairs_that_were_torn_apart() -> None:
    """Channels in equal pairs: the best permutation puts each pair into one subvector, and the score falls without
    bound."""
    draw = np.random.default_rng(0)
    weight = np.concatenate([base := draw.normal(0, 1, (200, 12)), base + 0.01 * draw.normal(0, 1, base.shape)], axis=1)
    objective = GroupObjective([ChildObjective(weight, 24, 2)], [1.0])
    found = search_best(objective, 1, 1000, stream(0)).permutation.reshape(-1, 2)
    assert all(abs(int(a) - int(b)) == 12 for a, b in found.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_best_is_at_least_as_good_as_published_for_the_group(seed: int) -> None:
    kinds = [(1, 4, 1), (9, 18, 1), (1, 8, 1)]
    objective = together(kinds, seed)
    best = search_best(objective, 1, 10_000, stream(seed))
    first_child = GroupObjective([child(kinds[0], seed)], [1.0])
    published = search(first_child, 1, 10_000, stream(seed))
    assert best.after < objective.evaluate(published.permutation.numpy())
    assert best.after < best.before
    again = search_best(together(kinds, seed), 1, 10_000, stream(seed))
    assert torch.equal(best.permutation, again.permutation)


def test_the_best_search_stays_within_blocks_and_its_time() -> None:
    objective = together([(4, 8, 2)], 0)
    found = search_best(objective, 2, 1000, stream(0)).permutation
    assert (found // 12).tolist() == [0] * 12 + [1] * 12
    found = search_best(objective, 2, 1000, stream(0), deadline=time.monotonic() - 1)
    only_first = search_best(together([(4, 8, 2)], 0), 2, 1000, stream(0), thorough=False)
    assert torch.equal(found.permutation, only_first.permutation)  # nothing that can be left out was begun


@pytest.mark.parametrize("large", [False, True])
def test_a_resnet18_permuted_by_the_best_search_computes_the_same(large: bool) -> None:
    torch.manual_seed(0)
    model = lively(ARCHITECTURES["resnet18"].build(10).double())
    groups = ARCHITECTURES["resnet18"].groups(model)[:4]
    sizes = make_plan(model, spec(256, large=large, ignored=["conv1"])).sizes
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = outputs(model, x)
    results = permute(model, groups, sizes, SearchSpec(search_seconds=2), show_progress=False)
    assert any(result.after < result.before for result in results)
    assert relative(outputs(model, x), before) < 1e-9  # float64, only the order of additions changes


def test_a_child_of_zeros_does_not_decide_for_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6))
    with torch.no_grad():
        model[1].weight.zero_()
    groups, sizes = [Group(("0",), ("1", "2"))], {"1": 4, "2": 4}
    for how in ("published", "best"):
        (result,) = permute(copy.deepcopy(model), groups, sizes, SearchSpec(search=how), show_progress=False)
        assert result.children == ("2",)
        assert result.after < result.before


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(ValueError, match="best, published"):
        permute(nn.Sequential(), [], {}, SearchSpec(search="fast"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_scores_what_the_covariance_of_the_permuted_weight_says(kind: tuple[int, int, int]) -> None:
    """Also where only the inner products of columns that can meet are computed."""
    area, d, groups = kind
    draw = np.random.default_rng(5)
    weight = draw.normal(0.1, 1, (60, CHANNELS // groups, area))
    objective = ChildObjective(weight.reshape(60, -1), CHANNELS, d, groups)
    assert (objective.tail > 0) == (groups == 1 and d <= area)
    size = CHANNELS // groups
    local = [draw.permutation(size) for _ in range(groups)]
    rows = 60 // groups
    permuted = np.concatenate([weight[g * rows : (g + 1) * rows][:, local[g]] for g in range(groups)])
    vectors = permuted.reshape(-1, d)
    expected = np.linalg.slogdet(np.cov(vectors.T, bias=True).reshape(d, d) + objective.ridge)[1]
    permutation = np.concatenate([local[g] + g * size for g in range(groups)])
    assert objective.evaluate(permutation) == pytest.approx(expected, abs=1e-9)


def test_measured_distortions_overrule_the_score_only_where_they_differ_clearly() -> None:
    """Estimates that prefer the identity by less than their standard error change nothing; those that prefer it by far
    decide."""
    identity = np.arange(CHANNELS)
    scatter = np.array([-0.02, 0.03, 0.0, -0.01])

    def preferring_identity(gain: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda p: 1.0 - gain + scatter if np.array_equal(p, identity) else np.ones(4)

    unmeasured = search_best(together(KINDS[:2], 0), 1, 1000, stream(0)).permutation
    little = search_best(together(KINDS[:2], 0), 1, 1000, stream(0), measure=preferring_identity(0.005)).permutation
    much = search_best(together(KINDS[:2], 0), 1, 1000, stream(0), measure=preferring_identity(0.1)).permutation
    assert torch.equal(unmeasured, little)
    assert not torch.equal(unmeasured, torch.from_numpy(identity))
    assert torch.equal(much, torch.from_numpy(identity))


@pytest.mark.parametrize("released", [True, False])
def test_half_a_gram_matrix_is_that_of_a_plain_product(released: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the routine that other threads do not wait for, and without it; also for columns that do not lie one
    after the other."""
    routine = gram._without_lock()
    assert routine is not None  # else this test compares the same function twice
    monkeypatch.setattr(gram, "_without_lock", lambda: routine if released else None)
    weight = np.random.default_rng(0).normal(size=(40, 70))
    for columns in (weight, weight[:, ::2], weight[:3], np.asfortranarray(weight), weight[:1, :1]):
        found = np.triu(gram.upper_gram(columns, 0.25))
        np.testing.assert_allclose(found, np.triu(columns.T @ columns) / 4, atol=1e-12)


def test_a_search_that_is_not_thorough_is_the_papers_on_all_children() -> None:
    """The thorough one begins with it and is never worse."""
    for seed in range(3):
        brief = search_best(together(KINDS[:3], seed), 1, 1000, stream(seed), thorough=False)
        swaps = search(together(KINDS[:3], seed), 1, 1000, stream(seed))
        assert torch.equal(brief.permutation, swaps.permutation)
        assert search_best(together(KINDS[:3], seed), 1, 1000, stream(seed)).after <= brief.after <= brief.before

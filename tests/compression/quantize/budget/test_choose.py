"""Laws of choosing options within a budget, on made curves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.compression.quantize.budget.choose import Chooser, Options

POINTS = st.lists(
    st.tuples(st.integers(1, 400), st.integers(0, 800).map(lambda eighths: eighths / 8)), min_size=1, max_size=9
)
ITEMS = st.lists(POINTS, min_size=1, max_size=5)


def options(points: list[tuple[int, float]]) -> Options:
    return Options(np.array([bits for bits, _ in points], dtype=np.int64), np.array([loss for _, loss in points]))


def chooser(items: list[list[tuple[int, float]]]) -> Chooser:
    return Chooser([options(points) for points in items])


def best_of_all(items: list[list[tuple[int, float]]], budget: int) -> float:
    """By trying everything."""
    return min(
        sum(loss for _, loss in picked)
        for picked in itertools.product(*items)
        if sum(bits for bits, _ in picked) <= budget
    )


@settings(max_examples=150, deadline=None)
@given(ITEMS, st.lists(st.integers(0, 2200), min_size=2, max_size=12))
def test_a_larger_budget_never_loses_more_and_no_choice_is_larger_than_the_budget(items, budgets) -> None:
    found, last = chooser(items), np.inf
    for extra in sorted(budgets):
        choice = found.within(found.smallest + extra)
        assert choice.bits <= found.smallest + extra
        picked = [points[option] for points, option in zip(items, choice.options, strict=True)]
        assert choice.bits == sum(bits for bits, _ in picked)
        assert choice.loss == pytest.approx(sum(loss for _, loss in picked))
        assert choice.loss <= last + 1e-9
        last = choice.loss


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.integers(0, 2200))
def test_no_choice_is_better_than_the_best_and_two_items_are_chosen_best(items, extra) -> None:
    found = chooser(items)
    budget = found.smallest + extra
    choice, best = found.within(budget), best_of_all(items, budget)
    assert choice.loss >= best - 1e-9
    if len(items) <= 2:  # the last step changes two items together
        assert choice.loss == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(ITEMS)
def test_the_path_is_convex_and_nothing_lies_below_it(items) -> None:
    path = chooser(items).path()
    slopes = [(a.loss - b.loss) / (b.bits - a.bits) for a, b in itertools.pairwise(path)]
    assert all(slope > 0 for slope in slopes)
    assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in itertools.pairwise(slopes))
    assert path[-1].loss == pytest.approx(sum(min(loss for _, loss in points) for points in items))
    for one in path:
        assert one.loss == pytest.approx(best_of_all(items, one.bits))


def curves(n_items: int, seed: int) -> list[Options]:
    """Items like the layers of a network: codes and codebooks, and losses that fall with the rate."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(n_items):
        n = int(2 ** draw.uniform(12, 21))
        pairs = [(d, 1 << b) for d in (1, 3, 9, 18) for b in range(1, 13) if (4 << b) <= n // d]
        bits = np.array([n // d * (k.bit_length() - 1) + 16 * k * d for d, k in pairs], dtype=np.int64)
        power = draw.uniform(0.1, 10) * n
        found.append(Options(bits, np.array([power * k ** (-2 / d) * (1 + d / 40) for d, k in pairs])))
    return found


@pytest.mark.parametrize(("n_items", "seed"), [(8, 0), (20, 1), (60, 2), (200, 3)])
def test_a_network_of_layers_fills_its_budget(n_items, seed) -> None:
    found = Chooser(curves(n_items, seed))
    path = found.path()
    bits, loss = np.array([one.bits for one in path]), np.array([one.loss for one in path])
    last = np.inf
    for budget in np.geomspace(found.smallest * 1.02, found.largest * 0.98, 800 // max(n_items, 20)).astype(int):
        choice = found.within(int(budget))
        fill = 0.995 if n_items >= 20 else 0.98  # few layers have few sums
        assert fill * budget <= choice.bits <= budget
        assert choice.loss <= last
        bound = np.interp(budget, bits, loss)  # which no choice can beat
        assert bound * (1 - 1e-9) <= choice.loss <= bound * (1.06 if n_items >= 20 else 1.15)
        last = choice.loss


def test_a_budget_below_the_smallest_is_refused_and_no_items_are_a_choice() -> None:
    found = chooser([[(10, 3.0), (20, 1.0)], [(5, 2.0)]])
    assert (found.smallest, found.largest) == (15, 25)
    with pytest.raises(ValueError, match="15"):
        found.within(14)
    nothing = Chooser([]).within(0)
    assert (nothing.options, nothing.bits, nothing.loss) == ((), 0, 0)

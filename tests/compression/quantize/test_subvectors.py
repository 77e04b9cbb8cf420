"""Laws of cutting weights into subvectors, and of the number of centroids a layer can use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from src.common.errors import PlanError
from src.compression.quantize.subvector_size import BlockRule, nearest_divisor, subvector_size
from src.compression.quantize.subvectors import bits_per_code, clamp_centroids, from_subvectors, to_subvectors
from src.compression.quantize.weights import WeightPlace


def weight_of(layer: nn.Module) -> WeightPlace:
    return WeightPlace(host=layer, attribute="weight", name="layer", below=False)


SIZES = [
    # layer, small blocks, large blocks (with pw_subvector_size 4, fc_subvector_size 6)
    (nn.Conv2d(8, 4, 3), 9, 18),
    (nn.Conv2d(8, 4, (1, 3)), 3, 6),
    (nn.Conv2d(8, 4, 7), 49, 98),
    (nn.Conv2d(8, 4, 3, groups=2), 9, 18),
    (nn.Conv2d(8, 4, 1), 4, 4),
    (nn.Linear(12, 5), 6, 6),
    (nn.ConvTranspose2d(5, 8, 2), 4, 8),
    (nn.ConvTranspose2d(5, 8, 1), 4, 4),
]


@pytest.mark.parametrize(("layer", "small", "large"), SIZES, ids=[str(layer) for layer, *_ in SIZES])
def test_d_follows_the_table_of_layer_kinds(layer: nn.Module, small: int, large: int) -> None:
    assert subvector_size(weight_of(layer), BlockRule(6, 4, False)) == (small, None)
    assert subvector_size(weight_of(layer), BlockRule(6, 4, True)) == (large, None)


def test_an_override_replaces_d() -> None:
    assert subvector_size(weight_of(nn.Linear(12, 5)), BlockRule(), 3) == (3, None)
    assert subvector_size(weight_of(nn.Conv2d(12, 5, 1)), BlockRule(large_subvectors=True), 2) == (2, None)
    assert subvector_size(weight_of(nn.Conv2d(12, 5, 3)), BlockRule(), 18) == (18, None)
    assert subvector_size(weight_of(nn.Conv2d(12, 5, 3)), BlockRule(large_subvectors=True), 9) == (9, None)
    with pytest.raises(PlanError, match=r"subvector_size 4 was given for a 3x3 convolution.*large_subvectors"):
        subvector_size(weight_of(nn.Conv2d(12, 5, 3)), BlockRule(), 4)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(7, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(4, 7, 3)]
)
def test_an_odd_number_of_channels_gets_small_blocks_and_a_note(layer: nn.Module) -> None:
    d, note = subvector_size(weight_of(layer), BlockRule(large_subvectors=True))
    assert d == 9
    assert note is not None
    assert "odd number of channels" in note
    assert "d = 9" in note
    assert subvector_size(weight_of(layer), BlockRule())[1] is None


def test_an_override_that_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(PlanError, match=r"size 4 .* 6 inputs .* 2, 3, 6$"):
        subvector_size(weight_of(nn.Linear(6, 5)), BlockRule(), 4)
    with pytest.raises(PlanError, match=r"size 5 .* 9 inputs .* 3, 9$"):
        subvector_size(weight_of(nn.Conv2d(9, 5, 1)), BlockRule(), 5)
    with pytest.raises(PlanError, match=r"size 4 does not divide the row length 6 .*\(5, 6\)"):
        to_subvectors(torch.zeros(5, 6), 4)


def test_where_a_size_for_all_layers_does_not_divide_the_nearest_one_that_does_is_taken_with_a_note() -> None:
    assert subvector_size(weight_of(nn.Linear(6, 5)), BlockRule()) == (
        3,
        "fc_subvector_size 4 does not divide 6 inputs per output: subvectors of 3 are used",
    )
    d, note = subvector_size(weight_of(nn.Conv2d(9, 5, 1)), BlockRule(pw_subvector_size=8))
    assert d == 9
    assert note is not None
    assert note.startswith("pw_subvector_size 8 does not divide 9 inputs")


@given(row=st.integers(1, 500), wanted=st.integers(1, 40))
def test_the_nearest_divisor_divides_and_none_is_nearer(row: int, wanted: int) -> None:
    d = nearest_divisor(row, wanted)
    assert row % d == 0
    nearer = [n for n in range(2, row + 1) if row % n == 0 and abs(n - wanted) < abs(d - wanted)]
    assert not nearer


def test_rows_are_cut_one_after_the_other() -> None:
    weight = torch.arange(2 * 2 * 1 * 2).reshape(2, 2, 1, 2)  # (c_out, c_in, h, w)
    assert to_subvectors(weight, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert to_subvectors(weight, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_transposed_or_strided_weight_is_cut_by_its_values_not_its_memory() -> None:
    weight = torch.arange(24).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert to_subvectors(weight, 4).tolist() == torch.arange(24).reshape(6, 4).tolist()


@given(rows=st.integers(1, 5), pieces=st.integers(1, 5), d=st.integers(1, 6), wide=st.booleans())
def test_cutting_and_putting_together_gives_the_weight_back(rows: int, pieces: int, d: int, wide: bool) -> None:
    shape = (rows, pieces, d, 1) if wide else (rows, pieces * d)
    weight = torch.randn(shape)
    cut = to_subvectors(weight, d)
    assert cut.shape == (rows * pieces, d)
    assert torch.equal(from_subvectors(cut, shape), weight)


@given(k=st.sampled_from([2, 16, 256, 2048, 65536]), n=st.integers(0, 300_000))
def test_the_clamp_is_the_largest_power_of_two_with_four_subvectors_per_centroid(k: int, n: int) -> None:
    power = max((1 << e for e in range(20) if 4 * (1 << e) <= n), default=0)
    assert clamp_centroids(k, n) == (min(k, power) if power >= 2 else 0)


@pytest.mark.parametrize("k", [2, 4, 8, 128, 256, 1024, 2048])
def test_the_clamp_keeps_an_exact_power_of_two(k: int) -> None:
    below = k // 2 if k > 2 else 0
    assert [clamp_centroids(65536, 4 * k + extra) for extra in (-1, 0, 1)] == [below, k, k]
    assert clamp_centroids(k, 4 * k) == k
    assert clamp_centroids(k, 100 * k) == k


def test_only_powers_of_two_have_a_number_of_bits() -> None:
    assert [bits_per_code(k) for k in (2, 4, 256, 2048, 65536)] == [1, 2, 8, 11, 16]
    for k in (-2, 0, 1, 3, 100, 257):
        with pytest.raises(PlanError, match=f"k = {k} is not a power of two"):
            bits_per_code(k)
